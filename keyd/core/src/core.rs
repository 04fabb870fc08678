//! The index: events in, outputs out.

use std::collections::{BTreeMap, BTreeSet};

use warren_model::{
    ClusterConfig, IdentityId, Labels, NodeName, NodeRecord, NodeUid, PodRef, PrefixSource, SlotKey,
};

use crate::{
    endpoints::Endpoints,
    event::{
        AgentEvent, CatchUp, EndpointError, Event, Mode, Output, Record, RecordKey, SessionId, SourceEvent,
    },
    identities::Identities,
    nodes::Nodes,
    publish::Published,
    sessions::{Sessions, Waiting},
    stored::{Object, Recovered, StoredEndpoint, StoredNode},
};

#[cfg(test)]
pub(crate) mod tests;

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
    sessions: Sessions,
    published: Published,
    synced: bool,
    added: Vec<Added>,
    waiting: Vec<Waiting>,
    out: Vec<Output>,
    last_publish: u64,
    persisted_nodes: BTreeMap<NodeName, StoredNode>,
    persisted_identities: BTreeMap<IdentityId, Labels>,
    persisted_endpoints: BTreeMap<PodRef, StoredEndpoint>,
    refusals: BTreeMap<(NodeName, &'static str), (u64, String)>,
    counters: Counters,
}

impl Core {
    /// Starts a term with what was stored. Nothing is published before [`SourceEvent::Synced`].
    pub fn new(settings: Settings, recovered: Recovered, now: u64) -> Self {
        let identities = Identities::new(recovered.identities.clone(), settings.identity_quarantine_ms, now);
        let kept = |number: &IdentityId, labels: &Labels| identities.labels(*number) == Some(labels);
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
            refusals: BTreeMap::new(),
            counters: Counters::default(),
            settings,
        }
    }

    /// Takes one event in. Cheap; the work is done in [`Self::poll`], so that many events make one version.
    pub fn handle(&mut self, now: u64, event: Event) {
        match event {
            Event::Source(event) => self.source(now, event),
            Event::Agent(event) => self.agent(now, event),
        }
    }

    fn source(&mut self, now: u64, event: SourceEvent) {
        match event {
            SourceEvent::NodeUpsert(node) => {
                let name = node.name.clone();
                if self.nodes.upsert(node) {
                    self.node_gone(&name, "was registered anew", now);
                }
            }
            SourceEvent::NodeDelete(name) => {
                if self.nodes.delete(&name) {
                    self.node_gone(&name, "was deleted", now);
                }
            }
            SourceEvent::NamespaceUpsert(namespace) => self.endpoints.upsert_namespace(namespace),
            SourceEvent::NamespaceDelete(name) => self.endpoints.delete_namespace(&name),
            SourceEvent::PodUpsert(pod) => self.endpoints.upsert_pod(pod, &mut self.identities, now),
            SourceEvent::PodDelete { namespace, name } => {
                self.endpoints
                    .delete_pod(&(namespace, name), &mut self.identities, now);
            }
            SourceEvent::Synced => {
                if !std::mem::replace(&mut self.synced, true) {
                    self.nodes.synced();
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
            self.close(session, format!("node {name} {what}"), false);
        }
    }

    fn close(&mut self, session: SessionId, reason: String, retry: bool) {
        if let Some(closed) = self.sessions.close(session) {
            self.waiting.retain(|waiting| waiting.session != session);
            self.added.retain(|added| added.session != session);
            drop(closed);
        }
        self.out.push(Output::Close {
            session,
            reason,
            retry,
        });
    }

    fn agent(&mut self, now: u64, event: AgentEvent) {
        match event {
            AgentEvent::Connected {
                session,
                node,
                uid,
                datapath,
                resume,
            } => {
                self.connected(session, node, uid, datapath, resume);
            }
            AgentEvent::Disconnected(session) => {
                self.sessions.close(session);
                self.waiting.retain(|waiting| waiting.session != session);
                self.added.retain(|added| added.session != session);
            }
            AgentEvent::KeyProved { session, slot } => self.key_proved(session, slot, now),
            AgentEvent::EndpointAdd {
                session,
                request_id,
                pod,
                addresses,
            } => {
                self.endpoint_add(
                    Added {
                        session,
                        request_id,
                        pod,
                        addresses,
                    },
                    now,
                );
            }
            AgentEvent::EndpointDelete {
                session,
                pod,
                addresses,
            } => {
                if let Some(node) = self.sessions.get(session).map(|session| session.node.clone()) {
                    self.endpoints
                        .delete(&node, &pod, &addresses, &mut self.identities, now);
                }
            }
            AgentEvent::Applied {
                session,
                epoch,
                version,
            } => {
                if epoch == self.settings.epoch {
                    self.sessions.applied(session, version, self.published.version());
                }
            }
        }
    }

    fn connected(
        &mut self,
        session: SessionId,
        node: NodeName,
        uid: NodeUid,
        datapath: Option<warren_model::Datapath>,
        resume: (u64, u64),
    ) {
        let refusal = match self.nodes.uid(&node) {
            _ if !self.synced => Some(("keyd is still reading the cluster's objects".to_owned(), true)),
            None => Some((format!("node {node} does not exist"), false)),
            Some(known) if *known != uid => Some((
                format!("node {node} has UID {known} now, not {uid}: enrol it again"),
                false,
            )),
            Some(_) => None,
        };
        if let Some((reason, retry)) = refusal {
            self.counters.refused_streams += 1;
            return self.out.push(Output::Close {
                session,
                reason,
                retry,
            });
        }
        self.nodes.set_datapath(&node, datapath);
        if let Some(older) = self.sessions.open(session, node.clone(), resume) {
            self.close(
                older,
                format!("a newer stream of node {node} replaces this one"),
                false,
            );
        }
    }

    fn key_proved(&mut self, session: SessionId, slot: SlotKey, now: u64) {
        let Some(node) = self.sessions.get(session).map(|session| session.node.clone()) else {
            return;
        };
        let public_key = slot.public_key;
        let result = self.nodes.put_key(&node, slot, now);
        match &result {
            Ok(()) => drop(self.refusals.remove(&(node, "key"))),
            Err(reason) => {
                self.counters.refused_keys += 1;
                let sentence = format!("node {node} offers a key that is refused: {reason}");
                self.refusals.insert((node, "key"), (now, sentence));
            }
        }
        self.out.push(Output::KeyResult {
            session,
            public_key,
            result,
        });
    }

    /// A key that never got as far as a proof (malformed, low order, wrong proof): shown and counted like the
    /// others.
    pub fn key_refused(&mut self, now: u64, node: &NodeName, reason: &str) {
        self.counters.refused_keys += 1;
        let sentence = format!("node {node} offers a key that is refused: {reason}");
        self.refusals.insert((node.clone(), "key"), (now, sentence));
    }

    fn endpoint_add(&mut self, added: Added, now: u64) {
        let Some(name) = self
            .sessions
            .get(added.session)
            .map(|session| session.node.clone())
        else {
            return;
        };
        self.nodes.settle();
        let result = match self.nodes.checked().get(&name) {
            Some(node) => self.endpoints.add(node, &added.pod, &added.addresses),
            None => Err(EndpointError {
                message: format!("node {name} is not a member"),
                retry: true,
            }),
        };
        match result {
            Ok(()) => {
                self.refusals.remove(&(name, "endpoint"));
                self.added.push(added);
            }
            Err(error) => {
                self.counters.refused_endpoints += 1;
                let sentence = format!(
                    "node {name} reports an endpoint that is refused: {}",
                    error.message
                );
                self.refusals.insert((name, "endpoint"), (now, sentence));
                let (session, request_id) = (added.session, added.request_id);
                self.out.push(Output::EndpointResult {
                    session,
                    request_id,
                    result: Err(error),
                });
            }
        }
    }

    /// Brings everything up to date and returns what must be done, in order. Call after one or more events, and
    /// about once a second.
    pub fn poll(&mut self, now: u64) -> Vec<Output> {
        if !self.synced {
            return std::mem::take(&mut self.out);
        }
        if self.nodes.settle() {
            self.endpoints.nodes_changed();
        }
        self.endpoints
            .settle(self.nodes.checked(), &mut self.identities, now);
        self.identities.collect(now);
        let early = std::mem::take(&mut self.out);
        let touched = self.persist();
        let due = self.published.version() == 0
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
        self.greet();
        self.out.extend(early);
        self.answer_added(now);
        self.answer_waiting(now);
        self.refusals
            .retain(|_, (at, _)| now.saturating_sub(*at) < SHOW_REFUSALS_MS);
        std::mem::take(&mut self.out)
    }

    /// Writes what durable parts changed and returns which records may have.
    fn persist(&mut self) -> BTreeSet<RecordKey> {
        let mut touched = BTreeSet::new();
        for name in self.nodes.take_changed() {
            if let Some(stored) = self.nodes.stored(&name)
                && self.persisted_nodes.get(&name) != Some(&stored)
            {
                self.persisted_nodes.insert(name.clone(), stored.clone());
                self.out.push(Output::Persist(Object::Node(stored)));
            }
            touched.insert(RecordKey::Node(name));
        }
        for number in self.identities.take_changed() {
            let labels = self.identities.labels(number);
            if labels != self.persisted_identities.get(&number) {
                let object = match labels {
                    Some(labels) => Object::Identity(number, labels.clone()),
                    None => Object::IdentityDelete(number),
                };
                match labels.cloned() {
                    Some(labels) => self.persisted_identities.insert(number, labels),
                    None => self.persisted_identities.remove(&number),
                };
                self.out.push(Output::Persist(object));
            }
            touched.insert(RecordKey::Identity(number));
        }
        let pods = self.endpoints.take_changed();
        if self.settings.mode == Mode::StandAlone {
            self.persist_endpoints(pods);
        }
        for address in self.endpoints.take_touched() {
            if self.settings.config.prefix_source == PrefixSource::PodIp {
                let now = self.endpoints.workload(address).map(|workload| workload.node);
                let before = match self.published.records().get(&RecordKey::Workload(address)) {
                    Some(Record::Workload(workload)) => Some(workload.node.clone()),
                    _ => None,
                };
                touched.extend(now.into_iter().chain(before).map(RecordKey::Node));
            }
            touched.insert(RecordKey::Workload(address));
        }
        touched
    }

    fn persist_endpoints(&mut self, pods: BTreeSet<PodRef>) {
        for pod in pods {
            let stored = self.endpoints.stored(&pod);
            if self.persisted_endpoints.get(&pod) == stored.as_ref() {
                continue;
            }
            let object = match stored {
                Some(stored) => {
                    self.persisted_endpoints.insert(pod, stored.clone());
                    Object::Endpoint(stored)
                }
                None => {
                    self.persisted_endpoints.remove(&pod);
                    Object::EndpointDelete(pod)
                }
            };
            self.out.push(Output::Persist(object));
        }
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

    /// Catches new streams up.
    fn greet(&mut self) {
        let version = self.published.version();
        for (session, node, (epoch, resume)) in self.sessions.take_new() {
            let increment = (epoch == self.settings.epoch)
                .then(|| self.published.since(resume))
                .flatten();
            let from = increment.map_or(CatchUp::Snapshot, CatchUp::Increment);
            self.out.push(Output::CatchUp {
                session,
                node,
                version,
                from,
            });
        }
    }

    /// Decides for every ADD of this round whether its addresses are free of their former owners.
    fn answer_added(&mut self, now: u64) {
        let acknowledged = self.sessions.acknowledged();
        for Added {
            session,
            request_id,
            pod,
            addresses,
        } in std::mem::take(&mut self.added)
        {
            let owned = self.endpoints.owns_all(&pod, &addresses);
            let identity = self
                .endpoints
                .identity_of(&pod)
                .filter(|identity| owned && *identity != IdentityId::UNKNOWN);
            let Some(identity) = identity else {
                let message = format!("pod {pod} lost its address or has no identity: try again");
                let result = Err(EndpointError { message, retry: true });
                self.out.push(Output::EndpointResult {
                    session,
                    request_id,
                    result,
                });
                continue;
            };
            match self
                .published
                .retired_at(&addresses)
                .filter(|version| *version > acknowledged)
            {
                None => self.out.push(Output::EndpointResult {
                    session,
                    request_id,
                    result: Ok(identity),
                }),
                Some(version) => {
                    let deadline = now + self.settings.acknowledge_ms;
                    self.waiting.push(Waiting {
                        session,
                        request_id,
                        identity,
                        version,
                        deadline,
                    });
                }
            }
        }
    }

    fn answer_waiting(&mut self, now: u64) {
        if let Some(version) = self
            .waiting
            .iter()
            .filter(|w| w.deadline <= now)
            .map(|w| w.version)
            .max()
        {
            for session in self.sessions.mark_laggards(version) {
                let reason = format!("version {version} was not acknowledged in time: reconnect");
                self.close_laggard(session, reason);
            }
        }
        let acknowledged = self.sessions.acknowledged();
        let out = &mut self.out;
        self.waiting.retain(|waiting| {
            let Waiting {
                session,
                request_id,
                identity,
                version,
                deadline,
            } = *waiting;
            if version <= acknowledged && deadline > now {
                out.push(Output::EndpointResult {
                    session,
                    request_id,
                    result: Ok(identity),
                });
                return false;
            }
            if deadline <= now {
                let message = "another node has not acknowledged that the address has a new owner".to_owned();
                let result = Err(EndpointError { message, retry: true });
                out.push(Output::EndpointResult {
                    session,
                    request_id,
                    result,
                });
            }
            deadline > now
        });
        self.published.forget_retired(acknowledged);
    }

    /// Ends a laggard's stream; its own waiting requests stay answered.
    fn close_laggard(&mut self, session: SessionId, reason: String) {
        self.sessions.close(session);
        self.out.push(Output::Close {
            session,
            reason,
            retry: true,
        });
    }

    /// Everything that is published.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        self.published.records().values()
    }

    /// Published version; 0 before the first.
    pub fn version(&self) -> u64 {
        self.published.version()
    }

    /// The UID under which a node exists now; `None` also before [`SourceEvent::Synced`].
    pub fn node_uid(&self, name: &NodeName) -> Option<&NodeUid> {
        self.synced.then(|| self.nodes.uid(name)).flatten()
    }

    /// One sentence per thing that is wrong.
    pub fn problems(&self) -> Vec<String> {
        let mut out = self.nodes.problems();
        out.extend(self.endpoints.problems());
        out.extend(self.refusals.values().map(|(_, sentence)| sentence.clone()));
        out.extend(self.sessions.problems());
        out
    }

    /// What was refused.
    pub fn counters(&self) -> Counters {
        self.counters
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
