//! What the CNI specification hands to a plugin.

use std::{collections::BTreeMap, env, net::IpAddr, path::PathBuf, time::Duration};

use serde::Deserialize;
use serde_json::Value;
use warren_agent_api::AttachmentKey;
use warren_model::PodRef;

use crate::error::{CniError, Code};

/// Versions of the specification whose configuration and results we read: all with chained plugins.
pub(crate) const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// The newest of them.
pub(crate) const NEWEST: &str = "1.1.0";

/// The plugin's part of the network configuration.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct NetConf {
    /// Version of the specification; missing means 0.1.0.
    #[serde(default)]
    pub(crate) cni_version: String,
    /// The agent's socket.
    #[serde(default = "default_socket")]
    pub(crate) socket: PathBuf,
    /// How long the agent may take.
    #[serde(default = "default_timeout")]
    timeout_seconds: u64,
    /// What the plugins before us did; kept as it is, because it is also our result.
    pub(crate) prev_result: Option<Value>,
    /// GC: the attachments that are still valid.
    #[serde(rename = "cni.dev/valid-attachments")]
    pub(crate) valid_attachments: Option<Vec<ValidAttachment>>,
}

/// One attachment of GC's list.
#[derive(Debug, Deserialize)]
pub(crate) struct ValidAttachment {
    #[serde(rename = "containerID")]
    pub(crate) container_id: String,
    pub(crate) ifname: String,
}

fn default_socket() -> PathBuf {
    PathBuf::from("/run/warren/agent.sock")
}

fn default_timeout() -> u64 {
    30
}

impl NetConf {
    pub(crate) fn parse(text: &str) -> Result<Self, CniError> {
        serde_json::from_str(text).map_err(|error| {
            CniError::new(
                Code::Decode,
                format!("the network configuration on standard input is malformed: {error}"),
            )
        })
    }

    /// Refuses what we would misread.
    pub(crate) fn check(&self) -> Result<(), CniError> {
        if !VERSIONS.contains(&self.cni_version.as_str()) {
            let version = if self.cni_version.is_empty() {
                "0.1.0 (none given)"
            } else {
                &self.cni_version
            };
            let message = format!(
                "cniVersion {version} is not supported: use one of {}",
                VERSIONS.join(", ")
            );
            return Err(CniError::new(Code::IncompatibleVersion, message));
        }
        if self.timeout_seconds == 0 {
            return Err(CniError::new(
                Code::Config,
                "timeoutSeconds is 0: give the agent at least one second",
            ));
        }
        Ok(())
    }

    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout_seconds)
    }
}

/// The result of the plugins before us, as far as we read it.
#[derive(Debug, Deserialize)]
pub(crate) struct PrevResult {
    #[serde(default)]
    interfaces: Vec<Interface>,
    #[serde(default)]
    ips: Vec<Ip>,
}

#[derive(Debug, Deserialize)]
struct Interface {
    name: String,
    #[serde(default)]
    sandbox: String,
}

#[derive(Debug, Deserialize)]
struct Ip {
    address: String,
    interface: Option<usize>,
}

impl PrevResult {
    /// Reads the result; `None` in the configuration means that we are not behind another plugin.
    pub(crate) fn parse(value: Option<&Value>) -> Result<Self, CniError> {
        let value = value.ok_or_else(|| {
            CniError::new(
                Code::Config,
                "there is no prevResult: chain warren-cni after a plugin that connects the pod",
            )
        })?;
        Self::deserialize(value)
            .map_err(|error| CniError::new(Code::Decode, format!("prevResult is malformed: {error}")))
    }

    /// The addresses of the interface `ifname` in the pod: those that name it, and those that name none.
    pub(crate) fn addresses(&self, ifname: &str) -> Result<Vec<IpAddr>, CniError> {
        let in_pod = |index: usize| {
            self.interfaces
                .get(index)
                .is_some_and(|interface| interface.name == ifname && !interface.sandbox.is_empty())
        };
        let mut addresses = Vec::new();
        for ip in self.ips.iter().filter(|ip| ip.interface.is_none_or(in_pod)) {
            let text = ip.address.split('/').next().unwrap_or_default();
            let address = text.parse().map_err(|_| {
                CniError::new(
                    Code::Decode,
                    format!("prevResult has the malformed address {:?}", ip.address),
                )
            })?;
            addresses.push(address);
        }
        if addresses.is_empty() {
            let message = format!(
                "prevResult has no address for {ifname}: chain warren-cni after a plugin that gives one"
            );
            return Err(CniError::new(Code::Config, message));
        }
        Ok(addresses)
    }
}

/// A required environment variable.
pub(crate) fn variable(name: &str) -> Result<String, CniError> {
    match env::var(name) {
        Ok(value) if !value.is_empty() => Ok(value),
        _ => Err(CniError::new(
            Code::Environment,
            format!("the environment variable {name} is missing"),
        )),
    }
}

/// Which attachment this call is about.
pub(crate) fn attachment_key() -> Result<AttachmentKey, CniError> {
    Ok(AttachmentKey {
        container_id: variable("CNI_CONTAINERID")?,
        ifname: variable("CNI_IFNAME")?,
    })
}

/// The pod that `CNI_ARGS` names. Without a UID there, the sandbox stands for it.
pub(crate) fn pod(args: &str, container_id: &str) -> Result<PodRef, CniError> {
    let args: BTreeMap<&str, &str> = args.split(';').filter_map(|pair| pair.split_once('=')).collect();
    let get = |name: &str| {
        args.get(name)
            .filter(|value| !value.is_empty())
            .map(|value| (*value).to_owned())
            .ok_or_else(|| {
                CniError::new(
                    Code::Environment,
                    format!("CNI_ARGS has no {name}: Warren must know which pod this is"),
                )
            })
    };
    Ok(PodRef {
        namespace: get("K8S_POD_NAMESPACE")?,
        name: get("K8S_POD_NAME")?,
        uid: get("K8S_POD_UID").unwrap_or_else(|_| container_id.to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn pods_come_from_the_arguments() {
        let args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;K8S_POD_UID=u-1";
        let found = pod(args, "sandbox").expect("complete");
        assert_eq!(
            (found.to_string(), found.uid),
            ("shop/cart-0".into(), "u-1".into())
        );
        assert_eq!(
            pod("K8S_POD_NAMESPACE=a;K8S_POD_NAME=b", "sandbox")
                .expect("complete")
                .uid,
            "sandbox"
        );
        for bad in [
            "",
            "K8S_POD_NAME=b",
            "K8S_POD_NAMESPACE=;K8S_POD_NAME=b",
            "nonsense",
        ] {
            assert_eq!(pod(bad, "sandbox").expect_err(bad).code, Code::Environment);
        }
    }

    #[test]
    fn only_the_interfaces_own_addresses_count() {
        let result = json!({
            "interfaces": [
                { "name": "cni0" }, { "name": "veth1" }, { "name": "eth0", "sandbox": "/n" },
                { "name": "eth1", "sandbox": "/n" },
            ],
            "ips": [
                { "address": "10.1.0.5/24", "interface": 2 }, { "address": "10.9.0.5/24", "interface": 3 },
                { "address": "fd00::5/64" }, { "address": "10.1.0.1/24", "interface": 0 },
                { "address": "10.8.0.1/24", "interface": 77 },
            ],
        });
        let result = PrevResult::parse(Some(&result)).expect("well formed");
        let addresses: Vec<String> = result
            .addresses("eth0")
            .expect("some")
            .iter()
            .map(IpAddr::to_string)
            .collect();
        assert_eq!(addresses, ["10.1.0.5", "fd00::5"]);
    }

    #[test]
    fn bad_results_are_refused() {
        assert_eq!(PrevResult::parse(None).expect_err("none").code, Code::Config);
        assert_eq!(
            PrevResult::parse(Some(&json!({ "ips": 3 })))
                .expect_err("type")
                .code,
            Code::Decode
        );
        let empty = PrevResult::parse(Some(&json!({}))).expect("well formed");
        assert_eq!(
            empty.addresses("eth0").expect_err("no address").code,
            Code::Config
        );
        let bad = PrevResult::parse(Some(&json!({ "ips": [{ "address": "ten" }] }))).expect("well formed");
        assert_eq!(bad.addresses("eth0").expect_err("address").code, Code::Decode);
    }

    #[test]
    fn versions_are_checked() {
        let conf = |text: &str| NetConf::parse(text).and_then(|conf| conf.check().map(|()| conf));
        for version in VERSIONS {
            assert!(conf(&format!(r#"{{"cniVersion":"{version}"}}"#)).is_ok());
        }
        for bad in [r#"{}"#, r#"{"cniVersion":"0.2.0"}"#, r#"{"cniVersion":"2.0.0"}"#] {
            assert_eq!(conf(bad).expect_err(bad).code, Code::IncompatibleVersion);
        }
        assert_eq!(conf("{").expect_err("cut").code, Code::Decode);
        assert_eq!(
            conf(r#"{"cniVersion":"1.0.0","timeoutSeconds":0}"#)
                .expect_err("zero")
                .code,
            Code::Config
        );
    }
}
