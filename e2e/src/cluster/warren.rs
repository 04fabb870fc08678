//! Installing Warren into a cluster, the way a user does: with Helm, from the chart.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde::de::DeserializeOwned;
use serde_json::Value;
use warren_agent_api::{AgentStatus, EncryptStatus};
use warren_model::ClusterConfig;

use super::{Cluster, address, cgroup, tools};
use crate::lab::{
    net::{node_pools, pod_pools},
    wait::wait_until,
};

/// How long an installation may take until everything runs.
const INSTALL: Duration = Duration::from_secs(120);

impl Cluster {
    /// `helm install`, with more `--set` values; returns when everything is ready.
    pub fn install(&self, set: &[&str]) -> Result<()> {
        self.helm("install", set)?;
        self.wait_pods(INSTALL)
    }

    /// `helm upgrade` to other values; returns when everything is ready.
    pub fn upgrade(&self, set: &[&str]) -> Result<()> {
        self.helm("upgrade", set)?;
        self.wait_pods(INSTALL)
    }

    /// The configuration that Warren runs with.
    pub fn config(&self) -> Result<ClusterConfig> {
        let map = self.get(["configmap", "warren-config", "-n", "kube-system"])?;
        let text = map["data"]["cluster.yaml"]
            .as_str()
            .context("warren-config has no cluster.yaml")?;
        serde_saphyr::from_str(text).context("warren-config cannot be read")
    }

    /// What a node's agent says of its encryption, asked the way a user does.
    pub fn encrypt_status(&self, node: &str) -> Result<EncryptStatus> {
        self.ask_agent(node, &["encrypt", "status"])
    }

    /// What it says of itself.
    pub fn agent_status(&self, node: &str) -> Result<AgentStatus> {
        self.ask_agent(node, &["status"])
    }

    fn ask_agent<T: DeserializeOwned>(&self, node: &str, command: &[&str]) -> Result<T> {
        let agent = self.pod_on("mesh-agent", node)?;
        let exec = ["-n", "kube-system", "exec", &agent, "--", "mesh-agent"];
        let output = self.kubectl_output([&exec, command, &["-o", "json"]].concat())?;
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("{agent}: {}", String::from_utf8_lossy(&output.stderr).trim()))
    }

    /// The pods of a part of Warren (`keyd`, `mesh-agent`), as the API server has them.
    pub fn pods_of(&self, part: &str) -> Result<Vec<Value>> {
        self.pods_where(part, &[])
    }

    fn pods_where(&self, part: &str, more: &[&str]) -> Result<Vec<Value>> {
        let label = format!("app.kubernetes.io/name={part}");
        let which = ["pods", "-n", "kube-system", "-l", &label];
        let mut list = self.get([&which, more].concat())?;
        match list["items"].take() {
            Value::Array(pods) => Ok(pods),
            other => bail!("kubectl lists no pods but {other}"),
        }
    }

    /// The metrics of a part of Warren on the node with this address.
    pub fn metrics(&self, part: &str, host: &str) -> Result<String> {
        let port = if part == "keyd" { 9964 } else { 9962 };
        let url = format!("http://{host}:{port}/metrics");
        self.control_place().run(["curl", "-sS", "--max-time", "5", &url])
    }

    /// Name of the pod of a part of Warren on a node.
    pub fn pod_on(&self, part: &str, node: &str) -> Result<String> {
        let pods = self.pods_where(part, &["--field-selector", &format!("spec.nodeName={node}")])?;
        let mut alive = pods
            .iter()
            .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        let name = alive.next().and_then(|pod| pod["metadata"]["name"].as_str());
        Ok(name
            .with_context(|| format!("there is no pod of {part} on {node}"))?
            .to_owned())
    }

    /// Waits until every node's agent says that encryption is as wanted, with all others as peers.
    pub fn wait_encrypted(&self) -> Result<()> {
        for node in self.nodes() {
            wait_until(INSTALL, &format!("{} encrypts to every peer", node.name), || {
                let status = self.encrypt_status(&node.name)?;
                ensure!(status.enabled, "{:?}", status.mismatches);
                let peers = status.peers.len();
                ensure!(peers == self.nodes().len() - 1, "{peers} peers");
                Ok(())
            })?;
        }
        Ok(())
    }

    fn helm(&self, verb: &str, set: &[&str]) -> Result<()> {
        let list = |items: Vec<String>| format!("{{{}}}", items.join(","));
        let text = |items: [ipnet::IpNet; 2]| list(items.iter().map(ToString::to_string).collect());
        let mut command = vec![
            tools::path("helm")?,
            verb.into(),
            "warren".into(),
            tools::chart().display().to_string(),
            "--namespace=kube-system".into(),
            "--kubeconfig".into(),
            self.folder().join("pki/admin.conf").display().to_string(),
        ];
        let fixed = [
            format!("podPools={}", text(pod_pools())),
            format!("nodePools={}", text(node_pools())),
            format!(
                "serviceCIDRs={}",
                list(address::SERVICE_CIDRS.map(String::from).to_vec())
            ),
            "image.pullPolicy=Never".into(),
            "policy.installCRDs=true".into(),
            format!("agent.cgroup={}", cgroup::unified()?.display()),
        ];
        for value in fixed
            .into_iter()
            .chain(set.iter().map(|value| (*value).to_owned()))
        {
            command.extend(["--set".into(), value]);
        }
        // Helm keeps a cache in the home folder; this one goes with the cluster.
        let home = format!("HELM_CACHE_HOME={}", self.folder().join("helm").display());
        let command = ["env".to_owned(), home].into_iter().chain(command);
        self.control_place().run(command).map(drop)
    }
}
