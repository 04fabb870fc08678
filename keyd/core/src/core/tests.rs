//! `apply(event)`, expect outputs.

use warren_model::{
    ClusterConfig, Datapath, NodeKeys, NodeName, PodRef, PrefixSource, PublicKey, SlotKey, keys::slots_of,
};

use super::*;
use crate::{
    event::{AgentEvent, CatchUp, EndpointError, Namespace, Node, Pod},
    stored::{Recovered, Revoked},
};

mod endpoints;
mod keys;
mod policies;
mod policy_histories;
mod properties;

pub(crate) fn config() -> ClusterConfig {
    ClusterConfig {
        cluster_name: "test".into(),
        encryption: true,
        pod_pools: vec![
            "10.244.0.0/16".parse().unwrap(),
            "fd00:10:244::/48".parse().unwrap(),
        ],
        node_pools: vec!["172.30.0.0/24".parse().unwrap(), "fd00:30::/64".parse().unwrap()],
        service_cidrs: vec!["10.96.0.0/16".parse().unwrap()],
        prefix_source: Default::default(),
        datapath: Default::default(),
        wireguard_port: 51871,
        keyd_port: 4250,
        apiserver_port: 6443,
        keepalive_seconds: 25,
        pre_shared_keys: true,
        mark_mask: 0x3f7f,
        node_ports: (30_000, 32_767),
        host_reaches_pods: true,
        policy_audit: false,
        pods_may_audit: true,
        ignored_labels: warren_model::config::default_ignored_labels(),
        identities_per_namespace: warren_model::config::default_identities_per_namespace(),
        snapshot_expiry_seconds: 86400,
        snapshot_hard_fail: false,
        signing_key_max_age_seconds: 0,
    }
}

/// A core with a clock.
pub(super) struct Index {
    pub(super) core: Core,
    pub(super) now: u64,
    pub(super) stored: Recovered,
    settings: Settings,
}

impl Index {
    pub(super) fn new(mode: Mode) -> Self {
        Self::with(mode, PrefixSource::PodCidr)
    }

    pub(super) fn with(mode: Mode, prefix_source: PrefixSource) -> Self {
        let settings = Settings::new(
            ClusterConfig {
                prefix_source,
                ..config()
            },
            mode,
            7,
        );
        Self::of(settings)
    }

    /// Knows the namespace `shop`.
    pub(super) fn of(settings: Settings) -> Self {
        let core = Core::new(settings.clone(), Recovered::default(), 0);
        let mut index = Self {
            core,
            now: 0,
            stored: Recovered::default(),
            settings,
        };
        index.source(SourceEvent::NamespaceUpsert(shop()));
        index
    }

    pub(super) fn synced(mode: Mode, nodes: u8) -> Self {
        let mut index = Self::new(mode);
        for n in 1..=nodes {
            index.source(SourceEvent::NodeUpsert(node(n)));
        }
        index.source(SourceEvent::Synced);
        index
    }

    pub(super) fn source(&mut self, event: SourceEvent) -> Vec<Output> {
        self.core.handle(self.now, Event::Source(event));
        self.poll()
    }

    pub(super) fn agent(&mut self, event: AgentEvent) -> Vec<Output> {
        self.core.handle(self.now, Event::Agent(event));
        self.poll()
    }

    /// Polls and keeps what is persisted, as a store would.
    pub(super) fn poll(&mut self) -> Vec<Output> {
        let mut all = vec![];
        loop {
            let outputs = self.core.poll(self.now);
            let mut written = vec![];
            for output in &outputs {
                match output {
                    Output::Persist(object) => self.store(object.clone()),
                    Output::WriteKeys { was, node } => written.push((was.clone(), node.clone())),
                    _ => {}
                }
            }
            all.extend(outputs);
            if written.is_empty() {
                return all;
            }
            for (was, node) in written {
                let stored = self.swap(&was, &node);
                self.core.handle(self.now, Event::Stored(Box::new(stored)));
            }
        }
    }

    fn stored_node(&self, name: &NodeName) -> Option<StoredNode> {
        self.stored.nodes.iter().find(|old| old.name == *name).cloned()
    }

    /// Writes keys as a store does; returns what is there then.
    pub(super) fn swap(&mut self, was: &NodeKeys, node: &StoredNode) -> StoredNode {
        let current = self.stored_node(&node.name);
        if let Some(new) = node.in_place_of(was, current.as_ref()) {
            self.stored.nodes.retain(|old| old.name != node.name);
            self.stored.nodes.push(new);
        }
        self.stored_node(&node.name).unwrap()
    }

    pub(super) fn store(&mut self, object: Object) {
        let stored = &mut self.stored;
        match object {
            Object::Node(node) => {
                let current = stored.nodes.iter().find(|old| old.name == node.name);
                if let Some(node) = node.over(current) {
                    stored.nodes.retain(|old| old.name != node.name);
                    stored.nodes.push(node);
                }
            }
            Object::RotationDelete(name) => stored.rotations.retain(|old| old.name != name),
            Object::Identity(number, labels) => {
                stored.identities.retain(|(old, _)| *old != number);
                stored.identities.push((number, labels));
            }
            Object::IdentityDelete(number) => stored.identities.retain(|(old, _)| *old != number),
            Object::Endpoint(endpoint) => {
                stored.endpoints.retain(|old| old.pod != endpoint.pod);
                stored.endpoints.push(endpoint);
            }
            Object::EndpointDelete(pod) => stored.endpoints.retain(|old| old.pod != pod),
        }
    }

    /// keyd dies and comes back with what was stored; the source tells everything again.
    pub(super) fn restart(&mut self) {
        self.settings.epoch += 1;
        self.core = Core::new(self.settings.clone(), self.stored.clone(), self.now);
        self.source(SourceEvent::NamespaceUpsert(shop()));
    }

    pub(super) fn connect(&mut self, n: u8) -> SessionId {
        let session = SessionId(u64::from(n));
        self.connect_as(session, n, (0, 0));
        session
    }

    pub(super) fn connect_as(&mut self, session: SessionId, n: u8, resume: (u64, u64)) -> Vec<Output> {
        let name = NodeName::from(format!("node{n}"));
        let uid = self
            .core
            .node_uid(&name)
            .cloned()
            .unwrap_or_else(|| "none".into());
        let datapath = Some(Datapath::Userspace);
        self.agent(AgentEvent::Connected {
            session,
            node: name,
            uid,
            datapath,
            resume,
        })
    }

    pub(super) fn prove(&mut self, session: SessionId, key: u8) -> Result<(), String> {
        self.prove_as(session, 1, key)
    }

    pub(super) fn prove_as(&mut self, session: SessionId, generation: u64, key: u8) -> Result<(), String> {
        let slots = slots(generation, key);
        let outputs = self.agent(AgentEvent::KeyProved { session, slots });
        outputs
            .into_iter()
            .find_map(|output| match output {
                Output::KeyResult { result, .. } => Some(result),
                _ => None,
            })
            .expect("a key is always answered")
    }

    /// The agent says what it holds; returns the generation that it is asked for.
    pub(super) fn held(&mut self, session: SessionId, keys: &[(u64, u8)]) -> Option<u64> {
        let keys = keys
            .iter()
            .map(|(generation, key)| (*generation, public_key(*key)));
        let keys = keys.collect();
        let outputs = self.agent(AgentEvent::Held { session, keys });
        outputs.into_iter().find_map(|output| match output {
            Output::AskKey { generation, .. } => Some(generation),
            _ => None,
        })
    }

    pub(super) fn add(
        &mut self,
        session: SessionId,
        pod: &PodRef,
        ip: &str,
    ) -> Option<Result<u32, EndpointError>> {
        let addresses = vec![ip.parse().unwrap()];
        let outputs = self.agent(AgentEvent::EndpointAdd {
            session,
            request_id: 1,
            pod: pod.clone(),
            addresses,
        });
        reply(outputs)
    }

    pub(super) fn applied(&mut self, session: SessionId) -> Vec<Output> {
        let (epoch, version) = (self.settings.epoch, self.core.version());
        self.agent(AgentEvent::Applied {
            session,
            epoch,
            version,
        })
    }

    pub(super) fn workload(&self, ip: &str) -> Option<(String, String, u32)> {
        let ip: std::net::IpAddr = ip.parse().unwrap();
        self.core.records().find_map(|record| match record {
            Record::Workload(workload) if workload.ip == ip => Some((
                workload.pod.to_string(),
                workload.node.to_string(),
                workload.identity.0,
            )),
            _ => None,
        })
    }

    pub(super) fn node(&self, n: u8) -> Option<NodeRecord> {
        self.core.records().find_map(|record| match record {
            Record::Node(node) if node.name.as_str() == format!("node{n}") => Some(node.clone()),
            _ => None,
        })
    }
}

pub(super) fn reply(outputs: Vec<Output>) -> Option<Result<u32, EndpointError>> {
    outputs.into_iter().find_map(|output| match output {
        Output::EndpointResult { result, .. } => Some(result.map(|identity| identity.0)),
        _ => None,
    })
}

pub(crate) fn node(n: u8) -> Node {
    Node {
        name: format!("node{n}").into(),
        uid: format!("uid{n}").into(),
        uid_derived: false,
        addresses: vec![std::net::IpAddr::from([172, 30, 0, n])],
        pod_cidrs: vec![format!("10.244.{n}.0/24").parse().unwrap()],
        labels: Default::default(),
        policy_audit: false,
    }
}

pub(super) fn public_key(key: u8) -> PublicKey {
    PublicKey::from_bytes([key; 32]).unwrap()
}

pub(super) fn slots(generation: u64, key: u8) -> [SlotKey; 2] {
    slots_of(generation).map(|slot| SlotKey {
        slot,
        port: 51871 + u16::from(slot),
        generation,
        public_key: public_key(key),
        pre_shared_keys: false,
    })
}

pub(super) fn pod(name: &str, node: u8, ip: Option<&str>) -> Pod {
    Pod {
        namespace: "shop".into(),
        name: name.into(),
        uid: Some(format!("{name}-uid")),
        node: Some(format!("node{node}").into()),
        labels: [(
            "app".to_owned(),
            name.split('-').next().unwrap_or(name).to_owned(),
        )]
        .into(),
        addresses: ip.into_iter().map(|ip| ip.parse().unwrap()).collect(),
        ..Pod::default()
    }
}

pub(super) fn shop() -> Namespace {
    Namespace {
        name: "shop".into(),
        labels: Default::default(),
    }
}

pub(super) fn pod_ref(name: &str) -> PodRef {
    PodRef {
        namespace: "shop".into(),
        name: name.into(),
        uid: format!("{name}-uid"),
    }
}

pub(super) fn closes(outputs: &[Output]) -> Vec<(u64, String)> {
    let close = |output: &Output| match output {
        Output::Close { session, reason, .. } => Some((session.0, reason.clone())),
        _ => None,
    };
    outputs.iter().filter_map(close).collect()
}

#[test]
fn nothing_is_published_before_the_source_is_complete() {
    let mut index = Index::new(Mode::StandAlone);
    assert_eq!(index.source(SourceEvent::NodeUpsert(node(1))), []);
    assert_eq!(index.core.node_uid(&"node1".into()), None);
    let outputs = index.source(SourceEvent::Synced);
    assert!(matches!(
        &outputs[..],
        [
            Output::Persist(Object::Node(_)),
            Output::Publish { version: 1, .. }
        ]
    ));
    assert_eq!(index.node(1).unwrap().prefixes, node(1).pod_cidrs);
}

#[test]
fn an_object_is_persisted_before_it_is_published_and_before_the_answer() {
    let mut index = Index::synced(Mode::StandAlone, 1);
    let session = index.connect(1);
    let outputs = index.agent(AgentEvent::KeyProved {
        session,
        slots: slots(1, 9),
    });
    let [
        Output::WriteKeys { node, .. },
        Output::Publish { .. },
        Output::KeyResult { result: Ok(()), .. },
    ] = &outputs[..]
    else {
        panic!("{outputs:?}")
    };
    let record = node.record.as_ref().unwrap();
    assert_eq!(record.slots, slots(1, 9));
    assert_eq!((record.active, record.last), (1, 1));
}

#[test]
fn a_new_agent_gets_a_snapshot_a_known_one_what_it_lacks() {
    let mut index = Index::synced(Mode::StandAlone, 2);
    let outputs = index.connect_as(SessionId(1), 1, (0, 0));
    assert!(
        matches!(
            outputs.last(),
            Some(Output::CatchUp {
                from: CatchUp::Snapshot,
                ..
            })
        ),
        "{outputs:?}"
    );
    let version = index.core.version();
    index.prove(SessionId(1), 9).unwrap();
    let outputs = index.connect_as(SessionId(2), 2, (7, version));
    let Some(Output::CatchUp {
        from: CatchUp::Increment(change),
        ..
    }) = outputs.last()
    else {
        panic!("{outputs:?}")
    };
    // node1's key, and node2's datapath, which its Hello has just told.
    assert_eq!(change.upserts.len(), 2);
    for resume in [(6, version), (7, version + 100)] {
        let outputs = index.connect_as(SessionId(3), 2, resume);
        assert!(
            outputs.iter().any(|o| matches!(
                o,
                Output::CatchUp {
                    from: CatchUp::Snapshot,
                    ..
                }
            )),
            "{resume:?}"
        );
    }
}

#[test]
fn a_quiet_directory_is_signed_afresh() {
    let mut index = Index::synced(Mode::StandAlone, 1);
    index.now = 3_599_999;
    assert_eq!(index.poll(), []);
    index.now = 3_600_000;
    let outputs = index.poll();
    assert_eq!(
        outputs,
        [Output::Publish {
            version: 2,
            change: Default::default()
        }]
    );
}

#[test]
fn streams_of_unknown_nodes_and_old_uids_are_refused() {
    let mut index = Index::synced(Mode::Kubernetes, 1);
    let connect = |node: &str, uid: &str| AgentEvent::Connected {
        session: SessionId(9),
        node: node.into(),
        uid: uid.into(),
        datapath: None,
        resume: (0, 0),
    };
    for (node, uid) in [("node2", "uid2"), ("node1", "uid0"), ("node1", "")] {
        let outputs = index.agent(connect(node, uid));
        assert_eq!(closes(&outputs).len(), 1, "{node} {uid}: {outputs:?}");
    }
    assert_eq!(index.core.counters().refused_streams, 3);
}

#[test]
fn a_node_registered_anew_loses_stream_and_key() {
    let mut index = Index::synced(Mode::Kubernetes, 2);
    let session = index.connect(1);
    index.prove(session, 9).unwrap();
    let anew = Node {
        uid: "uid1b".into(),
        ..node(1)
    };
    let outputs = index.source(SourceEvent::NodeUpsert(anew));
    assert_eq!(closes(&outputs)[0].0, 1);
    assert_eq!(index.node(1).unwrap().slots, []);
    let session = index.connect(1);
    assert!(index.prove(session, 9).unwrap_err().contains("revoked"));
    index.prove(session, 10).unwrap();
    let other = index.connect(2);
    assert!(index.prove(other, 9).unwrap_err().contains("revoked"));
}

#[test]
fn tombstones_survive_restarts_also_of_nodes_deleted_meanwhile() {
    let mut index = Index::synced(Mode::Kubernetes, 2);
    let session = index.connect(1);
    index.prove(session, 9).unwrap();
    index.restart();
    // node1 is gone now; nobody saw it go.
    index.source(SourceEvent::NodeUpsert(node(2)));
    index.source(SourceEvent::Synced);
    assert_eq!(index.node(1), None);
    let tombstone = index
        .stored
        .nodes
        .iter()
        .find(|node| node.name.as_str() == "node1")
        .unwrap();
    let key = PublicKey::from_bytes([9; 32]).unwrap();
    assert_eq!(tombstone.record, None);
    assert_eq!(
        tombstone.revoked,
        [Revoked {
            uid: "uid1".into(),
            keys: vec![key]
        }]
    );
    index.restart();
    index.source(SourceEvent::NodeUpsert(node(2)));
    index.source(SourceEvent::Synced);
    let session = index.connect(2);
    assert!(index.prove(session, 9).unwrap_err().contains("revoked"));
    // The very UID of a dead node is not accepted again.
    index.source(SourceEvent::NodeUpsert(node(1)));
    assert_eq!(index.node(1), None);
    assert!(
        index
            .core
            .problems()
            .iter()
            .any(|problem| problem.contains("uid1")),
        "{:?}",
        index.core.problems()
    );
}

#[test]
fn keys_are_published_at_once_after_a_restart_and_nothing_is_rewritten() {
    let mut index = Index::synced(Mode::Kubernetes, 2);
    let session = index.connect(1);
    index.prove(session, 9).unwrap();
    let before = index.node(1).unwrap();
    index.restart();
    index.source(SourceEvent::NodeUpsert(node(1)));
    index.source(SourceEvent::NodeUpsert(node(2)));
    let outputs = index.source(SourceEvent::Synced);
    assert!(
        outputs.iter().all(|output| !matches!(output, Output::Persist(_))),
        "{outputs:?}"
    );
    assert_eq!(index.node(1), Some(before));
    let session = index.connect(2);
    assert!(
        index
            .prove(session, 9)
            .unwrap_err()
            .contains("belongs to node node1")
    );
}

#[test]
fn derived_uids_count_incarnations() {
    let mut index = Index::synced(Mode::StandAlone, 0);
    let derived = Node {
        uid_derived: true,
        ..node(1)
    };
    index.source(SourceEvent::NodeUpsert(derived.clone()));
    assert_eq!(index.core.node_uid(&"node1".into()).unwrap().as_str(), "uid1");
    for incarnation in 1..=3 {
        index.source(SourceEvent::NodeDelete("node1".into()));
        index.source(SourceEvent::NodeUpsert(derived.clone()));
        let uid = index.core.node_uid(&"node1".into()).unwrap().to_string();
        assert_eq!(uid, format!("uid1-r{incarnation}"));
        index.restart();
        index.source(SourceEvent::NodeUpsert(derived.clone()));
        index.source(SourceEvent::Synced);
        assert_eq!(index.core.node_uid(&"node1".into()).unwrap().as_str(), uid);
    }
}

#[test]
fn lost_keys_do_not_come_back_and_endless_replacing_is_stopped() {
    let mut index = Index::synced(Mode::Kubernetes, 1);
    let session = index.connect(1);
    index.prove(session, 9).unwrap();
    index.prove(session, 9).unwrap();
    let refused = index.prove_as(session, 2, 10).unwrap_err();
    assert!(refused.contains("not asked"), "{refused}");
    // Its disk was replaced: it is asked for another key in the same half, and the lost one is void.
    assert_eq!(index.held(session, &[]), Some(3));
    index.prove_as(session, 3, 10).unwrap();
    assert_eq!(index.node(1).unwrap().slots, slots(3, 10));
    assert!(index.prove_as(session, 4, 9).unwrap_err().contains("revoked"));
    index.core.nodes.exhaust(&"node1".into());
    assert!(index.prove_as(session, 5, 11).unwrap_err().contains("wait"));
}

#[test]
fn nodes_without_pod_cidrs_or_addresses_are_problems_and_disturb_nobody() {
    let mut index = Index::synced(Mode::StandAlone, 1);
    let bare = Node {
        pod_cidrs: vec![],
        addresses: vec![],
        ..node(2)
    };
    index.source(SourceEvent::NodeUpsert(bare));
    let problems = index.core.problems();
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(problems[0].contains("node2 has no podCIDRs"));
    assert_eq!(index.node(1).unwrap().prefixes.len(), 1);
}

#[test]
fn epochs_grow_and_are_at_least_the_time() {
    assert_eq!(crate::next_epoch(0, 1_700_000_000_000), 1_700_000_000_000);
    assert_eq!(
        crate::next_epoch(1_700_000_000_000, 1_600_000_000_000),
        1_700_000_000_001
    );
    assert_eq!(crate::next_epoch(u64::MAX, 5), u64::MAX);
}
