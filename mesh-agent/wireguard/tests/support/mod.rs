//! Two or three nodes as network namespaces on one underlay bridge, each with a WireGuard implementation in a
//! process of its own, and traffic between them. Everything is removed on drop, also after a panic.
#![expect(dead_code, reason = "every test binary uses a part of it")]
#![expect(unreachable_pub, reason = "a module of several test binaries")]

use std::{
    ffi::OsStr,
    fs,
    io::{Read as _, Write as _},
    net::IpAddr,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use ipnet::IpNet;
use warren_model::{PrivateKey, PublicKey};

pub mod capture;
pub mod changes;
pub mod relay;
pub mod traffic;
mod wg;

/// How long a condition may take before a test gives up on it.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The UDP port of every node.
pub const PORT: u16 = 51871;

/// Who moves a node's packets.
#[derive(Debug, Clone)]
pub enum Engine {
    /// This crate's engine: the program and the arguments before the run directory.
    Warren(PathBuf, Vec<String>),
    /// wireguard-go.
    WireguardGo,
    /// `boringtun-cli`.
    BoringtunCli,
    /// `gotatun-cli`: for benchmarks.
    GotatunCli,
    /// The kernel's own, where it has one.
    Kernel,
}

impl Engine {
    /// This crate's engine as built for tests; with boringtun's sessions where `WARREN_TEST_ENGINE` says so.
    pub fn warren() -> Self {
        let named = std::env::var("WARREN_TEST_ENGINE");
        Self::warren_with(named.as_deref().unwrap_or("warren"))
    }

    /// With the sessions of boringtun.
    pub fn warren_boringtun() -> Self {
        Self::warren_with("boringtun")
    }

    fn warren_with(implementation: &str) -> Self {
        let arguments = vec![format!("--engine={implementation}")];
        if let Some(program) = std::env::var_os("WARREN_TUNNEL_ENGINE") {
            return Self::Warren(program.into(), arguments);
        }
        let beside = std::env::current_exe().expect("own path");
        let debug = beside.parent().and_then(Path::parent).expect("target directory");
        Self::Warren(debug.join("warren-tunnel-engine"), arguments)
    }
}

/// A namespace, deleted on drop.
pub struct Namespace(String);

impl Namespace {
    fn new(name: String) -> Result<Self> {
        run("ip", ["netns", "add", &name])?;
        let namespace = Self(name);
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    pub fn name(&self) -> &str {
        &self.0
    }

    /// `ip -n NAMESPACE ARGUMENTS`.
    pub fn ip(&self, arguments: &str) -> Result<Output> {
        run(
            "ip",
            ["-n", &self.0].into_iter().chain(arguments.split_whitespace()),
        )
    }

    /// As [`Self::ip`], for each line; one process for all.
    fn ip_all<const N: usize>(&self, lines: [String; N]) -> Result<()> {
        let mut child = Command::new("ip")
            .args(["-n", &self.0, "-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let stdin = child.stdin.take().context("ip has no stdin")?;
        { stdin }.write_all(lines.join("\n").as_bytes())?;
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "ip -n {} -batch: {lines:?}: {said}",
            self.0
        );
        Ok(())
    }

    /// Moves the calling thread into the namespace.
    pub fn enter(&self) -> Result<()> {
        enter(&self.0)
    }
}

/// Moves the calling thread into a namespace by name.
pub fn enter(namespace: &str) -> Result<()> {
    let file = fs::File::open(format!("/run/netns/{namespace}"))?;
    nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).context("setns")
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = run("ip", ["netns", "del", &self.0]);
    }
}

/// A node: its namespace and its engine.
pub struct Node {
    pub namespace: Namespace,
    pub engine: Engine,
    pub device: String,
    pub key: PrivateKey,
    /// 1 for the first node: part of all its addresses.
    pub number: u8,
    run_dir: tempfile::TempDir,
    child: Option<Child>,
}

/// Nodes on one underlay: 192.0.2.N and 2001:db8::N outside, 10.N.0.1/16 and fd00:N::1/32 inside.
pub struct Lab {
    pub nodes: Vec<Node>,
    /// Random: no two labs share a name.
    pub suffix: String,
    underlay: Namespace,
}

/// A fresh key pair.
pub fn key() -> PrivateKey {
    PrivateKey::from_bytes(random())
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .expect("random bytes");
    bytes
}

/// The public part of a key.
pub fn public(key: &PrivateKey) -> PublicKey {
    let secret = x25519_dalek::StaticSecret::from(*key.expose());
    PublicKey::from_bytes(x25519_dalek::PublicKey::from(&secret).to_bytes()).expect("public key")
}

/// Runs a program to its end; an error with all it said when it fails.
pub fn run<S: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = S>) -> Result<Output> {
    let mut command = Command::new(program);
    command.args(arguments);
    let output = command
        .output()
        .with_context(|| format!("{program} cannot be run"))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(output)
}

/// Waits until `condition` holds.
pub fn until(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !condition().with_context(|| what.to_owned())? {
        ensure!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

impl Lab {
    /// A lab with a node per engine, devices up, no peers yet.
    pub fn new(engines: impl IntoIterator<Item = Engine>) -> Result<Self> {
        let suffix = hex::encode(random::<3>());
        let underlay = Namespace::new(format!("wgt-{suffix}-u"))?;
        underlay.ip_all(["link add br0 type bridge", "link set br0 up"].map(String::from))?;
        let mut lab = Self {
            nodes: Vec::new(),
            suffix,
            underlay,
        };
        for (number, engine) in (1..).zip(engines) {
            lab.add(number, engine)?;
        }
        Ok(lab)
    }

    fn add(&mut self, number: u8, engine: Engine) -> Result<()> {
        let namespace = Namespace::new(format!("wgt-{}-{number}", self.suffix))?;
        let inside = namespace.name();
        self.underlay.ip_all([
            format!("link add v{number} type veth peer name eth0 netns {inside}"),
            format!("link set v{number} master br0 up"),
        ])?;
        namespace.ip_all([
            format!("addr add 192.0.2.{number}/24 dev eth0"),
            format!("addr add 2001:db8::{number}/64 dev eth0 nodad"),
            "link set eth0 up".into(),
        ])?;
        let device = match engine {
            Engine::Warren(..) | Engine::Kernel => "warren0".to_owned(),
            _ => "wgtest0".to_owned(),
        };
        let run_dir = tempfile::Builder::new()
            .prefix(&format!("wgt-{}-", self.suffix))
            .tempdir()?;
        let mut node = Node {
            namespace,
            engine,
            device,
            key: key(),
            number,
            run_dir,
            child: None,
        };
        node.start()?;
        node.configure_links()?;
        self.nodes.push(node);
        Ok(())
    }

    /// Moves the calling thread to where all that passes between the nodes is seen.
    pub fn enter_underlay(&self) -> impl FnOnce() -> Result<()> + Send + 'static {
        let name = self.underlay.name().to_owned();
        move || enter(&name)
    }

    /// One more namespace, with nothing in it.
    pub fn namespace(&self, name: &str) -> Result<Namespace> {
        Namespace::new(format!("wgt-{}-{name}", self.suffix))
    }

    /// `ip ARGUMENTS` where all that passes between the nodes is seen.
    pub fn underlay_ip(&self, arguments: &str) -> Result<Output> {
        self.underlay.ip(arguments)
    }

    /// Makes every node a peer of every other, each owning its inner prefixes. Underlay: IPv6 or IPv4.
    pub fn mesh(&self, outer_v6: bool) -> Result<()> {
        for node in &self.nodes {
            for other in self.nodes.iter().filter(|other| other.number != node.number) {
                node.peer(other, outer_v6)?;
            }
        }
        Ok(())
    }
}

impl Node {
    /// Starts the engine and waits until its device can be configured.
    pub fn start(&mut self) -> Result<()> {
        self.start_with(&[])
    }

    /// As [`Self::start`], with options for this crate's engine.
    pub fn start_with(&mut self, options: &[&str]) -> Result<()> {
        self.spawn(options)?;
        if matches!(self.engine, Engine::Kernel) {
            return Ok(());
        }
        until(
            &format!("the engine of node {} serves {}", self.number, self.device),
            || {
                if let Some(status) = self.child.as_mut().and_then(|child| child.try_wait().transpose()) {
                    bail!("the engine ended: {}", status?);
                }
                Ok(UnixStream::connect(self.socket()).is_ok())
            },
        )
    }

    /// Starts another of this crate's engines beside the running one and waits until it serves the devices. The process
    /// that has handed over to it.
    pub fn succeed(&mut self, options: &[&str]) -> Result<Child> {
        let old = self.child.take().context("no engine is running")?;
        self.spawn(options)?;
        until("the successor answers", || {
            if let Some(status) = self.child.as_mut().and_then(|child| child.try_wait().transpose()) {
                bail!("the successor ended: {}", status?);
            }
            // Between both engines a connection may end without an answer.
            let answer = self.control("ping");
            Ok(answer.is_ok_and(|answer| answer["pid"].as_u64() == Some(self.pid().into())))
        })?;
        Ok(old)
    }

    /// Starts the engine's process.
    fn spawn(&mut self, options: &[&str]) -> Result<()> {
        if matches!(self.engine, Engine::Kernel) {
            let make = format!("link add {} type wireguard", self.device);
            return self.namespace.ip(&make).map(drop);
        }
        let dir = self.run_dir.path().display().to_string();
        // wireguard-go and boringtun-cli always use /var/run/wireguard, and so does wg.
        let script = format!("mkdir -p /run/wireguard && mount --bind {dir} /run/wireguard && exec \"$@\"");
        let mut command = Command::new("ip");
        command.args([
            "netns",
            "exec",
            self.namespace.name(),
            "unshare",
            "-m",
            "sh",
            "-c",
            &script,
            "sh",
        ]);
        match &self.engine {
            Engine::Warren(program, arguments) => {
                // Still there after a restart.
                if !self.has_device() {
                    self.namespace
                        .ip(&format!("tuntap add dev {} mode tun", self.device))?;
                }
                command
                    .arg(program)
                    .args(arguments)
                    .args(options)
                    .args(["/run/wireguard", &self.device]);
            }
            Engine::WireguardGo => {
                command
                    .arg(tool("WARREN_WIREGUARD_GO", "wireguard")?)
                    .args(["-f", &self.device]);
                command.env("WG_PROCESS_FOREGROUND", "1");
            }
            Engine::BoringtunCli => {
                command.arg(tool("WARREN_BORINGTUN_CLI", "boringtun-cli")?);
                command.args([
                    "-f",
                    "--disable-drop-privileges",
                    "--verbosity",
                    "error",
                    &self.device,
                ]);
            }
            Engine::GotatunCli => {
                command.arg(tool("WARREN_GOTATUN_CLI", "gotatun")?);
                command.args([
                    "-f",
                    "--disable-drop-privileges",
                    "--verbosity",
                    "error",
                    &self.device,
                ]);
            }
            Engine::Kernel => {}
        }
        command.stdin(Stdio::null());
        if std::env::var_os("RUST_LOG").is_none() {
            command.stdout(Stdio::null());
        }
        self.child = Some(command.spawn().context("the engine cannot be started")?);
        Ok(())
    }

    pub fn has_device(&self) -> bool {
        self.namespace.ip(&format!("link show {}", self.device)).is_ok()
    }

    /// Addresses, MTU and routes of the tunnel device.
    pub fn configure_links(&self) -> Result<()> {
        let (number, device) = (self.number, &self.device);
        self.namespace.ip_all([
            // The queue as our engine has it: others leave it at 500.
            format!("link set {device} mtu 1412 txqueuelen 10000"),
            format!("addr add 10.{number}.0.1/8 dev {device}"),
            format!("addr add fd00:{number}::1/16 dev {device} nodad"),
            format!("link set {device} up"),
        ])
    }

    pub fn run_dir(&self) -> &Path {
        self.run_dir.path()
    }

    pub fn socket(&self) -> PathBuf {
        self.run_dir.path().join(format!("{}.sock", self.device))
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// Sends a signal to the engine and waits for its end.
    pub fn stop(&mut self, signal: nix::sys::signal::Signal) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), signal)?;
            child.wait()?;
        }
        Ok(())
    }

    pub fn inner_v4(&self) -> IpAddr {
        [10, self.number, 0, 1].into()
    }

    pub fn inner_v6(&self) -> IpAddr {
        std::net::Ipv6Addr::new(0xfd00, self.number.into(), 0, 0, 0, 0, 0, 1).into()
    }

    pub fn prefixes(&self) -> [IpNet; 2] {
        [
            IpNet::new(self.inner_v4(), 16).unwrap().trunc(),
            IpNet::new(self.inner_v6(), 32).unwrap().trunc(),
        ]
    }

    pub fn outer(&self, v6: bool) -> String {
        match v6 {
            true => format!("[2001:db8::{}]:{PORT}", self.number),
            false => format!("192.0.2.{}:{PORT}", self.number),
        }
    }

    /// Sends a `set=1` with these lines and returns the `errno`.
    pub fn set(&self, lines: &str) -> Result<i32> {
        if matches!(self.engine, Engine::Kernel) {
            return wg::set(self, lines).map(|()| 0);
        }
        let answer = self.raw(format!("set=1\n{lines}\n").as_bytes())?;
        let number = answer
            .trim()
            .strip_prefix("errno=")
            .with_context(|| format!("answer: {answer:?}"))?;
        Ok(number.parse()?)
    }

    /// As [`Self::set`], and it must succeed.
    pub fn must_set(&self, lines: &str) -> Result<()> {
        let errno = self.set(lines)?;
        ensure!(errno == 0, "errno={errno} for {lines}");
        Ok(())
    }

    /// One request of bytes, its answer up to the empty line.
    pub fn raw(&self, request: &[u8]) -> Result<String> {
        let mut stream = UnixStream::connect(self.socket())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(request)?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    /// What `get=1` is answered with.
    pub fn shown(&self) -> Result<String> {
        match self.engine {
            Engine::Kernel => wg::get(self),
            _ => self.raw(b"get=1\n\n"),
        }
    }

    /// Whether it is this crate's engine with boringtun's sessions.
    pub fn is_boringtun(&self) -> bool {
        matches!(&self.engine, Engine::Warren(_, arguments) if arguments.iter().any(|word| word.contains("boringtun")))
    }

    /// Whether it is this crate's engine.
    pub fn is_ours(&self) -> bool {
        matches!(self.engine, Engine::Warren(..))
    }

    /// The value of the first line with this key in `get=1`.
    pub fn get(&self, key: &str) -> Result<Option<String>> {
        Ok(self.get_all(key)?.into_iter().next())
    }

    /// The values of all lines with this key in `get=1`.
    pub fn get_all(&self, key: &str) -> Result<Vec<String>> {
        let answer = self.shown()?;
        let values = answer
            .lines()
            .filter_map(|line| line.split_once('='))
            .filter(|(name, _)| *name == key);
        Ok(values.map(|(_, value)| value.to_owned()).collect())
    }

    /// Sets the node's own key and port.
    pub fn set_device(&self) -> Result<()> {
        self.must_set(&format!(
            "private_key={}\nlisten_port={PORT}\n",
            hex::encode(self.key.expose())
        ))
    }

    /// Makes `other` a peer that owns its prefixes.
    pub fn peer(&self, other: &Node, outer_v6: bool) -> Result<()> {
        if self
            .get("private_key")?
            .is_none_or(|key| key.bytes().all(|byte| byte == b'0'))
        {
            self.set_device()?;
        }
        let [v4, v6] = other.prefixes();
        self.must_set(&format!(
            "{}endpoint={}\nallowed_ip={v4}\nallowed_ip={v6}\n",
            peer_line(&other.key),
            other.outer(outer_v6)
        ))
    }

    /// Runs a program as a person on the node would, with the engine's sockets in sight.
    pub fn exec(&self, arguments: &[&str]) -> Result<Output> {
        if matches!(self.engine, Engine::Kernel) {
            let prefix = ["netns", "exec", self.namespace.name()];
            return run("ip", prefix.iter().chain(arguments));
        }
        let pid = self.engine_pid()?.to_string();
        run("nsenter", ["-t", &pid, "-n", "-m"].iter().chain(arguments))
    }

    /// `ip netns exec` and `unshare` replace themselves, so the child is the engine.
    fn engine_pid(&self) -> Result<u32> {
        ensure!(self.child.is_some(), "the engine is not running");
        Ok(self.pid())
    }

    /// What this crate's engine answers to a control request.
    pub fn control(&self, request: &str) -> Result<serde_json::Value> {
        let mut stream = UnixStream::connect(self.run_dir.path().join("warren-engine.control"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        writeln!(stream, "{request}")?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(serde_json::from_str(&answer)?)
    }

    /// How many packets this crate's engine dropped for a reason.
    pub fn drops(&self, reason: &str) -> Result<u64> {
        let stats = self.control(&format!("stats {}", self.device))?;
        stats["drops"][reason]
            .as_u64()
            .with_context(|| format!("no counter {reason} in {stats}"))
    }

    /// How many handshakes this crate's engine completed.
    pub fn handshakes(&self) -> Result<u64> {
        let stats = self.control(&format!("stats {}", self.device))?;
        stats["handshakes"]
            .as_u64()
            .with_context(|| format!("no handshakes in {stats}"))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The line that begins a peer's part of a request.
pub fn peer_line(key: &PrivateKey) -> String {
    format!("public_key={}\n", hex::encode(public(key).as_bytes()))
}

/// Where a program of another project is.
fn tool(variable: &str, name: &str) -> Result<PathBuf> {
    let path = match std::env::var_os(variable) {
        Some(path) => path.into(),
        None => {
            let home = std::env::var_os("HOME").context("HOME is not set")?;
            Path::new(&home).join(".cache/warren/bin").join(name)
        }
    };
    ensure!(
        path.exists(),
        "{} is missing; run `cargo xtask setup`, or set {variable}",
        path.display()
    );
    Ok(path)
}
