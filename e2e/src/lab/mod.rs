//! The stand-alone lab: nodes and pods as namespaces of this machine, joined by a bridge in a namespace of
//! its own.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use warren_e2e::lab::{Lab, LabOptions, PodSpec};
//! let lab = Lab::start(LabOptions::default())?;
//! let client = lab.add_pod(PodSpec::new("client", 1))?;
//! let server = lab.add_pod(PodSpec::new("server", 2))?;
//! assert_eq!(client.ask(warren_e2e::app::ask::Protocol::Tcp, server.addresses()[0], 64)?.name, "server");
//! # Ok(()) }
//! ```

pub mod binaries;
pub mod check;
mod clock;
pub mod cni;
mod force;
mod keys;
mod load;
pub mod manifests;
pub mod net;
mod node;
mod options;
mod pod;
pub mod policies;
pub mod process;
mod running;
pub mod secrets;
pub mod seen;
pub mod service;
pub mod wait;

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use warren_model::{ClusterConfig, PrefixSource};

pub use self::{
    check::{Check, Checked, Hammer, Session, all_as_expected, check},
    cni::MainPlugin,
    keys::QUICKLY,
    load::Load,
    node::{AGENT_SOCKET, KEYD_SOCKET, Node},
    options::{DATAPATH_VARIABLE, LabOptions},
    pod::{Flow, PORT, Pod, PodSpec, ask_from, ping_from},
    process::{Place, Process},
    running::{RunningLab, running},
    service::ServiceSpec,
};
use self::{
    manifests::{Manifests, NodeManifest},
    process::{ALL, NET},
};
use crate::{
    capture::{Capture, Mesh},
    inside::{DETACH, KEEP_LOGS},
};

/// Keeps a failed lab running when set to anything but `0`.
pub const KEEP_VARIABLE: &str = "WARREN_LAB_KEEP";
/// The start of every lab folder's name.
const PREFIX: &str = "warren-lab-";

/// What nodes and pods share of their lab.
#[derive(Debug)]
struct Shared {
    id: String,
    dir: PathBuf,
    options: LabOptions,
    config: ClusterConfig,
    underlay: Place,
    manifests: Manifests,
    serial: AtomicU64,
}

impl Shared {
    fn app(&self) -> PathBuf {
        self.dir.join("bin").join(binaries::LAB_APP)
    }

    fn log(&self, name: &str) -> PathBuf {
        self.dir.join("logs").join(format!("{name}.log"))
    }

    /// A number never used before in this lab.
    fn next_serial(&self) -> u64 {
        self.serial.fetch_add(1, Ordering::Relaxed)
    }
}

/// A running lab. Dropping it removes everything; so does the end of this process, by whatever cause.
#[derive(Debug)]
pub struct Lab {
    shared: Arc<Shared>,
    nodes: Mutex<BTreeMap<u8, Arc<Node>>>,
    failed: AtomicBool,
    reaper: Child,
    pipe: Option<ChildStdin>,
}

impl Lab {
    /// Builds the lab; with Warren, returns when every node is ready for pods.
    pub fn start(options: LabOptions) -> Result<Self> {
        ensure!(
            (1..=net::MAX_NODES).contains(&options.nodes),
            "a lab has 1 to {} nodes",
            net::MAX_NODES
        );
        let dir = tempfile::Builder::new()
            .prefix(PREFIX)
            .rand_bytes(6)
            .tempdir()?
            .keep();
        let id = dir
            .to_string_lossy()
            .rsplit('-')
            .next()
            .unwrap_or_default()
            .to_owned();
        let mut names = vec![binaries::LAB_APP];
        if options.warren {
            names.extend(binaries::WARREN);
        }
        let started = binaries::gather(&dir.join("bin"), &names).and_then(|()| start_reaper(&dir, &id));
        let (reaper, pipe, underlay_pid) = started.inspect_err(|_| drop(fs::remove_dir_all(&dir)))?;
        let app = dir.join("bin").join(binaries::LAB_APP);
        let underlay = Place {
            pid: underlay_pid,
            kinds: NET,
            app: app.clone(),
            name: format!("the underlay of lab {id}"),
        };
        let config = options.cluster_config();
        let shared = Shared {
            manifests: Manifests::create(dir.join("manifests"))?,
            id,
            dir,
            options,
            config,
            underlay,
            serial: AtomicU64::new(1),
        };
        let lab = Self {
            shared: Arc::new(shared),
            nodes: Mutex::default(),
            failed: AtomicBool::new(false),
            reaper,
            pipe: Some(pipe),
        };
        lab.build().inspect_err(|_| lab.fail())?;
        Ok(lab)
    }

    /// Builds a lab, runs a scenario in it, and on an error says how to enter and where the logs are.
    pub fn run(options: LabOptions, scenario: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        let lab = Self::start(options)?;
        scenario(&lab).inspect_err(|_| lab.fail())
    }

    fn build(&self) -> Result<()> {
        for namespace in ["default", "demo", "kube-system"] {
            self.shared.manifests.namespace(namespace)?;
        }
        let count = self.shared.options.nodes;
        for n in 1..=count {
            self.boot_new(n)?;
        }
        for node in self.nodes() {
            self.connect(&node)?;
        }
        if self.shared.options.warren {
            let first = self.node(1);
            first.start_keyd()?;
            for node in self.nodes() {
                node.enroll(&first)?;
                node.start_agent()?;
            }
            self.wait_ready(Duration::from_secs(120))?;
        }
        Ok(())
    }

    /// Adds a node to the running lab: `node<n>`, with routes from and to all others.
    pub fn add_node(&self, n: u8) -> Result<Arc<Node>> {
        ensure!(!self.lock().contains_key(&n), "node{n} exists already");
        let node = self.boot_new(n)?;
        for node in self.nodes() {
            self.connect(&node)?;
        }
        if self.shared.options.warren {
            node.enroll(&self.node(1))?;
            node.start_agent()?;
        }
        Ok(node)
    }

    /// Removes a node for good: its Node object first, as an operator does, then the power.
    pub fn remove_node(&self, n: u8) -> Result<()> {
        let node = self
            .lock()
            .remove(&n)
            .with_context(|| format!("there is no node{n}"))?;
        self.shared.manifests.remove(&manifests::node_file(&node.name))?;
        node.power_off()
    }

    /// Switches a node off whose Node object is gone already, and wipes its disk: `n` is free again.
    pub fn forget_node(&self, n: u8) -> Result<()> {
        let node = self
            .lock()
            .remove(&n)
            .with_context(|| format!("there is no node{n}"))?;
        node.power_off()?;
        fs::remove_dir_all(node.dir()).with_context(|| format!("cannot wipe the disk of {}", node.name))
    }

    fn boot_new(&self, n: u8) -> Result<Arc<Node>> {
        let node = Arc::new(Node::new(n, Arc::clone(&self.shared))?);
        node.boot()?;
        self.describe_node(&node, &[], &[])?;
        self.lock().insert(n, Arc::clone(&node));
        Ok(node)
    }

    /// Writes the node's Node object with labels and annotations.
    pub fn describe_node(
        &self,
        node: &Node,
        labels: &[(&str, &str)],
        annotations: &[(&str, &str)],
    ) -> Result<()> {
        let cidrs = match self.shared.options.prefix_source {
            PrefixSource::PodCidr => net::pod_cidrs(node.number).to_vec(),
            PrefixSource::PodIp => Vec::new(),
        };
        let owned = |pairs: &[(&str, &str)]| {
            let pairs = pairs
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
            pairs.collect::<BTreeMap<_, _>>()
        };
        self.shared.manifests.node(&NodeManifest {
            name: &node.name,
            uid: &node.uid(),
            addresses: net::node_address(node.number),
            cidrs: &cidrs,
            labels: owned(labels),
            annotations: owned(annotations),
        })
    }

    /// The routes of the underlay: every other node's pods by that node's address. With encryption off, traffic
    /// takes them; with encryption on, so would a leak.
    pub fn connect(&self, node: &Node) -> Result<()> {
        if self.shared.options.prefix_source == PrefixSource::PodIp {
            return Ok(());
        }
        let others = self
            .nodes()
            .into_iter()
            .filter(|other| other.number != node.number);
        node.place().ip(&others
            .flat_map(|other| node.routes_to(&other))
            .collect::<Vec<_>>())
    }

    /// Waits until every agent says that encryption is as wanted, with all peers.
    pub fn wait_ready(&self, limit: Duration) -> Result<()> {
        let nodes = self.nodes();
        for node in &nodes {
            node.wait_ready(nodes.len() - 1, limit)?;
        }
        Ok(())
    }

    /// Adds a pod and starts it: manifest, sandbox, CNI ADD, process. Returns when it serves.
    pub fn add_pod(&self, spec: PodSpec) -> Result<Pod> {
        let pod = Pod::create(self.node(spec.node), Arc::clone(&self.shared), spec)?;
        if self.shared.options.prefix_source == PrefixSource::PodIp {
            self.route_pod(&pod, "replace")?;
        }
        Ok(pod)
    }

    /// Ends a pod: process, CNI DEL, sandbox, manifest.
    pub fn delete_pod(&self, pod: Pod) -> Result<()> {
        if self.shared.options.prefix_source == PrefixSource::PodIp {
            self.route_pod(&pod, "del")?;
        }
        pod.delete()
    }

    fn route_pod(&self, pod: &Pod, verb: &str) -> Result<()> {
        for node in self
            .nodes()
            .into_iter()
            .filter(|node| node.number != pod.node().number)
        {
            let gateways = net::node_address(pod.node().number).both();
            let lines = pod.addresses().iter().filter_map(|address| {
                let gateway = gateways
                    .iter()
                    .find(|gateway| gateway.is_ipv4() == address.is_ipv4())?;
                Some(format!("route {verb} {address} via {gateway}"))
            });
            // A route of the address's former owner may have replaced ours: absent is what is wanted.
            let done = node.place().ip(&lines.collect::<Vec<_>>());
            if verb != "del" {
                done?;
            }
        }
        Ok(())
    }

    /// Node `n`.
    ///
    /// # Panics
    /// Where there is none.
    #[track_caller]
    pub fn node(&self, n: u8) -> Arc<Node> {
        match self.lock().get(&n) {
            Some(node) => Arc::clone(node),
            None => panic!("the lab has no node{n}"),
        }
    }

    /// All nodes.
    pub fn nodes(&self) -> Vec<Arc<Node>> {
        self.lock().values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u8, Arc<Node>>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The underlay: a network namespace with the bridge and a port per node.
    pub fn underlay(&self) -> &Place {
        &self.shared.underlay
    }

    /// Starts counting what passes between the nodes.
    pub fn capture(&self) -> Result<Capture> {
        Capture::start(&self.shared.underlay, Mesh::of(&self.shared.config))
    }

    /// The manifests that `keyd` watches.
    pub fn manifests(&self) -> &Manifests {
        &self.shared.manifests
    }

    /// The cluster's configuration.
    pub fn config(&self) -> &ClusterConfig {
        &self.shared.config
    }

    /// The lab's id: part of its folder's name.
    pub fn id(&self) -> &str {
        &self.shared.id
    }

    /// The lab's folder.
    pub fn dir(&self) -> &Path {
        &self.shared.dir
    }

    /// How to enter everything, a line each.
    pub fn how_to_enter(&self) -> Vec<String> {
        let underlay = Place {
            kinds: ALL,
            ..self.shared.underlay.clone()
        };
        let mut lines = vec![format!("{:<16} {}", "underlay", underlay.how_to_enter())];
        for node in self.nodes() {
            if let Ok(place) = node.try_place() {
                lines.push(format!("{:<16} {}", node.name, place.how_to_enter()));
            }
        }
        lines
    }

    /// Marks the lab as failed: says how to enter and shows the ends of the logs. The logs are kept.
    pub fn fail(&self) {
        if self.failed.swap(true, Ordering::Relaxed) {
            return;
        }
        eprintln!(
            "\nlab {} failed; logs: {}",
            self.id(),
            self.dir().join("logs").display()
        );
        for entry in fs::read_dir(self.dir().join("logs"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let tail = process::tail(&entry.path(), 15);
            if !tail.is_empty() {
                eprintln!("--- {}\n{tail}", entry.file_name().to_string_lossy());
            }
        }
        if keep_wanted() {
            eprintln!(
                "--- it stays ({KEEP_VARIABLE} is set); remove it with `warren-lab down {}`",
                self.id()
            );
            for line in self.how_to_enter() {
                eprintln!("{line}");
            }
        } else {
            eprintln!("--- set {KEEP_VARIABLE}=1 to keep a failed lab running and enter it");
        }
    }

    /// Leaves the lab running after this process; `warren-lab down` removes it.
    pub fn detach(mut self) -> Result<()> {
        self.leave()
    }

    fn leave(&mut self) -> Result<()> {
        for node in self.nodes() {
            node.release();
        }
        let mut pipe = self.pipe.take().context("detached already")?;
        pipe.write_all(&[DETACH]).context("the reaper is gone")
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.fail();
        }
        if *self.failed.get_mut() {
            if keep_wanted() {
                let _ = self.leave();
                return;
            }
            if let Some(pipe) = &mut self.pipe {
                let _ = pipe.write_all(&[KEEP_LOGS]);
            }
        }
        if self.pipe.take().is_some() {
            let _ = self.reaper.wait();
        }
    }
}

fn keep_wanted() -> bool {
    std::env::var(KEEP_VARIABLE).is_ok_and(|value| !value.is_empty() && value != "0")
}

pub(crate) fn start_reaper(dir: &Path, id: &str) -> Result<(Child, ChildStdin, u32)> {
    fs::create_dir_all(dir.join("logs"))?;
    let log = fs::File::create(dir.join("logs/lab.log"))?;
    let mut reaper = Command::new(dir.join("bin").join(binaries::LAB_APP))
        .args(["reaper", "--id", id, "--dir"])
        .arg(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .context("cannot start the lab's reaper")?;
    let pipe = reaper.stdin.take().context("no pipe")?;
    let mut lines = BufReader::new(reaper.stdout.take().context("no pipe")?).lines();
    // Its pid and `ready` come from two processes, in any order.
    let (mut pid, mut ready) = (None, false);
    while pid.is_none() || !ready {
        let why = || {
            format!(
                "the lab cannot start: {}",
                process::tail(&dir.join("logs/lab.log"), 5)
            )
        };
        let line = lines.next().with_context(why)??;
        match line.parse() {
            Ok(number) => pid = Some(number),
            Err(_) => ready |= line == crate::inside::READY,
        }
    }
    Ok((reaper, pipe, pid.unwrap_or_default()))
}

/// Addresses of one family out of a list.
pub fn of_family(addresses: &[IpAddr], v6: bool) -> Option<IpAddr> {
    addresses.iter().copied().find(|address| address.is_ipv6() == v6)
}
