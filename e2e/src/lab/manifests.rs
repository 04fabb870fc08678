//! The folder of manifests that `keyd` watches, written as a person would.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use ipnet::IpNet;
use serde_json::{Value, json};

use super::net::DualStack;

/// The folder.
#[derive(Debug)]
pub struct Manifests {
    dir: PathBuf,
}

impl Manifests {
    /// Makes the folder.
    pub fn create(dir: PathBuf) -> Result<Self> {
        fs::create_dir_all(&dir)?;
        Ok(Self { dir })
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes a file as it is, well-formed or not; a reader never sees half of it.
    pub fn write_raw(&self, file: &str, text: &str) -> Result<()> {
        let temporary = self.dir.join(format!(".{file}.new"));
        fs::write(&temporary, text)?;
        fs::rename(&temporary, self.dir.join(file)).context("cannot write a manifest")
    }

    fn write(&self, file: &str, object: &Value) -> Result<()> {
        self.write_raw(file, &serde_json::to_string_pretty(object)?)
    }

    /// Removes a file.
    pub fn remove(&self, file: &str) -> Result<()> {
        fs::remove_file(self.dir.join(file)).with_context(|| format!("cannot remove the manifest {file}"))
    }

    /// A Node; without `cidrs` it has none.
    pub fn node(&self, name: &str, uid: &str, addresses: DualStack, cidrs: &[IpNet]) -> Result<()> {
        let cidrs: Vec<_> = cidrs.iter().map(IpNet::to_string).collect();
        let mut spec = json!({});
        if let Some(first) = cidrs.first() {
            spec = json!({"podCIDR": first, "podCIDRs": cidrs});
        }
        let addresses: Vec<_> = addresses
            .both()
            .iter()
            .map(|address| json!({"type": "InternalIP", "address": address}))
            .collect();
        self.write(
            &node_file(name),
            &json!({
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": name, "uid": uid, "labels": {"kubernetes.io/hostname": name}},
                "spec": spec,
                "status": {"addresses": addresses},
            }),
        )
    }

    /// A Namespace.
    pub fn namespace(&self, name: &str) -> Result<()> {
        self.write(
            &format!("namespace-{name}.yaml"),
            &json!({
                "apiVersion": "v1",
                "kind": "Namespace",
                "metadata": {"name": name, "labels": {"kubernetes.io/metadata.name": name}},
            }),
        )
    }

    /// A Pod as the API server would show it before its address is known.
    pub fn pod(
        &self,
        namespace: &str,
        name: &str,
        uid: &str,
        node: &str,
        labels: &BTreeMap<String, String>,
    ) -> Result<()> {
        self.write(
            &pod_file(namespace, name),
            &json!({
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "namespace": namespace, "uid": uid, "labels": labels},
                "spec": {
                    "nodeName": node,
                    "serviceAccountName": "default",
                    "containers": [{"name": "app", "image": "localhost/lab:1"}],
                },
            }),
        )
    }
}

/// Name of a Node's file.
pub fn node_file(name: &str) -> String {
    format!("node-{name}.yaml")
}

/// Name of a Pod's file.
pub fn pod_file(namespace: &str, name: &str) -> String {
    format!("pod-{namespace}-{name}.yaml")
}
