//! A pod of the cluster that runs the lab's application, asked without the API server: through its node's containerd.

use std::{
    net::{IpAddr, SocketAddr},
    process::Stdio,
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::Cluster;
use crate::{
    app::{
        ask::Protocol,
        ping::PingReport,
        wire::{Answer, FlowReport},
    },
    lab::process::{Place, Process},
};

/// Where the application listens.
pub const PORT: u16 = 8080;

/// A pod with the lab's application.
#[derive(Debug, Clone)]
pub struct AppPod {
    /// Its name, which it answers with.
    pub name: String,
    /// The node it runs on.
    pub node: String,
    /// IPv4 first.
    pub addresses: Vec<IpAddr>,
    place: Place,
    container: String,
}

impl Cluster {
    /// The manifest of a pod with the application, on a node.
    pub fn app(name: &str, node: &str, labels: &Value) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "nodeName": node,
                "terminationGracePeriodSeconds": 0,
                "containers": [{
                    "name": "app",
                    "image": "localhost/warren/lab-app:dev",
                    "imagePullPolicy": "Never",
                    "args": ["serve", "--name", name, "--listen", format!("[::]:{PORT}")],
                    // The application wants large socket buffers, and ICMP.
                    "securityContext": {"capabilities": {"add": ["NET_ADMIN", "NET_RAW"]}},
                    "readinessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 1},
                }],
            },
        })
    }

    /// A pod of the default namespace that is running.
    pub fn app_pod(&self, name: &str) -> Result<AppPod> {
        let object = self.get(["pod", name])?;
        let text = |pointer: &str| -> Result<String> {
            let value = object.pointer(pointer).and_then(Value::as_str);
            Ok(value
                .with_context(|| format!("pod {name} has no {pointer}"))?
                .to_owned())
        };
        let node = text("/spec/nodeName")?;
        let container = text("/status/containerStatuses/0/containerID")?;
        let addresses = object["status"]["podIPs"].as_array().into_iter().flatten();
        let addresses = addresses
            .filter_map(|entry| entry["ip"].as_str()?.parse().ok())
            .collect::<Vec<_>>();
        ensure!(
            addresses.len() == 2,
            "pod {name} has addresses {addresses:?}, not one of each family"
        );
        let place = self.nodes.iter().find(|known| known.name == node);
        Ok(AppPod {
            name: name.to_owned(),
            place: place
                .with_context(|| format!("pod {name} runs on {node}, which is no node"))?
                .place
                .clone(),
            node,
            addresses,
            container: container.trim_start_matches("containerd://").to_owned(),
        })
    }
}

impl AppPod {
    fn exec_command(&self, command: &[String]) -> Vec<String> {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let serial = format!(
            "lab-{}-{}",
            std::process::id(),
            SERIAL.fetch_add(1, Ordering::Relaxed)
        );
        let exec = [
            "ctr",
            "-n",
            "k8s.io",
            "tasks",
            "exec",
            "--exec-id",
            &serial,
            &self.container,
        ]
        .map(String::from);
        exec.into_iter().chain(command.iter().cloned()).collect()
    }

    /// Runs a command in the container.
    pub fn run(&self, command: &[String]) -> Result<String> {
        self.place
            .run(self.exec_command(command))
            .with_context(|| format!("in pod {}", self.name))
    }

    fn tool(arguments: &[&str]) -> Vec<String> {
        std::iter::once("warren-lab-app")
            .chain(arguments.iter().copied())
            .map(String::from)
            .collect()
    }

    /// One question, one answer.
    pub fn ask(&self, protocol: Protocol, to: SocketAddr, size: usize) -> Result<Answer> {
        let protocol = format!("{protocol:?}").to_lowercase();
        let (to, size) = (to.to_string(), size.to_string());
        let text = self.run(&Self::tool(&[
            "ask",
            "--protocol",
            &protocol,
            "--to",
            &to,
            "--size",
            &size,
        ]))?;
        serde_json::from_str(&text).with_context(|| format!("not an answer: {text}"))
    }

    /// ICMP echo.
    pub fn ping(&self, to: IpAddr, size: usize) -> Result<PingReport> {
        let text = self.run(&Self::tool(&[
            "ping",
            "--to",
            &to.to_string(),
            "--size",
            &size.to_string(),
        ]))?;
        serde_json::from_str(&text).with_context(|| format!("not a report: {text}"))
    }

    /// Starts numbered packets, 1,000 per second, until [`finish`].
    pub fn start_flow(&self, to: SocketAddr) -> Result<Process> {
        let command = self.exec_command(&Self::tool(&["flow", "--to", &to.to_string()]));
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
