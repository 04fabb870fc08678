//! The command as a user runs it, against a keyd socket with canned answers.

use std::{
    path::PathBuf,
    process::{Command, Output},
    sync::{Arc, Mutex},
    time::{SystemTime, UNIX_EPOCH},
};

use tempfile::TempDir;
use tokio::{net::UnixListener, runtime::Runtime};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, transport::Server};
use warren_keyd_api::proto::{
    AgentStatus, AskAgentRequest, AskAgentResponse, CreateJoinTokenRequest, CreateJoinTokenResponse,
    DirectoryChunk, DirectoryRequest, NodeEntry, NodeStatus, PeerStatus, PoliciesRequest, PoliciesResponse,
    Slot, StatusRequest, StatusResponse,
    admin_server::{Admin, AdminServer},
};

struct Canned(Arc<Mutex<StatusResponse>>);

#[tonic::async_trait]
impl Admin for Canned {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Ok(Response::new(self.0.lock().expect("not poisoned").clone()))
    }

    async fn create_join_token(
        &self,
        _: Request<CreateJoinTokenRequest>,
    ) -> Result<Response<CreateJoinTokenResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    type DirectoryStream = tokio_stream::Empty<Result<DirectoryChunk, Status>>;

    async fn directory(
        &self,
        _: Request<DirectoryRequest>,
    ) -> Result<Response<Self::DirectoryStream>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn policies(&self, _: Request<PoliciesRequest>) -> Result<Response<PoliciesResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn ask_agent(&self, _: Request<AskAgentRequest>) -> Result<Response<AskAgentResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }
}

/// A keyd that answers as told.
struct Keyd {
    answer: Arc<Mutex<StatusResponse>>,
    socket: PathBuf,
    _directory: TempDir,
    _runtime: Runtime,
}

impl Keyd {
    fn new(answer: StatusResponse) -> Self {
        let directory = TempDir::new().expect("directory");
        let socket = directory.path().join("keyd.sock");
        let answer = Arc::new(Mutex::new(answer));
        let runtime = Runtime::new().expect("runtime");
        let listener = runtime
            .block_on(async { UnixListener::bind(&socket) })
            .expect("bind");
        let service = AdminServer::new(Canned(answer.clone()));
        runtime.spawn(
            Server::builder()
                .add_service(service)
                .serve_with_incoming(UnixListenerStream::new(listener)),
        );
        Self {
            answer,
            socket,
            _directory: directory,
            _runtime: runtime,
        }
    }

    fn run(&self, arguments: &[&str]) -> (i32, String) {
        let output = warren(arguments, &["--keyd-socket", self.socket.to_str().expect("text")]);
        (
            output.status.code().expect("a code"),
            String::from_utf8(output.stdout).expect("text"),
        )
    }
}

fn warren(arguments: &[&str], more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_warren"))
        .args(arguments)
        .args(more)
        .output()
        .expect("run")
}

fn node(name: &str, number: u8, other: &str, other_number: u8) -> NodeStatus {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("after 1970")
        .as_millis();
    let slot = Slot {
        slot: 0,
        port: 51871,
        generation: 1,
        public_key: vec![number; 32],
        pre_shared_keys: true,
    };
    NodeStatus {
        node: Some(NodeEntry {
            name: name.into(),
            slots: vec![slot.clone()],
            datapath: 2,
            ..NodeEntry::default()
        }),
        connected: true,
        applied_epoch: 7,
        applied_version: 3,
        status: Some(AgentStatus {
            encryption: true,
            datapath: 2,
            slots: vec![slot],
            peers: vec![PeerStatus {
                node: other.into(),
                own_public_key: vec![number; 32],
                public_key: vec![other_number; 32],
                last_handshake_unix_ms: i64::try_from(now).expect("small") - 30_000,
                ready: true,
                ..PeerStatus::default()
            }],
            endpoints: 2,
            drops: [("no-path".to_owned(), 4)].into(),
            exemptions: vec!["host to keyd (4250/tcp)".into()],
            agent_version: "0.1.0".into(),
            ..AgentStatus::default()
        }),
        ..NodeStatus::default()
    }
}

fn healthy() -> StatusResponse {
    StatusResponse {
        leader: true,
        leader_address: "192.0.2.1:4250".into(),
        version: "0.1.0".into(),
        epoch: 7,
        directory_version: 3,
        encryption: true,
        nodes: vec![node("node-1", 1, "node-2", 2), node("node-2", 2, "node-1", 1)],
        ..StatusResponse::default()
    }
}

#[test]
fn a_healthy_mesh() {
    let keyd = Keyd::new(healthy());
    let (code, text) = keyd.run(&["encrypt", "status"]);
    assert_eq!(code, 0, "{text}");
    assert!(
        text.contains("Nodes encrypted:   2 of 2\nPairs encrypted:   1 of 1"),
        "{text}"
    );
    assert!(
        text.contains("host to keyd (4250/tcp) (on 2 of 2 nodes)"),
        "{text}"
    );
    assert!(text.contains("         8  no-path"), "{text}");
    let header = text
        .lines()
        .find(|line| line.starts_with("NODE"))
        .expect("a table");
    let row = text
        .lines()
        .find(|line| line.starts_with("node-1"))
        .expect("a row");
    assert_eq!(
        header.find("ENCRYPTED"),
        row.find("yes"),
        "columns are aligned:\n{text}"
    );

    let (code, text) = keyd.run(&["encrypt", "status", "-o", "json"]);
    let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(
        (code, &value["healthy"], &value["encryptedNodes"]),
        (0, &true.into(), &2.into())
    );

    let (code, text) = keyd.run(&["status"]);
    assert!(
        code == 0 && text.contains("Agents:  2 of 2 connected, 2 up to date, version 0.1.0"),
        "{text}"
    );
    assert!(text.contains("Pods:    4 managed"), "{text}");
    let (code, text) = keyd.run(&["version"]);
    assert!(code == 0 && text.contains("keyd:    0.1.0"), "{text}");
}

#[test]
fn a_problem_is_shown_and_fails() {
    let mut answer = healthy();
    answer.nodes[1].status.as_mut().expect("reported").peers.clear();
    let keyd = Keyd::new(answer);
    let (code, text) = keyd.run(&["encrypt", "status"]);
    assert_eq!(code, 1);
    assert!(
        text.contains("Problems:\n  node-1 and node-2: node-2 has no peer for node-1\n"),
        "{text}"
    );
    let (code, text) = keyd.run(&["encrypt", "status", "--output=json"]);
    let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!((code, &value["healthy"]), (1, &false.into()));
}

#[test]
fn waiting_ends_when_all_is_well() {
    let mut answer = healthy();
    answer.nodes[0].connected = false;
    let keyd = Keyd::new(answer);
    let (code, _) = keyd.run(&["status", "--wait", "--timeout", "0"]);
    assert_eq!(code, 1, "the time is over at once");
    let mut child = Command::new(env!("CARGO_BIN_EXE_warren"))
        .args(["status", "--wait", "--keyd-socket"])
        .arg(&keyd.socket)
        .stderr(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("start");
    let mut progress = String::new();
    let mut errors = std::io::BufReader::new(child.stderr.take().expect("piped"));
    std::io::BufRead::read_line(&mut errors, &mut progress).expect("progress");
    assert!(
        progress.contains("waiting: node node-1: its agent is not connected to keyd"),
        "{progress}"
    );
    *keyd.answer.lock().expect("not poisoned") = healthy();
    assert!(child.wait().expect("end").success());
}

#[test]
fn mistakes_are_one_sentence_and_code_2() {
    for arguments in [
        &["encrypt", "status", "--colour"][..],
        &["dance"],
        &["status", "--wait", "--timeout", "2d"],
    ] {
        let output = warren(arguments, &[]);
        let said = String::from_utf8(output.stderr).expect("text");
        assert_eq!(
            (output.status.code(), said.lines().count()),
            (Some(2), 1),
            "{said}"
        );
    }
    assert_eq!(warren(&[], &[]).status.code(), Some(2));
    let help = warren(&["status", "--help"], &[]);
    assert!(help.status.success() && String::from_utf8_lossy(&help.stdout).contains("warren status --wait"));
}

#[test]
fn nobody_there_is_a_clear_error() {
    let output = warren(
        &["encrypt", "status", "--keyd-socket", "/nonexistent/keyd.sock"],
        &[],
    );
    let said = String::from_utf8(output.stderr).expect("text");
    assert_eq!(
        (output.status.code(), said.lines().count()),
        (Some(1), 1),
        "{said}"
    );
    assert!(
        said.contains("cannot reach keyd at /nonexistent/keyd.sock"),
        "{said}"
    );
    let output = warren(&["status", "--kubeconfig", "/nonexistent/config"], &[]);
    let said = String::from_utf8(output.stderr).expect("text");
    assert_eq!(
        (output.status.code(), said.lines().count()),
        (Some(1), 1),
        "{said}"
    );
    let output = warren(&["version", "--kubeconfig", "/nonexistent/config"], &[]);
    assert!(output.status.success(), "the version is known without a cluster");
}

#[test]
fn completion_for_every_shell() {
    for shell in ["bash", "zsh", "fish"] {
        let output = warren(&["completion", shell], &[]);
        assert!(
            output.status.success() && String::from_utf8_lossy(&output.stdout).contains("warren"),
            "{shell}"
        );
    }
}
