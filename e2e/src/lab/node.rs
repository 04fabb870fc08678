//! A node: its namespaces, its processes, its power.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use warren_agent_api::{AgentStatus, EncryptStatus, EventStatus, Request, Response};
use warren_model::{Datapath, DatapathChoice, PrefixSource};

use super::{
    Shared, binaries,
    cni::{Chain, MainPlugin},
    net::{self, BRIDGE, UPLINK},
    process::{ALL, Place, Process, find},
    wait::{wait_for, wait_until},
};
use crate::inside::{Kind, NodeSpec, cgroup};

/// Where the agent listens on a node.
pub const AGENT_SOCKET: &str = "/run/warren/agent.sock";
/// Where `keyd` listens on its node.
pub const KEYD_SOCKET: &str = "/run/warren/keyd.sock";

/// A node of the lab.
#[derive(Debug)]
pub struct Node {
    /// 1, 2, ...
    pub number: u8,
    /// `node1`, `node2`, ...
    pub name: String,
    pub(super) chain: Chain,
    uid: String,
    shared: Arc<Shared>,
    state: Mutex<State>,
}

/// What changes during a node's life.
#[derive(Debug, Default)]
struct State {
    power: Option<(Process, u32)>,
    agent: Option<Process>,
    keyd: Option<Process>,
}

impl Node {
    pub(super) fn new(number: u8, shared: Arc<Shared>) -> Result<Self> {
        let options = &shared.options;
        let (main, ranges) = match options.prefix_source {
            PrefixSource::PodCidr => {
                let plugins = &options.plugins;
                let index = usize::from(number - 1) % plugins.len().max(1);
                (
                    plugins.get(index).copied().unwrap_or(MainPlugin::Ptp),
                    net::pod_cidrs(number),
                )
            }
            PrefixSource::PodIp => (MainPlugin::Ptp, net::shared_ranges()),
        };
        let node = Self {
            number,
            name: format!("node{number}"),
            chain: Chain::new(main, &ranges, options.warren),
            // Another one each time: a node of the same name that comes later is another node.
            uid: format!("uid-{}-node{number}-{}", shared.id, shared.next_serial()),
            shared,
            state: Mutex::default(),
        };
        for part in ["state", "etc"] {
            fs::create_dir_all(node.dir().join(part))?;
        }
        fs::write(
            node.dir().join("etc/cluster.yaml"),
            serde_saphyr::to_string(&node.shared.config)?,
        )?;
        if node.shared.options.clocks {
            node.set_clock("+0")?;
        }
        let spec = NodeSpec {
            name: node.name.clone(),
            cgroup: format!("{}/{}", cgroup::tree(&node.shared.id), node.name),
            state: node.dir().join("state"),
            etc: node.dir().join("etc"),
            bin: node.shared.dir.join("bin"),
        };
        fs::write(node.dir().join("spec.json"), serde_json::to_vec(&spec)?)?;
        Ok(node)
    }

    /// The node's folder on the machine: `etc` is its `/etc/warren`, `state` its `/var/lib/warren`.
    pub fn dir(&self) -> PathBuf {
        self.shared.dir.join(&self.name)
    }

    /// UID of its Node object.
    pub fn uid(&self) -> String {
        self.uid.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Powers the node on: fresh kernel state, the disk as it was. No process of ours is started.
    pub fn boot(&self) -> Result<()> {
        ensure!(self.lock().power.is_none(), "{} is on already", self.name);
        // A child of the lab's pid namespace, so that the lab's end is the node's.
        let lab = Place {
            kinds: &[Kind::Pid],
            name: self.name.clone(),
            ..self.shared.underlay.clone()
        };
        let spec = self.dir().join("spec.json");
        let app = self.shared.app();
        let command = [
            app.to_string_lossy(),
            "node-outer".into(),
            "--spec".into(),
            spec.to_string_lossy(),
        ];
        let (outer, init) = lab.spawn_init(command, &self.shared.log(&self.name))?;
        self.lock().power = Some((outer, init));
        self.wire(init)
    }

    fn wire(&self, init: u32) -> Result<()> {
        let port = self.port();
        self.shared.underlay.ip(&[
            format!("link add {port} type veth peer name {UPLINK} netns {init}"),
            format!("link set {port} master {BRIDGE} up"),
        ])?;
        let mac = net::node_mac(self.number)
            .map(|byte| format!("{byte:02x}"))
            .join(":");
        let address = net::node_address(self.number);
        self.place().ip(&[
            "link set lo up".into(),
            format!("link set {UPLINK} address {mac}"),
            format!("addr add {}/24 dev {UPLINK}", address.v4),
            format!("addr add {}/64 dev {UPLINK} nodad", address.v6),
            format!("link set {UPLINK} up"),
            format!("route add default via {}", net::ROUTER_V4),
            format!("route add default via {}", net::ROUTER_V6),
        ])
    }

    /// The node's port on the underlay's bridge.
    pub fn port(&self) -> String {
        format!("p{}", self.number)
    }

    /// The routes that lead from this node to the pods of another.
    pub(super) fn routes_to(&self, other: &Self) -> Vec<String> {
        net::pod_cidrs(other.number)
            .iter()
            .zip(net::node_address(other.number).both())
            .map(|(cidr, gateway)| format!("route replace {cidr} via {gateway}"))
            .collect()
    }

    /// Cuts the power: SIGKILL to PID 1, so that every process of the node and its pods ends at once, and
    /// with them devices, pins and rules.
    pub fn power_off(&self) -> Result<()> {
        let mut state = self.lock();
        let (mut outer, init) = state
            .power
            .take()
            .with_context(|| format!("{} is off", self.name))?;
        kill(nix::unistd::Pid::from_raw(i32::try_from(init)?), Signal::SIGKILL)?;
        outer.kill()?;
        state.agent = None;
        state.keyd = None;
        drop(state);
        // The kernel takes a network namespace down in the background.
        wait_for(
            Duration::from_secs(10),
            &format!("{}'s devices are gone", self.name),
            || {
                self.shared
                    .underlay
                    .output(["ip", "link", "show", &self.port()])
                    .is_ok_and(|output| !output.status.success())
            },
        )?;
        // With it go the programs that were attached to it.
        cgroup::remove_node(&self.shared.id, &self.name)
    }

    /// Where commands for this node run.
    ///
    /// # Panics
    /// While the node is off.
    #[track_caller]
    pub fn place(&self) -> Place {
        match self.try_place() {
            Ok(place) => place,
            Err(error) => panic!("{error}"),
        }
    }

    /// [`Node::place`], or an error while the node is off.
    pub fn try_place(&self) -> Result<Place> {
        let state = self.lock();
        let Some((_, init)) = &state.power else {
            bail!("{} is off", self.name)
        };
        Ok(Place {
            pid: *init,
            kinds: ALL,
            app: self.shared.app(),
            name: self.name.clone(),
        })
    }

    /// Runs a command on the node; it must succeed.
    pub fn run<S: AsRef<str>>(&self, command: impl IntoIterator<Item = S>) -> Result<String> {
        self.try_place()?.run(command)
    }

    /// Starts `keyd` with the lab's manifests and waits until it answers.
    pub fn start_keyd(&self) -> Result<()> {
        let mut command = self.environment();
        command.extend(["keyd", "run", "--config", "/etc/warren/cluster.yaml"]);
        command.extend(["--source", "manifests"]);
        let manifests = self.shared.manifests.dir().to_string_lossy().into_owned();
        let advertise = format!(
            "{}:{}",
            net::node_address(self.number).v4,
            self.shared.config.keyd_port
        );
        command.extend(["--manifests", &manifests, "--state-dir", "/var/lib/warren/keyd"]);
        command.extend(["--admin-socket", KEYD_SOCKET, "--advertise", &advertise]);
        let process = self
            .place()
            .spawn(command, &self.shared.log(&format!("{}-keyd", self.name)))?;
        self.lock().keyd = Some(process);
        wait_until(Duration::from_secs(60), "keyd answers", || {
            if let Some(keyd) = &mut self.lock().keyd
                && !keyd.running()
            {
                return Ok(Err(anyhow::anyhow!("keyd ended: {}", keyd.tail())));
            }
            self.run(["keyd", "status", "-o", "json", "--socket", KEYD_SOCKET])
                .map(Ok)
        })?
        .map(drop)
    }

    /// What stands before a program whose log is to be complete, or whose clock is not the machine's.
    fn environment(&self) -> Vec<&'static str> {
        let options = &self.shared.options;
        let mut words = Vec::new();
        if options.verbose || options.clocks {
            words.push("env");
        }
        if options.verbose {
            words.push("RUST_LOG=trace");
        }
        if options.clocks {
            words.extend(super::clock::ENVIRONMENT);
        }
        words
    }

    /// SIGKILL for `keyd`.
    pub fn kill_keyd(&self) -> Result<()> {
        self.lock().keyd.take().context("keyd is not running")?.kill()
    }

    /// SIGTERM for `keyd`.
    pub fn stop_keyd(&self) -> Result<()> {
        self.lock()
            .keyd
            .take()
            .context("keyd is not running")?
            .terminate()
    }

    /// Makes a join token on the node that runs `keyd` and puts it on this node.
    pub fn enroll(&self, keyd: &Self) -> Result<()> {
        let token = keyd.run(["keyd", "token", "create", &self.name, "--socket", KEYD_SOCKET])?;
        fs::write(self.dir().join("etc/join-token"), token.trim())?;
        Ok(())
    }

    /// Starts the agent; does not wait until it is ready.
    pub fn start_agent(&self) -> Result<()> {
        self.start_agent_with(&[])
    }

    /// Starts the agent with more arguments.
    pub fn start_agent_with(&self, more: &[&str]) -> Result<()> {
        let keyd = format!("{}:{}", net::node_address(1).v4, self.shared.config.keyd_port);
        let mut command = self.environment();
        command.extend(["mesh-agent", "run", "--config", "/etc/warren/cluster.yaml"]);
        command.extend([
            "--node-name",
            &self.name,
            "--keyd",
            &keyd,
            "--join-token-file",
            "/etc/warren/join-token",
            "--cgroup",
            "/sys/fs/cgroup",
        ]);
        command.extend(more);
        let process = self
            .place()
            .spawn(command, &self.shared.log(&format!("{}-agent", self.name)))?;
        let old = self.lock().agent.replace(process);
        drop(old);
        Ok(())
    }

    /// SIGKILL for the agent, and nothing else of the node.
    pub fn kill_agent(&self) -> Result<()> {
        self.lock()
            .agent
            .take()
            .context("the agent is not running")?
            .kill()
    }

    /// SIGTERM for the agent.
    pub fn stop_agent(&self) -> Result<()> {
        self.lock()
            .agent
            .take()
            .context("the agent is not running")?
            .terminate()
    }

    /// Does the agent's process live?
    pub fn agent_running(&self) -> bool {
        self.lock().agent.as_mut().is_some_and(Process::running)
    }

    /// The last lines of the agent's log.
    pub fn agent_log(&self, lines: usize) -> String {
        super::process::tail(&self.shared.log(&format!("{}-agent", self.name)), lines)
    }

    /// The last lines of `keyd`'s log.
    pub fn keyd_log(&self, lines: usize) -> String {
        super::process::tail(&self.shared.log(&format!("{}-keyd", self.name)), lines)
    }

    /// The tunnel processes, by their ids on the machine.
    pub fn tunnels(&self) -> Result<Vec<u32>> {
        find(self.try_place()?.pid, &["mesh-agent", "tunnel"])
    }

    /// SIGKILL for the tunnel process.
    pub fn kill_tunnel(&self) -> Result<()> {
        let tunnels = self.tunnels()?;
        ensure!(!tunnels.is_empty(), "no tunnel process runs on {}", self.name);
        for pid in tunnels {
            kill(nix::unistd::Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
        }
        Ok(())
    }

    /// `mesh-agent encrypt status -o json`; what it says counts, not its exit code.
    pub fn encrypt_status(&self) -> Result<EncryptStatus> {
        self.query(&["mesh-agent", "encrypt", "status", "-o", "json"])
    }

    /// `mesh-agent status -o json`.
    pub fn agent_status(&self) -> Result<AgentStatus> {
        self.query(&["mesh-agent", "status", "-o", "json"])
    }

    /// Asks the agent over its socket, as the programs on the node do.
    pub fn ask_agent(&self, request: &Request) -> Result<Response> {
        // The node's files, seen from outside.
        let socket = format!("/proc/{}/root{AGENT_SOCKET}", self.try_place()?.pid);
        match warren_agent_api::call(Path::new(&socket), request, Duration::from_secs(10))? {
            Response::Error { message, .. } => bail!("the agent of {}: {message}", self.name),
            response => Ok(response),
        }
    }

    /// The last events of the programs on this node, oldest first.
    pub fn policy_events(&self) -> Result<Vec<EventStatus>> {
        match self.ask_agent(&Request::PolicyEvents { limit: 10_000 })? {
            Response::Events { events, .. } => Ok(events),
            other => bail!("the agent of {} answered {other:?}", self.name),
        }
    }

    fn query<T: serde::de::DeserializeOwned>(&self, command: &[&str]) -> Result<T> {
        let output = self.try_place()?.output(command)?;
        serde_json::from_slice(&output.stdout).with_context(|| {
            let printed = [output.stdout.as_slice(), &output.stderr].concat();
            format!(
                "{}: {} printed: {}",
                self.name,
                command.join(" "),
                String::from_utf8_lossy(&printed).trim()
            )
        })
    }

    /// Dropped packets by reason.
    pub fn drops(&self) -> Result<BTreeMap<String, u64>> {
        Ok(self.encrypt_status()?.drops.into_iter().collect())
    }

    /// Waits until the agent is connected, has `peers` peers and sees nothing amiss.
    pub fn wait_ready(&self, peers: usize, limit: Duration) -> Result<()> {
        let encryption = self.shared.config.encryption;
        wait_until(
            limit,
            &format!("{} is ready with {peers} peers", self.name),
            || {
                if !self.agent_running() {
                    return Ok(Err(anyhow::anyhow!(
                        "the agent of {} ended: {}",
                        self.name,
                        self.agent_log(8)
                    )));
                }
                let agent = self.agent_status()?;
                ensure!(agent.healthy, "{:?} {:?}", agent.failing, agent.problems);
                ensure!(agent.keyd.is_some(), "not connected to keyd");
                if encryption {
                    let status = self.encrypt_status()?;
                    let known = status.peers.iter().filter(|peer| peer.node.is_some()).count();
                    ensure!(known == peers, "{known} peers");
                    ensure!(status.enabled, "{:?}", status.mismatches);
                    let wanted = match self.shared.config.datapath {
                        DatapathChoice::Auto => status.datapath,
                        DatapathChoice::Kernel => Datapath::Kernel,
                        DatapathChoice::Userspace => Datapath::Userspace,
                    };
                    ensure!(status.datapath == wanted, "its datapath is {:?}", status.datapath);
                }
                Ok(Ok(()))
            },
        )?
    }

    /// Its processes outlive this value.
    pub(super) fn release(&self) {
        let mut state = self.lock();
        let State { power, agent, keyd } = &mut *state;
        if let Some((outer, _)) = power {
            outer.release();
        }
        agent.iter_mut().chain(keyd).for_each(Process::release);
    }

    pub(super) fn app(&self) -> String {
        format!("/usr/local/bin/{}", binaries::LAB_APP)
    }
}
