//! Pods, addresses, identities.

use warren_model::{IdentityId, PodRef, PrefixSource};

use super::{Index, closes, node, pod, pod_ref, reply};
use crate::event::{AgentEvent, EndpointError, Mode, Namespace, Pod, Record, SourceEvent};

#[test]
fn kubernetes_pods_get_identities_from_their_labels() {
    let mut index = Index::synced(Mode::Kubernetes, 2);
    index.source(SourceEvent::PodUpsert(pod("web-1", 1, Some("10.244.1.5"))));
    index.source(SourceEvent::PodUpsert(pod("web-2", 2, Some("10.244.2.5"))));
    index.source(SourceEvent::PodUpsert(pod("db-1", 2, Some("10.244.2.6"))));
    let identity = |index: &Index, ip| index.workload(ip).unwrap().2;
    assert_eq!(identity(&index, "10.244.1.5"), 256);
    assert_eq!(identity(&index, "10.244.2.5"), 256);
    assert_eq!(identity(&index, "10.244.2.6"), 257);
    // New labels move the pod, a namespace's labels move all of its pods.
    let mut changed = pod("web-2", 2, Some("10.244.2.5"));
    changed.labels.insert("tier".into(), "front".into());
    index.source(SourceEvent::PodUpsert(changed));
    assert_eq!(identity(&index, "10.244.2.5"), 258);
    let namespace = Namespace {
        name: "shop".into(),
        labels: [("team".into(), "a".into())].into(),
    };
    index.source(SourceEvent::NamespaceUpsert(namespace));
    assert!(
        ["10.244.1.5", "10.244.2.5", "10.244.2.6"]
            .iter()
            .all(|ip| identity(&index, ip) > 258)
    );
}

#[test]
fn host_network_mirror_and_finished_pods() {
    let mut index = Index::synced(Mode::Kubernetes, 1);
    let host = Pod {
        host_network: true,
        ..pod("host", 1, Some("10.244.1.5"))
    };
    let mirror = Pod {
        mirror: true,
        ..pod("mirror", 1, Some("10.244.1.6"))
    };
    let done = pod("done", 1, Some("10.244.1.7"));
    for pod in [host, mirror, done.clone()] {
        index.source(SourceEvent::PodUpsert(pod));
    }
    assert_eq!(index.workload("10.244.1.5"), None);
    assert_eq!(index.workload("10.244.1.6").unwrap().2, IdentityId::UNMANAGED.0);
    index.source(SourceEvent::PodUpsert(Pod {
        finished: true,
        ..done
    }));
    assert_eq!(index.workload("10.244.1.7"), None);
}

#[test]
fn a_status_cannot_name_addresses_outside_the_nodes_prefixes() {
    let mut index = Index::synced(Mode::Kubernetes, 2);
    index.source(SourceEvent::PodUpsert(pod("web", 1, Some("10.244.1.5"))));
    for ip in ["10.244.1.5", "10.244.1.9", "172.30.0.1", "8.8.8.8"] {
        index.source(SourceEvent::PodUpsert(pod("liar", 2, Some(ip))));
        assert!(
            index
                .core
                .records()
                .all(|record| !matches!(record, Record::Workload(w) if w.pod.name == "liar"))
        );
        assert_eq!(
            index.core.problems().len(),
            1,
            "{ip}: {:?}",
            index.core.problems()
        );
    }
}

#[test]
fn an_add_needs_the_pod_its_uid_and_its_node() {
    let mut index = Index::synced(Mode::Kubernetes, 2);
    let (one, two) = (index.connect(1), index.connect(2));
    let refused = |result: Option<Result<u32, EndpointError>>| result.unwrap().unwrap_err();
    assert!(
        refused(index.add(one, &pod_ref("web"), "10.244.1.5")).retry,
        "not known yet"
    );
    index.source(SourceEvent::PodUpsert(pod("web", 1, None)));
    assert!(
        refused(index.add(two, &pod_ref("web"), "10.244.2.5"))
            .message
            .contains("node1")
    );
    let other = PodRef {
        uid: "x".into(),
        ..pod_ref("web")
    };
    assert!(
        refused(index.add(one, &other, "10.244.1.5"))
            .message
            .contains("UID")
    );
    assert!(
        refused(index.add(one, &pod_ref("web"), "10.244.2.5"))
            .message
            .contains("podCIDRs")
    );
    assert_eq!(index.add(one, &pod_ref("web"), "10.244.1.5"), Some(Ok(256)));
    assert_eq!(
        index.add(one, &pod_ref("web"), "10.244.1.5"),
        Some(Ok(256)),
        "again"
    );
    assert_eq!(index.core.counters().refused_endpoints, 4);
    index.source(SourceEvent::PodUpsert(Pod {
        host_network: true,
        ..pod("host", 1, None)
    }));
    assert!(
        refused(index.add(one, &pod_ref("host"), "10.244.1.6"))
            .message
            .contains("host's network")
    );
}

#[test]
fn stand_alone_pods_without_a_manifest_are_init_until_it_comes() {
    let mut index = Index::synced(Mode::StandAlone, 2);
    let one = index.connect(1);
    let container = PodRef {
        uid: "container-1".into(),
        ..pod_ref("web")
    };
    assert_eq!(
        index.add(one, &container, "10.244.1.5"),
        Some(Ok(IdentityId::INIT.0))
    );
    index.source(SourceEvent::PodUpsert(Pod {
        uid: None,
        node: None,
        ..pod("web", 1, None)
    }));
    assert_eq!(index.workload("10.244.1.5").unwrap().2, 256);
    let (namespace, name) = ("shop".into(), "web".into());
    index.source(SourceEvent::PodDelete { namespace, name });
    assert_eq!(index.workload("10.244.1.5").unwrap().2, IdentityId::INIT.0);
    // A second pod of that name elsewhere is refused, a manifest's place is binding.
    let two = index.connect(2);
    let copy = PodRef {
        uid: "container-2".into(),
        ..pod_ref("web")
    };
    assert!(
        index
            .add(two, &copy, "10.244.2.5")
            .unwrap()
            .unwrap_err()
            .message
            .contains("already runs")
    );
    index.source(SourceEvent::PodUpsert(pod("db", 1, None)));
    assert!(index.add(two, &pod_ref("db"), "10.244.2.5").unwrap().is_err());
}

#[test]
fn stand_alone_endpoints_survive_a_restart_and_end_with_their_node() {
    let mut index = Index::synced(Mode::StandAlone, 2);
    let one = index.connect(1);
    index.add(one, &pod_ref("web"), "10.244.1.5").unwrap().unwrap();
    index.restart();
    for n in [1, 2] {
        index.source(SourceEvent::NodeUpsert(node(n)));
    }
    index.source(SourceEvent::Synced);
    assert_eq!(index.workload("10.244.1.5").unwrap().1, "node1");
    index.source(SourceEvent::NodeDelete("node1".into()));
    assert_eq!(index.workload("10.244.1.5"), None);
    assert_eq!(index.stored.endpoints, []);
}

#[test]
fn a_reused_address_waits_for_every_connected_agent() {
    let mut index = Index::synced(Mode::StandAlone, 3);
    let (one, two) = (index.connect(1), index.connect(2));
    assert_eq!(index.add(one, &pod_ref("old"), "10.244.1.5"), Some(Ok(5)));
    index.applied(one);
    index.applied(two);
    index.agent(AgentEvent::EndpointDelete {
        session: one,
        pod: pod_ref("old"),
        addresses: vec![],
    });
    assert_eq!(index.workload("10.244.1.5"), None);
    assert_eq!(
        index.add(one, &pod_ref("new"), "10.244.1.5"),
        None,
        "nobody has acknowledged"
    );
    assert_eq!(reply(index.applied(one)), None, "one is missing");
    assert_eq!(reply(index.applied(two)), Some(Ok(5)));
    // Without a former owner nobody waits.
    assert_eq!(index.add(one, &pod_ref("fresh"), "10.244.1.6"), Some(Ok(5)));
}

#[test]
fn an_agent_that_never_acknowledges_stops_nobody_for_ever() {
    let mut index = Index::synced(Mode::StandAlone, 2);
    let (one, two) = (index.connect(1), index.connect(2));
    let reuse = |index: &mut Index, old: &str, new: &str| {
        index.applied(one);
        let _ = index.add(one, &pod_ref(old), "10.244.1.5");
        index.applied(one);
        index.agent(AgentEvent::EndpointDelete {
            session: one,
            pod: pod_ref(old),
            addresses: vec![],
        });
        index.applied(one);
        index.add(one, &pod_ref(new), "10.244.1.5")
    };
    assert_eq!(reuse(&mut index, "a", "b"), None);
    index.now += 10_000;
    let outputs = index.poll();
    assert_eq!(closes(&outputs)[0].0, two.0);
    let error = reply(outputs).unwrap().unwrap_err();
    assert!(error.retry);
    // It comes back and is silent again: nobody waits any more, and it is named.
    index.connect(2);
    assert_eq!(index.add(one, &pod_ref("b"), "10.244.1.5"), Some(Ok(5)));
    assert_eq!(reuse(&mut index, "b", "c"), Some(Ok(5)));
    assert!(
        index
            .core
            .problems()
            .iter()
            .any(|problem| problem.contains("node2 does not acknowledge"))
    );
    // Once it acknowledges again it counts again.
    index.applied(two);
    assert!(
        index
            .core
            .problems()
            .iter()
            .all(|problem| !problem.contains("acknowledge"))
    );
}

#[test]
fn with_pod_ips_an_address_moves_between_nodes_with_its_prefix() {
    let mut index = Index::with(Mode::StandAlone, PrefixSource::PodIp);
    for n in [1, 2] {
        index.source(SourceEvent::NodeUpsert(node(n)));
    }
    index.source(SourceEvent::Synced);
    let (one, two) = (index.connect(1), index.connect(2));
    let _ = index.add(one, &pod_ref("a"), "10.244.9.9");
    assert_eq!(
        index.node(1).unwrap().prefixes,
        ["10.244.9.9/32".parse().unwrap()]
    );
    let error = index.add(two, &pod_ref("b"), "10.244.9.9").unwrap().unwrap_err();
    assert!(error.retry && error.message.contains("living pod shop/a"));
    index.agent(AgentEvent::EndpointDelete {
        session: one,
        pod: pod_ref("a"),
        addresses: vec![],
    });
    assert_eq!(index.add(two, &pod_ref("b"), "10.244.9.9"), None);
    assert_eq!(index.node(1).unwrap().prefixes, []);
    assert_eq!(
        index.node(2).unwrap().prefixes,
        ["10.244.9.9/32".parse().unwrap()]
    );
    index.applied(one);
    assert_eq!(reply(index.applied(two)), Some(Ok(5)));
    for reserved in ["172.30.0.9", "10.96.0.9", "10.245.0.1"] {
        assert!(
            index.add(two, &pod_ref("c"), reserved).unwrap().is_err(),
            "{reserved}"
        );
    }
}

#[test]
fn a_released_address_stays_released_whatever_the_status_says() {
    let mut index = Index::synced(Mode::Kubernetes, 1);
    let one = index.connect(1);
    index.source(SourceEvent::PodUpsert(pod("web", 1, Some("10.244.1.5"))));
    index.agent(AgentEvent::EndpointDelete {
        session: one,
        pod: pod_ref("web"),
        addresses: vec![],
    });
    index.source(SourceEvent::PodUpsert(pod("web", 1, Some("10.244.1.5"))));
    assert_eq!(index.workload("10.244.1.5"), None);
    // The next pod may have it; the sandbox's return takes it back only through an ADD.
    index.source(SourceEvent::PodUpsert(pod("next", 1, Some("10.244.1.5"))));
    assert_eq!(index.workload("10.244.1.5").unwrap().0, "shop/next");
}

#[test]
fn a_pod_waits_for_an_address_until_its_owner_is_gone() {
    let mut index = Index::synced(Mode::Kubernetes, 1);
    index.source(SourceEvent::PodUpsert(pod("old", 1, Some("10.244.1.5"))));
    index.source(SourceEvent::PodUpsert(pod("new", 1, Some("10.244.1.5"))));
    assert_eq!(index.workload("10.244.1.5").unwrap().0, "shop/old");
    assert_eq!(index.core.problems().len(), 1);
    index.source(SourceEvent::PodDelete {
        namespace: "shop".into(),
        name: "old".into(),
    });
    assert_eq!(index.workload("10.244.1.5").unwrap().0, "shop/new");
    assert_eq!(index.core.problems(), Vec::<String>::new());
}

#[test]
fn a_pod_that_changes_its_address_and_goes_leaves_nothing_behind() {
    let mut index = Index::synced(Mode::Kubernetes, 1);
    index.source(SourceEvent::PodUpsert(pod("a-1", 1, Some("10.244.1.5"))));
    // Both before the next poll.
    let moved = SourceEvent::PodUpsert(pod("a-1", 1, Some("10.244.1.6")));
    index.core.handle(index.now, crate::Event::Source(moved));
    index.source(SourceEvent::PodDelete {
        namespace: "shop".into(),
        name: "a-1".into(),
    });
    index.source(SourceEvent::PodUpsert(pod("b-1", 1, Some("10.244.1.5"))));
    assert_eq!(index.workload("10.244.1.5").unwrap().0, "shop/b-1");
}
