//! Where durable state lives.

mod files;
mod kubernetes;
mod objects;

use std::sync::Arc;

pub(crate) use files::FileStore;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
pub(crate) use kubernetes::{KubeStore, MANAGER, is_code};
use warren_crds::MeshNodeStatus;
use warren_keyd_core::{Object, Recovered};
use warren_model::policy::PolicyRef;

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
        })
    }
}

/// Read back, with a sentence per object that was not believed.
#[derive(Debug, Default)]
pub(crate) struct Loaded {
    pub(crate) recovered: Recovered,
    pub(crate) problems: Vec<String>,
}

impl Store {
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
