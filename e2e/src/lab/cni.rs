//! A small container runtime's view of CNI 1.0.0: a chain of plugins, ADD forwards with `prevResult`, DEL
//! backwards.

use std::{io::Write as _, net::IpAddr, process::Stdio};

use anyhow::{Context as _, Result, bail};
use ipnet::IpNet;
use serde_json::{Value, json};

use super::process::Place;

/// The version of the specification that the lab speaks (the newest that Debian's plugins know).
pub const VERSION: &str = "1.0.0";
/// Where plugins are looked for, as a runtime's `CNI_PATH`.
const PATH: &str = "/usr/local/bin:/usr/lib/cni";
/// The type of our own plugin.
pub const WARREN: &str = "warren-cni";

/// Which plugin makes the interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MainPlugin {
    /// A routed veth.
    Ptp,
    /// A veth on a bridge.
    Bridge,
}

/// A node's chain.
#[derive(Debug, Clone)]
pub struct Chain {
    plugins: Vec<Value>,
}

impl Chain {
    /// The chain of a node: the main plugin with host-local addresses out of `ranges` and the usual
    /// masquerading for the outside world, then `warren-cni` if wanted.
    pub fn new(main: MainPlugin, ranges: &[IpNet], warren: bool) -> Self {
        let ranges: Vec<_> = ranges.iter().map(|range| json!([{"subnet": range}])).collect();
        let ipam = json!({
            "type": "host-local",
            "ranges": ranges,
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        });
        let mut plugins = vec![match main {
            MainPlugin::Ptp => json!({"type": "ptp", "ipMasq": true, "ipam": ipam}),
            MainPlugin::Bridge => json!({
                "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true, "ipam": ipam,
            }),
        }];
        if warren {
            plugins.push(json!({"type": WARREN, "socket": "/run/warren/agent.sock", "timeoutSeconds": 30}));
        }
        Self { plugins }
    }

    /// The conflist, as it would lie in `/etc/cni/net.d`.
    pub fn conflist(&self) -> Value {
        json!({"cniVersion": VERSION, "name": "lab", "plugins": self.plugins})
    }

    /// The types of the plugins, first to last.
    pub fn types(&self) -> Vec<&str> {
        self.plugins
            .iter()
            .filter_map(|plugin| plugin["type"].as_str())
            .collect()
    }

    /// ADD through the whole chain. After a failure the caller owes a DEL, as a runtime does.
    pub fn add(&self, node: &Place, attachment: &Attachment) -> Result<Added> {
        let mut result: Option<Value> = None;
        for plugin in &self.plugins {
            let text = self.call(node, attachment, "ADD", plugin, result.as_ref())?;
            result = Some(serde_json::from_str(&text).context("the plugin's result is no JSON")?);
        }
        Added::parse(result.context("the chain is empty")?)
    }

    /// DEL in reverse through those plugins that `wanted` accepts. All are tried; the first error is returned.
    pub fn del(
        &self,
        node: &Place,
        attachment: &Attachment,
        added: Option<&Added>,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<()> {
        let mut outcome = Ok(());
        for plugin in self
            .plugins
            .iter()
            .rev()
            .filter(|plugin| plugin["type"].as_str().is_some_and(&wanted))
        {
            let done = self.call(node, attachment, "DEL", plugin, added.map(|added| &added.result));
            outcome = outcome.and(done.map(drop));
        }
        outcome
    }

    /// CHECK through the whole chain.
    pub fn check(&self, node: &Place, attachment: &Attachment, added: &Added) -> Result<()> {
        for plugin in &self.plugins {
            self.call(node, attachment, "CHECK", plugin, Some(&added.result))?;
        }
        Ok(())
    }

    fn call(
        &self,
        node: &Place,
        attachment: &Attachment,
        verb: &str,
        plugin: &Value,
        previous: Option<&Value>,
    ) -> Result<String> {
        let kind = plugin["type"].as_str().context("a plugin without type")?;
        let mut config = plugin.clone();
        config["cniVersion"] = json!(VERSION);
        config["name"] = json!("lab");
        if let Some(previous) = previous {
            config["prevResult"] = previous.clone();
        }
        if !attachment.addresses.is_empty() {
            config["args"] = json!({"cni": {"ips": attachment.addresses}});
        }
        // Plugins find each other (IPAM) by CNI_PATH, which lists first the lab's binaries.
        let program = if kind == WARREN {
            format!("/usr/local/bin/{kind}")
        } else {
            format!("/usr/lib/cni/{kind}")
        };
        let mut child = node
            .command([program])
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &attachment.container_id)
            .env("CNI_NETNS", &attachment.netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_ARGS", attachment.args())
            .env("CNI_PATH", PATH)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run a CNI plugin")?;
        child
            .stdin
            .take()
            .context("no pipe")?
            .write_all(config.to_string().as_bytes())?;
        let output = child.wait_with_output()?;
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            bail!(
                "CNI {verb} of {kind} failed: {}",
                error_sentence(&stdout, &output.stderr)
            );
        }
        Ok(stdout)
    }
}

fn error_sentence(stdout: &str, stderr: &[u8]) -> String {
    let error: Value = serde_json::from_str(stdout).unwrap_or_default();
    match error["msg"].as_str() {
        Some(message) => {
            format!(
                "{message} {} (code {})",
                error["details"].as_str().unwrap_or_default(),
                error["code"]
            )
        }
        None => format!("{stdout}{}", String::from_utf8_lossy(stderr)),
    }
}

/// What identifies an attachment.
#[derive(Debug, Clone)]
pub struct Attachment {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// The pod's network namespace, a path on the node.
    pub netns: String,
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// UID of the Pod object.
    pub uid: String,
    /// Addresses to ask for; empty for whatever comes.
    pub addresses: Vec<IpNet>,
}

impl Attachment {
    fn args(&self) -> String {
        format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
            self.namespace, self.name, self.container_id, self.uid
        )
    }
}

/// What ADD returned.
#[derive(Debug, Clone)]
pub struct Added {
    /// The pod's addresses.
    pub addresses: Vec<IpAddr>,
    /// The host's end of the veth.
    pub host_interface: Option<String>,
    /// The whole result.
    pub result: Value,
}

impl Added {
    fn parse(result: Value) -> Result<Self> {
        let list = |key: &str| result[key].as_array().cloned().unwrap_or_default();
        let addresses = list("ips")
            .iter()
            .map(|ip| {
                let text = ip["address"].as_str().context("an ips entry without address")?;
                Ok(text
                    .parse::<IpNet>()
                    .with_context(|| format!("{text} is no address"))?
                    .addr())
            })
            .collect::<Result<Vec<_>>>()?;
        let host_interface = list("interfaces")
            .iter()
            .find(|interface| {
                interface["sandbox"].as_str().unwrap_or_default().is_empty()
                    && interface["name"]
                        .as_str()
                        .is_some_and(|name| name.starts_with("veth"))
            })
            .and_then(|interface| interface["name"].as_str().map(str::to_owned));
        Ok(Self {
            addresses,
            host_interface,
            result,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_yields_addresses_and_the_host_end() {
        let added = Added::parse(json!({
            "interfaces": [
                {"name": "cni0"}, {"name": "veth12", "mac": "02:00:00:00:00:01"}, {"name": "eth0", "sandbox": "/run/netns/x"},
            ],
            "ips": [{"address": "10.244.1.2/24", "interface": 2}, {"address": "fd00::2/64", "interface": 2}],
        }))
        .unwrap();
        assert_eq!(
            added.addresses,
            [
                "10.244.1.2".parse::<IpAddr>().unwrap(),
                "fd00::2".parse().unwrap()
            ]
        );
        assert_eq!(added.host_interface.as_deref(), Some("veth12"));
    }

    #[test]
    fn a_plugins_error_is_one_sentence() {
        let text = error_sentence(
            r#"{"code": 11, "msg": "the agent is away", "details": "start it"}"#,
            b"",
        );
        assert_eq!(text, "the agent is away start it (code 11)");
    }
}
