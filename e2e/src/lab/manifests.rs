//! The folder of manifests that `keyd` watches, written as a person would.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use ipnet::IpNet;
use serde_json::{Value, json};

use super::{PodSpec, net::DualStack};

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
    pub fn node(&self, node: &NodeManifest<'_>) -> Result<()> {
        let NodeManifest {
            name,
            cidrs,
            labels,
            annotations,
            ..
        } = node;
        let cidrs: Vec<_> = cidrs.iter().map(IpNet::to_string).collect();
        let mut spec = json!({});
        if let Some(first) = cidrs.first() {
            spec = json!({"podCIDR": first, "podCIDRs": cidrs});
        }
        let addresses: Vec<_> = node
            .addresses
            .both()
            .iter()
            .map(|address| json!({"type": "InternalIP", "address": address}))
            .collect();
        let mut labels = labels.clone();
        labels.insert("kubernetes.io/hostname".into(), (*name).into());
        self.write(
            &node_file(name),
            &json!({
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": name, "uid": node.uid, "labels": labels, "annotations": annotations},
                "spec": spec,
                "status": {"addresses": addresses},
            }),
        )
    }

    /// Any object with a kind and a name, in a file of its own; the same object again replaces it.
    pub fn apply(&self, object: &Value) -> Result<()> {
        self.write(&object_file(object)?, object)
    }

    /// Removes what [`Self::apply`] wrote.
    pub fn withdraw(&self, object: &Value) -> Result<()> {
        self.remove(&object_file(object)?)
    }

    /// A Namespace without labels but its name.
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
    pub fn pod(&self, spec: &PodSpec, uid: &str, node: &str) -> Result<()> {
        let ports: Vec<_> = spec
            .named_ports
            .iter()
            .map(|(name, port)| json!({"name": name, "containerPort": port, "protocol": "TCP"}))
            .collect();
        self.write(
            &pod_file(&spec.namespace, &spec.name),
            &json!({
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": spec.name,
                    "namespace": spec.namespace,
                    "uid": uid,
                    "labels": spec.labels,
                    "annotations": spec.annotations,
                },
                "spec": {
                    "nodeName": node,
                    "serviceAccountName": spec.service_account,
                    "containers": [{"name": "app", "image": "localhost/lab:1", "ports": ports}],
                },
            }),
        )
    }
}

/// What a Node object says.
#[derive(Debug)]
pub struct NodeManifest<'a> {
    /// Name.
    pub name: &'a str,
    /// UID.
    pub uid: &'a str,
    /// Internal addresses.
    pub addresses: DualStack,
    /// podCIDRs.
    pub cidrs: &'a [IpNet],
    /// Labels besides its host name.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
}

impl<'a> NodeManifest<'a> {
    /// Without labels and annotations.
    pub fn new(name: &'a str, uid: &'a str, addresses: DualStack, cidrs: &'a [IpNet]) -> Self {
        Self {
            name,
            uid,
            addresses,
            cidrs,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
        }
    }
}

/// Name of any object's file.
fn object_file(object: &Value) -> Result<String> {
    let text = |path: &str| object.pointer(path).and_then(Value::as_str);
    let kind = text("/kind").context("an object without kind")?.to_lowercase();
    let name = text("/metadata/name").context("an object without name")?;
    Ok(match text("/metadata/namespace") {
        Some(namespace) => format!("{kind}-{namespace}-{name}.yaml"),
        None => format!("{kind}-{name}.yaml"),
    })
}

/// Name of a Node's file.
pub fn node_file(name: &str) -> String {
    format!("node-{name}.yaml")
}

/// Name of a Pod's file.
pub fn pod_file(namespace: &str, name: &str) -> String {
    format!("pod-{namespace}-{name}.yaml")
}
