//! Nodes and pods as network namespaces, agents as processes, a directory signed by the test itself (and served, unless
//! the test does without). Everything
//! has names of its own and is removed at the end, also after a panic.
#![allow(dead_code, reason = "each test binary uses a part of this module")]

pub(crate) mod flow;
mod keyd;
pub(crate) mod memory;
pub(crate) mod net;

use std::{
    fs,
    net::IpAddr,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use warren_agent_api::{Attachment, AttachmentKey, Request, Response, call};
use warren_keyd_api::proof;
use warren_model::{Datapath, NodeRecord, PodRef, PrivateKey, PublicKey, SlotKey, keys::slots_of};

/// Runs a command that must succeed.
pub(crate) fn run(command: &str) -> String {
    let output = try_run(command);
    assert!(
        output.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn try_run(command: &str) -> Output {
    let mut words = command.split_whitespace();
    Command::new(words.next().unwrap()).args(words).output().unwrap()
}

/// Waits for a condition, which is what the test is about: the limit is only there to end a broken run.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(300);
    while !condition() {
        assert!(Instant::now() < end, "{what}: did not come");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// An underlay with nodes on it.
pub(crate) struct Mesh {
    pub(crate) name: String,
    pub(crate) directory: tempfile::TempDir,
    pub(crate) keyd: Keyd,
    pub(crate) nodes: Vec<Node>,
}

pub(crate) use keyd::Keyd;

/// Where the test's `keyd` listens, in the underlay.
const KEYD: &str = "172.30.0.254:4250";

/// A node: a namespace, its directories, its agent.
pub(crate) struct Node {
    pub(crate) number: u8,
    pub(crate) netns: String,
    pub(crate) home: PathBuf,
    pub(crate) bpffs: PathBuf,
    key: PrivateKey,
    /// Its sockets' cgroup: agents and whatever is run on the node.
    pub(crate) cgroup: PathBuf,
    agent: Option<Child>,
    pods: Vec<String>,
}

impl Mesh {
    /// Nodes and a `keyd`.
    pub(crate) fn new(count: u8) -> Self {
        let mesh = Self::without_keyd(count);
        mesh.keyd.serve(&mesh.name, KEYD.parse().unwrap());
        mesh
    }

    /// Nodes with nothing but a snapshot on disk.
    pub(crate) fn without_keyd(count: u8) -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests need root: they make network namespaces"
        );
        let directory = tempfile::tempdir().unwrap();
        let suffix: String = directory
            .path()
            .file_name()
            .unwrap()
            .to_string_lossy()
            .chars()
            .rev()
            .take(4)
            .collect();
        let name = format!("wt{}", suffix.to_lowercase());
        run(&format!("ip netns add {name}"));
        run(&format!("ip -n {name} link add br0 type bridge"));
        run(&format!("ip -n {name} link set br0 up"));
        run(&format!("ip -n {name} addr add 172.30.0.254/24 dev br0"));
        let mut mesh = Self {
            name,
            directory,
            keyd: Keyd::new(),
            nodes: Vec::new(),
        };
        for number in 1..=count {
            mesh.add_node(number);
        }
        mesh.publish(|_| {});
        mesh
    }

    fn add_node(&mut self, number: u8) {
        let (under, netns) = (&self.name, format!("{}n{number}", self.name));
        run(&format!("ip netns add {netns}"));
        run(&format!("ip -n {netns} link set lo up"));
        run(&format!(
            "ip -n {netns} link add eth0 type veth peer name n{number} netns {under}"
        ));
        run(&format!("ip -n {under} link set n{number} master br0 up"));
        run(&format!("ip -n {netns} addr add 172.30.0.{number}/24 dev eth0"));
        run(&format!(
            "ip -n {netns} addr add fd00:30::{number}/64 dev eth0 nodad"
        ));
        run(&format!("ip -n {netns} link set eth0 up"));
        for setting in ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"] {
            run(&format!("ip netns exec {netns} sysctl -qw {setting}"));
        }
        let home = self.directory.path().join(format!("node{number}"));
        let key = proof::generate_private_key().unwrap();
        fs::create_dir_all(home.join("state/keys")).unwrap();
        fs::create_dir_all(home.join("state/trust")).unwrap();
        let key_file = home.join("state/keys/slot0.key");
        fs::write(&key_file, STANDARD.encode(key.expose())).unwrap();
        fs::set_permissions(&key_file, fs::Permissions::from_mode(0o600)).unwrap();
        // The key was made with pre-shared keys.
        let psk_file = home.join("state/keys/gen1.psk");
        fs::write(&psk_file, "warren-psk 1\n").unwrap();
        fs::set_permissions(&psk_file, fs::Permissions::from_mode(0o600)).unwrap();
        let (ca, roots) = self.keyd.trust();
        for directory in ["state/trust", "trust"] {
            fs::create_dir_all(home.join(directory)).unwrap();
            fs::write(home.join(directory).join("ca.crt"), &ca).unwrap();
            fs::write(home.join(directory).join("snapshot-roots"), &roots).unwrap();
        }
        fs::write(home.join("token"), "a token").unwrap();
        fs::write(home.join("cluster.yaml"), CLUSTER).unwrap();
        let bpffs = home.join("bpf");
        fs::create_dir(&bpffs).unwrap();
        run(&format!("mount -t bpf bpf {}", bpffs.display()));
        // Whoever enters a namespace with `ip` sees a /sys without cgroups.
        let cgroups = home.join("cgroups");
        fs::create_dir(&cgroups).unwrap();
        run(&format!("mount -t cgroup2 none {}", cgroups.display()));
        let cgroup = cgroups.join(&netns);
        fs::create_dir(&cgroup).unwrap();
        self.nodes.push(Node {
            number,
            netns,
            home,
            bpffs,
            key,
            cgroup,
            agent: None,
            pods: Vec::new(),
        });
    }

    /// Publishes all nodes, changed by `change`, and puts a snapshot on the disk of each.
    pub(crate) fn publish(&mut self, change: impl FnOnce(&mut Vec<NodeRecord>)) {
        let mut records: Vec<NodeRecord> = self.nodes.iter().map(Node::record).collect();
        change(&mut records);
        self.keyd.set_nodes(records);
        self.save_snapshots();
    }

    /// Puts what is published now on the disk of each node.
    pub(crate) fn save_snapshots(&self) {
        let file = self.keyd.snapshot_file();
        for node in &self.nodes {
            fs::write(node.home.join("state/snapshot"), &file).unwrap();
        }
    }

    pub(crate) fn start(&mut self) {
        self.nodes.iter_mut().for_each(Node::start);
        self.nodes.iter().for_each(Node::wait_ready);
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.keyd.stop();
        if std::thread::panicking() {
            for node in &self.nodes {
                for log in ["agent.log", "wg/tunnel.log"] {
                    let text = fs::read_to_string(node.home.join(log)).unwrap_or_default();
                    eprintln!("--- {} {log}\n{text}", node.netns);
                }
            }
        }
        for node in &mut self.nodes {
            node.stop_all();
            for pod in &node.pods {
                try_run(&format!("ip netns del {pod}"));
            }
            try_run(&format!("ip netns del {}", node.netns));
            try_run(&format!("umount -l {}", node.bpffs.display()));
            let _ = fs::remove_dir(&node.cgroup);
            try_run(&format!("umount -l {}", node.home.join("cgroups").display()));
        }
        try_run(&format!("ip netns del {}", self.name));
    }
}

/// Both slots that a key fills.
pub(crate) fn slots_of_key(generation: u64, public_key: PublicKey) -> Vec<SlotKey> {
    let slot = |slot: u8| SlotKey {
        slot,
        port: 51871 + u16::from(slot),
        generation,
        public_key,
        pre_shared_keys: true,
    };
    slots_of(generation).map(slot).into()
}

const CLUSTER: &str = "
podPools: [10.244.0.0/16, 'fd00:10:244::/48']
nodePools: [172.30.0.0/24, 'fd00:30::/64']
";

impl Node {
    fn record(&self) -> NodeRecord {
        let n = self.number;
        let addresses: Vec<IpAddr> = vec![[172, 30, 0, n].into(), format!("fd00:30::{n}").parse().unwrap()];
        NodeRecord {
            name: format!("node{n}").into(),
            uid: format!("uid{n}").into(),
            endpoints: addresses.clone(),
            addresses,
            prefixes: vec![
                format!("10.244.{n}.0/24").parse().unwrap(),
                format!("fd00:10:244:{n}::/64").parse().unwrap(),
            ],
            slots: slots_of_key(1, proof::public_key(&self.key)),
            active: 1,
            last: 1,
            datapath: Some(Datapath::Userspace),
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.home.join("run/agent.sock")
    }

    pub(crate) fn start(&mut self) {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.home.join("agent.log"))
            .unwrap();
        let path = |name: &str| self.home.join(name).display().to_string();
        let child = Command::new("ip")
            .args([
                "netns",
                "exec",
                &self.netns,
                env!("CARGO_BIN_EXE_mesh-agent"),
                "run",
            ])
            .args([
                "--config",
                &path("cluster.yaml"),
                "--node-name",
                &format!("node{}", self.number),
            ])
            .args([
                "--keyd",
                KEYD,
                "--trust-dir",
                &path("trust"),
                "--token-file",
                &path("token"),
                "--cgroup",
                &self.cgroup.display().to_string(),
                "--state-dir",
                &path("state"),
                "--run-dir",
                &path("run"),
            ])
            .args(["--wireguard-dir", &path("wg"), "--bpffs", &path("bpf/warren")])
            .env(
                "RUST_LOG",
                std::env::var("RUST_LOG").unwrap_or_else(|_| "info,mesh_agent=debug".into()),
            )
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.agent = Some(child);
    }

    pub(crate) fn wait_ready(&self) {
        eventually(&format!("agent of {}", self.netns), || {
            matches!(
                call(&self.socket(), &Request::CniStatus, Duration::from_secs(5)),
                Ok(Response::Done)
            )
        });
    }

    /// SIGKILL, as a crash would.
    pub(crate) fn kill_agent(&mut self) {
        if let Some(mut child) = self.agent.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// The processes of this node's agent that were started with a word in their command line.
    pub(crate) fn processes(&self, word: &str) -> Vec<u32> {
        let pids = run(&format!("ip netns pids {}", self.netns));
        let is_one = |pid: &u32| {
            fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| line.split(|b| *b == 0).any(|w| w == word.as_bytes()))
        };
        pids.lines()
            .filter_map(|pid| pid.trim().parse().ok())
            .filter(is_one)
            .collect()
    }

    /// Kills the tunnel process of this node.
    pub(crate) fn kill_tunnel(&self) {
        let pids = self.processes("tunnel");
        run(&format!("kill -9 {}", pids.first().expect("a tunnel process")));
    }

    fn stop_all(&mut self) {
        if let Some(mut child) = self.agent.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        for pid in String::from_utf8_lossy(&try_run(&format!("ip netns pids {}", self.netns)).stdout).lines()
        {
            if let Ok(pid) = pid.trim().parse() {
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(pid),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
        }
    }

    /// A pod as the `ptp` plugin would make it, without telling the agent. Pods of one number have the same
    /// addresses; the newest has the routes.
    pub(crate) fn wire_pod(&mut self, number: u8) -> Pod {
        let (node, n, count) = (&self.netns, self.number, self.pods.len());
        let (netns, host) = (format!("{node}p{count}"), format!("veth{count}"));
        let (v4, v6) = (
            format!("10.244.{n}.{number}"),
            format!("fd00:10:244:{n}::{number}"),
        );
        run(&format!("ip netns add {netns}"));
        run(&format!("ip -n {netns} link set lo up"));
        run(&format!(
            "ip -n {node} link add {host} type veth peer name eth0 netns {netns}"
        ));
        run(&format!("ip -n {node} link set {host} up"));
        run(&format!("ip -n {netns} link set eth0 up"));
        for (gateway, address, length) in [
            (format!("10.244.{n}.1"), &v4, 32),
            (format!("fd00:10:244:{n}::1"), &v6, 128),
        ] {
            run(&format!(
                "ip -n {node} addr add {gateway}/{length} dev {host} nodad"
            ));
            run(&format!(
                "ip -n {node} route replace {address}/{length} dev {host}"
            ));
            run(&format!(
                "ip -n {netns} addr add {address}/{length} dev eth0 nodad"
            ));
            run(&format!("ip -n {netns} route add {gateway}/{length} dev eth0"));
            run(&format!("ip -n {netns} route add default via {gateway} dev eth0"));
        }
        self.pods.push(netns.clone());
        let host_ifindex = link_number(node, &host, "ifindex").parse().unwrap();
        let mac = link_number(&netns, "eth0", "address");
        let bytes: Vec<u8> = mac
            .split(':')
            .map(|byte| u8::from_str_radix(byte, 16).unwrap())
            .collect();
        let name = format!("pod{number}");
        Pod {
            attachment: Attachment {
                key: AttachmentKey {
                    container_id: netns.clone(),
                    ifname: "eth0".into(),
                },
                pod: PodRef {
                    namespace: "demo".into(),
                    name,
                    uid: netns.clone(),
                },
                netns: format!("/run/netns/{netns}"),
                host_ifindex,
                mac: bytes.try_into().unwrap(),
                addresses: vec![v4.parse().unwrap(), v6.parse().unwrap()],
            },
            netns,
            v4,
            v6,
        }
    }

    /// A pod with everything.
    pub(crate) fn add_pod(&mut self, number: u8) -> Pod {
        let pod = self.wire_pod(number);
        let response = self.ask(&Request::CniAdd(pod.attachment.clone()));
        assert_eq!(response, Response::Done);
        pod
    }

    pub(crate) fn ask(&self, request: &Request) -> Response {
        // A pod whose policy has half a million verdicts is added no sooner than they are written.
        call(&self.socket(), request, Duration::from_secs(300)).unwrap()
    }

    pub(crate) fn exec(&self, command: &str) -> Output {
        try_run(&format!("ip netns exec {} {command}", self.netns))
    }

    pub(crate) fn encrypt_status(&self) -> warren_agent_api::EncryptStatus {
        match self.ask(&Request::EncryptStatus) {
            Response::EncryptStatus(status) => *status,
            other => panic!("{other:?}"),
        }
    }
}

fn link_number(netns: &str, link: &str, what: &str) -> String {
    run(&format!("ip netns exec {netns} cat /sys/class/net/{link}/{what}"))
        .trim()
        .to_owned()
}

/// A pod.
pub(crate) struct Pod {
    pub(crate) netns: String,
    pub(crate) attachment: Attachment,
    pub(crate) v4: String,
    pub(crate) v6: String,
}

impl Pod {
    /// Whether an address answers within a second.
    pub(crate) fn ping(&self, address: &str) -> bool {
        try_run(&format!(
            "ip netns exec {} ping -n -q -c 1 -W 1 {address}",
            self.netns
        ))
        .status
        .success()
    }
}
