//! `/metrics`, `/healthz`, `/readyz`.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU64},
};

use anyhow::Context as _;
use axum::{Router, http::StatusCode, routing::get};
use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use tokio::{net::TcpListener, sync::watch};
use warren_keyd_core::Counters;

/// What keyd measures. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Metrics {
    /// By reason, which is that of the Event.
    alarms: Family<Vec<(&'static str, String)>, Counter>,
    pub(crate) refused_authentications: Counter,
    refused_keys: Counter,
    refused_endpoints: Counter,
    refused_streams: Counter,
    refused_identities: Counter,
    refused_claims: Counter,
    set_back: Counter,
    key_writes: Counter,
    revocations: Counter,
    rotating_nodes: Gauge,
    open_rotations: Gauge,
    policies: Gauge,
    invalid_policies: Gauge,
    selectors: Gauge,
    streams: Gauge,
    identities: Gauge,
    workloads: Gauge,
    problems: Gauge,
    version: Gauge<u64, AtomicU64>,
    epoch: Gauge<u64, AtomicU64>,
    leader: Gauge,
    /// The core counts per term; the metrics go on counting.
    seen: Arc<Mutex<Counters>>,
}

/// A moment of the index.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Observation {
    pub(crate) streams: usize,
    pub(crate) identities: usize,
    pub(crate) workloads: usize,
    pub(crate) version: u64,
    pub(crate) problems: usize,
    pub(crate) policies: usize,
    pub(crate) invalid_policies: usize,
    pub(crate) selectors: usize,
    /// Nodes on their way to another key.
    pub(crate) rotating_nodes: usize,
    /// Rotations that are not over.
    pub(crate) open_rotations: usize,
}

impl Metrics {
    /// Registers everything under `warren_keyd_`.
    pub(crate) fn registry(&self) -> Registry {
        let mut registry = Registry::with_prefix("warren_keyd");
        registry.register(
            "alarms",
            "What was refused, found changed or went wrong, by the reason that its Event has",
            self.alarms.clone(),
        );
        registry.register(
            "refused_keys",
            "Keys that were refused",
            self.refused_keys.clone(),
        );
        registry.register(
            "refused_endpoints",
            "Endpoints that were refused",
            self.refused_endpoints.clone(),
        );
        registry.register(
            "refused_streams",
            "Streams of nodes that do not exist",
            self.refused_streams.clone(),
        );
        registry.register(
            "refused_authentications",
            "Agents that could not prove who they are",
            self.refused_authentications.clone(),
        );
        registry.register(
            "refused_identities",
            "Pods that got no identity of their own: a quota, or no number left",
            self.refused_identities.clone(),
        );
        registry.register(
            "refused_claims",
            "Addresses and prefixes of nodes that were refused",
            self.refused_claims.clone(),
        );
        registry.register(
            "mesh_nodes_set_back",
            "MeshNodes that somebody else than keyd has changed: an alarm",
            self.set_back.clone(),
        );
        registry.register(
            "key_writes",
            "Changes of nodes' keys: new ones, ones that come into use, ones that go",
            self.key_writes.clone(),
        );
        registry.register(
            "revocations",
            "Nodes whose keys became void for ever: deleted, registered anew or revoked",
            self.revocations.clone(),
        );
        registry.register(
            "rotating_nodes",
            "Nodes on their way to another key",
            self.rotating_nodes.clone(),
        );
        registry.register(
            "open_rotations",
            "KeyRotations that are not over",
            self.open_rotations.clone(),
        );
        registry.register("policies", "Policy objects, valid or not", self.policies.clone());
        registry.register(
            "invalid_policies",
            "Policy objects that enforce nothing because something is wrong with them",
            self.invalid_policies.clone(),
        );
        registry.register("selectors", "Distinct selectors in use", self.selectors.clone());
        registry.register("streams", "Connected agents", self.streams.clone());
        registry.register("identities", "Allocated identities", self.identities.clone());
        registry.register(
            "workloads",
            "Pod addresses in the directory",
            self.workloads.clone(),
        );
        registry.register(
            "problems",
            "Problems that keyd status lists",
            self.problems.clone(),
        );
        registry.register(
            "directory_version",
            "Version of the directory",
            self.version.clone(),
        );
        registry.register("epoch", "Leadership term", self.epoch.clone());
        registry.register("leader", "Whether this keyd leads", self.leader.clone());
        registry
    }

    /// Something is not as it should be.
    pub(crate) fn alarm(&self, reason: &str) {
        self.alarms
            .get_or_create(&vec![("reason", reason.to_owned())])
            .inc();
    }

    /// A term begins (epoch) or ends (`None`).
    pub(crate) fn term(&self, epoch: Option<u64>) {
        self.leader.set(i64::from(epoch.is_some()));
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Counters::default();
        match epoch {
            Some(epoch) => drop(self.epoch.set(epoch)),
            None => drop(self.streams.set(0)),
        }
    }

    pub(crate) fn observe(&self, counters: Counters, now: &Observation) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        self.refused_keys
            .inc_by(counters.refused_keys.saturating_sub(seen.refused_keys));
        self.refused_endpoints
            .inc_by(counters.refused_endpoints.saturating_sub(seen.refused_endpoints));
        self.refused_streams
            .inc_by(counters.refused_streams.saturating_sub(seen.refused_streams));
        self.refused_identities.inc_by(
            counters
                .refused_identities
                .saturating_sub(seen.refused_identities),
        );
        self.refused_claims
            .inc_by(counters.refused_claims.saturating_sub(seen.refused_claims));
        self.set_back
            .inc_by(counters.set_back.saturating_sub(seen.set_back));
        self.key_writes
            .inc_by(counters.key_writes.saturating_sub(seen.key_writes));
        self.revocations
            .inc_by(counters.revocations.saturating_sub(seen.revocations));
        *seen = counters;
        let signed = |value: usize| i64::try_from(value).unwrap_or(i64::MAX);
        self.streams.set(signed(now.streams));
        self.identities.set(signed(now.identities));
        self.workloads.set(signed(now.workloads));
        self.problems.set(signed(now.problems));
        self.policies.set(signed(now.policies));
        self.invalid_policies.set(signed(now.invalid_policies));
        self.selectors.set(signed(now.selectors));
        self.rotating_nodes.set(signed(now.rotating_nodes));
        self.open_rotations.set(signed(now.open_rotations));
        self.version.set(now.version);
    }
}

/// Serves the three paths. `healthz` says that the process turns; `readyz` that it can serve agents or send them to
/// who can. Neither asks the API server.
pub(crate) async fn serve(
    address: SocketAddr,
    metrics: Metrics,
    ready: watch::Receiver<bool>,
) -> anyhow::Result<impl Future<Output = ()>> {
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen for metrics on {address} (--metrics)"))?;
    tracing::info!(metrics = %listener.local_addr()?, "metrics and health");
    let registry = Arc::new(metrics.registry());
    let text = move || async move {
        let mut out = String::new();
        match encode(&mut out, &registry) {
            Ok(()) => (StatusCode::OK, out),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        }
    };
    let readyz = move || async move {
        if *ready.borrow() {
            (StatusCode::OK, "ready\n")
        } else {
            (
                StatusCode::SERVICE_UNAVAILABLE,
                "still reading the cluster's objects, or no leader is known\n",
            )
        }
    };
    let app = Router::new()
        .route("/metrics", get(text))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz));
    Ok(async move {
        if let Err(error) = axum::serve(listener, app).await {
            tracing::error!("metrics ended: {error}");
        }
    })
}
