//! The plugin as a container runtime starts it: behind the real `ptp` and `bridge` plugins, in private network
//! namespaces, with a socket in place of the agent's.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    thread::{self, JoinHandle},
};

use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use tempfile::TempDir;
use warren_agent_api::{Request, Response};

const PLUGINS: &str = "/usr/lib/cni";

/// Runs a test on a thread with a network namespace of its own.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// A pod's namespace, held by a thread.
struct Pod {
    netns: String,
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Pod {
    fn new() -> Self {
        let (stop, stopped) = mpsc::channel::<()>();
        let (ready, is_ready) = mpsc::channel();
        let thread = thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
            ready.send(nix::unistd::gettid()).expect("the test waits");
            let _ = stopped.recv();
        });
        let tid = is_ready.recv().expect("the thread tells its id");
        let netns = format!("/proc/{}/task/{tid}/ns/net", std::process::id());
        Self {
            netns,
            stop: Some(stop),
            thread: Some(thread),
        }
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A socket that gives one answer and says what it was asked.
struct Agent {
    directory: TempDir,
    asked: mpsc::Receiver<Request>,
}

impl Agent {
    fn answering(response: Response) -> Self {
        let directory = TempDir::new().expect("directory");
        let listener = UnixListener::bind(directory.path().join("agent.sock")).expect("bind");
        let (tell, asked) = mpsc::channel();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("accept");
            let mut line = String::new();
            BufReader::new(&stream).read_line(&mut line).expect("a line");
            let _ = tell.send(serde_json::from_str(&line).expect("a request"));
            let mut answer = serde_json::to_vec(&response).expect("JSON");
            answer.push(b'\n');
            stream.write_all(&answer).expect("answer");
        });
        Self { directory, asked }
    }

    fn done() -> Self {
        Self::answering(Response::Done)
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("agent.sock")
    }
}

/// Starts a plugin as a container runtime would.
fn run(program: &Path, command: &str, netns: &str, conf: &Value) -> Result<Value, Value> {
    let mut child = Command::new(program)
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", "sandbox-1")
        .env("CNI_NETNS", netns)
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", PLUGINS)
        .env(
            "CNI_ARGS",
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;K8S_POD_UID=u-1",
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("start the plugin");
    child
        .stdin
        .take()
        .expect("input")
        .write_all(conf.to_string().as_bytes())
        .expect("write");
    let output = child.wait_with_output().expect("wait");
    let result = match output.stdout.is_empty() {
        true => Value::Null,
        false => serde_json::from_slice(&output.stdout).expect("the plugin prints JSON"),
    };
    if output.status.success() {
        Ok(result)
    } else {
        Err(result)
    }
}

fn ours() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_warren-cni"))
}

fn conf(socket: &Path, prev_result: Option<&Value>) -> Value {
    let mut conf = json!({
        "cniVersion": "1.0.0", "name": "net", "type": "warren-cni", "socket": socket, "timeoutSeconds": 5,
    });
    if let Some(result) = prev_result {
        conf["prevResult"] = result.clone();
    }
    conf
}

/// Connects the pod with one of the reference plugins.
fn connect(pod: &Pod, state: &TempDir, mut plugin: Value) -> Value {
    plugin["cniVersion"] = json!("1.0.0");
    plugin["name"] = json!("net");
    plugin["ipam"] = json!({
        "type": "host-local", "dataDir": state.path(),
        "ranges": [[{ "subnet": "10.244.1.0/24" }], [{ "subnet": "fd00:10:244:1::/64" }]],
        "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
    });
    let name = plugin["type"].as_str().expect("type").to_owned();
    run(&Path::new(PLUGINS).join(name), "ADD", &pod.netns, &plugin).expect("the reference plugin works")
}

fn chained(plugin: Value) {
    in_namespace(move || {
        let (pod, state) = (Pod::new(), TempDir::new().expect("directory"));
        let before = connect(&pod, &state, plugin);
        let agent = Agent::done();
        let result = run(ours(), "ADD", &pod.netns, &conf(&agent.socket(), Some(&before))).expect("ADD");
        assert_eq!(result, before, "the result is passed on unchanged");

        let Ok(Request::CniAdd(attachment)) = agent.asked.recv() else {
            panic!("no CniAdd")
        };
        assert_eq!(attachment.key.container_id, "sandbox-1");
        assert_eq!(
            (attachment.pod.to_string(), attachment.pod.uid.as_str()),
            ("shop/cart-0".into(), "u-1")
        );
        let addresses: Vec<String> = attachment.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["10.244.1.2", "fd00:10:244:1::2"]);
        // The reference plugin named both ends.
        let interfaces = before["interfaces"].as_array().expect("interfaces");
        let inside = interfaces
            .iter()
            .find(|i| i["sandbox"].is_string())
            .expect("the pod's end");
        let mac: Vec<String> = attachment.mac.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(inside["mac"], mac.join(":"));
        let name = nix::net::if_::if_indextoname(attachment.host_ifindex).expect("the host's end");
        let host = name.to_str().expect("text");
        assert!(
            interfaces
                .iter()
                .any(|i| i["name"] == host && i["sandbox"].is_null()),
            "{host} in {interfaces:?}"
        );

        let agent = Agent::done();
        run(ours(), "CHECK", &pod.netns, &conf(&agent.socket(), Some(&before))).expect("CHECK");
        assert_eq!(
            agent.asked.recv().expect("asked"),
            Request::CniCheck(attachment.clone())
        );
        let agent = Agent::done();
        run(ours(), "DEL", &pod.netns, &conf(&agent.socket(), None)).expect("DEL");
        assert_eq!(
            agent.asked.recv().expect("asked"),
            Request::CniDel(attachment.key)
        );
    });
}

#[test]
fn behind_ptp() {
    chained(json!({ "type": "ptp" }));
}

#[test]
fn behind_bridge() {
    chained(json!({ "type": "bridge", "bridge": "cni0", "isGateway": true }));
}

#[test]
fn without_an_agent_there_is_no_pod() {
    in_namespace(|| {
        let (pod, state) = (Pod::new(), TempDir::new().expect("directory"));
        let before = connect(&pod, &state, json!({ "type": "ptp" }));
        let nobody = state.path().join("no.sock");
        let error = run(ours(), "ADD", &pod.netns, &conf(&nobody, Some(&before))).expect_err("no agent");
        assert_eq!(
            (&error["code"], &error["cniVersion"]),
            (&json!(11), &json!("1.0.0"))
        );
        let message = error["msg"].as_str().expect("a sentence");
        assert!(
            message.starts_with("the agent is not running on this node"),
            "{message}"
        );
        // Nothing keeps the pod from being removed, twice as well.
        for _ in 0..2 {
            run(ours(), "DEL", "", &conf(&nobody, None)).expect("DEL works without an agent");
        }
        let error = run(ours(), "STATUS", "", &conf(&nobody, None)).expect_err("no agent");
        assert_eq!(error["code"], 50);
        let error = run(ours(), "CHECK", &pod.netns, &conf(&nobody, Some(&before))).expect_err("no agent");
        assert_eq!(error["code"], 11);
    });
}

#[test]
fn the_agents_refusal_is_passed_on() {
    in_namespace(|| {
        for (retry, code) in [(true, 11), (false, 100)] {
            let (pod, state) = (Pod::new(), TempDir::new().expect("directory"));
            let before = connect(&pod, &state, json!({ "type": "ptp" }));
            let agent = Agent::answering(Response::Error {
                message: "no identity yet".into(),
                retry,
            });
            let error =
                run(ours(), "ADD", &pod.netns, &conf(&agent.socket(), Some(&before))).expect_err("refused");
            assert_eq!(
                (&error["code"], &error["msg"]),
                (&json!(code), &json!("no identity yet"))
            );
        }
    });
}

#[test]
fn an_agent_that_hangs_up_is_an_error() {
    in_namespace(|| {
        let (pod, state) = (Pod::new(), TempDir::new().expect("directory"));
        let before = connect(&pod, &state, json!({ "type": "ptp" }));
        let socket = state.path().join("agent.sock");
        let listener = UnixListener::bind(&socket).expect("bind");
        let agent = thread::spawn(move || {
            let (stream, _) = listener.accept().expect("accept");
            BufReader::new(&stream)
                .read_line(&mut String::new())
                .expect("a line");
        });
        let error = run(ours(), "ADD", &pod.netns, &conf(&socket, Some(&before))).expect_err("no answer");
        assert_eq!(error["code"], 11);
        agent.join().expect("agent");
    });
}

#[test]
fn garbage_collection_and_status() {
    let agent = Agent::done();
    let mut gc = conf(&agent.socket(), None);
    gc["cniVersion"] = json!("1.1.0");
    gc["cni.dev/valid-attachments"] = json!([{ "containerID": "a", "ifname": "eth0" }]);
    assert_eq!(run(ours(), "GC", "", &gc), Ok(Value::Null));
    let Ok(Request::CniGc { valid }) = agent.asked.recv() else {
        panic!("no CniGc")
    };
    assert_eq!(
        (
            valid.len(),
            valid[0].container_id.as_str(),
            valid[0].ifname.as_str()
        ),
        (1, "a", "eth0")
    );
    // Without the list nothing is forgotten.
    let error = run(ours(), "GC", "", &conf(&agent.socket(), None)).expect_err("no list");
    assert_eq!(error["code"], 7);

    let agent = Agent::done();
    assert_eq!(
        run(ours(), "STATUS", "", &conf(&agent.socket(), None)),
        Ok(Value::Null)
    );
    let agent = Agent::answering(Response::Error {
        message: "no snapshot yet".into(),
        retry: true,
    });
    let error = run(ours(), "STATUS", "", &conf(&agent.socket(), None)).expect_err("not ready");
    assert_eq!(
        (&error["code"], &error["msg"]),
        (&json!(50), &json!("pods cannot be added now: no snapshot yet"))
    );
}

#[test]
fn versions_and_bad_input() {
    let version = run(ours(), "VERSION", "", &json!({ "cniVersion": "1.0.0" })).expect("VERSION");
    assert_eq!(
        version["supportedVersions"],
        json!(["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"])
    );
    assert_eq!(version["cniVersion"], "1.0.0");
    let nobody = Path::new("/nonexistent/agent.sock");
    let code = |command: &str, conf: &Value| {
        run(ours(), command, "/nonexistent/netns", conf).expect_err(command)["code"].clone()
    };
    assert_eq!(code("ADD", &json!({ "cniVersion": "0.1.0" })), 1);
    assert_eq!(code("ADD", &json!([])), 6);
    assert_eq!(code("ADD", &conf(nobody, None)), 7);
    assert_eq!(code("DANCE", &conf(nobody, None)), 4);
    let result = json!({ "ips": [{ "address": "10.1.1.1/24" }] });
    assert_eq!(
        code("ADD", &conf(nobody, Some(&result))),
        3,
        "the namespace is gone"
    );
}

#[test]
fn a_pod_without_veth_is_refused() {
    in_namespace(|| {
        let pod = Pod::new();
        let result = json!({ "ips": [{ "address": "10.244.1.2/24" }] });
        let add = || {
            run(
                ours(),
                "ADD",
                &pod.netns,
                &conf(Path::new("/nonexistent"), Some(&result)),
            )
            .expect_err("no veth")
        };
        assert_eq!(add()["code"], 3, "no interface at all");
        let status = Command::new("nsenter")
            .arg(format!("--net={}", pod.netns))
            .args(["ip", "link", "add", "eth0", "type", "bridge"])
            .status()
            .expect("nsenter");
        assert!(status.success());
        let error = add();
        assert_eq!(error["code"], 7);
        assert!(
            error["msg"]
                .as_str()
                .expect("a sentence")
                .contains("is not a veth"),
            "{error}"
        );
    });
}
