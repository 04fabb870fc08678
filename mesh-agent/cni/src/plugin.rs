//! The commands of the CNI specification.

use std::{
    env,
    io::{self, Read as _},
    process::ExitCode,
};

use serde_json::{Value, json};
use warren_agent_api::{Attachment, AttachmentKey, ClientError, Request, Response, call};

use crate::{
    attachment,
    error::{CniError, Code},
    spec::{self, NEWEST, NetConf, PrevResult, VERSIONS},
};

/// Runs one command and prints its result, or its error, on standard output.
pub(crate) fn run(command: &str) -> ExitCode {
    let mut text = String::new();
    let conf = match io::stdin().read_to_string(&mut text) {
        Ok(_) => NetConf::parse(&text),
        Err(error) => Err(CniError::new(
            Code::Io,
            format!("cannot read standard input: {error}"),
        )),
    };
    let version = conf
        .as_ref()
        .map(|conf| conf.cni_version.clone())
        .unwrap_or_default();
    match conf.and_then(|conf| execute(command, &conf)) {
        Ok(result) => {
            if let Some(result) = result {
                println!("{result}");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            let version = if VERSIONS.contains(&version.as_str()) {
                &version
            } else {
                NEWEST
            };
            println!("{}", error.to_json(version));
            ExitCode::FAILURE
        }
    }
}

fn execute(command: &str, conf: &NetConf) -> Result<Option<Value>, CniError> {
    if command == "VERSION" {
        let version = if conf.cni_version.is_empty() {
            NEWEST
        } else {
            &conf.cni_version
        };
        return Ok(Some(
            json!({ "cniVersion": version, "supportedVersions": VERSIONS }),
        ));
    }
    conf.check()?;
    match command {
        "ADD" => add(conf).map(Some),
        "DEL" => del(conf).map(|()| None),
        "CHECK" => done(ask(conf, &Request::CniCheck(this_attachment(conf)?))?).map(|()| None),
        "GC" => gc(conf).map(|()| None),
        "STATUS" => status(conf).map(|()| None),
        other => {
            let message = format!("CNI_COMMAND {other:?} is none of ADD, DEL, CHECK, GC, STATUS, VERSION");
            Err(CniError::new(Code::Environment, message))
        }
    }
}

/// Our result is the one of the plugins before us: we add nothing that a container runtime could use.
fn add(conf: &NetConf) -> Result<Value, CniError> {
    done(ask(conf, &Request::CniAdd(this_attachment(conf)?))?)?;
    let mut result = conf.prev_result.clone().unwrap_or_default();
    result["cniVersion"] = json!(conf.cni_version);
    Ok(result)
}

/// The specification wants DEL to succeed where nothing can be done: without an agent the pod still has to go, and
/// the agent notices when its veth is gone.
fn del(conf: &NetConf) -> Result<(), CniError> {
    match call(
        &conf.socket,
        &Request::CniDel(spec::attachment_key()?),
        conf.timeout(),
    ) {
        Ok(response) => done(response),
        Err(error) => {
            eprintln!("warren-cni: {error}; the pod is removed without it");
            Ok(())
        }
    }
}

fn gc(conf: &NetConf) -> Result<(), CniError> {
    // Without the list everything would look stale.
    let valid = conf.valid_attachments.as_ref().ok_or_else(|| {
        CniError::new(
            Code::Config,
            "GC without cni.dev/valid-attachments: nothing can be told to be stale",
        )
    })?;
    let valid = valid
        .iter()
        .map(|one| AttachmentKey {
            container_id: one.container_id.clone(),
            ifname: one.ifname.clone(),
        })
        .collect();
    done(ask(conf, &Request::CniGc { valid })?)
}

/// Pods that are there keep their traffic without the agent: code 50, not 51.
fn status(conf: &NetConf) -> Result<(), CniError> {
    ask(conf, &Request::CniStatus).and_then(done).map_err(|error| {
        CniError::new(
            Code::NotAvailable,
            format!("pods cannot be added now: {}", error.message),
        )
    })
}

fn this_attachment(conf: &NetConf) -> Result<Attachment, CniError> {
    let key = spec::attachment_key()?;
    let netns = spec::variable("CNI_NETNS")?;
    let pod = spec::pod(&env::var("CNI_ARGS").unwrap_or_default(), &key.container_id)?;
    let addresses = PrevResult::parse(conf.prev_result.as_ref())?.addresses(&key.ifname)?;
    let ends = attachment::find(&netns, &key.ifname)?;
    Ok(Attachment {
        key,
        pod,
        netns,
        host_ifindex: ends.host_ifindex,
        mac: ends.mac,
        addresses,
    })
}

fn ask(conf: &NetConf, request: &Request) -> Result<Response, CniError> {
    call(&conf.socket, request, conf.timeout()).map_err(|error| {
        let code = match error {
            // The agent may be starting, or busy: the runtime tries again.
            ClientError::Connect { .. } | ClientError::Io(_) => Code::TryAgainLater,
            ClientError::Protocol(_) => Code::Decode,
        };
        CniError::new(code, error.to_string())
    })
}

fn done(response: Response) -> Result<(), CniError> {
    match response {
        Response::Done => Ok(()),
        Response::Error { message, retry } => Err(CniError::new(
            if retry { Code::TryAgainLater } else { Code::Refused },
            message,
        )),
        Response::EncryptStatus(_)
        | Response::Status(_)
        | Response::Policies(_)
        | Response::Trace(_)
        | Response::Flows(_)
        | Response::Events { .. } => Err(CniError::new(
            Code::Decode,
            "the agent answered another question: are plugin and agent of one version?",
        )),
    }
}
