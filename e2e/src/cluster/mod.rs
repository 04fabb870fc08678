//! A real Kubernetes cluster in namespaces of one machine: etcd, API server, controller manager, scheduler, and nodes
//! with containerd, runc, kubelet and kube-proxy (nftables), each in its own net, mount, uts, ipc, pid and cgroup
//! namespaces. Nothing is pulled from anywhere; nothing can leave the machine.
//!
//! Nodes 1 and 2 use the `ptp` CNI plugin, node 3 `bridge`. Every node has routes to the pods of the others over the
//! underlay in clear: if Warren let a packet through unencrypted it would arrive, and the capture would see it.

mod address;
pub mod api;
pub mod bench;
pub(crate) mod cgroup;
mod config;
pub mod conformance;
mod control;
pub mod hello;
pub mod inside;
mod manifests;
mod node;
mod pki;
pub mod pod;
mod shell;
mod tools;
mod warren;
mod workload;

use std::{
    fs,
    io::Write as _,
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::{address::Families, control::Control, shell::Shell};
pub use self::{config::ProxyMode, node::Node, workload::Workload};
use crate::lab::{
    process::{Place, Process},
    wait::wait_until,
};

/// How long nodes may take to be ready.
const NODES_READY: Duration = Duration::from_secs(120);

/// What kind of cluster.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Number of nodes, from 1 to 9.
    pub nodes: u8,
    /// Bring Warren's images; [`Cluster::install`] needs them.
    pub warren: bool,
    /// Say what is being done.
    pub verbose: bool,
    /// IPv6 is the first family of nodes, pods and services, IPv4 the second.
    pub ipv6_first: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            nodes: 3,
            warren: true,
            verbose: false,
            ipv6_first: false,
        }
    }
}

/// A running cluster; removed when dropped, and also when this process is killed.
pub struct Cluster {
    // Fields are dropped in this order: the shell, which removes everything, last.
    control: Control,
    nodes: Vec<Node>,
    families: Families,
    holder: Process,
    shell: Shell,
}

/// What another process needs to know of a cluster that was left running: `cluster.json` in its folder.
#[derive(Debug, Serialize, Deserialize)]
pub struct Left {
    /// Its id.
    pub id: String,
    /// Process 1 of the control plane's namespaces.
    pub control: u32,
    /// Process 1 of each node.
    pub nodes: Vec<u32>,
    /// A kubectl command line, to be run in the control plane's network namespace.
    pub kubectl: Vec<String>,
}

impl Cluster {
    /// Starts a cluster without Warren; returns when all nodes and the DNS are ready.
    pub fn start(options: Options) -> Result<Self> {
        ensure!((1..=9).contains(&options.nodes), "a cluster has 1 to 9 nodes");
        let say = |what: &str| {
            if options.verbose {
                eprintln!("cluster: {what}");
            }
        };
        let images = tools::images(options.warren)?;
        let shell = Shell::start()?;
        say(&format!("{} in {}", shell.id, shell.folder.display()));
        let (holder, place) = shell.control(options.nodes)?;
        let families = Families {
            ipv6_first: options.ipv6_first,
        };
        let control = Control::start(place, &shell.folder, options.nodes, families)?;
        say("API server ready");
        let mut cluster = Self {
            control,
            nodes: Vec::new(),
            families,
            holder,
            shell,
        };
        cluster.apply(&manifests::base(options.nodes, families))?;
        cluster.nodes = std::thread::scope(|scope| {
            let threads: Vec<_> = (1..=options.nodes)
                .map(|n| {
                    let (shell, images) = (&cluster.shell, &images);
                    scope.spawn(move || Node::start(shell, n, options.nodes, families, images))
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| {
                    thread
                        .join()
                        .unwrap_or_else(|_| anyhow::bail!("a node's thread panicked"))
                })
                .collect::<Result<_>>()
        })?;
        say("nodes started");
        cluster.wait_nodes()?;
        say("nodes ready");
        cluster.apply(&manifests::dns(families))?;
        Ok(cluster)
    }

    /// Its random id.
    pub fn id(&self) -> &str {
        &self.shell.id
    }

    /// Its folder: logs, state, certificates.
    pub fn folder(&self) -> &Path {
        &self.shell.folder
    }

    /// The nodes, in order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Runs kubectl; an error where it fails.
    pub fn kubectl<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<String> {
        self.control.place().run(&self.control.kubectl(arguments)?)
    }

    /// Runs kubectl, whatever its end.
    pub fn kubectl_output<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<Output> {
        self.control.place().output(&self.control.kubectl(arguments)?)
    }

    /// What `kubectl get ... -o json` says.
    pub fn get<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<Value> {
        let arguments = ["get", "-o", "json"].into_iter().chain(arguments);
        serde_json::from_str(&self.kubectl(arguments)?).context("kubectl's answer is no JSON")
    }

    /// Runs a command in a pod of the default namespace.
    pub fn exec(&self, pod: &str, command: &[&str]) -> Result<String> {
        self.kubectl(["exec", pod, "--"].into_iter().chain(command.iter().copied()))
    }

    /// `kubectl apply` of some objects.
    pub fn apply(&self, objects: &[Value]) -> Result<()> {
        let list = serde_json::json!({"apiVersion": "v1", "kind": "List", "items": objects});
        self.apply_text(&list.to_string())
    }

    /// `kubectl apply` of YAML or JSON.
    pub fn apply_text(&self, text: &str) -> Result<()> {
        self.kubectl_stdin(&["apply", "-f", "-"], text)
    }

    /// `kubectl delete` of the objects in YAML or JSON; returns when they are gone.
    pub fn delete_text(&self, text: &str) -> Result<()> {
        self.kubectl_stdin(&["delete", "-f", "-", "--wait"], text)
    }

    /// Runs kubectl with something to read, whatever its end.
    pub fn kubectl_with<'a>(
        &self,
        arguments: impl IntoIterator<Item = &'a str>,
        input: &[u8],
    ) -> Result<Output> {
        let command = self.control.kubectl(arguments)?;
        let mut child = self
            .control
            .place()
            .command(&command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run kubectl")?;
        child.stdin.take().context("no pipe")?.write_all(input)?;
        Ok(child.wait_with_output()?)
    }

    /// Runs kubectl with a text to read; it must succeed.
    fn kubectl_stdin(&self, arguments: &[&str], text: &str) -> Result<()> {
        let output = self.kubectl_with(arguments.iter().copied(), text.as_bytes())?;
        ensure!(
            output.status.success(),
            "kubectl {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    }

    /// The addresses of the cluster's DNS, IPv4 first.
    pub fn dns_addresses(&self) -> [IpAddr; 2] {
        address::CLUSTER_DNS
    }

    /// Where the API server runs; it has no agent.
    pub fn control_place(&self) -> &Place {
        self.control.place()
    }

    /// The underlay: its bridge sees every packet between the nodes.
    pub fn underlay(&self) -> &Place {
        &self.shell.underlay
    }

    /// Stops the API server; everything else goes on.
    pub fn stop_api_server(&mut self) -> Result<()> {
        self.control.stop_api_server()
    }

    /// Starts it again and waits until it is ready.
    pub fn start_api_server(&mut self) -> Result<()> {
        self.control.start_api_server()
    }

    /// Cuts a node's power, `f` happens, and it is powered on again with the disk it had.
    pub fn power_cycle(&mut self, node: usize, f: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        self.nodes[node].power_off()?;
        f(self)?;
        self.nodes[node].power_on(&self.shell)
    }

    /// Starts every kube-proxy anew in another mode.
    pub fn switch_proxies(&mut self, mode: ProxyMode) -> Result<()> {
        let (kubeconfig, families) = (self.shell.folder.join("pki/proxy.conf"), self.families);
        self.nodes
            .iter_mut()
            .try_for_each(|node| node.switch_proxy(&kubeconfig, mode, families))
    }

    /// Waits until every node is ready.
    pub fn wait_nodes(&self) -> Result<()> {
        self.wait_ready(&["nodes"], NODES_READY)
    }

    /// Waits until all pods (of all namespaces) that are wanted run and are ready; lists those that are not.
    pub fn wait_pods(&self, limit: Duration) -> Result<()> {
        self.wait_ready(&["daemonsets,deployments,pods", "-A"], limit)
    }

    /// Waits until the objects that `kubectl get` finds are ready; lists those that are not. Asks again and again, unlike
    /// `kubectl wait`: a watch of an API server that was away may see nothing (etcd 3.4 has no progress notifications).
    pub fn wait_ready(&self, which: &[&str], limit: Duration) -> Result<()> {
        wait_until(limit, &format!("{} are ready", which.join(" ")), || {
            let waiting = self.unready(which)?;
            ensure!(waiting.is_empty(), "not ready: {}", waiting.join(", "));
            Ok(())
        })
    }

    /// The objects that are not ready, and the workloads whose pods are not all there and ready.
    fn unready(&self, which: &[&str]) -> Result<Vec<String>> {
        let found = self.get(which.iter().copied())?;
        let objects = match found["items"].as_array() {
            Some(list) => list.as_slice(),
            None => std::slice::from_ref(&found),
        };
        let mut waiting = Vec::new();
        for object in objects {
            let (status, metadata) = (&object["status"], &object["metadata"]);
            let is_ready = match object["kind"].as_str() {
                Some("DaemonSet") => {
                    status["observedGeneration"] == metadata["generation"]
                        && status["desiredNumberScheduled"].as_u64() > Some(0)
                        && status["numberReady"] == status["desiredNumberScheduled"]
                        && status["updatedNumberScheduled"] == status["desiredNumberScheduled"]
                }
                Some("Deployment") => {
                    status["observedGeneration"] == metadata["generation"]
                        && status["readyReplicas"] == object["spec"]["replicas"]
                        && status["updatedReplicas"] == object["spec"]["replicas"]
                }
                _ => {
                    let conditions = status["conditions"].as_array();
                    let ready = |c: &Value| c["type"] == "Ready" && c["status"] == "True";
                    metadata["deletionTimestamp"].is_null()
                        && conditions.is_some_and(|all| all.iter().any(ready))
                }
            };
            if !is_ready {
                let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
                // A pod that the kubelet refused says why: "Evicted: The node had condition: [DiskPressure]."
                let why = match (status["reason"].as_str(), status["message"].as_str()) {
                    (Some(reason), Some(message)) => format!(" ({reason}: {message})"),
                    (Some(reason), None) => format!(" ({reason})"),
                    (None, _) => String::new(),
                };
                waiting.push(format!(
                    "{} {}{why}",
                    text(&object["kind"]),
                    text(&metadata["name"])
                ));
            }
        }
        Ok(waiting)
    }

    /// Leaves the cluster running after this process has ended, until [`down`].
    pub fn leave(mut self) -> Result<Left> {
        let left = Left {
            id: self.shell.id.clone(),
            control: self.control.place().pid,
            nodes: self.nodes.iter().map(|node| node.place.pid).collect(),
            kubectl: self.control.kubectl([])?,
        };
        fs::write(
            self.shell.folder.join("cluster.json"),
            serde_json::to_vec_pretty(&left)?,
        )?;
        self.control.release();
        self.holder.release();
        for node in &mut self.nodes {
            node.release();
        }
        self.shell.detach()?;
        Ok(left)
    }

    /// When something failed: keeps the logs, and says where.
    pub fn keep_logs(&mut self) -> Result<PathBuf> {
        self.shell.keep_logs()?;
        Ok(self.shell.folder.join("logs"))
    }
}

/// The clusters of this machine that were left running.
pub fn left() -> Vec<(PathBuf, Left)> {
    let read = |folder: PathBuf| {
        let text = fs::read(folder.join("cluster.json")).ok()?;
        Some((folder, serde_json::from_slice(&text).ok()?))
    };
    shell::folders().into_iter().filter_map(read).collect()
}

/// Removes a cluster that was left running, and returns when everything is gone.
pub fn down(folder: &Path) -> Result<()> {
    shell::down(folder)
}
