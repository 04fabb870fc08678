//! Where durable state lives.

mod files;
mod kubernetes;
mod objects;
mod odd;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

pub(crate) use files::FileStore;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
pub(crate) use kubernetes::{KubeStore, MANAGER, is_code};
pub(crate) use odd::{Kind, Odd};
use tokio::sync::mpsc;
use warren_crds::{KeyRotationStatus, MeshNodeStatus};
use warren_keyd_core::{Object, Recovered, StoredNode, StoredRotation};
use warren_model::{NodeKeys, policy::PolicyRef};

use self::objects::Believed;
use crate::{guard, hub, rotations::progress};

/// A store. Writes are idempotent.
#[derive(Clone)]
pub(crate) enum Store {
    /// A folder.
    Files(Arc<FileStore>),
    /// The Kubernetes API.
    Kubernetes(Arc<KubeStore>),
}

/// Names the thing that an object is about: a newer object of the same name replaces an older one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ObjectName(pub(crate) String);

impl ObjectName {
    pub(crate) fn of(object: &Object) -> Self {
        Self(match object {
            Object::Node(node) => format!("MeshNode {}", node.name),
            Object::Identity(number, _) | Object::IdentityDelete(number) => format!("MeshIdentity {number}"),
            Object::Endpoint(endpoint) => format!("endpoint {}/{}", endpoint.pod, endpoint.pod.uid),
            Object::EndpointDelete(pod) => format!("endpoint {pod}/{}", pod.uid),
            Object::RotationDelete(name) => format!("KeyRotation {name}"),
        })
    }
}

/// Read back, with a sentence per object that was not believed.
#[derive(Debug, Default)]
pub(crate) struct Loaded {
    pub(crate) recovered: Recovered,
    /// Statuses of KeyRotations as they were found.
    pub(crate) rotations: RotationStatuses,
    pub(crate) problems: Vec<String>,
}

impl Loaded {
    /// A KeyRotation with a status was found.
    fn rotation(&mut self, name: String, uid: String, status: KeyRotationStatus) {
        self.recovered.rotations.push(StoredRotation {
            name: name.clone(),
            uid: uid.clone(),
            progress: progress(&status),
        });
        self.rotations.insert(name, (uid, status));
    }
}

/// (UID, status) of KeyRotations, by name.
pub(crate) type RotationStatuses = BTreeMap<String, (String, KeyRotationStatus)>;

/// What became of a status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum StatusWritten {
    Written,
    /// Somebody else has written another one, which counts.
    Theirs(Box<KeyRotationStatus>),
    /// The object is gone.
    Gone,
}

/// Whether a node has to be written: it is another, or a former key has signed it.
fn needs_write(current: Option<&Believed>, new: &StoredNode) -> bool {
    current.is_none_or(|current| current.node != *new || !current.renewed)
}

/// What to write where a node's signature is to be renewed; nothing where it has been written since.
fn renewal(node: &StoredNode, current: Option<&Believed>) -> Option<StoredNode> {
    match current {
        Some(current) if current.renewed => None,
        current => node.over(current.map(|current| &current.node)),
    }
}

impl Store {
    /// Signs a node anew that a former key has signed.
    pub(crate) async fn renew(&self, node: &StoredNode) -> anyhow::Result<()> {
        match self {
            Self::Files(store) => store.renew(node),
            Self::Kubernetes(store) => store.renew(node).await,
        }
    }

    /// Writes a node with changed keys, if those that are stored are still `was`. Returns what is stored then; `None`: nothing
    /// that is ours. After an error it is not known what is stored.
    pub(crate) async fn swap_keys(
        &self,
        was: &NodeKeys,
        node: &StoredNode,
    ) -> anyhow::Result<Option<StoredNode>> {
        match self {
            Self::Files(store) => store.swap_keys(was, node),
            Self::Kubernetes(store) => store.swap_keys(was, node).await,
        }
    }

    /// Reads one node; `None` where there is none that is ours.
    pub(crate) async fn node(&self, name: &str) -> anyhow::Result<Option<StoredNode>> {
        match self {
            Self::Files(store) => Ok(store.node(name)),
            Self::Kubernetes(store) => store.node(name).await,
        }
    }

    /// Looks after the objects; a folder is root's alone.
    pub(crate) fn guard(
        &self,
        hub: mpsc::WeakSender<hub::Command>,
        keyd_id: &str,
    ) -> impl Future<Output = ()> + Send + 'static {
        let (store, keyd_id) = (self.clone(), keyd_id.to_owned());
        async move {
            if let Self::Kubernetes(store) = store {
                guard::watch(store, hub, keyd_id).await;
            }
        }
    }

    /// How often the time is worth a note: what is not noted is lost with the process and a wrong clock.
    pub(crate) fn note_every(&self) -> Duration {
        match self {
            Self::Files(_) => Duration::from_secs(60),
            Self::Kubernetes(_) => Duration::from_secs(3600),
        }
    }

    /// Notes a time that was reached, unless the term is over.
    pub(crate) async fn note_time(&self, epoch: u64, signed_unix_ms: u64) -> anyhow::Result<()> {
        match self {
            Self::Files(store) => store.note_time(epoch, signed_unix_ms),
            Self::Kubernetes(store) => store.note_time(epoch, signed_unix_ms).await,
        }
    }

    /// The epoch that is stored now.
    pub(crate) async fn epoch(&self) -> anyhow::Result<u64> {
        match self {
            Self::Files(store) => store.epoch(),
            Self::Kubernetes(store) => store.epoch().await,
        }
    }

    /// Writes the status of a KeyRotation, if the one that is stored is still `was` (`None`: there is none yet).
    pub(crate) async fn rotation_status(
        &self,
        name: &str,
        uid: &str,
        was: Option<&KeyRotationStatus>,
        status: &KeyRotationStatus,
    ) -> anyhow::Result<StatusWritten> {
        match self {
            Self::Files(store) => store.rotation_status(name, uid, status),
            Self::Kubernetes(store) => store.rotation_status(name, uid, was, status).await,
        }
    }

    /// Reads everything at the start of a term.
    pub(crate) async fn load(&self) -> anyhow::Result<Loaded> {
        match self {
            Self::Files(store) => store.load(),
            Self::Kubernetes(store) => store.load().await,
        }
    }

    /// Writes one object.
    pub(crate) async fn apply(&self, object: &Object) -> anyhow::Result<()> {
        match self {
            Self::Files(store) => store.apply(object),
            Self::Kubernetes(store) => store.apply(object).await,
        }
    }

    /// Writes the `Valid` condition of a policy object; a folder's objects have no status, and neither have
    /// NetworkPolicies.
    pub(crate) async fn policy_status(
        &self,
        policy: &PolicyRef,
        condition: &Condition,
    ) -> anyhow::Result<()> {
        match self {
            Self::Files(_) => Ok(()),
            Self::Kubernetes(store) => store.policy_status(policy, condition).await,
        }
    }

    /// Writes what was last seen of a node; a folder keeps no such thing.
    pub(crate) async fn status(&self, name: &str, status: &MeshNodeStatus) -> anyhow::Result<()> {
        match self {
            Self::Files(_) => Ok(()),
            Self::Kubernetes(store) => store.status(name, status).await,
        }
    }
}
