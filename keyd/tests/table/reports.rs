//! What a node may not say of itself: addresses, keys, paths, acknowledgements.

use warren_keyd_api::{
    convert::address_to_bytes,
    proof,
    proto::{
        AgentMessage, Applied, EndpointAdd, EndpointDelete, EndpointResult, Held, KeyProof, PairState,
        PathReport, PathState, TokenRefresh, agent_message::Body as Say, keyd_message::Body as Heard,
    },
};

use crate::{Case, World, case, new_key, support::hello};

// Addresses that are not its own.
pub(crate) fn endpoints() -> Vec<Case> {
    let of = ("add", "endpoint", "node2's stream");
    let no = |word| ("EndpointRefused", word);
    let mut cases = vec![];
    let foreign = "podCIDRs of node node2";
    for (claim, pod, address, word) in [
        ("a free address of node1's", "db", "10.244.1.7", foreign),
        ("the address of node1's pod", "db", "10.244.1.5", foreign),
        (
            "the address of a pod of node3, which is away",
            "db",
            "10.244.3.5",
            foreign,
        ),
        ("node1's address", "db", "172.30.0.1", foreign),
        ("its own node's address", "db", "172.30.0.2", foreign),
        ("a Service's address", "db", "10.96.0.1", foreign),
        ("an address of the world", "db", "8.8.8.8", foreign),
        ("0.0.0.0", "db", "0.0.0.0", foreign),
        ("loopback", "db", "127.0.0.1", foreign),
        ("multicast", "db", "224.0.0.1", foreign),
        ("a pool's IPv6 address of nobody", "db", "fd00:10:244::1", foreign),
        ("an IPv4 address in IPv6", "db", "::ffff:10.244.1.5", foreign),
        ("node1's pod", "web", "10.244.2.7", "on node node1"),
        ("node3's pod", "cache", "10.244.2.7", "on node node3"),
    ] {
        cases.push(case(of, claim, no(word), move |world| {
            Box::pin(async move { not_added(world.hostile().await.add(pod, "u9", address).await) })
        }));
    }
    for (claim, bytes) in [("5 bytes", vec![7; 5]), ("no bytes", vec![])] {
        let word = if claim == "5 bytes" { "5 bytes" } else { "" };
        cases.push(case(
            of,
            format!("an address of {claim}"),
            ("MessageRefused", word),
            move |world| {
                let bytes = bytes.clone();
                Box::pin(async move { malformed_add(world, "db", "u9", vec![bytes]).await })
            },
        ));
    }
    let ours = || vec![address_to_bytes("10.244.2.7".parse().unwrap())];
    for (claim, pod, uid) in [
        ("a pod called ../etc", "../etc", "u9"),
        ("a pod without a name", "", "u9"),
        ("a pod without a UID", "db", ""),
        ("a UID with a line break", "db", "a\nb"),
    ] {
        cases.push(case(of, claim, ("MessageRefused", ""), move |world| {
            Box::pin(async move { malformed_add(world, pod, uid, ours()).await })
        }));
    }
    let of = ("delete", "endpoint", "node2's stream");
    cases.push(case(of, "node1's pod", no(""), |world| {
        Box::pin(async move {
            world.hostile().await.delete("web", "u1").await;
            Ok(String::new())
        })
    }));
    cases.push(case(
        of,
        "a pod called ../etc",
        ("MessageRefused", "name"),
        |world| {
            Box::pin(async move {
                world
                    .ends(Say::EndpointDelete(EndpointDelete {
                        namespace: "shop".into(),
                        pod: "../etc".into(),
                        uid: "u".into(),
                        addresses: vec![],
                    }))
                    .await
            })
        },
    ));
    cases
}

fn not_added(result: EndpointResult) -> Result<String, String> {
    match (result.identity, result.error) {
        (0, error) if !error.is_empty() => Ok(error),
        (identity, error) => Err(format!("identity {identity}, {error:?}")),
    }
}

async fn malformed_add(
    world: &mut World,
    pod: &str,
    uid: &str,
    addresses: Vec<Vec<u8>>,
) -> Result<String, String> {
    let add = EndpointAdd {
        request_id: 77,
        namespace: "shop".into(),
        pod: pod.into(),
        uid: uid.into(),
        addresses,
    };
    let agent = world.hostile().await;
    agent.stream.send(Say::EndpointAdd(add)).await;
    let result = |heard| match heard {
        Heard::EndpointResult(result) if result.request_id == 77 => Some(result),
        _ => None,
    };
    not_added(agent.until(result).await?)
}

// What it may not say of itself.
pub(crate) fn reports() -> Vec<Case> {
    let of = |verb, object| (verb, object, "node2's stream");
    let no = |word| ("MessageRefused", word);
    let path = PathState {
        own_generation: 1,
        peer_generation: 1,
        verified: true,
        sending: true,
        quiet: false,
        conflict: None,
    };
    let pair = |peer: &str, paths: usize| {
        Say::Paths(PathReport {
            pairs: vec![PairState {
                peer: peer.into(),
                peer_uid: "u".into(),
                paths: vec![path.clone(); paths],
            }],
        })
    };
    let (nameless, many) = (pair("", 1), pair("node1", 9));
    vec![
        case(
            of("report", "keys held"),
            "65 of them",
            no("more than 64"),
            |world| {
                Box::pin(async move {
                    let key = |n: u64| (n, proof::public_key(&new_key()).as_bytes().to_vec());
                    world
                        .ends(Say::Held(Held {
                            public_keys: (1..=65).map(key).collect(),
                        }))
                        .await
                })
            },
        ),
        case(
            of("report", "keys held"),
            "node1's key",
            ("KeyRefused", ""),
            |world| {
                Box::pin(async move {
                    let (own, stolen) = (
                        proof::public_key(&world.hostile_key),
                        proof::public_key(&world.honest_key),
                    );
                    let keys = [(1, own.as_bytes().to_vec()), (2, stolen.as_bytes().to_vec())];
                    let public_keys = keys.into();
                    world.says(Say::Held(Held { public_keys })).await
                })
            },
        ),
        case(
            of("report", "keys held"),
            "node3's key, which is away",
            ("KeyRefused", ""),
            |world| {
                Box::pin(async move {
                    let keys = [(1, world.victim_key.as_bytes().to_vec())];
                    let public_keys = keys.into();
                    world.says(Say::Held(Held { public_keys })).await
                })
            },
        ),
        case(of("report", "keys held"), "31 bytes", no("32 bytes"), |world| {
            Box::pin(async move {
                world
                    .ends(Say::Held(Held {
                        public_keys: [(1, vec![7; 31])].into(),
                    }))
                    .await
            })
        }),
        case(
            of("report", "paths"),
            "to a node without a name",
            no("peer"),
            move |world| {
                let body = nameless.clone();
                Box::pin(async move { world.ends(body).await })
            },
        ),
        case(
            of("report", "paths"),
            "nine to one node",
            no("number of paths"),
            move |world| {
                let body = many.clone();
                Box::pin(async move { world.ends(body).await })
            },
        ),
        case(
            of("acknowledge", "directory"),
            "a version of the future",
            no(""),
            |world| {
                Box::pin(async move {
                    let (epoch, version) = world.hostile().await.directory.position();
                    let applied = Applied {
                        epoch,
                        version: version + 1000,
                    };
                    world.says(Say::Applied(applied)).await
                })
            },
        ),
        case(
            of("acknowledge", "directory"),
            "an epoch of the future",
            no(""),
            |world| {
                Box::pin(async move {
                    let applied = Applied {
                        epoch: u64::MAX,
                        version: 1,
                    };
                    world.says(Say::Applied(applied)).await
                })
            },
        ),
        case(
            of("send", "message"),
            "a second Hello",
            no("second Hello"),
            |world| Box::pin(async move { world.ends(Say::Hello(hello("node2"))).await }),
        ),
        case(
            of("send", "message"),
            "nothing in it",
            no("without content"),
            |world| {
                Box::pin(async move {
                    let agent = world.hostile().await;
                    agent
                        .stream
                        .sender()
                        .send(AgentMessage { body: None })
                        .await
                        .unwrap();
                    let reason = agent.until(|_| None::<()>).await.unwrap_err();
                    world.hostile = None;
                    Ok(reason)
                })
            },
        ),
        case(of("send", "message"), "8 MiB", no(""), |world| {
            Box::pin(async move {
                let public_key = vec![0; 8 << 20];
                world
                    .ends(Say::KeyProof(KeyProof {
                        public_key,
                        nonce: vec![],
                        mac: vec![],
                    }))
                    .await
            })
        }),
        case(
            of("refresh", "token"),
            "a service account's",
            no("not tokens"),
            |world| {
                Box::pin(async move {
                    world
                        .ends(Say::Token(TokenRefresh {
                            token: "x.y.z".into(),
                        }))
                        .await
                })
            },
        ),
    ]
}
