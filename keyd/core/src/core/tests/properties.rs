//! Random histories: whatever happens in whatever order, the invariants hold and a follower of the increments has
//! exactly what is published. Proptest prints the seed of a failure and keeps it in `proptest-regressions`.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use warren_model::{PrefixSource, directory::check};

use super::{Index, config, node, pod, pod_ref};
use crate::event::{
    AgentEvent, CatchUp, Change, Mode, Node, Output, Pod, Record, RecordKey, SessionId, SourceEvent,
};

/// One step of a history. Numbers are small so that they meet.
#[derive(Debug, Clone)]
enum Step {
    NodeUp { n: u8, cidr: u8, address: u8, uid: u8 },
    NodeDown(u8),
    PodUp { p: u8, n: u8, ip: u8, host: bool },
    PodDown(u8),
    Connect { n: u8, session: u8, resume: u8 },
    Disconnect(u8),
    Key { session: u8, key: u8 },
    Add { session: u8, p: u8, ip: u8 },
    Delete { session: u8, p: u8 },
    Applied { session: u8, version: u8 },
    Wait(u16),
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (1..4_u8, 1..5_u8, 1..5_u8, 0..3_u8).prop_map(|(n, cidr, address, uid)| Step::NodeUp { n, cidr, address, uid }),
        1 => (1..4_u8).prop_map(Step::NodeDown),
        3 => (0..4_u8, 1..4_u8, 0..12_u8, any::<bool>()).prop_map(|(p, n, ip, host)| Step::PodUp { p, n, ip, host }),
        1 => (0..4_u8).prop_map(Step::PodDown),
        3 => (1..4_u8, 0..6_u8, 0..40_u8).prop_map(|(n, session, resume)| Step::Connect { n, session, resume }),
        1 => (0..6_u8).prop_map(Step::Disconnect),
        3 => (0..6_u8, 2..9_u8).prop_map(|(session, key)| Step::Key { session, key }),
        4 => (0..6_u8, 0..4_u8, 0..12_u8).prop_map(|(session, p, ip)| Step::Add { session, p, ip }),
        2 => (0..6_u8, 0..4_u8).prop_map(|(session, p)| Step::Delete { session, p }),
        2 => (0..6_u8, 0..60_u8).prop_map(|(session, version)| Step::Applied { session, version }),
        1 => (0..20_000_u16).prop_map(Step::Wait),
        1 => Just(Step::Restart),
    ]
}

fn ip(ip: u8) -> String {
    format!("10.244.{}.{}", 1 + ip / 4, 1 + ip % 4)
}

/// What a follower of the stream has.
#[derive(Default)]
struct Follower {
    records: BTreeMap<RecordKey, Record>,
}

impl Follower {
    fn take(&mut self, change: &Change) {
        for record in &change.upserts {
            self.records.insert(record.key(), record.clone());
        }
        for key in &change.removes {
            self.records.remove(key);
        }
    }
}

fn play(index: &mut Index, step: &Step, told: &mut Vec<SourceEvent>) -> Vec<Output> {
    let source = match step {
        Step::NodeUp {
            n,
            cidr,
            address,
            uid,
        } => Some(SourceEvent::NodeUpsert(Node {
            uid: format!("uid{n}-{uid}").into(),
            pod_cidrs: vec![format!("10.244.{cidr}.0/24").parse().unwrap()],
            addresses: vec![std::net::IpAddr::from([172, 30, 0, *address])],
            ..node(*n)
        })),
        Step::NodeDown(n) => Some(SourceEvent::NodeDelete(format!("node{n}").into())),
        Step::PodUp { p, n, ip: at, host } => {
            let name = format!("p{p}-x");
            let pod = pod(&name, *n, Some(&ip(*at)));
            Some(SourceEvent::PodUpsert(Pod {
                host_network: *host && *at == 0,
                ..pod
            }))
        }
        Step::PodDown(p) => Some(SourceEvent::PodDelete {
            namespace: "shop".into(),
            name: format!("p{p}-x"),
        }),
        _ => None,
    };
    if let Some(event) = source {
        told.push(event.clone());
        return index.source(event);
    }
    let session = |session: &u8| SessionId((*session).into());
    match step {
        Step::Connect {
            n,
            session: s,
            resume,
        } => {
            let epoch = index.settings.epoch;
            index.connect_as(session(s), *n, (epoch, (*resume).into()))
        }
        Step::Disconnect(s) => index.agent(AgentEvent::Disconnected(session(s))),
        Step::Key { session: s, key } => index.agent(AgentEvent::KeyProved {
            session: session(s),
            slots: super::slots(1, *key),
        }),
        Step::Add {
            session: s,
            p,
            ip: at,
        } => index.agent(AgentEvent::EndpointAdd {
            session: session(s),
            request_id: 1,
            pod: pod_ref(&format!("p{p}-x")),
            addresses: vec![ip(*at).parse().unwrap()],
        }),
        Step::Delete { session: s, p } => index.agent(AgentEvent::EndpointDelete {
            session: session(s),
            pod: pod_ref(&format!("p{p}-x")),
            addresses: vec![],
        }),
        Step::Applied { session: s, version } => {
            let (session, epoch, version) = (session(s), index.settings.epoch, (*version).into());
            index.agent(AgentEvent::Applied {
                session,
                epoch,
                version,
            })
        }
        Step::Wait(ms) => {
            index.now += u64::from(*ms);
            index.poll()
        }
        Step::Restart => {
            index.restart();
            let mut outputs = vec![];
            for event in told.clone() {
                outputs.extend(index.source(event));
            }
            outputs.extend(index.source(SourceEvent::Synced));
            outputs
        }
        _ => vec![],
    }
}

fn invariants(index: &Index, ever_revoked: &mut BTreeSet<String>) {
    let nodes: Vec<_> = index
        .core
        .records()
        .filter_map(|record| match record {
            Record::Node(node) => Some(node.clone()),
            _ => None,
        })
        .collect();
    let config = warren_model::ClusterConfig {
        prefix_source: index.settings.config.prefix_source,
        ..config()
    };
    // What keyd publishes passes the rules that every agent applies again, in any order.
    for order in [nodes.clone(), nodes.iter().rev().cloned().collect()] {
        assert_eq!(check(&config, &order).refused, []);
    }
    let published: BTreeMap<_, _> = nodes.iter().map(|node| (node.name.clone(), node)).collect();
    for record in index.core.records() {
        if let Record::Workload(workload) = record {
            let home = published
                .get(&workload.node)
                .expect("a workload's node is a member");
            assert!(
                home.prefixes.iter().any(|prefix| prefix.contains(&workload.ip)),
                "{workload:?}"
            );
        }
        if let Record::Identity(number, _) = record {
            assert!(number.0 >= 256);
        }
    }
    // A key once revoked is in no record.
    for stored in &index.stored.nodes {
        ever_revoked.extend(
            stored
                .revoked
                .iter()
                .flat_map(|revoked| &revoked.keys)
                .map(ToString::to_string),
        );
    }
    for slot in nodes.iter().flat_map(|node| &node.slots) {
        assert!(
            !ever_revoked.contains(&slot.public_key.to_string()),
            "a revoked key came back"
        );
    }
}

fn history(mode: Mode, prefixes: PrefixSource, steps: &[Step]) {
    let mut index = Index::with(mode, prefixes);
    let mut told = vec![];
    let mut follower = Follower::default();
    let mut ever_revoked = BTreeSet::new();
    // An agent's copy at each version, to check what a resuming one is sent.
    let mut copies: BTreeMap<u64, BTreeMap<RecordKey, Record>> = BTreeMap::new();
    index.source(SourceEvent::Synced);
    for step in steps {
        if matches!(step, Step::Restart) {
            follower = Follower::default();
            copies.clear();
        }
        let outputs = play(&mut index, step, &mut told);
        for output in &outputs {
            match output {
                Output::Publish { version, change } => {
                    follower.take(change);
                    copies.insert(*version, follower.records.clone());
                }
                Output::CatchUp {
                    from: CatchUp::Increment(change),
                    version,
                    ..
                } => {
                    let Step::Connect { resume, .. } = step else {
                        panic!("only a new stream is caught up")
                    };
                    // Resumable versions are those of this term.
                    if let Some(copy) = copies.get(&u64::from(*resume)) {
                        let mut resumed = Follower {
                            records: copy.clone(),
                        };
                        resumed.take(change);
                        assert_eq!(&resumed.records, &copies[version]);
                    }
                }
                _ => {}
            }
        }
        let all: BTreeMap<_, _> = index
            .core
            .records()
            .map(|record| (record.key(), record.clone()))
            .collect();
        assert_eq!(follower.records, all, "increments lead to what is published");
        invariants(&index, &mut ever_revoked);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn kubernetes_with_pod_cidrs(steps in prop::collection::vec(step(), 1..60)) {
        history(Mode::Kubernetes, PrefixSource::PodCidr, &steps);
    }

    #[test]
    fn kubernetes_with_pod_ips(steps in prop::collection::vec(step(), 1..60)) {
        history(Mode::Kubernetes, PrefixSource::PodIp, &steps);
    }

    #[test]
    fn stand_alone_with_pod_cidrs(steps in prop::collection::vec(step(), 1..60)) {
        history(Mode::StandAlone, PrefixSource::PodCidr, &steps);
    }

    #[test]
    fn stand_alone_with_pod_ips(steps in prop::collection::vec(step(), 1..60)) {
        history(Mode::StandAlone, PrefixSource::PodIp, &steps);
    }
}
