//! What operators do with keys at the local socket: list, rotate, abort, audit, revoke.

#[expect(dead_code, reason = "the other suites use the rest")]
#[path = "support/rotating.rs"]
mod rotating;
#[expect(dead_code, reason = "the other suites use the rest")]
mod support;

use std::time::Duration;

use rotating::Rotating;
use support::{Keyd, PATIENCE, node};
use tokio::{sync::watch, time::timeout};
use tonic::{Code, transport::Channel};
use warren_keyd_api::proto::{
    AbortRotationRequest, AuditKeysRequest, KeyHeld, KeyState, ListKeysRequest, ListKeysResponse, Pace,
    PairAudit, RevokeKeysRequest, RotateKeysRequest, RotationsRequest, keys_client::KeysClient,
};

struct Lab {
    keyd: Keyd,
    address: watch::Sender<String>,
    agents: Vec<Rotating>,
}

impl Lab {
    async fn new() -> Self {
        let keyd = Keyd::start(&[node(1), node(2), node(3)].concat());
        let (address, _) = watch::channel(keyd.address.clone());
        let mut lab = Self {
            keyd,
            address,
            agents: vec![],
        };
        for n in 1..=3 {
            lab.enrol(n).await;
        }
        lab.list_where("all have keys, nothing changes", |keys| {
            keys.nodes.iter().all(|node| node.active == 1 && node.phase == 0)
        })
        .await;
        lab
    }

    async fn enrol(&mut self, n: usize) {
        let name = format!("node{n}");
        let enrolment = self.keyd.enroll(&name).await;
        self.agents
            .push(Rotating::start(&name, enrolment, self.address.subscribe()));
    }

    async fn client(&self) -> KeysClient<Channel> {
        let channel = warren_keyd_api::admin::channel(&self.keyd.socket())
            .await
            .unwrap();
        KeysClient::new(channel)
    }

    async fn list_where(&self, what: &str, wanted: impl Fn(&ListKeysResponse) -> bool) -> ListKeysResponse {
        let mut last = None;
        let reached = timeout(PATIENCE, async {
            loop {
                let request = ListKeysRequest::default();
                let keys = self.client().await.list(request).await.unwrap().into_inner();
                if wanted(&keys) {
                    return keys;
                }
                last = Some(keys);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        match reached.await {
            Ok(keys) => keys,
            Err(_) => panic!("never: {what}: {last:#?}; log: {:#?}", self.keyd.log()),
        }
    }

    async fn audit(&self, only_disagreeing: bool) -> Vec<PairAudit> {
        let request = AuditKeysRequest {
            node: String::new(),
            only_disagreeing,
        };
        let mut stream = self.client().await.audit(request).await.unwrap().into_inner();
        let mut pairs = vec![];
        while let Some(pair) = stream.message().await.unwrap() {
            pairs.push(pair);
        }
        pairs
    }

    async fn over(&self, name: &str) -> String {
        let request = RotationsRequest {
            names: vec![name.into()],
        };
        timeout(PATIENCE, async {
            loop {
                let all = self.client().await.rotations(request.clone()).await.unwrap();
                if let Some(one) = all.into_inner().rotations.pop()
                    && one.completed_unix_ms > 0
                {
                    return one.phase;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
        .expect("the rotation never ends")
    }
}

fn of_node2() -> RotateKeysRequest {
    RotateKeysRequest {
        nodes: vec!["node2".into()],
        reason: "a test".into(),
        pace: Some(Pace {
            drain_seconds: 1,
            ..Pace::default()
        }),
        ..RotateKeysRequest::default()
    }
}

#[tokio::test]
async fn one_node_is_rotated_and_listed_and_all_pairs_agree() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let name = client.rotate(of_node2()).await.unwrap().into_inner().name;
    assert_eq!(lab.over(&name).await, "Succeeded");
    let keys = lab
        .list_where("node2 has a new key", |keys| {
            keys.nodes.iter().all(|node| node.phase == 0)
        })
        .await;
    let active: Vec<_> = keys.nodes.iter().map(|node| node.active).collect();
    assert_eq!(active, [1, 2, 1]);
    for node in &keys.nodes {
        let [key] = &node.keys[..] else { panic!("{node:?}") };
        assert_eq!((key.state(), key.held()), (KeyState::Active, KeyHeld::Yes));
        assert!(key.accepted_unix_ms > 1_700_000_000_000 && node.connected);
    }
    let pairs = lab.audit(false).await;
    assert_eq!(pairs.len(), 3);
    assert!(pairs.iter().all(|pair| pair.agree), "{pairs:?}");
    assert_eq!(lab.audit(true).await, []);
    // A name is taken once; nonsense is refused at once; there is nothing to abort where nothing is.
    let again = RotateKeysRequest { name, ..of_node2() };
    assert_eq!(
        client.rotate(again).await.unwrap_err().code(),
        Code::AlreadyExists
    );
    let everybody = RotateKeysRequest::default();
    assert_eq!(
        client.rotate(everybody).await.unwrap_err().code(),
        Code::InvalidArgument
    );
    let nothing = AbortRotationRequest { name: "none".into() };
    assert_eq!(client.abort(nothing).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn a_revoked_key_is_gone_everywhere_and_never_comes_back() {
    let mut lab = Lab::new().await;
    let old = lab.agents[2].sees("node3").unwrap();
    let mut client = lab.client().await;
    let revoke = |node: &str| RevokeKeysRequest {
        node: node.into(),
        reason: "stolen".into(),
    };
    assert_eq!(
        client.revoke(revoke("node9")).await.unwrap_err().code(),
        Code::NotFound
    );
    let done = client.revoke(revoke("node3")).await.unwrap().into_inner();
    let revocation = done.revocation.unwrap();
    assert_eq!(
        (revocation.node.as_str(), revocation.uid.as_str()),
        ("node3", old.uid.as_str())
    );
    assert_eq!(revocation.public_keys.len(), 1);
    // Those who are connected say so; the node itself is another one now, whose agent is nobody.
    lab.list_where("the others have removed it", |keys| {
        keys.revocations[0].acknowledged == ["node1", "node2"] && keys.revocations[0].waiting == ["node3"]
    })
    .await;
    for agent in &lab.agents[..2] {
        let seen = agent.sees("node3").unwrap();
        assert!(seen.slots.is_empty() && seen.uid != old.uid, "{seen:?}");
    }
    let stolen = old.slots[0].public_key;
    let file = lab.keyd.dir.path().join("state/state/meshnode-node3.yaml");
    let text = || std::fs::read_to_string(&file).unwrap();
    assert!(
        text().contains(&stolen.to_string()),
        "the tombstone names the key"
    );

    lab.keyd.restart();
    lab.address.send_replace(lab.keyd.address.clone());
    lab.list_where("node3 has no key", |keys| {
        keys.nodes.len() == 3 && keys.nodes[2].keys.is_empty() && keys.nodes[1].connected
    })
    .await;
    // With a new join token it is a new node, and makes a new key.
    lab.enrol(3).await;
    let keys = lab
        .list_where("node3 is back", |keys| {
            keys.nodes[2].active == 1 && keys.nodes[2].phase == 0
        })
        .await;
    assert_ne!(keys.nodes[2].keys[0].public_key, stolen.as_bytes());
    assert!(text().contains(&stolen.to_string()));
}
