//! Hostile nodes: whatever one of them says, it is refused with a clear reason and nothing changes for the others.

#[expect(dead_code, reason = "the lifecycle tests use the rest")]
mod support;

use support::{Agent, Keyd, channel, foreign_identity, hello, node, node_with, pod};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use warren_keyd_api::{
    convert::Record,
    proof,
    proto::{
        AgentMessage, EnrollRequest, Hello, KeyProof, agent_message::Body as Say, keyd_client::KeydClient,
        keyd_message::Body as Heard,
    },
    snapshot::SnapshotRoot,
    tls::{self, Trust},
    token::JoinToken,
};
use warren_model::{IdentityId, PrivateKey};

/// Two nodes, an honest agent on the first; the hostile one is node2.
async fn lab() -> (Keyd, Agent) {
    let (keyd, honest, _) = lab_with_key().await;
    (keyd, honest)
}

/// The same, with the honest agent's key.
async fn lab_with_key() -> (Keyd, Agent, PrivateKey) {
    let keyd = Keyd::start(
        &[
            node(1),
            node(2),
            pod("web", Some("node1")),
            pod("db", Some("node2")),
        ]
        .concat(),
    );
    let mut honest = keyd.agent("node1").await;
    let key = proof::generate_private_key().unwrap();
    assert!(honest.prove(&key).await.accepted);
    assert_eq!(honest.add("web", "u1", "10.244.1.5").await.error, "");
    honest
        .until_directory(|directory| {
            directory
                .records()
                .flatten()
                .any(|record| matches!(record, Record::Workload(_)))
                && directory
                    .records()
                    .flatten()
                    .any(|r| matches!(r, Record::Node(n) if !n.slots.is_empty()))
        })
        .await;
    (keyd, honest, key)
}

fn records(agent: &Agent) -> Vec<Record> {
    agent.directory.records().map(Result::unwrap).collect()
}

/// After the attack an honest change arrives next, and nothing but it has changed.
async fn nothing_else_changed(honest: &mut Agent, before: Vec<Record>) {
    let result = honest.add("probe", "p1", "10.244.1.99").await;
    assert_eq!(result.error, "");
    honest
        .until_directory(|d| d.records().flatten().any(|r| is_probe(&r)))
        .await;
    let after: Vec<_> = records(honest)
        .into_iter()
        .filter(|record| !is_probe(record))
        .collect();
    assert_eq!(after, before);
}

fn is_probe(record: &Record) -> bool {
    matches!(record, Record::Workload(workload) if workload.pod.name == "probe")
}

#[tokio::test]
async fn another_nodes_name_is_refused() {
    let (keyd, mut honest) = lab().await;
    let enrolment = keyd.enroll("node2").await;
    let before = records(&honest);
    let channel = channel(&keyd.address, &enrolment).await;
    let error = Agent::open(channel, hello("node1"), enrolment.root())
        .await
        .err()
        .unwrap();
    assert!(
        error.contains("node1") && error.contains("node2 by its proof"),
        "{error}"
    );
    nothing_else_changed(&mut honest, before).await;
}

#[tokio::test]
async fn keys_that_it_does_not_hold_are_refused() {
    let (keyd, mut honest) = lab().await;
    let mut hostile = keyd.agent("node2").await;
    honest
        .until_directory(|d| d.position() >= hostile.directory.position())
        .await;
    let before = records(&honest);
    let stolen = before.iter().find_map(|record| match record {
        Record::Node(node) if node.name.as_str() == "node1" => Some(node.slots[0].public_key),
        _ => None,
    });
    let stolen = stolen.unwrap();
    let own = proof::generate_private_key().unwrap();
    let uid = hostile.uid.as_str().into();

    // A wrong MAC.
    let challenge = hostile.challenge(stolen).await;
    let forged = KeyProof {
        public_key: challenge.public_key,
        nonce: challenge.nonce,
        mac: vec![7; 32],
    };
    let result = hostile.answer(forged).await;
    assert!(
        !result.accepted && result.reason.contains("does not hold the private key"),
        "{}",
        result.reason
    );

    // Its own key's MAC for the stolen one.
    let mut challenge = hostile.challenge(stolen).await;
    challenge.public_key = proof::public_key(&own).as_bytes().to_vec();
    let mut forged = proof::answer(&challenge, &own, &uid, 1, false).unwrap();
    forged.public_key = stolen.as_bytes().to_vec();
    assert!(!hostile.answer(forged).await.accepted);

    // A replayed answer: the challenge was used up.
    let challenge = hostile.challenge(proof::public_key(&own)).await;
    let mut answer = proof::answer(&challenge, &own, &uid, 1, false).unwrap();
    answer.mac[0] ^= 1;
    assert!(!hostile.answer(answer.clone()).await.accepted);
    answer.mac[0] ^= 1;
    let result = hostile.answer(answer.clone()).await;
    assert!(
        !result.accepted && result.reason.contains("not open"),
        "{}",
        result.reason
    );
    // ... and an old nonce for a new challenge.
    hostile.challenge(proof::public_key(&own)).await;
    assert!(!hostile.answer(answer).await.accepted);

    // Proved for another node's UID, or another generation.
    let challenge = hostile.challenge(proof::public_key(&own)).await;
    let other = honest.uid.as_str().into();
    assert!(
        !hostile
            .answer(proof::answer(&challenge, &own, &other, 1, false).unwrap())
            .await
            .accepted
    );
    let challenge = hostile.challenge(proof::public_key(&own)).await;
    assert!(
        !hostile
            .answer(proof::answer(&challenge, &own, &uid, 2, false).unwrap())
            .await
            .accepted
    );

    nothing_else_changed(&mut honest, before).await;
    let status = keyd.status().await;
    assert!(
        status
            .problems
            .iter()
            .any(|p| p.starts_with("node node2 offers a key")),
        "{:?}",
        status.problems
    );
}

#[tokio::test]
async fn another_nodes_proved_key_is_refused_even_with_a_proof() {
    let (keyd, mut honest, key) = lab_with_key().await;
    let mut hostile = keyd.agent("node2").await;
    honest
        .until_directory(|d| d.position() >= hostile.directory.position())
        .await;
    let before = records(&honest);
    // The private key leaked to node2: it is node1's all the same.
    let result = hostile.prove(&key).await;
    assert!(
        !result.accepted && result.reason.contains("already belongs to node node1"),
        "{}",
        result.reason
    );
    nothing_else_changed(&mut honest, before).await;
}

#[tokio::test]
async fn zero_low_order_and_malformed_keys_are_refused() {
    let (keyd, mut honest) = lab().await;
    let mut hostile = keyd.agent("node2").await;
    honest
        .until_directory(|d| d.position() >= hostile.directory.position())
        .await;
    let before = records(&honest);
    let mut one = vec![0; 32];
    one[0] = 1;
    let mut prime = vec![0xff; 32];
    prime[0] = 0xed;
    prime[31] = 0x7f;
    for (key, word) in [
        (vec![0; 32], "zero"),
        (one, "low-order"),
        (prime, "low-order"),
        (vec![7; 31], "32 bytes"),
        (vec![], "32 bytes"),
    ] {
        match hostile.offer(0, 1, key.clone()).await.unwrap() {
            Heard::KeyResult(result) => {
                assert!(
                    !result.accepted && result.reason.contains(word),
                    "{key:?}: {}",
                    result.reason
                );
            }
            other => panic!("{key:?}: {other:?}"),
        }
    }
    let good = proof::public_key(&proof::generate_private_key().unwrap())
        .as_bytes()
        .to_vec();
    for (slot, generation) in [(3, 1), (u32::MAX, 1), (0, 0)] {
        let heard = hostile.offer(slot, generation, good.clone()).await.unwrap();
        assert!(
            matches!(heard, Heard::KeyResult(result) if !result.accepted),
            "slot {slot}"
        );
    }
    nothing_else_changed(&mut honest, before).await;
}

#[tokio::test]
async fn addresses_of_its_own_choosing_are_refused() {
    let (keyd, mut honest) = lab().await;
    let mut hostile = keyd.agent("node2").await;
    honest
        .until_directory(|d| d.position() >= hostile.directory.position())
        .await;
    let before = records(&honest);
    for (pod, address, word) in [
        ("db", "10.244.1.7", "podCIDRs of node node2"),
        ("db", "10.244.1.5", "podCIDRs of node node2"),
        ("db", "172.30.0.1", "podCIDRs of node node2"),
        ("db", "10.96.0.1", "podCIDRs of node node2"),
        ("db", "8.8.8.8", "podCIDRs of node node2"),
        ("db", "fd00:10:244::1", "podCIDRs of node node2"),
        ("web", "10.244.2.7", "on node node1"),
        ("../etc", "10.244.2.7", "name"),
        ("", "10.244.2.7", "name"),
    ] {
        let result = hostile.add(pod, "u2", address).await;
        assert_eq!(result.identity, 0, "{pod} {address}");
        assert!(result.error.contains(word), "{pod} {address}: {}", result.error);
    }
    // Deleting another node's endpoint does nothing.
    hostile.delete("web", "u1").await;
    assert_eq!(hostile.add("db", "", "10.244.2.7").await.identity, 0);
    nothing_else_changed(&mut honest, before).await;
    // What is right still works afterwards.
    assert!(hostile.add("db", "u2", "10.244.2.7").await.identity >= IdentityId::FIRST_ALLOCATED.0);
    let status = keyd.status().await;
    assert_eq!(status.workloads, 3);
}

#[tokio::test]
async fn a_living_pods_address_is_refused_with_pod_ip_prefixes() {
    let manifests = [node(1), node(2), pod("web", None), pod("db", None)].concat();
    let keyd = Keyd::start_with(&manifests, "prefixSource: podIP\n");
    let mut honest = keyd.agent("node1").await;
    assert_eq!(honest.add("web", "u1", "10.244.9.5").await.error, "");
    let mut hostile = keyd.agent("node2").await;
    let result = hostile.add("db", "u2", "10.244.9.5").await;
    assert!(
        result.error.contains("living pod shop/web") && result.retry,
        "{}",
        result.error
    );
    let result = hostile.add("web", "u3", "10.244.9.6").await;
    assert!(
        result.error.contains("already runs on node node1"),
        "{}",
        result.error
    );
    let result = hostile.add("db", "u2", "10.245.0.1").await;
    assert!(
        result.error.contains("outside podPools") && !result.retry,
        "{}",
        result.error
    );
    // Once the pod is gone its address may move, after everybody has acknowledged.
    honest.delete("web", "u1").await;
    keyd.status_where("no workload", |status| status.workloads == 0)
        .await;
    let id = hostile.send_add("db", "u2", "10.244.9.5").await;
    let mut granted = None;
    while granted.is_none() {
        tokio::select! {
            heard = hostile.next() => match heard.unwrap() {
                Heard::EndpointResult(result) if result.request_id == id => granted = Some(result),
                _ => {}
            },
            heard = honest.next() => drop(heard.unwrap()),
        }
    }
    assert_eq!(granted.unwrap().error, "");
}

#[tokio::test]
async fn join_tokens_of_every_wrong_kind_are_refused() {
    let (keyd, mut honest) = lab().await;
    let before = records(&honest);
    let ca = *keyd.join_token("node2", 0).await.ca_sha256();
    let unknown = JoinToken::generate("node2".into(), ca).unwrap();
    let refused = |token: JoinToken| {
        let address = keyd.address.clone();
        async move { tls::enroll(&address, &token).await.unwrap_err().to_string() }
    };
    assert!(refused(unknown).await.contains("not known"));

    let used = keyd.join_token("node2", 0).await;
    tls::enroll(&keyd.address, &used).await.unwrap();
    assert!(refused(used).await.contains("has been used"));

    let expired = keyd.join_token("node2", 1).await;
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    assert!(refused(expired).await.contains("expired"));

    // node2's token does not make a node1, nor does a changed name in it.
    let other = keyd.join_token("node2", 0).await;
    let renamed: JoinToken = other.expose().replace("node2", "node1").parse().unwrap();
    assert!(refused(renamed).await.contains("another node"));
    let nobody = keyd.join_token("node9", 0).await;
    assert!(refused(nobody).await.contains("does not exist"));

    // A bad request does not use the token up.
    let channel = tls::connect(&keyd.address, &Trust::Pinned(ca), None, None)
        .await
        .unwrap();
    let request = EnrollRequest {
        token: other.expose_secret().into(),
        node_name: "node2".into(),
        csr_der: b"junk".to_vec(),
    };
    let status = KeydClient::new(channel).enroll(request).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    tls::enroll(&keyd.address, &other).await.unwrap();

    // The token of another cluster pins another CA: the secret is never sent.
    let foreign = JoinToken::generate("node2".into(), [9; 32]).unwrap();
    assert!(refused(foreign).await.contains("cannot connect"));
    nothing_else_changed(&mut honest, before).await;
}

#[tokio::test]
async fn foreign_and_missing_certificates_are_refused() {
    let (keyd, mut honest) = lab().await;
    let before = records(&honest);
    let ca = *keyd.join_token("node2", 0).await.ca_sha256();
    let root = SnapshotRoot::from_bytes([1; 32]);

    let anonymous = tls::connect(&keyd.address, &Trust::Pinned(ca), None, None)
        .await
        .unwrap();
    let error = Agent::open(anonymous.clone(), hello("node1"), root)
        .await
        .err()
        .unwrap();
    assert!(error.contains("no client certificate"), "{error}");
    let with_token = Hello {
        token: "eyJ.a.b".into(),
        ..hello("node1")
    };
    let error = Agent::open(anonymous.clone(), with_token, root)
        .await
        .err()
        .unwrap();
    assert!(error.contains("not tokens"), "{error}");
    let request = EnrollRequest {
        token: String::new(),
        node_name: "node1".into(),
        csr_der: tls::generate_client_key().unwrap().1,
    };
    let status = KeydClient::new(anonymous).enroll(request).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::PermissionDenied);

    // TLS 1.3 tells a client that its certificate is refused only after its handshake.
    let identity = foreign_identity("node1", &honest.uid);
    let refused = match tls::connect(&keyd.address, &Trust::Pinned(ca), Some(&identity), None).await {
        Ok(channel) => Agent::open(channel, hello("node1"), root).await.is_err(),
        Err(_) => true,
    };
    assert!(refused);
    nothing_else_changed(&mut honest, before).await;
}

#[tokio::test]
async fn certificates_die_with_their_node() {
    let keyd = Keyd::start(&[node(1), node(2)].concat());
    let enrolment = keyd.enroll("node2").await;
    let mut agent = Agent::connect(&keyd.address, "node2", &enrolment).await;
    let key = proof::generate_private_key().unwrap();
    assert!(agent.prove(&key).await.accepted);
    let mut other = keyd.agent("node1").await;

    keyd.manifests(&node(1));
    let reason = loop {
        if let Err(reason) = agent.next().await {
            break reason;
        }
    };
    assert!(reason.contains("was deleted"), "{reason}");
    other
        .until_directory(|d| {
            !d.records()
                .flatten()
                .any(|r| matches!(r, Record::Node(n) if n.name.as_str() == "node2"))
        })
        .await;
    let channel2 = channel(&keyd.address, &enrolment).await;
    let error = Agent::open(channel2, hello("node2"), enrolment.root())
        .await
        .err()
        .unwrap();
    assert!(error.contains("does not exist"), "{error}");

    // The same manifest again is another node: the old certificate and the old key are worth nothing.
    keyd.manifests(&[node(1), node(2)].concat());
    keyd.status_where("two nodes", |status| status.nodes.len() == 2)
        .await;
    let channel2 = channel(&keyd.address, &enrolment).await;
    let error = Agent::open(channel2, hello("node2"), enrolment.root())
        .await
        .err()
        .unwrap();
    assert!(error.contains("enrol it again"), "{error}");
    let mut again = keyd.agent("node2").await;
    assert_ne!(again.uid, agent.uid);
    let result = again.prove(&key).await;
    assert!(
        !result.accepted && result.reason.contains("revoked"),
        "{}",
        result.reason
    );
    assert!(
        again
            .prove(&proof::generate_private_key().unwrap())
            .await
            .accepted
    );
}

#[tokio::test]
async fn garbage_ends_only_its_own_stream() {
    let (keyd, mut honest) = lab().await;
    let before = records(&honest);
    // Not TLS at all.
    let mut tcp = tokio::net::TcpStream::connect(&keyd.address).await.unwrap();
    tcp.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut answer = vec![];
    let _ = tcp.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP"));

    // The wrong first message, an unknown protocol, an unknown datapath.
    let enrolment = keyd.enroll("node2").await;
    let root = enrolment.root();
    let open = |hello| {
        let address = keyd.address.clone();
        let enrolment = enrolment.clone();
        async move {
            Agent::open(channel(&address, &enrolment).await, hello, root)
                .await
                .err()
                .unwrap()
        }
    };
    assert!(
        open(Hello {
            protocol: 99,
            ..hello("node2")
        })
        .await
        .contains("protocol 99")
    );
    assert!(
        open(Hello {
            datapath: 77,
            ..hello("node2")
        })
        .await
        .contains("datapath")
    );
    assert!(
        open(Hello {
            node_name: String::new(),
            ..hello("node2")
        })
        .await
        .contains("by its proof")
    );
    let (out, messages) = tokio::sync::mpsc::channel(1);
    let first = Say::KeyProof(KeyProof::default());
    out.send(AgentMessage { body: Some(first) }).await.unwrap();
    let mut stream = KeydClient::new(channel(&keyd.address, &enrolment).await)
        .session(tokio_stream::wrappers::ReceiverStream::new(messages))
        .await
        .unwrap()
        .into_inner();
    assert!(stream.message().await.unwrap_err().message().contains("Hello"));

    // A second Hello, an empty message, a proof without a challenge, a message that is too large.
    let mut agent = Agent::connect(&keyd.address, "node2", &enrolment).await;
    let result = agent
        .answer(KeyProof {
            public_key: vec![1; 32],
            nonce: vec![],
            mac: vec![],
        })
        .await;
    assert!(!result.accepted);
    agent.stream.send(Say::Hello(hello("node2"))).await;
    assert!(
        agent
            .until(|_| None::<()>)
            .await
            .unwrap_err()
            .contains("second Hello")
    );
    let mut agent = Agent::connect(&keyd.address, "node2", &enrolment).await;
    agent
        .stream
        .sender()
        .send(AgentMessage { body: None })
        .await
        .unwrap();
    assert!(
        agent
            .until(|_| None::<()>)
            .await
            .unwrap_err()
            .contains("without content")
    );
    let mut agent = Agent::connect(&keyd.address, "node2", &enrolment).await;
    agent
        .stream
        .send(Say::KeyProof(KeyProof {
            public_key: vec![0; 8 << 20],
            nonce: vec![],
            mac: vec![],
        }))
        .await;
    assert!(agent.until(|_| None::<()>).await.is_err());

    honest
        .until_directory(|d| {
            d.records()
                .flatten()
                .any(|r| matches!(r, Record::Node(n) if n.name.as_str() == "node2" && n.datapath.is_some()))
        })
        .await;
    let before: Vec<_> = before
        .into_iter()
        .map(|record| match record {
            Record::Node(mut node) if node.name.as_str() == "node2" => {
                // Its honest Hello said how it moves packets; nothing else changed.
                node.datapath = Some(warren_model::Datapath::Userspace);
                Record::Node(node)
            }
            other => other,
        })
        .collect();
    nothing_else_changed(&mut honest, before).await;
}

#[tokio::test]
async fn a_newer_stream_replaces_the_older_one() {
    let keyd = Keyd::start(&node(1));
    let enrolment = keyd.enroll("node1").await;
    let mut older = Agent::connect(&keyd.address, "node1", &enrolment).await;
    let mut newer = Agent::connect(&keyd.address, "node1", &enrolment).await;
    let reason = older.until(|_| None::<()>).await.unwrap_err();
    assert!(reason.contains("newer stream"), "{reason}");
    assert!(
        newer
            .prove(&proof::generate_private_key().unwrap())
            .await
            .accepted
    );
}

#[tokio::test]
async fn claims_in_manifests_follow_the_first_owner() {
    let keyd = Keyd::start(
        &[
            node(1),
            node_with(2, "10.244.1.128/25", "172.30.0.1"),
            node_with(3, "10.245.0.0/24", "10.9.9.9"),
        ]
        .concat(),
    );
    let status = keyd
        .status_where("three nodes", |status| status.nodes.len() == 3)
        .await;
    for (node, entry) in status
        .nodes
        .iter()
        .map(|node| node.node.clone().unwrap())
        .enumerate()
    {
        let expected = usize::from(node == 0);
        assert_eq!(entry.prefixes.len(), expected, "{entry:?}");
        assert_eq!(entry.addresses.len(), expected, "{entry:?}");
    }
    for sentence in [
        "overlaps 10.244.1.0/24",
        "172.30.0.1 already belongs",
        "outside podPools",
        "outside nodePools",
    ] {
        assert!(
            status.problems.iter().any(|problem| problem.contains(sentence)),
            "{sentence}: {:?}",
            status.problems
        );
    }
}
