//! `warren policy get`, `policy trace`, `identity` and `endpoint` as a user runs them, against a keyd with canned answers.

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write as _,
    sync::{Arc, Mutex},
};

use serde_json::Value;
use support::Served;
use tonic::{Request, Response, Status, transport::Server};
use warren_agent_api::{
    EndpointPolicyStatus, Request as Question, Response as Answer, TraceAnswer, TraceRequest, TraceVerdict,
};
use warren_keyd_api::{
    convert::Record,
    proto::{
        AskAgentRequest, AskAgentResponse, CreateJoinTokenRequest, CreateJoinTokenResponse, DirectoryChunk,
        DirectoryRequest, PoliciesRequest, PoliciesResponse, PolicyStatus, StatusRequest, StatusResponse,
        admin_server::{Admin, AdminServer},
    },
};
use warren_model::{
    Datapath, IdentityId, Labels, NodeName, NodeRecord, PodRef, WorkloadRecord,
    policy::{Direction, NodeFacts},
};

type Chunks = tokio_stream::Iter<std::vec::IntoIter<Result<DirectoryChunk, Status>>>;

/// What the agents were asked, and what they say to a trace.
#[derive(Default)]
struct Agents {
    asked: Vec<(String, Question)>,
    /// Verdict of the maps and of the model, per direction; allowed where nothing is said.
    verdicts: BTreeMap<Direction, (TraceVerdict, TraceVerdict)>,
    away: BTreeSet<String>,
}

struct Canned(Arc<Mutex<Agents>>);

#[tonic::async_trait]
impl Admin for Canned {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn create_join_token(
        &self,
        _: Request<CreateJoinTokenRequest>,
    ) -> Result<Response<CreateJoinTokenResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    type DirectoryStream = Chunks;

    async fn directory(
        &self,
        request: Request<DirectoryRequest>,
    ) -> Result<Response<Self::DirectoryStream>, Status> {
        let kinds = request.into_inner().kinds;
        let chunks: Vec<_> = records()
            .iter()
            .map(Record::to_entry)
            .filter(|entry| kinds.contains(&entry.kind))
            .map(|entry| {
                Ok(DirectoryChunk {
                    epoch: 7,
                    version: 3,
                    entries: vec![entry],
                })
            })
            .collect();
        Ok(Response::new(tokio_stream::iter(chunks)))
    }

    async fn policies(&self, _: Request<PoliciesRequest>) -> Result<Response<PoliciesResponse>, Status> {
        let policy = |namespace: &str, name: &str, valid| PolicyStatus {
            kind: "CiliumNetworkPolicy".into(),
            namespace: namespace.into(),
            name: name.into(),
            valid,
            message: if valid {
                "Enforced."
            } else {
                "spec.ingres: unknown field"
            }
            .into(),
            rules: u64::from(valid),
        };
        Ok(Response::new(PoliciesResponse {
            policies: vec![policy("shop", "db", true), policy("demo", "api", false)],
        }))
    }

    async fn ask_agent(
        &self,
        request: Request<AskAgentRequest>,
    ) -> Result<Response<AskAgentResponse>, Status> {
        let AskAgentRequest { node, request_json } = request.into_inner();
        let question: Question = serde_json::from_str(&request_json).expect("a question");
        let mut agents = self.0.lock().expect("not poisoned");
        if agents.away.contains(&node) {
            return Err(Status::unavailable(format!(
                "the agent of {node} is not connected"
            )));
        }
        let answer = match &question {
            Question::Endpoints => Answer::Policies(endpoints(&node)),
            Question::PolicyTrace(trace) => Answer::Trace(Box::new(agents.trace(trace))),
            other => panic!("{other:?}"),
        };
        agents.asked.push((node, question));
        Ok(Response::new(AskAgentResponse {
            response_json: serde_json::to_string(&answer).expect("JSON"),
        }))
    }
}

impl Agents {
    fn trace(&self, request: &TraceRequest) -> TraceAnswer {
        let allowed = verdict(true);
        let (maps, model) = self
            .verdicts
            .get(&request.direction)
            .cloned()
            .unwrap_or_else(|| (allowed.clone(), allowed));
        TraceAnswer {
            endpoint: 4,
            maps,
            model,
            statements: vec![("CiliumNetworkPolicy demo/api spec.ingress[0]".into(), true)],
        }
    }
}

fn verdict(allowed: bool) -> TraceVerdict {
    TraceVerdict {
        allowed,
        audit: false,
        reason: if allowed { "allowed" } else { "default-deny" }.into(),
        rule: allowed.then(|| "CiliumNetworkPolicy demo/api spec.ingress[0]".into()),
    }
}

/// Two nodes, the first with an API server; demo/frontend on the first, demo/api on the second.
fn records() -> Vec<Record> {
    let node = |name: &str, last: u8| {
        Record::Node(NodeRecord {
            name: NodeName::from(name),
            uid: format!("uid-{name}").into(),
            endpoints: vec![[192, 0, 2, last].into()],
            addresses: vec![[192, 0, 2, last].into()],
            prefixes: Vec::new(),
            slots: Vec::new(),
            active: 0,
            last: 0,
            datapath: Some(Datapath::Userspace),
        })
    };
    let workload = |ip: &str, node: &str, identity: u32, name: &str| {
        Record::Workload(WorkloadRecord {
            ip: ip.parse().expect("an address"),
            node: node.into(),
            identity: IdentityId(identity),
            pod: PodRef {
                namespace: "demo".into(),
                name: name.into(),
                uid: format!("uid-{name}"),
            },
            policy_audit: false,
        })
    };
    let identity = |number, app: &str| {
        let labels = [("k8s:app".to_owned(), app.to_owned())];
        Record::Identity(IdentityId(number), Labels(labels.into()))
    };
    let facts = NodeFacts {
        runs_apiserver: true,
        ..NodeFacts::default()
    };
    vec![
        node("node1", 1),
        node("node2", 2),
        Record::NodeFacts("node1".into(), facts),
        identity(300, "frontend"),
        identity(301, "api"),
        workload("10.0.1.2", "node1", 300, "frontend"),
        workload("fd00:1::2", "node1", 300, "frontend"),
        workload("10.0.2.2", "node2", 301, "api"),
        workload("fd00:2::2", "node2", 301, "api"),
    ]
}

fn endpoints(node: &str) -> Vec<EndpointPolicyStatus> {
    let host = EndpointPolicyStatus {
        endpoint: 0,
        pod: None,
        addresses: Vec::new(),
        identity: IdentityId::HOST,
        labels: Vec::new(),
        closed: false,
        ingress_enforced: false,
        egress_enforced: false,
        audit: false,
        entries: Vec::new(),
    };
    let pod = EndpointPolicyStatus {
        endpoint: 1,
        pod: Some(PodRef {
            namespace: "demo".into(),
            name: format!("pod-of-{node}"),
            uid: "u".into(),
        }),
        addresses: vec![[10, 0, 0, 1].into()],
        identity: IdentityId(300),
        ingress_enforced: true,
        ..host.clone()
    };
    vec![pod, host]
}

struct Keyd {
    agents: Arc<Mutex<Agents>>,
    served: Served,
}

impl Keyd {
    fn new() -> Self {
        let agents = Arc::<Mutex<Agents>>::default();
        let services = Server::builder().add_service(AdminServer::new(Canned(agents.clone())));
        Self {
            agents,
            served: Served::new(services),
        }
    }

    fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        self.served.run(arguments)
    }

    fn json(&self, arguments: &[&str]) -> (i32, Value) {
        let (code, out, errors) = self.run(&[arguments, &["-o", "json"]].concat());
        (
            code,
            serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}{errors}")),
        )
    }

    fn asked(&self) -> Vec<(String, TraceRequest)> {
        let asked = self.agents.lock().expect("not poisoned").asked.clone();
        let traces = asked.into_iter().map(|(node, question)| match question {
            Question::PolicyTrace(trace) => (node, *trace),
            other => panic!("{other:?}"),
        });
        traces.collect()
    }
}

const TRACE: [&str; 8] = [
    "policy",
    "trace",
    "--from",
    "demo/frontend",
    "--to",
    "demo/api",
    "--port",
    "5000",
];

#[test]
fn policies_are_listed_and_an_invalid_one_fails() {
    let keyd = Keyd::new();
    let (code, text, _) = keyd.run(&["policy", "get"]);
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(code, 1);
    let columns: Vec<_> = lines[0].split_whitespace().collect();
    assert_eq!(columns, ["NAMESPACE", "NAME", "KIND", "VALID", "MESSAGE"]);
    assert!(
        lines[1].starts_with("demo ") && lines[1].contains("False"),
        "{text}"
    );
    assert_eq!(
        lines[0].find("VALID"),
        lines[2].find("True"),
        "columns are aligned:\n{text}"
    );
    let (code, value) = keyd.json(&["policy", "get", "shop/db"]);
    assert_eq!(
        (code, value.as_array().map(Vec::len), &value[0]["valid"]),
        (0, Some(1), &true.into())
    );
    let (code, _, errors) = keyd.run(&["policy", "get", "shop/none"]);
    assert_eq!((code, errors.lines().count()), (1, 1), "{errors}");
}

#[test]
fn a_trace_asks_both_ends_in_both_families() {
    let keyd = Keyd::new();
    let (code, text, errors) = keyd.run(&TRACE);
    assert_eq!(code, 0, "{text}{errors}");
    for line in [
        "demo/frontend (10.0.1.2) -> demo/api (10.0.2.2), TCP/5000: ALLOWED",
        "demo/frontend (fd00:1::2) -> demo/api (fd00:2::2), TCP/5000: ALLOWED",
        "Verdict: ALLOWED",
        "    allow  CiliumNetworkPolicy demo/api spec.ingress[0]",
    ] {
        assert!(text.lines().any(|l| l == line), "{line}\n{text}");
    }
    let asked = keyd.asked();
    let expected = |pod: &str, direction, peer, address: &str| TraceRequest {
        pod: Some(pod.parse().expect("an address")),
        direction,
        peer: IdentityId(peer),
        address: address.parse().expect("an address"),
        protocol: 6,
        port: 5000,
    };
    assert_eq!(
        asked[..2],
        [
            (
                "node1".into(),
                expected("10.0.1.2", Direction::Egress, 301, "10.0.2.2")
            ),
            (
                "node2".into(),
                expected("10.0.2.2", Direction::Ingress, 300, "10.0.1.2")
            ),
        ]
    );
    assert_eq!(asked.len(), 4);
}

#[test]
fn denials_and_disagreements_fail() {
    let keyd = Keyd::new();
    let say = |maps, model| {
        let verdicts = (verdict(maps), verdict(model));
        keyd.agents.lock().expect("not poisoned").verdicts = [(Direction::Ingress, verdicts)].into();
    };
    say(false, false);
    let (code, text, _) = keyd.run(&TRACE);
    assert!(
        code == 1 && text.contains("maps:  denied (default-deny)"),
        "{text}"
    );
    let (code, value) = keyd.json(&TRACE);
    assert_eq!((code, &value["verdict"]), (1, &"denied".into()));
    assert_eq!(value["ways"][0]["ingress"]["maps"]["allowed"], Value::Bool(false));
    say(true, false);
    let (code, text, _) = keyd.run(&TRACE);
    assert!(code == 1 && text.contains("<- they disagree"), "{text}");
}

#[test]
fn hosts_and_the_world_are_ends_too() {
    let keyd = Keyd::new();
    let trace =
        |from: &str, to: &str| keyd.run(&["policy", "trace", "--from", from, "--to", to, "--port", "53/UDP"]);
    let (code, text, errors) = trace("host:node1", "demo/api");
    assert_eq!(code, 0, "{text}{errors}");
    let asked = keyd.asked();
    // Seen from its own node, the pod is a pod; the host of an API server is that to other nodes.
    assert_eq!(asked[0].1.pod, None);
    assert_eq!(
        (asked[0].1.peer, asked[1].1.peer),
        (IdentityId(301), IdentityId::KUBE_APISERVER)
    );
    let (code, text, _) = trace("demo/api", "world:198.51.100.1");
    assert!(
        code == 0 && text.contains("outside the cluster, nothing is enforced there"),
        "{text}"
    );
    let (_, request) = keyd.asked().pop().expect("asked");
    assert_eq!(
        (request.direction, request.peer),
        (Direction::Egress, IdentityId::WORLD)
    );
    for (from, to, sentence) in [
        (
            "demo/none",
            "demo/api",
            "keyd knows no address of a pod demo/none",
        ),
        ("host:node9", "demo/api", "keyd knows no node node9"),
        ("world:10.0.2.2", "demo/frontend", "write demo/api"),
        ("demo/api", "world:192.0.2.1", "write host:node1"),
        ("host:node1", "world:fd00::1", "no address family in common"),
    ] {
        let (code, _, errors) = trace(from, to);
        assert!(code == 1 && errors.contains(sentence), "{errors}");
    }
    for bad in [
        ["--from", "api", "--to", "demo/api", "--port", "80"],
        ["--from", "demo/api", "--to", "demo/api", "--port", "http"],
    ] {
        let (code, _, errors) = keyd.run(&[&["policy", "trace"][..], &bad].concat());
        assert_eq!((code, errors.lines().count()), (2, 1), "{errors}");
    }
}

#[test]
fn identities_show_their_labels_and_pods() {
    let keyd = Keyd::new();
    let (code, text, _) = keyd.run(&["identity", "list"]);
    let row = |start: &str| {
        text.lines()
            .find(|line| line.starts_with(start))
            .map(str::to_owned)
    };
    assert_eq!(code, 0);
    assert!(
        row("300 ").is_some_and(|row| row.contains("k8s:app=frontend")),
        "{text}"
    );
    assert!(
        row("1 ").is_some_and(|row| row.contains("reserved:host")),
        "{text}"
    );
    let (_, value) = keyd.json(&["identity", "get", "301"]);
    assert_eq!(value["pods"][0], "demo/api");
    let (code, _, errors) = keyd.run(&["identity", "get", "999"]);
    assert!(
        code == 1 && errors.contains("there is no identity 999"),
        "{errors}"
    );
}

#[test]
fn endpoints_of_all_nodes_and_a_node_that_is_away() {
    let keyd = Keyd::new();
    let (code, text, _) = keyd.run(&["endpoint", "list"]);
    assert_eq!(code, 0, "{text}");
    let columns: Vec<_> = text
        .lines()
        .next()
        .expect("a header")
        .split_whitespace()
        .collect();
    assert_eq!(
        columns,
        ["NODE", "POD", "IDENTITY", "ADDRESSES", "INGRESS", "EGRESS"]
    );
    let rows: Vec<Vec<_>> = text
        .lines()
        .skip(1)
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(rows[0], ["node1", "(host)", "1", "-", "disabled", "disabled"]);
    assert_eq!(
        rows[1],
        [
            "node1",
            "demo/pod-of-node1",
            "300",
            "10.0.0.1",
            "enabled",
            "disabled"
        ]
    );
    assert_eq!(rows.len(), 4);
    keyd.agents
        .lock()
        .expect("not poisoned")
        .away
        .insert("node2".into());
    let (code, value) = keyd.json(&["endpoint", "list"]);
    assert_eq!((code, value["endpoints"].as_array().map(Vec::len)), (1, Some(2)));
    assert_eq!(value["problems"][0], "keyd: the agent of node2 is not connected");
}

/// In Kubernetes the admin service is reached through the streams of a command in keyd's pod.
#[test]
fn the_admin_service_works_through_the_streams_of_a_command() {
    let keyd = Keyd::new();
    let count = keyd.served.runtime.block_on(async {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_warren"));
        let mut child = command
            .args(["keyd-tunnel", "--keyd-socket"])
            .arg(&keyd.served.socket)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("start");
        let streams = tokio::io::join(
            child.stdout.take().expect("piped"),
            child.stdin.take().expect("piped"),
        );
        let mut client = warren_keyd_api::admin::over(streams).await.expect("connect");
        let policies = client
            .policies(PoliciesRequest {})
            .await
            .expect("an answer")
            .into_inner()
            .policies;
        drop(client);
        // The end of the streams is the end of the command.
        assert!(child.wait().await.expect("an end").success());
        policies.len()
    });
    assert_eq!(count, 2);
}

/// `warren` closes its end while keyd still has something to say, as HTTP/2 does at the end of a connection.
#[test]
fn a_tunnel_whose_reader_has_gone_ends_well() {
    let directory = tempfile::TempDir::new().expect("directory");
    let socket = directory.path().join("keyd.sock");
    let keyd = std::os::unix::net::UnixListener::bind(&socket).expect("bind");
    let mut tunnel = std::process::Command::new(env!("CARGO_BIN_EXE_warren"))
        .args(["keyd-tunnel", "--keyd-socket"])
        .arg(&socket)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("start");
    let (mut stream, _) = keyd.accept().expect("the tunnel connects");
    // Kept open: the end must come from the other stream.
    let _input = tunnel.stdin.take();
    drop(tunnel.stdout.take());
    stream.write_all(b"goodbye").expect("write");
    assert!(tunnel.wait().expect("an end").success());
}
