//! Where the cluster's status comes from.

use std::{
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::anyhow;
use warren_keyd_api::{
    admin::{self, DEFAULT_SOCKET},
    proto::StatusRequest,
    status::ClusterStatus,
};

use crate::{args::Target, keyd::Keyd, kubernetes::Cluster};

/// Where to ask.
pub(crate) enum Source {
    /// The socket of a `keyd` on this machine.
    Socket(PathBuf),
    /// A Kubernetes cluster.
    Kubernetes(Box<Cluster>),
}

impl Source {
    /// The socket where it is named, or where there is one and no cluster is named; else Kubernetes.
    pub(crate) async fn open(target: &Target) -> anyhow::Result<Self> {
        if let Some(path) = &target.keyd_socket {
            return Ok(Self::Socket(path.clone()));
        }
        let cluster_named = target.kubeconfig.is_some() || target.context.is_some();
        if !cluster_named && Path::new(DEFAULT_SOCKET).exists() {
            return Ok(Self::Socket(DEFAULT_SOCKET.into()));
        }
        Ok(Self::Kubernetes(Box::new(Cluster::connect(target).await?)))
    }

    /// What `keyd` knows, from the leader where it can be found.
    pub(crate) async fn cluster_status(&self) -> anyhow::Result<ClusterStatus> {
        match self {
            Self::Socket(path) => {
                let response = admin::connect(path).await?.status(StatusRequest {}).await;
                Ok(response
                    .map_err(|status| anyhow!("keyd: {}", status.message()))?
                    .into_inner()
                    .into())
            }
            Self::Kubernetes(cluster) => cluster.keyd_status().await,
        }
    }

    /// A connection to `keyd`'s admin service; in Kubernetes to the leader's.
    pub(crate) async fn keyd(&self) -> anyhow::Result<Keyd> {
        match self {
            Self::Socket(path) => Ok(Keyd::new(admin::channel(path).await?)),
            Self::Kubernetes(cluster) => cluster.keyd().await,
        }
    }
}

/// Unix milliseconds.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
