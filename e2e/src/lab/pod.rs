//! A pod: a process in a network namespace that got its network through CNI.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use ipnet::IpNet;

use super::{
    Shared,
    cni::{Added, Attachment, WARREN},
    manifests,
    net::DualStack,
    node::Node,
    process::{ALL, Place, Process},
    seen::{self, Arrivals},
    wait::patient,
};
use crate::app::{
    ask::Protocol,
    ping::PingReport,
    wire::{Answer, FlowReport, TransferReport},
};

/// The port that a pod serves if none is given.
pub const PORT: u16 = 8080;

/// What pod to make.
#[derive(Debug, Clone)]
pub struct PodSpec {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// Its service account.
    pub service_account: String,
    /// Names of its TCP ports.
    pub named_ports: Vec<(String, u16)>,
    /// On which node.
    pub node: u8,
    /// Its addresses; `None` for whatever IPAM gives.
    pub addresses: Option<DualStack>,
    /// Ports to serve.
    pub ports: Vec<u16>,
    /// Count what reaches it, from before it has an interface: [`Pod::arrivals`].
    pub watched: bool,
}

impl PodSpec {
    /// A pod in namespace `default` with label `app` = its name, serving 8080.
    pub fn new(name: &str, node: u8) -> Self {
        Self {
            name: name.into(),
            namespace: "default".into(),
            labels: BTreeMap::from([("app".into(), name.into())]),
            annotations: BTreeMap::new(),
            service_account: "default".into(),
            named_ports: Vec::new(),
            node,
            addresses: None,
            ports: vec![PORT],
            watched: false,
        }
    }
}

/// A running pod. Dropping it kills its process but leaves its network; delete it through the lab.
#[derive(Debug)]
pub struct Pod {
    spec: PodSpec,
    node: Arc<Node>,
    shared: Arc<Shared>,
    attachment: Attachment,
    added: Added,
    process: Process,
    init: u32,
    terminating: bool,
}

impl Pod {
    pub(super) fn create(node: Arc<Node>, shared: Arc<Shared>, spec: PodSpec) -> Result<Self> {
        let serial = shared.next_serial();
        let uid = format!("uid-{}-{serial}", spec.name);
        shared.manifests.pod(&spec, &uid, &node.name)?;
        let attachment = Attachment {
            container_id: format!("{}{serial:08x}", shared.id.to_lowercase()),
            netns: format!("/run/netns/{}-{serial}", spec.name),
            namespace: spec.namespace.clone(),
            name: spec.name.clone(),
            uid,
            addresses: spec.addresses.map(addresses_to_ask_for).unwrap_or_default(),
        };
        let place = node.try_place()?;
        place.run([&node.app(), "sandbox", "--netns", &attachment.netns])?;
        if spec.watched {
            seen::start(&place, &attachment.netns)?;
        }
        let started = Self::attach_and_start(&node, &shared, &spec, &attachment, &place);
        if started.is_err() {
            // What a runtime does after a failed ADD; its own errors would hide the first one.
            let _ = node.chain.del(&place, &attachment, None, |_| true);
            let _ = place.run([&node.app(), "sandbox", "--remove", "--netns", &attachment.netns]);
            let _ = shared
                .manifests
                .remove(&manifests::pod_file(&spec.namespace, &spec.name));
        }
        let (added, process, init) = started?;
        Ok(Self {
            spec,
            node,
            shared,
            attachment,
            added,
            process,
            init,
            terminating: false,
        })
    }

    fn attach_and_start(
        node: &Node,
        shared: &Shared,
        spec: &PodSpec,
        attachment: &Attachment,
        place: &Place,
    ) -> Result<(Added, Process, u32)> {
        let added = node
            .chain
            .add(place, attachment)
            .with_context(|| format!("pod {}", spec.name))?;
        let ports: Vec<_> = spec.ports.iter().map(u16::to_string).collect();
        let place = Place {
            name: format!("pod {}", spec.name),
            ..place.clone()
        };
        let app = node.app();
        let command = [
            &app,
            "pod-outer",
            "--name",
            &spec.name,
            "--netns",
            &attachment.netns,
            "--port",
            &ports.join(","),
        ];
        let (process, init) = place.spawn_init(command, &shared.log(&format!("pod-{}", spec.name)))?;
        Ok((added, process, init))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Namespace and name, as the API writes them.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.spec.namespace, self.spec.name)
    }

    /// Its node.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Its addresses, as CNI returned them.
    pub fn addresses(&self) -> &[IpAddr] {
        &self.added.addresses
    }

    /// Its address of a family.
    pub fn address(&self, v6: bool) -> Result<IpAddr> {
        super::of_family(&self.added.addresses, v6)
            .with_context(|| format!("pod {} lacks a family", self.spec.name))
    }

    /// The node's end of its veth.
    pub fn host_interface(&self) -> Result<&str> {
        self.added
            .host_interface
            .as_deref()
            .context("CNI named no interface of the host")
    }

    /// What has reached a watched pod.
    pub fn arrivals(&self) -> Result<Arrivals> {
        seen::read(&self.node.try_place()?, &self.attachment.netns)
    }

    /// Gives the Pod object other labels.
    pub fn relabel(&mut self, labels: &[(&str, &str)]) -> Result<()> {
        let labels = labels.iter().map(|(key, value)| ((*key).into(), (*value).into()));
        self.spec.labels = labels.collect();
        self.rewrite()
    }

    /// Gives the Pod object other annotations.
    pub fn annotate(&mut self, annotations: &[(&str, &str)]) -> Result<()> {
        let annotations = annotations
            .iter()
            .map(|(key, value)| ((*key).into(), (*value).into()));
        self.spec.annotations = annotations.collect();
        self.rewrite()
    }

    fn rewrite(&self) -> Result<()> {
        self.shared
            .manifests
            .pod(&self.spec, &self.attachment.uid, &self.node.name)
    }

    /// Where a tool of this pod writes its log.
    pub(super) fn log(&self, tool: &str) -> std::path::PathBuf {
        self.shared.log(&format!("{tool}-{}", self.spec.name))
    }

    /// What CNI knows of it.
    pub fn attachment(&self) -> (&Attachment, &Added) {
        (&self.attachment, &self.added)
    }

    /// Where commands in this pod run.
    pub fn place(&self) -> Place {
        Place {
            pid: self.init,
            kinds: ALL,
            app: self.shared.app(),
            name: format!("pod {}", self.spec.name),
        }
    }

    /// Asks a server.
    pub fn ask(&self, protocol: Protocol, to: IpAddr, size: usize) -> Result<Answer> {
        self.ask_port(protocol, SocketAddr::new(to, PORT), size)
    }

    /// Asks a server on any port.
    pub fn ask_port(&self, protocol: Protocol, to: SocketAddr, size: usize) -> Result<Answer> {
        ask_from(&self.place(), protocol, to, size, 5000)
    }

    /// Pings.
    pub fn ping(&self, to: IpAddr, count: u16, size: usize) -> Result<PingReport> {
        ping_from(&self.place(), to, count, size)
    }

    /// Sends `bytes` bytes over TCP.
    pub fn transfer(&self, to: IpAddr, bytes: u64) -> Result<TransferReport> {
        self.transfer_port(SocketAddr::new(to, PORT), bytes)
    }

    /// Sends `bytes` bytes over TCP to any port.
    pub fn transfer_port(&self, to: SocketAddr, bytes: u64) -> Result<TransferReport> {
        let to = to.to_string();
        let app = self.node.app();
        let timeout = patient(Duration::from_secs(20)).as_millis().to_string();
        let command = ["--bytes", &bytes.to_string(), "--timeout", &timeout];
        let text = self
            .place()
            .run([app.as_str(), "transfer", "--to", &to].into_iter().chain(command))?;
        Ok(serde_json::from_str(&text)?)
    }

    /// Starts numbered UDP packets to another pod.
    pub fn flow(&self, to: IpAddr, rate: u32) -> Result<Flow> {
        self.flow_port(SocketAddr::new(to, PORT), rate)
    }

    /// Starts numbered UDP packets to any port.
    pub fn flow_port(&self, to: SocketAddr, rate: u32) -> Result<Flow> {
        self.start_flow(to, rate, &[])
    }

    /// Starts `count` numbered UDP packets to another pod, whatever becomes of them: a receiver that does not
    /// report at once is not waited for.
    pub fn burst(&self, to: IpAddr, rate: u32, count: u64) -> Result<Flow> {
        let count = count.to_string();
        self.start_flow(
            SocketAddr::new(to, PORT),
            rate,
            &["--count", &count, "--patience", "200"],
        )
    }

    fn start_flow(&self, to: SocketAddr, rate: u32, more: &[&str]) -> Result<Flow> {
        let (app, to, rate) = (self.node.app(), to.to_string(), rate.to_string());
        let command = [app.as_str(), "flow", "--to", &to, "--rate", &rate];
        let mut command = self.place().command(command.iter().chain(more));
        let log = self.shared.log(&format!("flow-{}", self.spec.name));
        let errors = std::fs::File::options().create(true).append(true).open(&log)?;
        let child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .context("cannot start a flow")?;
        Ok(Flow {
            process: Process::adopt(child, &format!("flow from {}", self.spec.name), &log),
        })
    }

    /// The pod terminates, as seen by the control plane and by Warren: its manifest is gone and `warren-cni` has
    /// had its DEL. Its process and its veth still live.
    pub fn begin_termination(&mut self) -> Result<()> {
        ensure!(!self.terminating, "it terminates already");
        self.terminating = true;
        self.shared
            .manifests
            .remove(&manifests::pod_file(&self.spec.namespace, &self.spec.name))?;
        self.node.chain.del(
            &self.node.try_place()?,
            &self.attachment,
            Some(&self.added),
            |kind| kind == WARREN,
        )
    }

    /// Its process ends; nothing is told to anybody.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    pub(super) fn delete(mut self) -> Result<()> {
        self.process.kill()?;
        let place = self.node.try_place()?;
        let deleted = self
            .node
            .chain
            .del(&place, &self.attachment, Some(&self.added), |_| true);
        place.run([
            &self.node.app(),
            "sandbox",
            "--remove",
            "--netns",
            &self.attachment.netns,
        ])?;
        if !self.terminating {
            self.shared
                .manifests
                .remove(&manifests::pod_file(&self.spec.namespace, &self.spec.name))?;
        }
        deleted
    }

    /// Its process outlives this value.
    pub fn release(&mut self) {
        self.process.release();
    }
}

/// Asks from any place in the lab, waiting `timeout_ms` at most.
pub fn ask_from(
    place: &Place,
    protocol: Protocol,
    to: SocketAddr,
    size: usize,
    timeout_ms: u64,
) -> Result<Answer> {
    let protocol = match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Http => "http",
    };
    let text = place.run([
        &place.app.to_string_lossy(),
        "ask",
        "--protocol",
        protocol,
        "--to",
        &to.to_string(),
        "--size",
        &size.to_string(),
        "--timeout",
        &patient(Duration::from_millis(timeout_ms)).as_millis().to_string(),
    ])?;
    Ok(serde_json::from_str(&text)?)
}

/// Pings from any place in the lab.
pub fn ping_from(place: &Place, to: IpAddr, count: u16, size: usize) -> Result<PingReport> {
    let app = place.app.to_string_lossy();
    let text = place.run([
        &app,
        "ping",
        "--to",
        &to.to_string(),
        "--count",
        &count.to_string(),
        "--size",
        &size.to_string(),
        "--timeout",
        &patient(Duration::from_secs(3)).as_millis().to_string(),
    ])?;
    Ok(serde_json::from_str(&text)?)
}

fn addresses_to_ask_for(addresses: DualStack) -> Vec<IpNet> {
    let [v4, v6] = super::net::shared_ranges().map(|range| range.prefix_len());
    [(IpAddr::from(addresses.v4), v4), (addresses.v6.into(), v6)]
        .into_iter()
        .map(|(address, length)| IpNet::new_assert(address, length))
        .collect()
}

/// A running flow of numbered packets.
#[derive(Debug)]
pub struct Flow {
    process: Process,
}

impl Flow {
    /// Stops sending; the report may take a while.
    pub fn stop(&mut self) {
        drop(self.process.stdin());
    }

    /// Stops sending and returns what became of the packets.
    pub fn finish(self) -> Result<FlowReport> {
        Ok(serde_json::from_str(&self.process.finish()?)?)
    }
}
