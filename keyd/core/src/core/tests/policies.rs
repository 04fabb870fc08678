//! Policy objects, selectors and their members in the directory.

use std::collections::BTreeSet;

use warren_model::{
    ClusterConfig, IdentityId,
    policy::{
        Action, Direction, Directions, LabelKey, NamedPorts, Peer, Peers, PolicyError, PolicyKind, PolicyRef,
        Ports, Protocol, Requirement, Rule, Selector, Statement, Subject,
    },
};

use super::{Index, config, node, pod, pod_ref, shop};
use crate::{
    Settings,
    event::{Change, Mode, Namespace, Output, Pod, Record, RecordKey, SourceEvent},
};

pub(super) fn policy(name: &str) -> PolicyRef {
    PolicyRef {
        kind: PolicyKind::CiliumNetworkPolicy,
        namespace: "shop".into(),
        name: name.into(),
    }
}

pub(super) fn app(name: &str) -> Selector {
    Selector::new([Requirement::is(LabelKey::parse("app"), name)])
}

/// Pods with the label app=`subject` take connections of these peers only.
pub(super) fn rule(name: &str, subject: &str, peers: Vec<Peer>) -> Rule {
    Rule {
        policy: policy(name),
        subject: Subject::Pods(app(subject)),
        default_deny: Directions {
            ingress: true,
            egress: false,
        },
        statements: vec![Statement {
            place: "spec.ingress[0]".into(),
            direction: Direction::Ingress,
            action: Action::Allow,
            peers: Peers::These(peers),
            ports: Ports::All,
            unenforced: Vec::new(),
        }],
    }
}

fn allow(name: &str, subject: &str, peer: &str) -> SourceEvent {
    SourceEvent::PolicyUpsert {
        policy: policy(name),
        outcome: Ok(vec![rule(name, subject, vec![Peer::Selector(app(peer))])]),
    }
}

/// The changes of every version that was made, one per version.
fn versions(outputs: &[Output]) -> Vec<&Change> {
    let mut changes = vec![];
    for output in outputs {
        if let Output::Publish { change, .. } = output {
            changes.push(change);
        }
    }
    changes
}

fn keys(change: &Change) -> BTreeSet<&'static str> {
    let kind = |key: &RecordKey| match key {
        RecordKey::Node(_) => "node",
        RecordKey::Identity(_) => "identity",
        RecordKey::Workload(_) => "workload",
        RecordKey::Selector(_) => "selector",
        RecordKey::Members(..) => "members",
        RecordKey::Policy(_) => "policy",
        RecordKey::NodeFacts(_) => "facts",
    };
    change.upserts.iter().map(|record| kind(&record.key())).collect()
}

fn members(index: &Index, selector: &Selector) -> BTreeSet<u32> {
    let id = index.core.records().find_map(|record| match record {
        Record::Selector(id, published) if published == selector => Some(*id),
        _ => None,
    });
    let members = index.core.records().filter_map(|record| match record {
        Record::Members(of, _, members) if Some(*of) == id => Some(members),
        _ => None,
    });
    members.flatten().map(|identity| identity.0).collect()
}

#[test]
fn nothing_is_published_before_the_policies_are_known() {
    let mut index = Index::new(Mode::Kubernetes);
    index.source(SourceEvent::NodeUpsert(node(1)));
    index.source(SourceEvent::PodUpsert(pod("web-1", 1, Some("10.244.1.5"))));
    assert_eq!(index.source(allow("web", "web", "api")), []);
    let outputs = index.source(SourceEvent::Synced);
    let [change] = versions(&outputs)[..] else {
        panic!("{outputs:?}")
    };
    assert_eq!(
        keys(change),
        [
            "facts", "identity", "members", "node", "policy", "selector", "workload"
        ]
        .into()
    );
    assert_eq!(members(&index, &app("web")), [256].into());
}

#[test]
fn everything_of_one_pod_is_in_one_version_before_the_answer() {
    let mut index = Index::synced(Mode::Kubernetes, 2);
    index.source(allow("web", "web", "api"));
    index.source(allow("db", "db", "web"));
    let session = index.connect(1);
    index.source(SourceEvent::PodUpsert(pod("api-1", 1, None)));
    let addresses = vec!["10.244.1.5".parse().unwrap()];
    let outputs = index.agent(crate::event::AgentEvent::EndpointAdd {
        session,
        request_id: 1,
        pod: pod_ref("api-1"),
        addresses,
    });
    let [change] = versions(&outputs)[..] else {
        panic!("{outputs:?}")
    };
    assert_eq!(keys(change), ["identity", "members", "workload"].into());
    assert_eq!(change.upserts.len(), 3, "one selector, one block: {change:?}");
    let at = |wanted: fn(&Output) -> bool| outputs.iter().position(wanted).unwrap();
    assert!(
        at(|output| matches!(output, Output::Publish { .. }))
            < at(|output| matches!(output, Output::EndpointResult { result: Ok(_), .. }))
    );
}

#[test]
fn a_new_identity_touches_only_its_block_of_the_selectors_that_it_matches() {
    let mut index = Index::synced(Mode::Kubernetes, 1);
    index.source(allow("all", "web", "api"));
    let everybody = Selector::new([Requirement::exists(LabelKey::parse("app"))]);
    index.source(SourceEvent::PolicyUpsert {
        policy: policy("every"),
        outcome: Ok(vec![rule("every", "db", vec![Peer::Selector(everybody.clone())])]),
    });
    for n in 0..300_u32 {
        let mut many = pod(
            &format!("many{n}-x"),
            1,
            Some(&format!("10.244.1.{}", n % 250 + 1)),
        );
        many.uid = Some(format!("u{n}"));
        index.source(SourceEvent::PodUpsert(many.clone()));
        index.source(SourceEvent::PodDelete {
            namespace: many.namespace,
            name: many.name,
        });
    }
    assert_eq!(members(&index, &everybody).len(), 300);
    let outputs = index.source(SourceEvent::PodUpsert(pod("one-x", 1, Some("10.244.1.9"))));
    let [change] = versions(&outputs)[..] else {
        panic!("{outputs:?}")
    };
    let blocks: Vec<_> = change
        .upserts
        .iter()
        .filter_map(|record| match record {
            Record::Members(_, block, members) => Some((*block, members.len())),
            _ => None,
        })
        .collect();
    assert_eq!(blocks, [(2, 45)], "256 + 300 lies in the block from 512 on");
}

#[test]
fn an_identity_that_is_released_leaves_its_selectors_after_the_quarantine() {
    let mut index = Index::synced(Mode::Kubernetes, 1);
    index.source(allow("web", "web", "api"));
    index.source(SourceEvent::PodUpsert(pod("api-1", 1, Some("10.244.1.5"))));
    assert_eq!(members(&index, &app("api")), [256].into());
    // New labels: both identities are members for a while, so that flows under way know their peer.
    let mut changed = pod("api-1", 1, Some("10.244.1.5"));
    changed.labels.insert("tier".into(), "back".into());
    let outputs = index.source(SourceEvent::PodUpsert(changed));
    let [change] = versions(&outputs)[..] else {
        panic!("{outputs:?}")
    };
    assert_eq!(keys(change), ["identity", "members", "workload"].into());
    assert_eq!(members(&index, &app("api")), [256, 257].into());
    assert_eq!(index.workload("10.244.1.5").unwrap().2, 257);
    index.now += index.settings.identity_quarantine_ms;
    index.poll();
    assert_eq!(members(&index, &app("api")), [257].into());
    index.source(SourceEvent::PodDelete {
        namespace: "shop".into(),
        name: "api-1".into(),
    });
    index.now += index.settings.identity_quarantine_ms;
    index.poll();
    let left = index
        .core
        .records()
        .filter(|r| matches!(r, Record::Members(..)))
        .count();
    assert_eq!(left, 0, "an empty block is no record");
}

#[test]
fn a_policy_goes_with_its_selectors_and_their_members() {
    let mut index = Index::synced(Mode::Kubernetes, 1);
    index.source(SourceEvent::PodUpsert(pod("api-1", 1, Some("10.244.1.5"))));
    index.source(allow("web", "web", "api"));
    let before = index.core.records().count();
    index.source(allow("again", "web", "api"));
    assert_eq!(index.core.records().count(), before + 1, "selectors are shared");
    index.source(SourceEvent::PolicyDelete(policy("web")));
    let outputs = index.source(SourceEvent::PolicyDelete(policy("again")));
    let [change] = versions(&outputs)[..] else {
        panic!("{outputs:?}")
    };
    assert_eq!(
        change.removes.len(),
        4,
        "policy, two selectors, a block: {change:?}"
    );
    assert!(index.core.policies().selectors().is_empty());
}

#[test]
fn what_is_wrong_is_said_and_nothing_else_changes() {
    let mut index = Index::synced(Mode::Kubernetes, 1);
    index.source(allow("web", "web", "api"));
    let outputs = index.source(SourceEvent::PolicyUpsert {
        policy: policy("bad"),
        outcome: Err(PolicyError::new("spec.ingress", "is no list")),
    });
    let [
        Output::Validity {
            policy: bad,
            validity: Some(validity),
        },
    ] = &outputs[..]
    else {
        panic!("{outputs:?}")
    };
    assert!(*bad == policy("bad") && !validity.valid);
    assert!(
        index
            .core
            .problems()
            .iter()
            .any(|p| p.contains("shop/bad: spec.ingress: is no list")),
        "{:?}",
        index.core.problems()
    );
    let outputs = index.source(SourceEvent::PolicyDelete(policy("bad")));
    assert!(
        matches!(&outputs[..], [Output::Validity { validity: None, .. }]),
        "{outputs:?}"
    );
    assert_eq!(index.core.problems(), Vec::<String>::new());
}

#[test]
fn facts_of_nodes_are_published_with_them() {
    let mut index = Index::synced(Mode::Kubernetes, 2);
    let facts = |index: &Index| -> Vec<_> {
        let facts = index.core.records().filter_map(|record| match record {
            Record::NodeFacts(name, facts) => Some((name.to_string(), facts.runs_apiserver, facts.audit)),
            _ => None,
        });
        facts.collect()
    };
    index.source(SourceEvent::ApiServers(["172.30.0.2".parse().unwrap()].into()));
    let mut audited = node(1);
    audited.policy_audit = true;
    let outputs = index.source(SourceEvent::NodeUpsert(audited));
    assert_eq!(keys(versions(&outputs)[0]), ["facts"].into());
    assert_eq!(
        facts(&index),
        [("node1".into(), false, true), ("node2".into(), true, false)]
    );
    index.source(SourceEvent::NodeDelete("node2".into()));
    assert_eq!(facts(&index), [("node1".into(), false, true)]);
}

#[test]
fn audit_mode_and_named_ports_of_pods_are_followed() {
    let mut index = Index::synced(Mode::Kubernetes, 1);
    let audited = |index: &Index| {
        index
            .core
            .records()
            .any(|record| matches!(record, Record::Workload(w) if w.policy_audit))
    };
    let mut web = pod("web-1", 1, Some("10.244.1.5"));
    web.ports = NamedPorts([("http".to_owned(), (Protocol::Tcp, 8080))].into());
    index.source(SourceEvent::PodUpsert(web.clone()));
    assert!(!audited(&index));
    web.policy_audit = true;
    index.source(SourceEvent::PodUpsert(web.clone()));
    assert!(audited(&index));
    web.policy_audit = false;
    index.source(SourceEvent::PodUpsert(web.clone()));
    assert!(!audited(&index));
    let labels = index.core.records().find_map(|record| match record {
        Record::Identity(_, labels) => Some(labels.clone()),
        _ => None,
    });
    assert_eq!(NamedPorts::of(&labels.unwrap()), web.ports);
    // A kubelet makes mirror pods as it likes.
    let mirror = Pod {
        mirror: true,
        policy_audit: true,
        ..web
    };
    index.source(SourceEvent::PodUpsert(mirror));
    assert!(!audited(&index));
}

#[test]
fn a_pod_whose_namespace_is_not_known_is_closed() {
    let mut index = Index::synced(Mode::Kubernetes, 1);
    let mut stray = pod("web-1", 1, Some("10.244.1.5"));
    stray.namespace = "new".into();
    index.source(SourceEvent::PodUpsert(stray.clone()));
    assert_eq!(index.workload("10.244.1.5").unwrap().2, IdentityId::INIT.0);
    let session = index.connect(1);
    let mut reference = pod_ref("web-1");
    reference.namespace = "new".into();
    let refused = index.add(session, &reference, "10.244.1.5").unwrap().unwrap_err();
    assert!(
        refused.retry && refused.message.contains("namespace new is not known yet"),
        "{refused:?}"
    );
    index.source(SourceEvent::NamespaceUpsert(Namespace {
        name: "new".into(),
        ..shop()
    }));
    assert_eq!(index.workload("10.244.1.5").unwrap().2, 256);
}

#[test]
fn pods_beyond_the_quota_are_closed_and_come_in_when_there_is_room() {
    let config = ClusterConfig {
        identities_per_namespace: 2,
        ..config()
    };
    let mut index = Index::of(Settings::new(config, Mode::Kubernetes, 7));
    index.source(SourceEvent::NodeUpsert(node(1)));
    index.source(SourceEvent::Synced);
    for (n, name) in ["a-1", "b-1", "c-1", "d-1"].iter().enumerate() {
        index.source(SourceEvent::PodUpsert(pod(
            name,
            1,
            Some(&format!("10.244.1.{}", 5 + n)),
        )));
    }
    let identity = |index: &Index, last: u8| index.workload(&format!("10.244.1.{last}")).unwrap().2;
    assert_eq!([5, 6, 7, 8].map(|n| identity(&index, n)), [256, 257, 5, 5]);
    assert_eq!(index.core.counters().refused_identities, 2);
    let problems = index.core.problems();
    assert!(
        matches!(&problems[..], [one] if one.contains("namespace shop has as many identities")),
        "{problems:?}"
    );
    // Known label sets still come in, and another namespace notices nothing.
    index.source(SourceEvent::PodUpsert(pod("a-2", 1, Some("10.244.1.20"))));
    assert_eq!(identity(&index, 20), 256);
    index.source(SourceEvent::NamespaceUpsert(Namespace {
        name: "other".into(),
        ..shop()
    }));
    let other = Pod {
        namespace: "other".into(),
        ..pod("z-1", 1, Some("10.244.1.21"))
    };
    index.source(SourceEvent::PodUpsert(other));
    assert_eq!(identity(&index, 21), 258);
    index.source(SourceEvent::PodDelete {
        namespace: "shop".into(),
        name: "b-1".into(),
    });
    assert_eq!(identity(&index, 7), 5);
    index.now += index.settings.identity_quarantine_ms;
    index.poll();
    assert_eq!([7, 8].map(|n| identity(&index, n)), [259, 5]);
    index.source(SourceEvent::PodDelete {
        namespace: "shop".into(),
        name: "d-1".into(),
    });
    assert_eq!(index.core.problems(), Vec::<String>::new());
    assert_eq!(index.core.counters().refused_identities, 2);
}

#[test]
fn a_new_term_starts_with_a_snapshot_of_everything() {
    let mut index = Index::synced(Mode::Kubernetes, 1);
    index.source(allow("web", "web", "api"));
    index.source(SourceEvent::PodUpsert(pod("api-1", 1, Some("10.244.1.5"))));
    let version = index.core.version();
    index.restart();
    let events = [
        SourceEvent::NodeUpsert(node(1)),
        SourceEvent::PodUpsert(pod("api-1", 1, Some("10.244.1.5"))),
        // Told in another order: the numbers of selectors differ.
        allow("other", "other", "web"),
        allow("web", "web", "api"),
    ];
    for event in events {
        assert_eq!(versions(&index.source(event)), Vec::<&Change>::new());
    }
    index.source(SourceEvent::Synced);
    let outputs = index.connect_as(crate::SessionId(1), 1, (7, version));
    assert!(
        matches!(
            outputs.last(),
            Some(Output::CatchUp {
                from: crate::CatchUp::Snapshot,
                ..
            })
        ),
        "{outputs:?}"
    );
    assert_eq!(members(&index, &app("api")), [256].into());
}
