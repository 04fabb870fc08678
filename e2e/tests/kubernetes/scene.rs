//! The cluster and the pods that scenarios share.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use warren_e2e::{
    app::{ask::Protocol, wire::FlowReport},
    capture::{Capture, Counts, Mesh},
    cluster::{
        Cluster, Options,
        pod::{AppPod, PORT, finish},
    },
    lab::Process,
};

/// Until pods run, or a change has reached every node.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);

/// The NodePort of the service `app`.
pub(crate) const NODE_PORT: u16 = 30080;

pub(crate) struct Scene {
    pub(crate) cluster: Cluster,
    /// One on each node, behind the service `app`; in the order of the nodes.
    pub(crate) pods: Vec<AppPod>,
}

impl Scene {
    /// A cluster with nothing in it.
    pub(crate) fn start() -> Result<Self> {
        let cluster = Cluster::start(Options {
            verbose: true,
            ..Options::default()
        })?;
        Ok(Self {
            cluster,
            pods: Vec::new(),
        })
    }

    /// Starts the pods that all scenarios use.
    pub(crate) fn deploy(&mut self) -> Result<()> {
        let labels = json!({"app": "app"});
        let nodes: Vec<String> = self
            .cluster
            .nodes()
            .iter()
            .map(|node| node.name.clone())
            .collect();
        let mut objects: Vec<_> = nodes
            .iter()
            .map(|node| Cluster::app(&format!("app-{node}"), node, &labels))
            .collect();
        let service = |name: &str, kind: &str, port: serde_json::Value| {
            json!({
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": name},
                "spec": {"type": kind, "selector": labels, "ipFamilyPolicy": "RequireDualStack", "ports": [port]},
            })
        };
        objects.push(service(
            "app",
            "ClusterIP",
            json!({"port": 80, "targetPort": PORT}),
        ));
        objects.push(service(
            "app-outside",
            "NodePort",
            json!({"port": 80, "targetPort": PORT, "nodePort": NODE_PORT}),
        ));
        self.cluster.apply(&objects)?;
        self.cluster.wait_pods(PATIENCE)?;
        self.pods = nodes
            .iter()
            .map(|node| self.cluster.app_pod(&format!("app-{node}")))
            .collect::<Result<_>>()?;
        Ok(())
    }

    /// Adds a pod and waits until it runs.
    pub(crate) fn add_pod(&self, name: &str, node: &str) -> Result<AppPod> {
        self.cluster
            .apply(&[Cluster::app(name, node, &json!({"extra": name}))])?;
        self.cluster.wait_ready(&["pod", name], PATIENCE)?;
        self.cluster.app_pod(name)
    }

    /// Removes it.
    pub(crate) fn remove_pod(&self, pod: &AppPod) -> Result<()> {
        self.cluster
            .kubectl(["delete", "pod", &pod.name, "--wait"])
            .map(drop)
    }

    /// Counts what passes between the nodes.
    pub(crate) fn capture(&self) -> Result<Capture> {
        Capture::start(self.cluster.underlay(), Mesh::of(&self.cluster.config()?))
    }

    /// Numbered packets between the first and the second, and the second and the third pod, both families.
    pub(crate) fn start_flows(&self) -> Result<Vec<Process>> {
        let pairs = self.pods.iter().zip(self.pods.iter().skip(1));
        pairs
            .flat_map(|(from, to)| {
                to.addresses
                    .iter()
                    .map(move |to| from.start_flow((*to, PORT).into()))
            })
            .collect()
    }
}

impl Scene {
    /// Keeps what explains a failure beside the logs.
    pub(crate) fn failed(&mut self, name: &str) {
        let mut text = String::new();
        let questions: [&[&str]; 4] = [
            &["get", "nodes,pods,svc,meshnodes", "-A", "-o", "wide"],
            &["get", "events", "-A", "--sort-by=.lastTimestamp"],
            &[
                "logs",
                "-n",
                "kube-system",
                "-l",
                "app.kubernetes.io/part-of=warren",
                "--all-containers",
                "--prefix",
                "--tail=200",
            ],
            &[
                "logs",
                "-n",
                "kube-system",
                "-l",
                "app.kubernetes.io/part-of=warren",
                "-c",
                "mesh-agent",
                "--previous",
                "--prefix",
            ],
        ];
        for question in questions {
            text += &format!("$ kubectl {}\n", question.join(" "));
            if let Ok(output) = self.cluster.kubectl_output(question.iter().copied()) {
                text += &String::from_utf8_lossy(&output.stdout);
                text += &String::from_utf8_lossy(&output.stderr);
            }
        }
        match self.cluster.keep_logs() {
            Ok(folder) => {
                let file = folder.join(format!("{name}.txt"));
                let _ = fs::write(&file, text);
                println!("  see {} and the logs beside it", file.display());
            }
            Err(error) => println!("  the logs are lost: {error:#}"),
        }
    }
}

/// No packet of any flow was lost or doubled.
pub(crate) fn nothing_lost(flows: Vec<Process>) -> Result<()> {
    for flow in flows {
        let report: FlowReport = finish(flow)?;
        ensure!(report.sent > 0, "a flow sent nothing");
        ensure!(report.lost == 0 && report.duplicated == 0, "{report:?}");
    }
    Ok(())
}

/// Only WireGuard between the nodes.
pub(crate) fn nothing_in_clear(counts: &Counts) -> Result<()> {
    ensure!(counts.plaintext == 0, "in clear: {:?}", counts);
    ensure!(counts.encrypted > 0, "nothing was encrypted: {counts:?}");
    Ok(())
}

/// `to` answers `from` by its own name: both families, TCP, UDP, ICMP, small, 1,400 bytes and 64 KiB.
pub(crate) fn answers(from: &AppPod, to: &AppPod) -> Result<()> {
    for address in &to.addresses {
        let at = (*address, PORT).into();
        for size in [64, 1400, 64 << 10] {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let answer = from.ask(protocol, at, size).with_context(|| {
                    format!("{} -> {} {address} {protocol:?} {size} bytes", from.name, to.name)
                })?;
                ensure!(
                    answer.name == to.name,
                    "{} asked {} and {} answered",
                    from.name,
                    to.name,
                    answer.name
                );
            }
        }
        let report = from.ping(*address, 1000)?;
        ensure!(
            report.received == report.sent,
            "{} -> {address}: {report:?}",
            from.name
        );
    }
    Ok(())
}
