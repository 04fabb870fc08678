//! A pod of the cluster that runs the lab's application, asked without the API server and the container runtime: its
//! network namespace is entered.

use std::{
    net::{IpAddr, SocketAddr},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{Cluster, workload::Workload};
use crate::{
    app::{
        ask::Protocol,
        ping::PingReport,
        probe::{Probed, Target},
        wire::{Answer, FlowReport},
    },
    lab::{
        binaries,
        process::{NET, Place, Process},
        wait::wait_until,
    },
};

/// Where the application listens.
pub const PORT: u16 = 8080;

/// A pod with the lab's application.
#[derive(Debug, Clone)]
pub struct AppPod {
    /// Its namespace.
    pub namespace: String,
    /// Its name, which it answers with.
    pub name: String,
    /// The node it runs on.
    pub node: String,
    /// IPv4 first.
    pub addresses: Vec<IpAddr>,
    /// In its network namespace.
    pub place: Place,
}

impl Cluster {
    /// The manifest of a pod with the application, on a node.
    pub fn app(name: &str, node: &str, labels: &Value) -> Value {
        let mut manifest = Workload::new("default", name, node).manifest();
        manifest["metadata"]["labels"] = labels.clone();
        manifest
    }

    /// A pod of the default namespace that is running.
    pub fn app_pod(&self, name: &str) -> Result<AppPod> {
        self.running(&self.get(["pod", name])?)
    }

    /// All pods of a namespace; they must run.
    pub fn app_pods(&self, namespace: &str) -> Result<Vec<AppPod>> {
        let list = self.get(["pods", "-n", namespace])?;
        let pods = list["items"].as_array().into_iter().flatten();
        pods.map(|object| self.running(object)).collect()
    }

    fn running(&self, object: &Value) -> Result<AppPod> {
        let text = |pointer: &str| -> Result<String> {
            let value = object.pointer(pointer).and_then(Value::as_str);
            Ok(value
                .with_context(|| format!("{} has no {pointer}", object["metadata"]["name"]))?
                .to_owned())
        };
        let (name, node) = (text("/metadata/name")?, text("/spec/nodeName")?);
        let container = text("/status/containerStatuses/0/containerID")?;
        let addresses = object["status"]["podIPs"].as_array().into_iter().flatten();
        let addresses = addresses
            .filter_map(|entry| entry["ip"].as_str()?.parse().ok())
            .collect::<Vec<_>>();
        ensure!(
            addresses.len() == 2,
            "pod {name} has addresses {addresses:?}, not one of each family"
        );
        let host = self.nodes.iter().find(|known| known.name == node);
        let host = host.with_context(|| format!("pod {name} runs on {node}, which is no node"))?;
        let id = container.trim_start_matches("containerd://");
        // The container runs, but its process may not be itself yet.
        let pid = wait_until(
            Duration::from_secs(10),
            &format!("the server of pod {name} runs"),
            || {
                host.processes(id, &[binaries::LAB_APP, "serve"])?
                    .first()
                    .copied()
                    .context("it is not there")
            },
        )?;
        let place = Place {
            pid,
            kinds: NET,
            name: format!("pod {name}"),
            ..host.place.clone()
        };
        Ok(AppPod {
            namespace: text("/metadata/namespace")?,
            name,
            node,
            addresses,
            place,
        })
    }
}

impl AppPod {
    fn tool(&self, arguments: &[&str]) -> Vec<String> {
        let app = self.place.app.display().to_string();
        std::iter::once(app)
            .chain(arguments.iter().map(|word| (*word).to_owned()))
            .collect()
    }

    /// One question, one answer.
    pub fn ask(&self, protocol: Protocol, to: SocketAddr, size: usize) -> Result<Answer> {
        let protocol = format!("{protocol:?}").to_lowercase();
        let (to, size) = (to.to_string(), size.to_string());
        let text =
            self.place
                .run(self.tool(&["ask", "--protocol", &protocol, "--to", &to, "--size", &size]))?;
        serde_json::from_str(&text).with_context(|| format!("not an answer: {text}"))
    }

    /// ICMP echo.
    pub fn ping(&self, to: IpAddr, size: usize) -> Result<PingReport> {
        let text =
            self.place
                .run(self.tool(&["ping", "--to", &to.to_string(), "--size", &size.to_string()]))?;
        serde_json::from_str(&text).with_context(|| format!("not a report: {text}"))
    }

    /// Many questions at once: some should be answered, the others should meet silence.
    pub fn probe(&self, allow: &[Target], deny: &[Target]) -> Result<Vec<Probed>> {
        let mut command = self.tool(&["probe", "--timeout", "2000"]);
        for (flag, targets) in [("--allow", allow), ("--deny", deny)] {
            for target in targets {
                command.extend([flag.to_owned(), target.to_string()]);
            }
        }
        let text = self.place.run(command)?;
        serde_json::from_str(&text).with_context(|| format!("not a report: {text}"))
    }

    /// Starts numbered packets, 1,000 per second, until [`finish`].
    pub fn start_flow(&self, to: SocketAddr) -> Result<Process> {
        let command = self.tool(&["flow", "--to", &to.to_string()]);
        let child = self
            .place
            .command(command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start a flow in pod {}", self.name))?;
        Ok(Process::adopt(
            child,
            &format!("the flow of pod {}", self.name),
            std::path::Path::new("/dev/null"),
        ))
    }
}

/// Ends a flow and returns what became of its packets.
pub fn finish(flow: Process) -> Result<FlowReport> {
    let text = flow.finish()?;
    serde_json::from_str(&text).with_context(|| format!("not a report: {text}"))
}
