//! The state folder of stand-alone mode: the same objects as in Kubernetes, one YAML file each.

use std::{
    fs::{self, File},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use warren_crds::{KeyRotationStatus, MeshIdentity, MeshNode, MeshState, MeshStateSpec, STATE_NAME};
use warren_keyd_api::token::sha256;
use warren_keyd_core::{Object, StoredEndpoint, StoredNode, next_epoch};
use warren_model::{NodeKeys, NodeName, PodRef};

use super::{Loaded, StatusWritten, needs_write, objects, objects::Believed, renewal};
use crate::{clock, files, trust::Trust};

/// An endpoint's file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct EndpointFile {
    node: NodeName,
    pod: PodRef,
    addresses: Vec<std::net::IpAddr>,
}

/// The status of a KeyRotation, whose spec is a manifest.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RotationFile {
    name: String,
    uid: String,
    status: KeyRotationStatus,
}

/// A folder of objects.
pub(crate) struct FileStore {
    folder: PathBuf,
    trust: Arc<Trust>,
}

impl FileStore {
    pub(crate) fn open(folder: PathBuf, trust: Arc<Trust>) -> anyhow::Result<Self> {
        files::make_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(Self { folder, trust })
    }

    /// Starts a term: the stored epoch plus one, at least the time.
    pub(crate) fn begin_term(&self, holder: &str) -> anyhow::Result<u64> {
        let _lock = self.lock()?;
        let last = self.state()?.unwrap_or_default();
        clock::anchor(last.signed_unix_ms);
        let signed_unix_ms = clock::unix_ms();
        let epoch = next_epoch(last.epoch, signed_unix_ms);
        self.write_state(MeshStateSpec {
            epoch,
            holder: holder.to_owned(),
            signed_unix_ms,
        })?;
        Ok(epoch)
    }

    /// Notes the time, unless the term is over.
    pub(crate) fn note_time(&self, epoch: u64, signed_unix_ms: u64) -> anyhow::Result<()> {
        let _lock = self.lock()?;
        match self.state()? {
            Some(state) if state.epoch == epoch => self.write_state(MeshStateSpec {
                signed_unix_ms: signed_unix_ms.max(state.signed_unix_ms),
                ..state
            }),
            _ => Ok(()),
        }
    }

    fn write_state(&self, spec: MeshStateSpec) -> anyhow::Result<()> {
        write(
            &self.folder.join("meshstate.yaml"),
            &MeshState::new(STATE_NAME, spec),
        )
    }

    fn state(&self) -> anyhow::Result<Option<MeshStateSpec>> {
        let path = self.folder.join("meshstate.yaml");
        let text = files::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let Some(text) = text else { return Ok(None) };
        let state: MeshState = serde_saphyr::from_str(&text)
            .map_err(|error| anyhow::anyhow!("{} is damaged: {error}", path.display()))?;
        Ok(Some(state.spec))
    }

    /// The stored epoch; 0 before the first term.
    pub(crate) fn epoch(&self) -> anyhow::Result<u64> {
        Ok(self.state()?.map_or(0, |state| state.epoch))
    }

    /// Held while an object is read, compared and written: another keyd may have been started on the same folder.
    fn lock(&self) -> anyhow::Result<File> {
        let path = self.folder.join(".lock");
        let locked = File::create(&path).and_then(|file| {
            file.set_permissions(fs::Permissions::from_mode(0o600))?;
            file.lock()?;
            Ok(file)
        });
        locked.with_context(|| format!("cannot lock {}", path.display()))
    }

    /// The stored node; `None` where there is none that is ours.
    pub(crate) fn node(&self, name: &str) -> Option<StoredNode> {
        self.believed(name).map(|believed| believed.node)
    }

    fn believed(&self, name: &str) -> Option<Believed> {
        let object: MeshNode = read(&self.node_path(name)).ok()?;
        objects::stored_node(name, &object.spec, &self.trust.signing()).ok()
    }

    fn node_path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("meshnode-{name}.yaml"))
    }

    fn write_node(
        &self,
        name: &str,
        decide: impl Fn(Option<&Believed>) -> Option<StoredNode>,
    ) -> anyhow::Result<Option<StoredNode>> {
        let _lock = self.lock()?;
        let current = self.believed(name);
        match decide(current.as_ref()).filter(|new| needs_write(current.as_ref(), new)) {
            Some(new) => {
                let object = objects::mesh_node(&new, &self.trust.signing().signer);
                write(&self.node_path(name), &object)?;
                Ok(Some(new))
            }
            None => Ok(current.map(|current| current.node)),
        }
    }

    pub(crate) fn swap_keys(&self, was: &NodeKeys, node: &StoredNode) -> anyhow::Result<Option<StoredNode>> {
        self.write_node(node.name.as_str(), |current| {
            node.in_place_of(was, current.map(|current| &current.node))
        })
    }

    pub(crate) fn renew(&self, node: &StoredNode) -> anyhow::Result<()> {
        self.write_node(node.name.as_str(), |current| renewal(node, current))
            .map(drop)
    }

    fn rotation_path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("keyrotation-{name}.yaml"))
    }

    pub(crate) fn rotation_status(
        &self,
        name: &str,
        uid: &str,
        status: &KeyRotationStatus,
    ) -> anyhow::Result<StatusWritten> {
        let file = RotationFile {
            name: name.to_owned(),
            uid: uid.to_owned(),
            status: status.clone(),
        };
        write(&self.rotation_path(name), &file)?;
        Ok(StatusWritten::Written)
    }

    pub(crate) fn load(&self) -> anyhow::Result<Loaded> {
        let mut loaded = Loaded::default();
        let entries = fs::read_dir(&self.folder)
            .with_context(|| format!("cannot list {}", self.folder.display()))?
            .collect::<Result<Vec<_>, _>>()?;
        let mut paths: Vec<_> = entries.into_iter().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths {
            if let Err(error) = self.load_one(&path, &mut loaded) {
                loaded
                    .problems
                    .push(format!("state file {}: {error:#}", path.display()));
            }
        }
        Ok(loaded)
    }

    fn load_one(&self, path: &Path, loaded: &mut Loaded) -> anyhow::Result<()> {
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        let Some(name) = name.strip_suffix(".yaml").filter(|name| !name.starts_with('.')) else {
            return Ok(());
        };
        if name.starts_with("meshnode-") {
            let object: MeshNode = read(path)?;
            let name = object.metadata.name.as_deref().context("it has no name")?;
            loaded
                .recovered
                .nodes
                .push(objects::stored_node(name, &object.spec, &self.trust.signing())?.node);
        } else if name.starts_with("meshidentity-") {
            loaded
                .recovered
                .identities
                .push(read::<MeshIdentity>(path)?.identity());
        } else if name.starts_with("keyrotation-") {
            let RotationFile { name, uid, status } = read(path)?;
            loaded.rotation(name, uid, status);
        } else if name.starts_with("endpoint-") {
            let EndpointFile { node, pod, addresses } = read(path)?;
            loaded
                .recovered
                .endpoints
                .push(StoredEndpoint { node, pod, addresses });
        }
        Ok(())
    }

    pub(crate) fn apply(&self, object: &Object) -> anyhow::Result<()> {
        match object {
            Object::Node(node) => self
                .write_node(node.name.as_str(), |current| {
                    node.over(current.map(|current| &current.node))
                })
                .map(drop),
            Object::Identity(number, labels) => {
                let path = self.folder.join(format!("meshidentity-{number}.yaml"));
                write(&path, &MeshIdentity::of(*number, labels))
            }
            Object::IdentityDelete(number) => {
                remove(&self.folder.join(format!("meshidentity-{number}.yaml")))
            }
            Object::Endpoint(endpoint) => {
                let StoredEndpoint { node, pod, addresses } = endpoint.clone();
                write(
                    &self.endpoint_path(&endpoint.pod),
                    &EndpointFile { node, pod, addresses },
                )
            }
            Object::EndpointDelete(pod) => remove(&self.endpoint_path(pod)),
            Object::RotationDelete(name) => remove(&self.rotation_path(name)),
        }
    }

    /// Agents choose pod names and UIDs, so that they do not stand in file names.
    fn endpoint_path(&self, pod: &PodRef) -> PathBuf {
        let text = serde_json::json!([pod.namespace, pod.name, pod.uid]).to_string();
        self.folder.join(format!(
            "endpoint-{}.yaml",
            hex::encode(&sha256(text.as_bytes())[..16])
        ))
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let text = fs::read_to_string(path)?;
    serde_saphyr::from_str(&text).map_err(|error| anyhow::anyhow!("{error}"))
}

fn write<T: Serialize>(path: &Path, object: &T) -> anyhow::Result<()> {
    let text = serde_saphyr::to_string(object).map_err(|error| anyhow::anyhow!("{error}"))?;
    files::replace(path, text.as_bytes()).with_context(|| format!("cannot write {}", path.display()))
}

fn remove(path: &Path) -> anyhow::Result<()> {
    files::remove(path).with_context(|| format!("cannot remove {}", path.display()))
}
