//! A small agent for labs and hostile tests: enrols or presents a token, proves a key, prints every update, touches no
//! device. Every message of `keyd` becomes one JSON line on standard output; it ends with code 3 when it is refused.
//!
//! ```text
//! test_agent --keyd HOST:PORT --node NAME
//!     (--join-token TOKEN | --token-file F --ca ca.crt --roots snapshot-roots)
//!     [--claim NAME] [--uid UID] [--wrong-proof] [--endpoint NAMESPACE/POD/UID/ADDRESS] [--updates N]
//! ```
//! `--claim` says another name in Hello, `--uid` proves for another UID, `--wrong-proof` answers with another key,
//! `--endpoint` asks for an identity, `--updates` ends with code 0 after that many updates.

use std::{error::Error, process::ExitCode};

use warren_keyd_api::{
    PROTOCOL,
    convert::{Record, address_to_bytes},
    proof,
    proto::{
        Applied, Datapath, EndpointAdd, Hello, KeyOffer, KeyProof, Welcome, agent_message::Body as Say,
        keyd_message::Body as Heard,
    },
    snapshot::{Directory, Followed, RootChain},
    stream::AgentStream,
    tls::{self, Trust},
};

#[derive(Default)]
struct Options {
    keyd: String,
    node: String,
    claim: Option<String>,
    uid: Option<String>,
    join_token: Option<String>,
    token_file: Option<String>,
    ca: Option<String>,
    roots: Option<String>,
    endpoint: Option<String>,
    wrong_proof: bool,
    updates: Option<u32>,
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options = Options::default();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        if arg == "--wrong-proof" {
            options.wrong_proof = true;
            continue;
        }
        let value = args.next().ok_or_else(|| format!("{arg} needs a value"))?;
        match arg.as_str() {
            "--keyd" => options.keyd = value,
            "--node" => options.node = value,
            "--claim" => options.claim = Some(value),
            "--uid" => options.uid = Some(value),
            "--join-token" => options.join_token = Some(value),
            "--token-file" => options.token_file = Some(value),
            "--ca" => options.ca = Some(value),
            "--roots" => options.roots = Some(value),
            "--endpoint" => options.endpoint = Some(value),
            "--updates" => options.updates = Some(value.parse()?),
            _ => return Err(format!("unknown option {arg}").into()),
        }
    }
    Ok(options)
}

#[tokio::main]
async fn main() -> ExitCode {
    match options() {
        Ok(options) => match run(options).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                print("error", &error.to_string());
                ExitCode::from(3)
            }
        },
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}

fn print(what: &str, text: &str) {
    println!("{{\"event\":{what:?},\"text\":{text:?}}}");
}

async fn run(options: Options) -> Result<(), Box<dyn Error>> {
    let (channel, mut roots, token) = match &options.join_token {
        Some(token) => {
            let enrolment = tls::enroll(&options.keyd, &token.parse()?).await?;
            print("enrolled", &options.node);
            let trust = Trust::Ca(enrolment.ca_der.clone().into());
            let channel = tls::connect(&options.keyd, &trust, Some(&enrolment.identity), None).await?;
            (channel, enrolment.roots, String::new())
        }
        None => {
            let read = |path: &Option<String>| std::fs::read_to_string(path.as_deref().unwrap_or_default());
            let trust = Trust::from_pem(&read(&options.ca)?)?;
            let roots = RootChain::from_text(&read(&options.roots)?)?;
            (
                tls::connect(&options.keyd, &trust, None, None).await?,
                roots,
                read(&options.token_file)?.trim().to_owned(),
            )
        }
    };
    let hello = Hello {
        protocol: PROTOCOL,
        node_name: options.claim.clone().unwrap_or_else(|| options.node.clone()),
        token,
        agent_version: "test".into(),
        datapath: Datapath::Userspace.into(),
        resume_epoch: 0,
        resume_version: 0,
        snapshot_root: roots.newest().key.as_bytes().to_vec(),
    };
    let mut stream = AgentStream::open(channel, hello).await?;
    let mut directory = Directory::new(roots.newest().key);
    let key = proof::generate_private_key()?;
    let mut uid = String::new();
    let mut updates = 0;
    while let Some(heard) = stream
        .receive()
        .await
        .map_err(|status| status.message().to_owned())?
    {
        match heard {
            Heard::Welcome(welcome) => {
                uid = options.uid.clone().unwrap_or_else(|| welcome.node_uid.clone());
                greet(&stream, &options, &key, &welcome).await?;
            }
            Heard::KeyChallenge(challenge) => {
                let answer = if options.wrong_proof {
                    KeyProof {
                        public_key: challenge.public_key,
                        nonce: challenge.nonce,
                        mac: vec![0; 32],
                    }
                } else {
                    proof::answer(&challenge, &key, &uid.as_str().into(), 1, false)?
                };
                stream.send(Say::KeyProof(answer)).await;
            }
            Heard::KeyResult(result) if result.accepted => print("key-accepted", ""),
            Heard::KeyResult(result) => return Err(result.reason.into()),
            Heard::EndpointResult(result) if result.error.is_empty() => {
                print("identity", &result.identity.to_string());
            }
            Heard::EndpointResult(result) => return Err(result.error.into()),
            Heard::Redirect(redirect) => {
                return Err(format!("redirect to {}", redirect.addresses.join(",")).into());
            }
            Heard::Goodbye(goodbye) => return Err(goodbye.reason.into()),
            Heard::AskKey(ask) => print("ask-key", &ask.generation.to_string()),
            Heard::ForgetPsk(forget) => print("forget-psk", &forget.peer),
            Heard::Roots(offered) => {
                if let Followed::Further(further) = roots.follow(RootChain::parse(offered.roots)?)? {
                    roots = further;
                    directory.set_root(roots.newest().key);
                }
            }
            Heard::Question(question) => print("question", &question.request_json),
            Heard::Update(update) => {
                if directory.apply(update)?.is_none() {
                    continue;
                }
                let (epoch, version) = directory.position();
                stream.send(Say::Applied(Applied { epoch, version })).await;
                for record in directory.records() {
                    match record? {
                        Record::Node(node) => print("node", &format!("{node:?}")),
                        Record::Identity(number, labels) => {
                            print("identity-labels", &format!("{number} {labels}"))
                        }
                        Record::Workload(workload) => print("workload", &format!("{workload:?}")),
                        record @ (Record::Selector(..)
                        | Record::Members(..)
                        | Record::Policy(..)
                        | Record::NodeFacts(..)) => print("policy", &format!("{record:?}")),
                    }
                }
                print("applied", &format!("{epoch}/{version}"));
                updates += 1;
                if options.updates == Some(updates) {
                    return Ok(());
                }
            }
        }
    }
    Err("the stream ended".into())
}

async fn greet(
    stream: &AgentStream,
    options: &Options,
    key: &warren_model::PrivateKey,
    welcome: &Welcome,
) -> Result<(), Box<dyn Error>> {
    print("welcome", &welcome.node_uid);
    let public_key = proof::public_key(key).as_bytes().to_vec();
    stream
        .send(Say::KeyOffer(KeyOffer {
            slot: 0,
            port: 51871,
            generation: 1,
            public_key,
            pre_shared_keys: false,
        }))
        .await;
    if let Some(endpoint) = &options.endpoint {
        let parts: Vec<_> = endpoint.splitn(4, '/').collect();
        let [namespace, pod, uid, address] = parts[..] else {
            return Err("NAMESPACE/POD/UID/ADDRESS".into());
        };
        let addresses = vec![address_to_bytes(address.parse()?)];
        let (namespace, pod, uid) = (namespace.into(), pod.into(), uid.into());
        stream
            .send(Say::EndpointAdd(EndpointAdd {
                request_id: 1,
                namespace,
                pod,
                uid,
                addresses,
            }))
            .await;
    }
    Ok(())
}
