//! The index: events in, outputs out.

use std::collections::{BTreeMap, BTreeSet};

use warren_model::{
    ClusterConfig, IdentityId, Labels, NodeName, NodeRecord, NodeUid, PodRef, PrefixSource, PublicKey,
    policy::PolicyRef,
};

use crate::{
    endpoints::Endpoints,
    event::{Event, Mode, Output, Record, RecordKey, RotationObject, SessionId, SourceEvent},
    facts::Facts,
    identities::{Identities, Limits},
    nodes::Nodes,
    policy::{self, PolicyChange, PolicyRepository},
    publish::Published,
    rotation::{Machine, Progress},
    sessions::{Sessions, Waiting},
    stored::{Object, Recovered, StoredEndpoint, StoredNode},
};

mod agents;
mod keys;
mod persist;
mod policies;
mod replies;
mod revocations;
#[cfg(test)]
pub(crate) mod tests;

pub use self::revocations::Revocation;
use self::revocations::Revocations;

/// Refusals are shown as problems for this long, milliseconds.
const SHOW_REFUSALS_MS: u64 = 600_000;

/// What a term is run with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The cluster's configuration.
    pub config: ClusterConfig,
    /// Where objects come from.
    pub mode: Mode,
    /// The epoch of this term ([`crate::next_epoch`]).
    pub epoch: u64,
    /// How long an unused identity number keeps its labels, and again how long it then rests, milliseconds.
    pub identity_quarantine_ms: u64,
    /// How long an ADD waits for acknowledgements before it fails, milliseconds.
    pub acknowledge_ms: u64,
    /// After this time without a change a fresh version is signed, milliseconds.
    pub refresh_ms: u64,
}

impl Settings {
    /// The defaults for a configuration.
    pub fn new(config: ClusterConfig, mode: Mode, epoch: u64) -> Self {
        let expiry_ms = config.snapshot_expiry_seconds.saturating_mul(1000);
        Self {
            config,
            mode,
            epoch,
            identity_quarantine_ms: 600_000,
            acknowledge_ms: 10_000,
            refresh_ms: (expiry_ms / 4).min(3_600_000),
        }
    }
}

/// What was refused since the term began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Keys.
    pub refused_keys: u64,
    /// Endpoints.
    pub refused_endpoints: u64,
    /// Streams of nodes that do not exist (any more).
    pub refused_streams: u64,
    /// Pods that got no identity of their own.
    pub refused_identities: u64,
    /// MeshNodes that somebody else had set back.
    pub set_back: u64,
    /// Addresses and prefixes of nodes.
    pub refused_claims: u64,
    /// Changes of keys that were sent to be written.
    pub key_writes: u64,
    /// Incarnations of nodes whose keys became void.
    pub revocations: u64,
}

/// An ADD that was accepted in this round.
#[derive(Debug)]
struct Added {
    session: SessionId,
    request_id: u64,
    pod: PodRef,
    addresses: Vec<std::net::IpAddr>,
}

/// The index of one leadership term.
#[derive(Debug)]
pub struct Core {
    settings: Settings,
    nodes: Nodes,
    endpoints: Endpoints,
    identities: Identities,
    facts: Facts,
    policies: PolicyRepository,
    /// Records of policy that may have changed.
    policy_touched: BTreeSet<RecordKey>,
    /// Objects of which something else may have to be said.
    judged: BTreeSet<PolicyRef>,
    sessions: Sessions,
    published: Published,
    synced: bool,
    added: Vec<Added>,
    waiting: Vec<Waiting>,
    out: Vec<Output>,
    last_publish: u64,
    refresh: bool,
    persisted_nodes: BTreeMap<NodeName, StoredNode>,
    persisted_identities: BTreeMap<IdentityId, Labels>,
    persisted_endpoints: BTreeMap<PodRef, StoredEndpoint>,
    refusals: BTreeMap<(NodeName, &'static str), (u64, String)>,
    counters: Counters,
    machine: Machine,
    rotations: BTreeMap<String, RotationObject>,
    /// (UID, progress) of rotations that have not been seen yet in this term.
    recovered_rotations: BTreeMap<String, (String, Progress)>,
    /// Keys that are being written, with who waits for it.
    proving: BTreeMap<NodeName, (SessionId, PublicKey)>,
    revocations: Revocations,
    unix_seconds: u64,
}

impl Core {
    /// Starts a term with what was stored. Nothing is published before [`SourceEvent::Synced`].
    pub fn new(settings: Settings, recovered: Recovered, now: u64) -> Self {
        let limits = Limits {
            quarantine_ms: settings.identity_quarantine_ms,
            per_namespace: usize::try_from(settings.config.identities_per_namespace).unwrap_or(usize::MAX),
        };
        let identities = Identities::new(recovered.identities.clone(), limits, now);
        let kept = |number: &IdentityId, labels: &Labels| identities.labels(*number) == Some(labels);
        let revocations = recovered_revocations(&recovered.nodes);
        let recovered_rotations = recovered
            .rotations
            .into_iter()
            .map(|stored| (stored.name, (stored.uid, stored.progress)));
        let (good, bad): (Vec<_>, Vec<_>) = recovered
            .identities
            .into_iter()
            .partition(|(number, labels)| kept(number, labels));
        let endpoints = Endpoints::new(
            settings.mode,
            settings.config.clone(),
            recovered.endpoints.clone(),
        );
        Self {
            persisted_nodes: recovered
                .nodes
                .iter()
                .map(|node| (node.name.clone(), node.clone()))
                .collect(),
            persisted_identities: good.into_iter().collect(),
            persisted_endpoints: recovered
                .endpoints
                .into_iter()
                .map(|e| (e.pod.clone(), e))
                .collect(),
            nodes: Nodes::new(settings.config.clone(), recovered.nodes),
            endpoints,
            identities,
            facts: Facts::new(settings.mode, settings.config.host_reaches_pods),
            policies: PolicyRepository::new(settings.config.clone()),
            policy_touched: BTreeSet::new(),
            judged: BTreeSet::new(),
            sessions: Sessions::default(),
            published: Published::default(),
            synced: false,
            added: vec![],
            waiting: vec![],
            // Stored twice or out of range: not ours to keep.
            out: bad
                .into_iter()
                .map(|(number, _)| Output::Persist(Object::IdentityDelete(number)))
                .collect(),
            last_publish: now,
            refresh: false,
            refusals: BTreeMap::new(),
            counters: Counters::default(),
            machine: Machine::default(),
            rotations: BTreeMap::new(),
            recovered_rotations: recovered_rotations.collect(),
            proving: BTreeMap::new(),
            revocations,
            unix_seconds: 0,
            settings,
        }
    }
    /// Takes one event in. Cheap; the work is done in [`Self::poll`], so that many events make one version.
    pub fn handle(&mut self, now: u64, event: Event) {
        match event {
            Event::Source(event) => self.source(now, event),
            Event::Agent(event) => self.agent(now, event),
            Event::Stored(stored) => self.stored(now, *stored),
            Event::Progress {
                rotation,
                uid,
                progress,
            } => self.rotation_progress(now, rotation, &uid, progress),
        }
    }
    fn source(&mut self, now: u64, event: SourceEvent) {
        match event {
            SourceEvent::NodeUpsert(node) => {
                let name = node.name.clone();
                let before = self.nodes.uid(&name).cloned();
                self.facts.upsert(&node);
                if self.nodes.upsert(node) {
                    self.node_gone(&name, "was registered anew", now);
                }
                self.tell_machine(now, &name, before.as_ref());
            }
            SourceEvent::NodeDelete(name) => {
                let before = self.nodes.uid(&name).cloned();
                self.facts.delete(&name);
                if self.nodes.delete(&name) {
                    self.node_gone(&name, "was deleted", now);
                }
                self.tell_machine(now, &name, before.as_ref());
            }
            SourceEvent::NamespaceUpsert(namespace) => self.endpoints.upsert_namespace(namespace),
            SourceEvent::NamespaceDelete(name) => self.endpoints.delete_namespace(&name),
            SourceEvent::PodUpsert(pod) => self.endpoints.upsert_pod(pod, &mut self.identities, now),
            SourceEvent::PodDelete { namespace, name } => {
                self.endpoints
                    .delete_pod(&(namespace, name), &mut self.identities, now);
            }
            SourceEvent::PolicyUpsert { policy, outcome } => {
                let changes = self.policies.upsert(&policy, outcome);
                self.take_policy(changes);
            }
            SourceEvent::PolicyDelete(policy) => {
                let changes = self.policies.remove(&policy);
                self.take_policy(changes);
                self.judged.insert(policy);
            }
            SourceEvent::CidrGroupUpsert { name, outcome } => {
                let changes = self.policies.set_group(&name, Some(outcome));
                self.take_policy(changes);
            }
            SourceEvent::CidrGroupDelete(name) => {
                let changes = self.policies.set_group(&name, None);
                self.take_policy(changes);
            }
            SourceEvent::ApiServers(addresses) => self.facts.set_apiservers(addresses),
            SourceEvent::RotationUpsert(object) => self.rotation_upsert(now, object),
            SourceEvent::RotationDelete(name) => self.rotation_delete(now, &name),
            SourceEvent::Synced => {
                if !std::mem::replace(&mut self.synced, true) {
                    self.nodes.synced();
                    self.forget_rotations();
                    let nodes = &self.nodes;
                    self.endpoints
                        .synced(|name| nodes.uid(name).is_some(), &mut self.identities, now);
                }
            }
        }
    }
    fn node_gone(&mut self, name: &NodeName, what: &str, now: u64) {
        self.endpoints.node_gone(name, &mut self.identities, now);
        self.sessions.forget_node(name);
        self.refusals.retain(|(node, _), _| node != name);
        if let Some(session) = self.sessions.of_node(name) {
            self.close(now, session, format!("node {name} {what}"), false);
        }
    }
    /// Brings everything up to date and returns what must be done, in order. Call after one or more events, and
    /// about once a second.
    pub fn poll(&mut self, now: u64) -> Vec<Output> {
        if !self.synced {
            return std::mem::take(&mut self.out);
        }
        let turned = self.turn(now);
        self.note_buried();
        if self.nodes.settle() {
            self.endpoints.nodes_changed();
        }
        for refusal in self.nodes.take_refusals() {
            self.counters.refused_claims += 1;
            self.note(&refusal.node, "ClaimRefused", refusal.to_string());
        }
        self.identities.collect(now);
        if self.identities.take_freed() {
            self.endpoints.numbers_freed();
        }
        self.endpoints
            .settle(self.nodes.checked(), &mut self.identities, now);
        let early = std::mem::take(&mut self.out);
        let touched = self.persist();
        let due = std::mem::take(&mut self.refresh)
            || self.published.version() == 0
            || now.saturating_sub(self.last_publish) >= self.settings.refresh_ms;
        // Taken out so that the closure may read the rest.
        let mut published = std::mem::take(&mut self.published);
        let change = published.advance(touched, |key| self.current(key), due);
        self.published = published;
        if let Some(change) = change {
            self.last_publish = now;
            self.out.push(Output::Publish {
                version: self.published.version(),
                change,
            });
        }
        self.revocations.published(self.published.version());
        self.tell_validity();
        self.greet();
        self.out.extend(early);
        self.out.extend(turned);
        self.answer_added(now);
        self.answer_waiting(now);
        self.refusals
            .retain(|_, (at, _)| now.saturating_sub(*at) < SHOW_REFUSALS_MS);
        std::mem::take(&mut self.out)
    }
    /// The record that a key has now.
    fn current(&self, key: &RecordKey) -> Option<Record> {
        match key {
            RecordKey::Node(name) => self.node_record(name).map(Record::Node),
            RecordKey::Identity(number) => self
                .identities
                .labels(*number)
                .map(|labels| Record::Identity(*number, labels.clone())),
            RecordKey::Workload(address) => self.endpoints.workload(*address).map(Record::Workload),
            RecordKey::NodeFacts(name) => {
                let facts = self.nodes.uid(name).and_then(|_| self.facts.of(name));
                facts.map(|facts| Record::NodeFacts(name.clone(), facts))
            }
            RecordKey::Selector(_) | RecordKey::Members(..) | RecordKey::Policy(_) => {
                self.policies.record(key)
            }
        }
    }
    fn node_record(&self, name: &NodeName) -> Option<NodeRecord> {
        let mut record = self.nodes.checked().get(name)?.clone();
        if self.settings.config.prefix_source == PrefixSource::PodIp {
            record
                .prefixes
                .extend(self.endpoints.addresses_of(name).map(ipnet::IpNet::from));
        }
        Some(record)
    }
    /// The next [`Self::poll`] makes a version, whether anything has changed or not: for a fresh signature.
    pub fn refresh(&mut self) {
        self.refresh = true;
    }
    /// The stored object of a node is not what was written: it is written anew.
    pub fn rewrite_node(&mut self, name: &NodeName) {
        self.counters.set_back += 1;
        self.persisted_nodes.remove(name);
        self.nodes.touch(name);
    }
    /// The same of an identity; one that does not exist is deleted.
    pub fn rewrite_identity(&mut self, number: IdentityId) {
        let object = match self.identities.labels(number) {
            Some(labels) => Object::Identity(number, labels.clone()),
            None => Object::IdentityDelete(number),
        };
        self.out.push(Output::Persist(object));
    }
    /// The durable part of every node and tombstone.
    pub fn stored_nodes(&self) -> Vec<StoredNode> {
        self.persisted_nodes.values().cloned().collect()
    }
    /// Everything that is published.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        self.published.records().values()
    }
    /// Published version; 0 before the first.
    pub fn version(&self) -> u64 {
        self.published.version()
    }
    /// Whether the source has told everything once.
    pub fn is_synced(&self) -> bool {
        self.synced
    }
    /// The UID under which a node exists now; `None` also before [`SourceEvent::Synced`].
    pub fn node_uid(&self, name: &NodeName) -> Option<&NodeUid> {
        self.synced.then(|| self.nodes.uid(name)).flatten()
    }
    /// The policy objects and selectors.
    pub fn policies(&self) -> &PolicyRepository {
        &self.policies
    }
    /// One sentence per thing that is wrong.
    pub fn problems(&self) -> Vec<String> {
        let mut out = self.nodes.problems();
        out.extend(self.endpoints.problems());
        out.extend(self.policy_problems());
        out.extend(self.refusals.values().map(|(_, sentence)| sentence.clone()));
        out.extend(self.sessions.problems());
        out
    }
    /// What was refused.
    pub fn counters(&self) -> Counters {
        Counters {
            refused_identities: self.endpoints.refused_identities,
            ..self.counters
        }
    }
    /// (identities, workloads) that exist.
    pub fn sizes(&self) -> (usize, usize) {
        let workloads = self
            .published
            .records()
            .keys()
            .filter(|key| matches!(key, RecordKey::Workload(_)));
        (self.identities.len(), workloads.count())
    }
}

/// Tombstones that were stored: nothing that this term publishes has their keys.
fn recovered_revocations(nodes: &[StoredNode]) -> Revocations {
    let mut out = Revocations::default();
    for node in nodes.iter().filter(|node| node.record.is_none()) {
        if let Some(last) = node.revoked.last() {
            out.add(Revocation {
                node: node.name.clone(),
                uid: last.uid.clone(),
                keys: last.keys.clone(),
                version: 1,
            });
        }
    }
    out
}
