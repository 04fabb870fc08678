//! Random histories of policies, pods, namespaces and nodes: what a follower of the increments has is what one would
//! compute from the objects that exist, and nothing else.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use warren_model::{
    IdentityId, Labels,
    policy::{
        Action, AddressScope, CidrSet, CidrSource, NodeFacts, Peer, PolicyError, PolicyRef, Rule, Selector,
        SelectorId, reserved_labels,
    },
};

use super::{
    Index, node, pod,
    policies::{app, policy, rule},
    shop,
};
use crate::event::{Event, Mode, Namespace, Output, Pod, Record, RecordKey, SourceEvent};

/// One step of a history. Numbers are small so that they meet.
#[derive(Debug, Clone)]
enum Step {
    Policy {
        p: u8,
        subject: u8,
        peer: u8,
        group: u8,
        deny: bool,
    },
    Bad(u8),
    PolicyGone(u8),
    Group {
        g: u8,
        cidr: u8,
    },
    GroupGone(u8),
    Pod {
        p: u8,
        label: u8,
        more: u8,
        audit: bool,
    },
    PodGone(u8),
    Namespace(u8),
    Node {
        n: u8,
        label: u8,
        audit: bool,
    },
    ApiServers(u8),
    Poll,
    Wait,
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..4_u8, 0..4_u8, 0..5_u8, 0..4_u8, any::<bool>())
            .prop_map(|(p, subject, peer, group, deny)| Step::Policy { p, subject, peer, group, deny }),
        1 => (0..4_u8).prop_map(Step::Bad),
        3 => (0..4_u8).prop_map(Step::PolicyGone),
        2 => (0..2_u8, 0..4_u8).prop_map(|(g, cidr)| Step::Group { g, cidr }),
        1 => (0..2_u8).prop_map(Step::GroupGone),
        6 => (0..6_u8, 0..4_u8, 0..3_u8, any::<bool>())
            .prop_map(|(p, label, more, audit)| Step::Pod { p, label, more, audit }),
        2 => (0..6_u8).prop_map(Step::PodGone),
        1 => (0..3_u8).prop_map(Step::Namespace),
        1 => (1..4_u8, 0..3_u8, any::<bool>()).prop_map(|(n, label, audit)| Step::Node { n, label, audit }),
        1 => (0..4_u8).prop_map(Step::ApiServers),
        5 => Just(Step::Poll),
        1 => Just(Step::Wait),
        1 => Just(Step::Restart),
    ]
}

fn peers(peer: u8, group: u8) -> Vec<Peer> {
    let mut peers = match peer {
        4 => vec![Peer::Selector(Selector::new([]))],
        n => vec![Peer::Selector(app(&format!("l{n}")))],
    };
    if group < 2 {
        peers.push(Peer::Cidr(CidrSet {
            source: CidrSource::Group(format!("g{group}")),
            except: vec![],
            scope: AddressScope::World,
        }));
    }
    peers
}

fn event(step: &Step) -> Option<SourceEvent> {
    let named = |p: &u8| policy(&format!("p{p}"));
    let group = |g: &u8| format!("g{g}");
    Some(match step {
        Step::Policy {
            p,
            subject,
            peer,
            group,
            deny,
        } => {
            let mut rule = rule(&format!("p{p}"), &format!("l{subject}"), peers(*peer, *group));
            if *deny {
                rule.statements[0].action = Action::Deny;
            }
            SourceEvent::PolicyUpsert {
                policy: named(p),
                outcome: Ok(vec![rule]),
            }
        }
        Step::Bad(p) => SourceEvent::PolicyUpsert {
            policy: named(p),
            outcome: Err(PolicyError::new("spec", "is wrong")),
        },
        Step::PolicyGone(p) => SourceEvent::PolicyDelete(named(p)),
        Step::Group { g, cidr } => SourceEvent::CidrGroupUpsert {
            name: group(g),
            outcome: match cidr {
                3 => Err(PolicyError::new("spec", "is wrong")),
                n => Ok(vec![format!("192.0.{n}.0/24").parse().unwrap()]),
            },
        },
        Step::GroupGone(g) => SourceEvent::CidrGroupDelete(group(g)),
        Step::Pod {
            p,
            label,
            more,
            audit,
        } => {
            let mut pod = pod(
                &format!("x{p}"),
                1 + p % 2,
                Some(&format!("10.244.{}.{}", 1 + p % 2, 10 + p)),
            );
            pod.labels = [("app".to_owned(), format!("l{label}"))].into();
            if *more > 0 {
                pod.labels.insert("tier".into(), more.to_string());
            }
            SourceEvent::PodUpsert(Pod {
                policy_audit: *audit,
                ..pod
            })
        }
        Step::PodGone(p) => SourceEvent::PodDelete {
            namespace: "shop".into(),
            name: format!("x{p}"),
        },
        Step::Namespace(n) => SourceEvent::NamespaceUpsert(Namespace {
            labels: [("team".to_owned(), n.to_string())].into(),
            ..shop()
        }),
        Step::Node { n, label, audit } => {
            let mut node = node(*n);
            node.labels.insert("zone".into(), label.to_string());
            node.policy_audit = *audit;
            SourceEvent::NodeUpsert(node)
        }
        Step::ApiServers(n) => SourceEvent::ApiServers([std::net::IpAddr::from([172, 30, 0, *n])].into()),
        Step::Poll | Step::Wait | Step::Restart => return None,
    })
}

/// What exists, by name: the newest event about each thing.
fn exists(told: &[SourceEvent]) -> Vec<SourceEvent> {
    let mut newest: BTreeMap<String, SourceEvent> = BTreeMap::new();
    for event in told {
        let name = match event {
            SourceEvent::PolicyUpsert { policy, .. } | SourceEvent::PolicyDelete(policy) => {
                policy.to_string()
            }
            SourceEvent::CidrGroupUpsert { name, .. } | SourceEvent::CidrGroupDelete(name) => name.clone(),
            SourceEvent::PodUpsert(pod) => format!("pod {}", pod.name),
            SourceEvent::PodDelete { name, .. } => format!("pod {name}"),
            SourceEvent::NamespaceUpsert(_) => "namespace".into(),
            SourceEvent::NodeUpsert(node) => format!("node {}", node.name),
            SourceEvent::ApiServers(_) => "api servers".into(),
            other => panic!("{other:?}"),
        };
        newest.insert(name, event.clone());
    }
    newest.into_values().collect()
}

/// The directory without numbers that depend on its history.
#[derive(Debug, Default, PartialEq)]
struct Meaning {
    workloads: BTreeMap<std::net::IpAddr, (Labels, bool)>,
    rules: BTreeMap<PolicyRef, Vec<Rule>>,
    facts: BTreeMap<String, NodeFacts>,
    selectors: BTreeSet<Selector>,
}

fn meaning(records: &BTreeMap<RecordKey, Record>) -> Meaning {
    let mut out = Meaning::default();
    let selector = |id: SelectorId| match &records[&RecordKey::Selector(id)] {
        Record::Selector(_, selector) => selector.clone(),
        other => panic!("{other:?}"),
    };
    for record in records.values() {
        match record {
            Record::Workload(workload) => {
                let labels = match &records[&RecordKey::Identity(workload.identity)] {
                    Record::Identity(_, labels) => labels.clone(),
                    other => panic!("{other:?}"),
                };
                out.workloads.insert(workload.ip, (labels, workload.policy_audit));
            }
            Record::Policy(policy, rules) => {
                let rules = rules.iter().map(|rule| rule.clone().map(selector)).collect();
                out.rules.insert(policy.clone(), rules);
            }
            Record::NodeFacts(name, facts) => drop(out.facts.insert(name.to_string(), facts.clone())),
            Record::Selector(_, selector) => assert!(out.selectors.insert(selector.clone()), "twice"),
            Record::Node(_) | Record::Identity(..) | Record::Members(..) => {}
        }
    }
    out
}

/// The members of every selector, by trying each identity.
fn check_members(records: &BTreeMap<RecordKey, Record>) {
    let reserved = (1..256).map(|n| (IdentityId(n), reserved_labels(IdentityId(n), false)));
    let allocated = records.values().filter_map(|record| match record {
        Record::Identity(number, labels) => Some((*number, labels.clone())),
        _ => None,
    });
    let identities: Vec<_> = reserved.chain(allocated).collect();
    let mut expected = BTreeMap::new();
    for record in records.values() {
        let Record::Selector(id, selector) = record else {
            continue;
        };
        for (number, _) in identities.iter().filter(|(_, labels)| selector.matches(labels)) {
            let block: &mut BTreeSet<_> = expected.entry((*id, number.0 / 256)).or_default();
            block.insert(*number);
        }
    }
    let published: BTreeMap<_, _> = records
        .values()
        .filter_map(|record| match record {
            Record::Members(id, block, members) => Some(((*id, *block), members.clone())),
            _ => None,
        })
        .collect();
    assert_eq!(published, expected);
}

fn follow(copy: &mut BTreeMap<RecordKey, Record>, outputs: &[Output]) -> usize {
    let mut versions = 0;
    for output in outputs {
        if let Output::Publish { change, .. } = output {
            versions += 1;
            for key in &change.removes {
                assert!(copy.remove(key).is_some(), "{key:?} was not there");
            }
            for record in &change.upserts {
                let old = copy.insert(record.key(), record.clone());
                assert_ne!(old.as_ref(), Some(record), "told twice");
            }
        }
    }
    versions
}

fn history(steps: &[Step]) {
    let mut index = Index::new(Mode::Kubernetes);
    let base = [1, 2].map(|n| SourceEvent::NodeUpsert(node(n)));
    let mut told: Vec<SourceEvent> = base.to_vec();
    let mut copy = BTreeMap::new();
    let begin = |index: &mut Index, told: &[SourceEvent], copy: &mut BTreeMap<_, _>| {
        copy.clear();
        for event in told {
            assert_eq!(follow(copy, &index.source(event.clone())), 0);
        }
        assert_eq!(follow(copy, &index.source(SourceEvent::Synced)), 1);
    };
    begin(&mut index, &told, &mut copy);
    for step in steps {
        match step {
            Step::Restart => {
                index.restart();
                begin(&mut index, &exists(&told), &mut copy);
            }
            Step::Wait => index.now += 400_000,
            Step::Poll => {
                let outputs = index.poll();
                assert!(follow(&mut copy, &outputs) <= 1, "one version per poll");
            }
            step => {
                let event = event(step).unwrap();
                told.push(event.clone());
                index.core.handle(index.now, Event::Source(event));
                continue;
            }
        }
        if matches!(step, Step::Wait) {
            continue;
        }
        let all: BTreeMap<_, _> = index
            .core
            .records()
            .map(|record| (record.key(), record.clone()))
            .collect();
        assert_eq!(copy, all);
        check_members(&copy);
        let mut fresh = Index::new(Mode::Kubernetes);
        let mut from_scratch = BTreeMap::new();
        begin(&mut fresh, &exists(&told), &mut from_scratch);
        assert_eq!(meaning(&copy), meaning(&from_scratch));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn increments_lead_to_what_the_objects_mean(steps in prop::collection::vec(step(), 1..80)) {
        history(&steps);
    }
}
