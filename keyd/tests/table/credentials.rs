//! Who may enrol and who may have a stream.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use warren_keyd_api::{
    proto::{
        AgentMessage, EnrollRequest, Hello, KeyProof, agent_message::Body as Say, keyd_client::KeydClient,
    },
    tls::{self, Trust},
    token::JoinToken,
};

use crate::{
    Case, World, case,
    support::{Agent, channel, foreign_identity, hello},
};

// What a token or a certificate is asked for.
pub(crate) fn enrolments() -> Vec<Case> {
    let of = |proof| ("enrol", "certificate", proof);
    let no = |word| ("EnrolmentRefused", word);
    vec![
        case(of("made-up token"), "node2", no("not known"), |world| {
            Box::pin(async move {
                let ca = *world.keyd.join_token("node2", 0).await.ca_sha256();
                world
                    .enroll(&JoinToken::generate("node2".into(), ca).unwrap())
                    .await
            })
        }),
        case(of("used token"), "node2", no("has been used"), |world| {
            Box::pin(async move {
                let token = world.keyd.join_token("node2", 0).await;
                tls::enroll(&world.keyd.address, &token).await.unwrap();
                world.enroll(&token).await
            })
        }),
        case(of("expired token"), "node2", no("expired"), |world| {
            Box::pin(async move {
                let token = world.keyd.join_token("node2", 1).await;
                tokio::time::sleep(Duration::from_millis(1100)).await;
                world.enroll(&token).await
            })
        }),
        case(of("node2's token"), "node1", no("another node"), |world| {
            Box::pin(async move {
                let token = world.keyd.join_token("node2", 0).await;
                world
                    .enroll(&token.expose().replace("node2", "node1").parse().unwrap())
                    .await
            })
        }),
        case(of("token of no node"), "node9", no("does not exist"), |world| {
            Box::pin(async move {
                let token = world.keyd.join_token("node9", 0).await;
                world.enroll(&token).await
            })
        }),
        case(
            of("node2's token"),
            "a request that is none",
            no("malformed"),
            |world| {
                Box::pin(async move {
                    let token = world.keyd.join_token("node2", 0).await;
                    enroll_with(world, None, token.expose_secret(), "node2", b"junk".to_vec()).await
                })
            },
        ),
        case(of("nothing"), "node1", no("not known"), |world| {
            Box::pin(async move { enroll_with(world, None, "", "node1", request()).await })
        }),
        case(of("node2's certificate"), "node1", no("not known"), |world| {
            Box::pin(async move {
                let identity = world.enrolment.identity.clone();
                enroll_with(world, Some(identity), "", "node1", request()).await
            })
        }),
        case(
            of("a deleted node's certificate"),
            "node4",
            no("does not exist"),
            |world| {
                Box::pin(async move {
                    let identity = world.dead.0.identity.clone();
                    enroll_with(world, Some(identity), "", "node4", request()).await
                })
            },
        ),
    ]
}

fn request() -> Vec<u8> {
    tls::generate_client_key().unwrap().1
}

async fn enroll_with(
    world: &World,
    identity: Option<tls::ClientIdentity>,
    token: &str,
    node: &str,
    csr_der: Vec<u8>,
) -> Result<String, String> {
    let trust = Trust::Ca(world.enrolment.ca_der.clone().into());
    let channel = tls::connect(&world.keyd.address, &trust, identity.as_ref(), None)
        .await
        .unwrap();
    let request = EnrollRequest {
        token: token.into(),
        node_name: node.into(),
        csr_der,
    };
    match KeydClient::new(channel).enroll(request).await {
        Ok(_) => Err("it was enrolled".into()),
        Err(status) => Ok(status.message().to_owned()),
    }
}

/// What a Hello is made to say.
type Claim = fn(Hello) -> Hello;

// Who may have a stream.
pub(crate) fn streams() -> Vec<Case> {
    let of = |proof| ("open", "stream", proof);
    let no = |word| ("AuthenticationRefused", word);
    let mut cases = vec![
        case(of("nothing"), "node1", no("no client certificate"), |world| {
            Box::pin(async move { anonymous(world, hello("node1")).await })
        }),
        case(
            of("a service account's token"),
            "node1",
            no("not tokens"),
            |world| {
                Box::pin(async move {
                    let hello = Hello {
                        token: "eyJ.a.b".into(),
                        ..hello("node1")
                    };
                    anonymous(world, hello).await
                })
            },
        ),
        case(
            of("another CA's certificate"),
            "node1",
            ("ConnectionRefused", ""),
            |world| {
                Box::pin(async move {
                    let identity = foreign_identity("node1", &world.honest.uid);
                    let trust = Trust::Ca(world.enrolment.ca_der.clone().into());
                    let root = world.enrolment.root();
                    // TLS 1.3 tells a client that its certificate is refused only after its handshake.
                    match tls::connect(&world.keyd.address, &trust, Some(&identity), None).await {
                        Ok(channel) => match Agent::open(channel, hello("node1"), root).await {
                            Ok(_) => Err("it was welcomed".into()),
                            Err(reason) => Ok(reason),
                        },
                        Err(error) => Ok(error.to_string()),
                    }
                })
            },
        ),
        case(
            of("nothing"),
            "what is not TLS",
            ("ConnectionRefused", ""),
            |world| {
                Box::pin(async move {
                    let mut tcp = tokio::net::TcpStream::connect(&world.keyd.address).await.unwrap();
                    tcp.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
                    let mut answer = vec![];
                    let _ = tcp.read_to_end(&mut answer).await;
                    match answer.starts_with(b"HTTP") {
                        true => Err("it was answered".into()),
                        false => Ok(String::new()),
                    }
                })
            },
        ),
        case(
            of("a deleted node's certificate"),
            "node4",
            ("StreamRefused", "does not exist"),
            |world| Box::pin(async move { world.open(&world.dead.0, hello("node4")).await }),
        ),
        case(
            of("a deleted node's certificate"),
            "node1",
            no("by its proof"),
            |world| Box::pin(async move { world.open(&world.dead.0, hello("node1")).await }),
        ),
        case(
            of("node2's certificate"),
            "a first message that is no Hello",
            no("Hello"),
            |world| {
                Box::pin(async move {
                    let (out, messages) = tokio::sync::mpsc::channel(1);
                    let first = Say::KeyProof(KeyProof::default());
                    out.send(AgentMessage { body: Some(first) }).await.unwrap();
                    let mut client = KeydClient::new(channel(&world.keyd.address, &world.enrolment).await);
                    let stream = client.session(tokio_stream::wrappers::ReceiverStream::new(messages));
                    let status = stream.await.unwrap().into_inner().message().await.unwrap_err();
                    Ok(status.message().to_owned())
                })
            },
        ),
    ];
    let claims: [(&str, &str, Claim); 7] = [
        ("node1", "by its proof", |h| Hello {
            node_name: "node1".into(),
            ..h
        }),
        ("node3, not connected", "by its proof", |h| Hello {
            node_name: "node3".into(),
            ..h
        }),
        ("no name", "by its proof", |h| Hello {
            node_name: String::new(),
            ..h
        }),
        ("a name of 300 characters", "by its proof", |h| Hello {
            node_name: "n".repeat(300),
            ..h
        }),
        ("protocol 99", "protocol 99", |h| Hello { protocol: 99, ..h }),
        ("datapath 77", "datapath", |h| Hello { datapath: 77, ..h }),
        ("a token beside it", "not tokens", |h| Hello {
            token: "x.y.z".into(),
            ..h
        }),
    ];
    for (claim, word, change) in claims {
        cases.push(case(of("node2's certificate"), claim, no(word), move |world| {
            Box::pin(async move { world.open(&world.enrolment, change(hello("node2"))).await })
        }));
    }
    cases
}

async fn anonymous(world: &World, hello: Hello) -> Result<String, String> {
    let trust = Trust::Ca(world.enrolment.ca_der.clone().into());
    let channel = tls::connect(&world.keyd.address, &trust, None, None)
        .await
        .unwrap();
    match Agent::open(channel, hello, world.enrolment.root()).await {
        Ok(_) => Err("it was welcomed".into()),
        Err(reason) => Ok(reason),
    }
}
