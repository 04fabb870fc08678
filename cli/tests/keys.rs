//! `warren keys` as a user runs it, against a keyd socket with canned answers.

mod support;

use std::sync::{Arc, Mutex};

use support::Served;
use tonic::{Request, Response, Status, transport::Server};
use warren_keyd_api::proto::{
    AbortRotationRequest, AbortRotationResponse, AuditKeysRequest, KeyHeld, KeyState, KeyStatus,
    ListKeysRequest, ListKeysResponse, NodeKeysStatus, NodePhase, Pace, PairAudit, PathAudit, PathState,
    Revocation, RevokeKeysRequest, RevokeKeysResponse, RotateKeysRequest, RotateKeysResponse,
    RotateSigningKeyRequest, RotateSigningKeyResponse, RotationCounts, RotationException, RotationNode,
    RotationStatus, RotationsRequest, RotationsResponse, SigningKey, SigningKeysRequest, SigningKeysResponse,
    keys_server::{Keys, KeysServer},
};

/// What it was asked, and what it answers.
#[derive(Default)]
struct Script {
    rotate: Vec<RotateKeysRequest>,
    revoke: Vec<RevokeKeysRequest>,
    audit: Vec<AuditKeysRequest>,
    /// Answers of `Rotations` in turn; the last one stays.
    rotations: Vec<Vec<RotationStatus>>,
    /// Revocations in `List`, in turn; the last one stays.
    revocations: Vec<Vec<Revocation>>,
    pairs: Vec<PairAudit>,
    /// Answers of `SigningKeys` in turn; the last one stays.
    signing: Vec<SigningKeysResponse>,
}

fn next<T: Clone + Default>(answers: &mut Vec<T>) -> T {
    match answers.len() {
        0 => T::default(),
        1 => answers[0].clone(),
        _ => answers.remove(0),
    }
}

struct Canned(Arc<Mutex<Script>>);

impl Canned {
    fn script(&self) -> std::sync::MutexGuard<'_, Script> {
        self.0.lock().expect("not poisoned")
    }
}

fn signing_key(generation: u8) -> SigningKey {
    SigningKey {
        generation: generation.into(),
        public_key: vec![generation; 32],
        made_unix_ms: 1,
    }
}

fn signing(behind: &[&str]) -> SigningKeysResponse {
    SigningKeysResponse {
        keys: vec![signing_key(1), signing_key(2)],
        behind: behind.iter().map(|name| (*name).to_owned()).collect(),
        objects_renewed: true,
    }
}

fn revocation(version: u64, acknowledged: &[&str], waiting: &[&str]) -> Revocation {
    let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    Revocation {
        node: "node3".into(),
        uid: "uid-3".into(),
        epoch: 1,
        version,
        public_keys: vec![vec![3; 32]],
        acknowledged: owned(acknowledged),
        waiting: owned(waiting),
    }
}

#[tonic::async_trait]
impl Keys for Canned {
    async fn list(&self, request: Request<ListKeysRequest>) -> Result<Response<ListKeysResponse>, Status> {
        let key = |generation: u8, state: KeyState| KeyStatus {
            generation: generation.into(),
            public_key: vec![generation; 32],
            state: state.into(),
            accepted_unix_ms: 1,
            held: KeyHeld::Yes.into(),
        };
        let node = NodeKeysStatus {
            node: "node1".into(),
            active: 1,
            last: 2,
            keys: vec![key(1, KeyState::Active), key(2, KeyState::Candidate)],
            connected: true,
            phase: NodePhase::Verifying.into(),
            ..NodeKeysStatus::default()
        };
        let names = request.into_inner().nodes;
        let asked = names.is_empty() || names.contains(&node.node);
        Ok(Response::new(ListKeysResponse {
            nodes: asked.then_some(node).into_iter().collect(),
            revocations: next(&mut self.script().revocations),
        }))
    }

    async fn rotate(
        &self,
        request: Request<RotateKeysRequest>,
    ) -> Result<Response<RotateKeysResponse>, Status> {
        let request = request.into_inner();
        if request.name == "taken" {
            return Err(Status::already_exists("there is a KeyRotation taken already"));
        }
        self.script().rotate.push(request);
        Ok(Response::new(RotateKeysResponse { name: "made".into() }))
    }

    async fn abort(
        &self,
        request: Request<AbortRotationRequest>,
    ) -> Result<Response<AbortRotationResponse>, Status> {
        match request.into_inner().name.as_str() {
            "made" => Ok(Response::new(AbortRotationResponse {})),
            name => Err(Status::not_found(format!("there is no KeyRotation {name}"))),
        }
    }

    async fn revoke(
        &self,
        request: Request<RevokeKeysRequest>,
    ) -> Result<Response<RevokeKeysResponse>, Status> {
        self.script().revoke.push(request.into_inner());
        Ok(Response::new(RevokeKeysResponse {
            revocation: Some(revocation(0, &[], &["node1", "node2"])),
        }))
    }

    type AuditStream = tokio_stream::Iter<std::vec::IntoIter<Result<PairAudit, Status>>>;

    async fn audit(&self, request: Request<AuditKeysRequest>) -> Result<Response<Self::AuditStream>, Status> {
        let mut script = self.script();
        script.audit.push(request.into_inner());
        let pairs: Vec<_> = script.pairs.iter().cloned().map(Ok).collect();
        Ok(Response::new(tokio_stream::iter(pairs)))
    }

    async fn rotations(&self, _: Request<RotationsRequest>) -> Result<Response<RotationsResponse>, Status> {
        Ok(Response::new(RotationsResponse {
            rotations: next(&mut self.script().rotations),
        }))
    }

    async fn signing_keys(
        &self,
        _: Request<SigningKeysRequest>,
    ) -> Result<Response<SigningKeysResponse>, Status> {
        Ok(Response::new(next(&mut self.script().signing)))
    }

    async fn rotate_signing_key(
        &self,
        _: Request<RotateSigningKeyRequest>,
    ) -> Result<Response<RotateSigningKeyResponse>, Status> {
        Ok(Response::new(RotateSigningKeyResponse {
            key: Some(signing_key(2)),
            epoch: 1,
            version: 9,
        }))
    }
}

/// A keyd that answers as told.
struct Keyd {
    script: Arc<Mutex<Script>>,
    served: Served,
}

impl Keyd {
    fn new(script: Script) -> Self {
        let script = Arc::new(Mutex::new(script));
        let services = Server::builder().add_service(KeysServer::new(Canned(script.clone())));
        Self {
            script,
            served: Served::new(services),
        }
    }

    fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        self.served.run(&[&["keys"], arguments].concat())
    }
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).expect("JSON")
}

fn rotation(phase: &str, node: NodePhase) -> RotationStatus {
    let counts = RotationCounts {
        total: 1,
        verifying: u32::from(node == NodePhase::Verifying),
        done: u32::from(node == NodePhase::Done),
        failed: u32::from(node == NodePhase::Failed),
        ..RotationCounts::default()
    };
    RotationStatus {
        name: "made".into(),
        phase: phase.into(),
        counts: Some(counts),
        nodes: vec![RotationNode {
            node: "node1".into(),
            phase: node.into(),
            waiting_for: String::new(),
        }],
        started_unix_ms: 1000,
        completed_unix_ms: if phase == "Running" { 0 } else { 3500 },
        ..RotationStatus::default()
    }
}

#[test]
fn a_new_signing_key_is_waited_for_until_every_agent_follows() {
    let keyd = Keyd::new(Script {
        signing: vec![signing(&["node1", "node2"]), signing(&["node2"]), signing(&[])],
        ..Script::default()
    });
    let (code, out, _) = keyd.run(&["rotate-signing"]);
    assert_eq!(code, 0);
    assert!(
        out.contains("signed with key 2") && !out.contains("node2"),
        "{out}"
    );
    let keyd = Keyd::new(Script {
        signing: vec![signing(&["node2"])],
        ..Script::default()
    });
    for arguments in [&["rotate-signing", "--timeout", "1s"][..], &["signing"]] {
        let (code, out, _) = keyd.run(arguments);
        assert!(code == 1 && out.contains("node2"), "{out}");
    }
    let (code, _, _) = keyd.run(&["rotate-signing", "--timeout", "0"]);
    assert_eq!(code, 0);
}

#[test]
fn keys_are_listed() {
    let keyd = Keyd::new(Script::default());
    let (code, text, _) = keyd.run(&["list"]);
    assert_eq!(code, 0, "{text}");
    let header = text.lines().next().expect("a header");
    for (line, state) in [(1, "active"), (2, "next")] {
        let row = text.lines().nth(line).expect("a row");
        assert_eq!(
            header.find("STATE"),
            row.find(state),
            "columns are aligned:\n{text}"
        );
    }
    let (code, text, _) = keyd.run(&["list", "node1", "-o", "json"]);
    let value = json(&text);
    assert_eq!((code, &value["nodes"][0]["active"]), (0, &1.into()));
    assert_eq!(value["nodes"][0]["phase"], "verifying");
    let (code, text, _) = keyd.run(&["list", "node7"]);
    assert!(code == 1 && text.contains("there is no node node7"), "{text}");
}

#[test]
fn a_rotation_is_asked_for_with_all_its_choices() {
    let keyd = Keyd::new(Script::default());
    let (code, text, _) = keyd.run(&[
        "rotate",
        "--node",
        "a,b",
        "--selector",
        "zone=x",
        "--reason",
        "monthly",
        "--concurrency",
        "50%",
        "--drain",
        "2s",
        "--deadline",
        "1m",
        "--stragglers",
        "leave",
    ]);
    assert!(code == 0 && text.contains("warren keys rotations made"), "{text}");
    let asked = keyd.script.lock().expect("not poisoned").rotate[0].clone();
    let wanted = RotateKeysRequest {
        nodes: vec!["a".into(), "b".into()],
        match_labels: [("zone".to_owned(), "x".to_owned())].into(),
        reason: "monthly".into(),
        pace: Some(Pace {
            concurrency: "50%".into(),
            drain_seconds: 2,
            deadline_seconds: 60,
            ..Pace::default()
        }),
        stragglers: "Leave".into(),
        ..RotateKeysRequest::default()
    };
    assert_eq!(asked, wanted);
    let (code, text, _) = keyd.run(&["rotate", "--all", "-o", "json"]);
    assert_eq!((code, &json(&text)["name"]), (0, &"made".into()));
    assert!(keyd.script.lock().expect("not poisoned").rotate[1].all);
}

#[test]
fn what_cannot_be_meant_is_refused_before_keyd_is_asked() {
    let keyd = Keyd::new(Script::default());
    for (arguments, code) in [
        (&["rotate"][..], 2),
        (&["rotate", "--all", "--node", "a"], 2),
        (&["rotate", "--selector", "zone"], 2),
        (&["rotate", "--all", "--timeout", "5s"], 2),
        (&["rotate", "--all", "--drain", "0"], 1),
        (&["revoke"], 2),
        (&["abort"], 2),
    ] {
        let (is, _, said) = keyd.run(arguments);
        assert_eq!((is, said.lines().count()), (code, 1), "{arguments:?}: {said}");
    }
    let script = keyd.script.lock().expect("not poisoned");
    assert!(script.rotate.is_empty() && script.revoke.is_empty());
}

#[test]
fn waiting_shows_the_phases_and_ends_with_the_rotation() {
    let answers = [
        vec![],
        vec![rotation("Running", NodePhase::Verifying)],
        vec![rotation("Running", NodePhase::Verifying)],
        vec![rotation("Succeeded", NodePhase::Done)],
    ];
    let keyd = Keyd::new(Script {
        rotations: answers.to_vec(),
        ..Script::default()
    });
    let (code, text, progress) = keyd.run(&["rotate", "--all", "--wait"]);
    assert_eq!(code, 0, "{text}");
    let lines: Vec<_> = progress
        .lines()
        .map(|line| line.split_once(" s  ").expect("a time").1)
        .collect();
    assert_eq!(
        lines,
        [
            "made: running",
            "node1: verifying",
            "made: succeeded",
            "node1: done"
        ]
    );
    assert!(
        text.contains("1 of 1 done") && text.contains("Took:    2.5 s"),
        "{text}"
    );

    let failed = RotationStatus {
        exceptions: vec![RotationException {
            node: "node1".into(),
            reason: "Failed".into(),
            message: "its deadline is over".into(),
        }],
        ..rotation("Failed", NodePhase::Failed)
    };
    let keyd = Keyd::new(Script {
        rotations: vec![vec![failed]],
        ..Script::default()
    });
    let (code, text, _) = keyd.run(&["rotate", "--all", "--wait"]);
    assert!(
        code == 1 && text.contains("node1: Failed: its deadline is over"),
        "{text}"
    );
    let (code, text, _) = keyd.run(&["rotations", "-o", "json"]);
    assert_eq!((code, &json(&text)[0]["counts"]["failed"]), (1, &1.into()));

    let keyd = Keyd::new(Script {
        rotations: vec![vec![rotation("Running", NodePhase::Verifying)]],
        ..Script::default()
    });
    let (code, _, said) = keyd.run(&["rotate", "--all", "--wait", "--timeout", "0"]);
    assert!(code == 1 && said.contains("it goes on"), "{said}");
    let (code, text, _) = keyd.run(&["rotations"]);
    assert!(code == 0 && text.contains("Running"), "{text}");
    let (code, text, _) = keyd.run(&["rotations", "made"]);
    assert!(code == 0 && text.contains("1 verifying"), "{text}");
}

#[test]
fn what_keyd_refuses_is_said() {
    let keyd = Keyd::new(Script::default());
    let (code, _, said) = keyd.run(&["rotate", "--all", "--name", "taken"]);
    assert_eq!(
        (code, said.as_str()),
        (1, "warren: keyd: there is a KeyRotation taken already\n")
    );
    let (code, _, said) = keyd.run(&["abort", "other"]);
    assert_eq!(
        (code, said.as_str()),
        (1, "warren: keyd: there is no KeyRotation other\n")
    );
    let (code, text, _) = keyd.run(&["abort", "made"]);
    assert_eq!((code, text.as_str()), (0, "KeyRotation made stops\n"));
}

#[test]
fn a_revocation_is_over_when_every_agent_has_removed_the_keys() {
    let keyd = Keyd::new(Script {
        revocations: vec![
            vec![revocation(4, &["node1"], &["node2"])],
            vec![revocation(4, &["node1", "node2"], &[])],
        ],
        ..Script::default()
    });
    let (code, text, _) = keyd.run(&["revoke", "node3", "--reason", "stolen"]);
    assert!(code == 0 && text.contains("removed by 2 of 2 agents"), "{text}");
    let asked = keyd.script.lock().expect("not poisoned").revoke[0].clone();
    assert_eq!((asked.node.as_str(), asked.reason.as_str()), ("node3", "stolen"));

    let keyd = Keyd::new(Script {
        revocations: vec![vec![revocation(4, &["node1"], &["node2"])]],
        ..Script::default()
    });
    let (code, text, _) = keyd.run(&["revoke", "node3", "--timeout", "1s"]);
    assert!(
        code == 1 && text.contains("removed by 1 of 2 agents; not yet by node2"),
        "{text}"
    );
    let (code, _, _) = keyd.run(&["revoke", "node3", "--timeout", "0"]);
    assert_eq!(code, 0, "it was not to wait");
    let (_, text, _) = keyd.run(&["list"]);
    assert!(text.contains("Revoked:\n  node3"), "{text}");
}

#[test]
fn an_audit_fails_where_a_pair_disagrees() {
    let state = PathState {
        own_generation: 1,
        peer_generation: 1,
        verified: true,
        sending: true,
        quiet: false,
        conflict: None,
    };
    let good = PairAudit {
        a: "node1".into(),
        b: "node2".into(),
        agree: true,
        faults: vec![],
        paths: vec![PathAudit {
            a_generation: 1,
            b_generation: 1,
            at_a: Some(state.clone()),
            at_b: Some(state),
        }],
        pre_shared_key: true,
    };
    let keyd = Keyd::new(Script {
        pairs: vec![good.clone()],
        ..Script::default()
    });
    let (code, text, _) = keyd.run(&["audit"]);
    assert!(
        code == 0
            && text.starts_with(
                "Pairs that agree on their keys: 1 of 1\nPairs with a pre-shared key:    1 of 1\n"
            ),
        "{text}"
    );
    assert!(text.contains("1-1*"), "{text}");

    let bad = PairAudit {
        b: "node3".into(),
        agree: false,
        faults: vec!["node3 has no peer for node1".into()],
        ..good.clone()
    };
    let keyd = Keyd::new(Script {
        pairs: vec![good, bad],
        ..Script::default()
    });
    let (code, text, _) = keyd.run(&["audit", "--node", "node1", "--disagreeing", "-o", "json"]);
    assert_eq!((code, &json(&text)["healthy"]), (1, &false.into()));
    let asked = keyd.script.lock().expect("not poisoned").audit[0].clone();
    assert_eq!((asked.node.as_str(), asked.only_disagreeing), ("node1", true));
}
