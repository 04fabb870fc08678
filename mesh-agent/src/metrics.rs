//! Metrics and health over HTTP. What is served is the last report: a scrape never waits for the loop.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{Router, extract::State, http::StatusCode, routing::get};
use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::{Registry, Unit},
};
use warren_agent_api::{AgentStatus, EncryptStatus};

use crate::policy::{Report, Shared};

/// A loop that has not come round for this long is stuck.
const STUCK: Duration = Duration::from_secs(60);

/// The pause before a port that is taken is tried again.
const RETRY: Duration = Duration::from_secs(10);

type Labels = Vec<(&'static str, String)>;

/// What the loop tells about itself.
pub(crate) struct Health {
    started: Instant,
    beat: AtomicU64,
    ready: AtomicBool,
    last: Mutex<Option<(EncryptStatus, AgentStatus)>>,
    policy: Option<Shared>,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            beat: AtomicU64::new(0),
            ready: AtomicBool::new(false),
            last: Mutex::new(None),
            policy: None,
        }
    }
}

impl Health {
    /// With what policy tells about itself.
    pub(crate) fn new(policy: Shared) -> Self {
        Self {
            policy: Some(policy),
            ..Self::default()
        }
    }

    /// The loop came round.
    pub(crate) fn beat(&self) {
        let millis = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.beat.store(millis, Ordering::Relaxed);
    }

    /// Whether pods may be added.
    pub(crate) fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Relaxed);
    }

    /// The last report.
    pub(crate) fn update(&self, encrypt: &EncryptStatus, agent: &AgentStatus) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some((encrypt.clone(), agent.clone()));
    }

    /// Only about the agent's own loop: never about `keyd` or the API server.
    fn alive(&self) -> bool {
        let beat = Duration::from_millis(self.beat.load(Ordering::Relaxed));
        self.started.elapsed().saturating_sub(beat) < STUCK
    }
}

/// Serves until the agent ends. A port that is taken is no reason to leave a node without an agent: it is said, and
/// tried again.
pub(crate) async fn serve(address: SocketAddr, health: Arc<Health>) {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(health);
    loop {
        let served = match tokio::net::TcpListener::bind(address).await {
            Ok(listener) => axum::serve(listener, router.clone()).await,
            Err(error) => Err(error),
        };
        if let Err(error) = served {
            tracing::error!(%address, %error, "metrics cannot be served: name another address with --metrics");
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn healthz(State(health): State<Arc<Health>>) -> (StatusCode, &'static str) {
    match health.alive() {
        true => (StatusCode::OK, "ok\n"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "the agent's loop is stuck\n"),
    }
}

async fn readyz(State(health): State<Arc<Health>>) -> (StatusCode, &'static str) {
    match health.ready.load(Ordering::Relaxed) {
        true => (StatusCode::OK, "ok\n"),
        false => (
            StatusCode::SERVICE_UNAVAILABLE,
            "not ready: see mesh-agent status\n",
        ),
    }
}

async fn metrics(
    State(health): State<Arc<Health>>,
) -> (StatusCode, [(&'static str, &'static str); 1], String) {
    let header = [(
        "content-type",
        "application/openmetrics-text; version=1.0.0; charset=utf-8",
    )];
    let last = health.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let mut text = String::new();
    let mut registry = registry(last.as_ref(), health.ready.load(Ordering::Relaxed));
    if let Some(shared) = &health.policy {
        policy(&mut registry, &shared.report());
    }
    match encode(&mut text, &registry) {
        Ok(()) => (StatusCode::OK, header, text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, header, error.to_string()),
    }
}

/// The report as metrics. Counters end in `_total` by themselves.
fn registry(last: Option<&(EncryptStatus, AgentStatus)>, ready: bool) -> Registry {
    let mut whole = Registry::with_prefix("warren");
    agent_metrics(whole.sub_registry_with_prefix("agent"), last, ready);
    whole
}

fn agent_metrics(registry: &mut Registry, last: Option<&(EncryptStatus, AgentStatus)>, ready: bool) {
    gauge(registry, "ready", "Whether pods may be added", i64::from(ready));
    let Some((encrypt, agent)) = last else {
        return;
    };
    registry.register(
        "build",
        "Version",
        Info::new(vec![("version", agent.version.clone())]),
    );
    gauge(
        registry,
        "encryption_enabled",
        "Device and programs are as wanted",
        i64::from(encrypt.enabled),
    );
    gauge(
        registry,
        "encryption_mismatches",
        "Differences from what is wanted",
        count(encrypt.mismatches.len()),
    );
    gauge(
        registry,
        "keyd_connected",
        "Whether a session with keyd is open",
        i64::from(agent.keyd.is_some()),
    );
    gauge(
        registry,
        "failing_actions",
        "Actions that failed and are tried again",
        count(agent.failing.len()),
    );
    gauge(
        registry,
        "problems",
        "Refused entries and malformed input",
        count(agent.problems.len()),
    );
    gauge(
        registry,
        "endpoints",
        "Pods on this node",
        count(agent.endpoints.len()),
    );
    gauge(
        registry,
        "peers",
        "Peers on the tunnel devices",
        count(encrypt.peers.len()),
    );
    trust(registry, agent);
    if let Some((epoch, version)) = agent.snapshot {
        gauge(
            registry,
            "snapshot_epoch",
            "Epoch of the directory in force",
            epoch.try_into().unwrap_or(i64::MAX),
        );
        gauge(
            registry,
            "snapshot_version",
            "Its version",
            version.try_into().unwrap_or(i64::MAX),
        );
    }
    let drops = Family::<Labels, Counter>::default();
    for (reason, packets) in &encrypt.drops {
        drops
            .get_or_create(&vec![("reason", reason.clone())])
            .inc_by(*packets);
    }
    registry.register("dropped_packets", "Packets dropped, by reason", drops);
    exchanges(registry, encrypt);
    peers(registry, encrypt);
}

/// How pairs agree on pre-shared keys.
fn exchanges(registry: &mut Registry, encrypt: &EncryptStatus) {
    let exchanges = &encrypt.exchanges;
    let without = encrypt.peers.iter().filter(|peer| !peer.pre_shared_key);
    gauge(
        registry,
        "peers_without_pre_shared_key",
        "Peers on the tunnel devices that have no pre-shared key",
        count(without.count()),
    );
    gauge(
        registry,
        "peers_awaiting_pre_shared_key",
        "Peers that are not sent to before one is agreed on",
        count(exchanges.awaited),
    );
    for (name, help, value) in [
        (
            "pre_shared_key_exchanges_begun",
            "Offers made and answered",
            exchanges.begun,
        ),
        (
            "pre_shared_keys_agreed",
            "Keys that were agreed on",
            exchanges.agreed,
        ),
        (
            "pre_shared_key_exchanges_failed",
            "Offers and answers that led to no key, and keys that could not be kept",
            exchanges.failed,
        ),
        (
            "pre_shared_key_dropped_packets",
            "Packets of exchanges that were no message, unasked, or too many",
            exchanges.dropped,
        ),
    ] {
        let counter = Counter::<u64>::default();
        counter.inc_by(value);
        registry.register(name, help, counter);
    }
}

/// Alarms about whom the agent believes.
fn trust(registry: &mut Registry, agent: &AgentStatus) {
    gauge(
        registry,
        "directory_expired",
        "Whether the time of the directory is over: an alarm",
        i64::from(agent.expired_seconds.is_some()),
    );
    gauge(
        registry,
        "directory_expired_seconds",
        "For how long it is over",
        agent
            .expired_seconds
            .map_or(0, |seconds| seconds.try_into().unwrap_or(i64::MAX)),
    );
    gauge(
        registry,
        "trust_refused",
        "Whether keyd's roots, or the mounted trust, are not what this node has pinned: an alarm",
        i64::from(agent.trust_fault.is_some()),
    );
    gauge(
        registry,
        "snapshot_root_generation",
        "Of the root that snapshots must be signed by",
        agent
            .root
            .as_ref()
            .map_or(0, |root| root.generation.try_into().unwrap_or(i64::MAX)),
    );
    let refused = Counter::<u64>::default();
    refused.inc_by(agent.refused_updates);
    registry.register(
        "refused_updates",
        "Updates of the directory that were refused, forged, replayed or damaged: an alarm",
        refused,
    );
}

fn policy(whole: &mut Registry, report: &Report) {
    maps(whole.sub_registry_with_prefix("bpf"), report);
    let registry = whole.sub_registry_with_prefix("agent");
    gauge(
        registry,
        "policy_revision",
        "Revision of policy that new flows are judged under",
        report.revision.into(),
    );
    gauge(
        registry,
        "policies",
        "Policy objects in force",
        count(report.policies),
    );
    gauge(registry, "policy_rules", "Their statements", count(report.rules));
    gauge(
        registry,
        "policy_endpoints",
        "Pods whose policy is written; others are closed",
        count(report.written.len()),
    );
    gauge(
        registry,
        "policy_failing",
        "Policies that could not be written and are tried again",
        count(report.failing.len()),
    );
    registry.register(
        "policy_write_failures",
        "Policy writes that failed",
        report.failures.clone(),
    );
    registry.register(
        "policy_drift",
        "Entries of policy maps found other than they should be",
        report.drift.clone(),
    );
    registry.register_with_unit(
        "policy_apply",
        "From a directory that is there to its policy in force",
        Unit::Seconds,
        report.latency.clone(),
    );
    let verdicts = Family::<Labels, Counter>::default();
    for ((outcome, direction, reason), packets) in &report.verdicts {
        let labels = vec![
            ("outcome", outcome.clone()),
            ("direction", direction.clone()),
            ("reason", reason.clone()),
        ];
        verdicts.get_or_create(&labels).inc_by(*packets);
    }
    registry.register("events", "Packets that events told of", verdicts);
    let lost = Counter::<u64>::default();
    lost.inc_by(report.events_lost);
    registry.register("events_lost", "Events that found no room", lost);
    let flows = Family::<Labels, Gauge>::default();
    for (state, number) in [
        ("established", report.flows.established),
        ("new", report.flows.new),
    ] {
        flows
            .get_or_create(&vec![("state", state.to_owned())])
            .set(number.into());
    }
    registry.register("flows", "Tracked flows", flows);
    registry.register(
        "flows_expired",
        "Flows that were over and were removed",
        report.flows_removed.clone(),
    );
}

/// How full the maps are; named after the programs, whose maps they are.
fn maps(registry: &mut Registry, report: &Report) {
    let entries = Family::<Labels, Gauge>::default();
    let limits = Family::<Labels, Gauge>::default();
    for usage in &report.usage {
        let labels = vec![("map", usage.map.to_owned())];
        entries.get_or_create(&labels).set(usage.entries.into());
        limits.get_or_create(&labels).set(usage.limit.into());
    }
    registry.register("map_entries", "Entries of an eBPF map", entries);
    registry.register("map_limit", "Most entries of an eBPF map", limits);
}

fn peers(registry: &mut Registry, encrypt: &EncryptStatus) {
    let received = Family::<Labels, Counter>::default();
    let sent = Family::<Labels, Counter>::default();
    let handshake = Family::<Labels, Gauge>::default();
    for peer in &encrypt.peers {
        let node = peer.node.as_ref().map_or_else(String::new, ToString::to_string);
        let labels = vec![("node", node), ("interface", peer.interface.clone())];
        received.get_or_create(&labels).inc_by(peer.received_bytes);
        sent.get_or_create(&labels).inc_by(peer.sent_bytes);
        if let Some(seconds) = peer.last_handshake_seconds {
            handshake
                .get_or_create(&labels)
                .set(seconds.try_into().unwrap_or(i64::MAX));
        }
    }
    registry.register_with_unit("peer_received", "Received from a peer", Unit::Bytes, received);
    registry.register_with_unit("peer_sent", "Sent to a peer", Unit::Bytes, sent);
    registry.register_with_unit(
        "peer_handshake_age",
        "Since the last handshake",
        Unit::Seconds,
        handshake,
    );
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: i64) {
    let gauge = Gauge::<i64>::default();
    gauge.set(value);
    registry.register(name, help, gauge);
}

fn count(length: usize) -> i64 {
    i64::try_from(length).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_becomes_metrics() {
        let encrypt = EncryptStatus {
            enabled: true,
            keys: Default::default(),
            mismatches: vec![],
            datapath: warren_model::Datapath::Userspace,
            interfaces: vec![],
            peers: vec![],
            exchanges: warren_agent_api::ExchangeStatus {
                agreed: 4,
                ..Default::default()
            },
            exemptions: vec![],
            drops: vec![("no-path".into(), 7)],
        };
        let agent = AgentStatus {
            healthy: true,
            node: "node1".into(),
            version: "1".into(),
            keyd: None,
            snapshot: Some((5, 6)),
            root: None,
            expired_seconds: Some(7),
            trust_fault: None,
            refused_updates: 3,
            failing: vec![],
            problems: vec![],
            endpoints: vec![],
            policy: Default::default(),
        };
        let mut text = String::new();
        encode(&mut text, &registry(Some(&(encrypt, agent)), true)).unwrap();
        assert!(
            text.contains("warren_agent_dropped_packets_total{reason=\"no-path\"} 7"),
            "{text}"
        );
        for line in [
            "warren_agent_snapshot_version 6",
            "warren_agent_directory_expired 1",
            "warren_agent_directory_expired_seconds 7",
            "warren_agent_trust_refused 0",
            "warren_agent_refused_updates_total 3",
            "warren_agent_pre_shared_keys_agreed_total 4",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }

    #[test]
    fn a_loop_that_beats_is_alive() {
        let health = Health::default();
        assert!(health.alive());
        health.beat();
        assert!(health.alive());
    }
}
