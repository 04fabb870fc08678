//! Events in, plans out.

mod common;

use std::{net::SocketAddr, time::Duration};

use common::{
    agent_with, apply, bare, barred, comparable, config, converge, covered, directory, key, link, node,
};
use warren_agent_core::{
    Action, Agent, Change, Endpoint, EndpointKey, Entry, EntryKey, LinkKind, NodePath, Observed, Programs,
    Route, RouteKey, State, Table, metric, mismatches,
};
use warren_model::{ClusterConfig, IdentityId, NodeRecord, PodRef, WorkloadRecord};

fn agent() -> Agent {
    common::agent_with(config())
}

fn pods_route(prefix: &str, metric: u32) -> RouteKey {
    RouteKey {
        table: Table::Pods,
        prefix: prefix.parse().unwrap(),
        metric,
    }
}

fn pod(ifindex: u32, container: &str, address: &str) -> Endpoint {
    Endpoint {
        key: Some(EndpointKey {
            container_id: container.into(),
            ifname: "eth0".into(),
        }),
        pod: Some(PodRef {
            namespace: "demo".into(),
            name: container.into(),
            uid: container.into(),
        }),
        ifindex,
        mac: [2, 0, 0, 0, 0, 1],
        addresses: [address.parse().unwrap()].into(),
        identity: IdentityId::INIT,
        deleted: false,
    }
}

fn position(steps: &[Action], wanted: impl Fn(&Action) -> bool) -> usize {
    steps.iter().position(wanted).expect("a step that is in the plan")
}

#[test]
fn before_any_directory_pods_are_dropped_and_nothing_is_removed() {
    let mut observed = bare();
    let mut before = agent();
    before.set_directory(directory(1, vec![node(1), node(2)]));
    converge(&mut before, &mut observed);
    let kept = observed.state.clone();

    let mut agent = agent();
    let steps = agent.plan(&observed, Duration::ZERO);
    assert_eq!(steps, [], "an agent that knows nothing leaves what works alone");
    assert_eq!(observed.state, kept);

    let mut fresh = bare();
    converge(&mut agent, &mut fresh);
    assert!(barred(&fresh, 2));
    assert_eq!(
        fresh.state.routes[&pods_route("10.244.0.0/16", metric::POOL)],
        Route::Blackhole
    );
    assert!(covered(&fresh.state, "10.244.2.0/24".parse().unwrap()));
}

#[test]
fn a_peer_gets_barrier_cover_device_key_prefixes_owner_path_route_in_this_order() {
    let mut agent = agent();
    agent.set_directory(directory(1, vec![node(1), node(2)]));
    let mut observed = bare();
    let steps = converge(&mut agent, &mut observed);
    let order = [
        position(&steps, |s| matches!(s, Action::Attach(2, Programs::Barrier))),
        position(&steps, |s| matches!(s, Action::SetFirewall(_))),
        position(&steps, |s| matches!(s, Action::SetRoute(_, Route::Throw))),
        position(
            &steps,
            |s| matches!(s, Action::SetRoute(key, Route::Blackhole) if key.metric == metric::POOL),
        ),
        position(&steps, |s| matches!(s, Action::AddRule(_))),
        position(&steps, |s| matches!(s, Action::SetNodeAddress(..))),
        position(&steps, |s| matches!(s, Action::CreateDevice { .. })),
        position(&steps, |s| matches!(s, Action::AttachTunnel(0))),
        position(&steps, |s| matches!(s, Action::SetAddress { .. })),
        position(&steps, |s| matches!(s, Action::DeviceUp(0))),
        position(&steps, |s| matches!(s, Action::SetPeer { .. })),
        position(&steps, |s| matches!(s, Action::AddAllowedIp { .. })),
        position(&steps, |s| matches!(s, Action::SetOwner(..))),
        position(&steps, |s| matches!(s, Action::SetPath(..))),
        position(&steps, |s| matches!(s, Action::SetRoute(_, Route::Tunnel { .. }))),
    ];
    assert!(order.is_sorted(), "{order:?}");
    let device = &observed.state.devices[&0];
    assert_eq!(device.mtu, 1500 - 88);
    assert_eq!(
        device.wireguard.peers.keys().copied().collect::<Vec<_>>(),
        [key(2)],
        "never a peer of itself"
    );
    let route = observed.state.routes[&pods_route("10.244.2.0/24", metric::ROUTE)];
    assert_eq!(
        route,
        Route::Tunnel {
            slot: 0,
            source: Some("172.30.0.1".parse().unwrap())
        }
    );
    assert_eq!(
        observed.state.routes[&pods_route("10.244.1.0/24", metric::ROUTE)],
        Route::Throw
    );
    let own = RouteKey {
        table: Table::Main,
        prefix: "10.244.1.0/24".parse().unwrap(),
        metric: metric::COVER,
    };
    assert_eq!(observed.state.routes[&own], Route::Blackhole);
}

#[test]
fn the_mtu_follows_the_underlay() {
    let mut config = config();
    config.node_pools.truncate(1);
    let mut agent = common::agent_with(config);
    let mut nodes = vec![node(1), node(2)];
    nodes.iter_mut().for_each(|n| n.addresses.truncate(1));
    agent.set_directory(directory(1, nodes));
    let mut observed = bare();
    observed.links[1].addresses.truncate(1);
    converge(&mut agent, &mut observed);
    assert_eq!(observed.state.devices[&0].mtu, 1500 - 68);
    observed.links[1].mtu = 9000;
    assert_eq!(
        converge(&mut agent, &mut observed),
        [Action::SetMtu {
            slot: 0,
            mtu: 9000 - 68
        }]
    );
}

#[test]
fn a_peer_that_leaves_loses_path_owner_and_route_before_its_key_and_stays_covered() {
    let mut agent = agent();
    agent.set_directory(directory(1, vec![node(1), node(2), node(3)]));
    let mut observed = bare();
    converge(&mut agent, &mut observed);
    agent.set_directory(directory(2, vec![node(1), node(3)]));
    let steps = converge(&mut agent, &mut observed);
    let order = [
        position(&steps, |s| matches!(s, Action::RemovePath(_))),
        position(&steps, |s| matches!(s, Action::RemoveOwner(_))),
        position(&steps, |s| {
            matches!(s, Action::RemoveRoute(_, Route::Tunnel { .. }))
        }),
        position(&steps, |s| {
            *s == Action::RemovePeer {
                slot: 0,
                peer: key(2),
            }
        }),
        position(&steps, |s| matches!(s, Action::RemoveRoute(_, Route::Blackhole))),
    ];
    assert!(order.is_sorted(), "{order:?}");
    assert!(
        covered(&observed.state, "10.244.2.0/24".parse().unwrap()),
        "an unknown peer's pods are dropped"
    );
}

#[test]
fn a_prefix_that_moves_is_stolen_not_removed_first() {
    let mut agent = agent();
    let mut nodes = vec![node(1), node(2), node(3)];
    nodes[1].prefixes = vec!["10.244.9.9/32".parse().unwrap()];
    nodes[2].prefixes = vec![];
    agent.set_directory(directory(1, nodes.clone()));
    let mut observed = bare();
    converge(&mut agent, &mut observed);
    nodes[2].prefixes = std::mem::take(&mut nodes[1].prefixes);
    agent.set_directory(directory(2, nodes));
    let steps = converge(&mut agent, &mut observed);
    assert!(steps.contains(&Action::AddAllowedIp {
        slot: 0,
        peer: key(3),
        prefix: "10.244.9.9/32".parse().unwrap()
    }));
    assert!(
        !steps
            .iter()
            .any(|s| matches!(s, Action::RemoveAllowedIp { .. } | Action::RemoveRoute(..))),
        "{steps:?}"
    );
    assert_eq!(agent.plan(&observed, Duration::ZERO), []);
}

#[test]
fn roaming_survives_until_the_directory_changes_the_endpoint() {
    let mut agent = agent();
    agent.set_directory(directory(1, vec![node(1), node(2)]));
    let mut observed = bare();
    converge(&mut agent, &mut observed);
    let roamed: SocketAddr = "172.30.0.77:40000".parse().unwrap();
    let set = |observed: &mut Observed, silent| {
        let peer = observed
            .state
            .devices
            .get_mut(&0)
            .unwrap()
            .wireguard
            .peers
            .get_mut(&key(2))
            .unwrap();
        (peer.endpoint, peer.silent) = (Some(roamed), silent);
    };
    set(&mut observed, false);
    agent.set_directory(directory(2, vec![node(1), node(2)]));
    assert_eq!(
        converge(&mut agent, &mut observed),
        [],
        "a resync leaves the endpoint alone"
    );

    let mut restarted = common::agent_with(config());
    restarted.set_directory(directory(2, vec![node(1), node(2)]));
    assert_eq!(converge(&mut restarted, &mut observed), [], "so does a restart");

    set(&mut observed, true);
    let steps = converge(&mut agent, &mut observed);
    assert!(
        matches!(
            steps[..],
            [Action::SetPeer {
                endpoint: Some(_),
                ..
            }]
        ),
        "no handshake there: try the directory's"
    );

    set(&mut observed, false);
    let mut moved = node(2);
    moved.slots[0].port = 51999;
    agent.set_directory(directory(3, vec![node(1), moved]));
    let steps = converge(&mut agent, &mut observed);
    assert!(
        matches!(steps[..], [Action::SetPeer { endpoint: Some(to), .. }] if to.port() == 51999),
        "{steps:?}"
    );
}

#[test]
fn a_pod_gets_its_entry_and_its_way_back_before_its_programs_replace_the_barrier() {
    let mut agent = agent();
    agent.set_directory(directory(1, vec![node(1), node(2)]));
    let mut observed = bare();
    observed.links.push(link(10, "veth10", LinkKind::Veth, &[]));
    converge(&mut agent, &mut observed);
    assert!(barred(&observed, 10), "a device that nobody explained");
    agent
        .add_endpoint(pod(10, "a", "10.244.1.10"), &observed.state)
        .unwrap();
    let steps = converge(&mut agent, &mut observed);
    let order = [
        position(&steps, |s| matches!(s, Action::SetRoute(_, Route::Throw))),
        position(&steps, |s| matches!(s, Action::SetEndpoint(10, _))),
        position(&steps, |s| *s == Action::Attach(10, Programs::Pod)),
    ];
    assert!(order.is_sorted());

    agent
        .delete_endpoint(&EndpointKey {
            container_id: "a".into(),
            ifname: "eth0".into(),
        })
        .unwrap();
    assert_eq!(
        converge(&mut agent, &mut observed),
        [],
        "a terminating pod keeps its programs"
    );
    observed.links.pop();
    assert_eq!(agent.links_seen(&observed), []);
    let steps = converge(&mut agent, &mut observed);
    assert!(steps.contains(&Action::RemoveEndpoint(10)) && steps.contains(&Action::Detach(10)));
    assert_eq!(agent.plan(&observed, Duration::ZERO), []);
}

#[test]
fn an_address_that_moved_to_another_node_is_routed_there_though_the_old_pod_still_has_its_veth() {
    let mut agent = agent();
    let mut nodes = vec![node(1), node(2)];
    nodes[0].prefixes = vec!["10.244.7.7/32".parse().unwrap()];
    nodes[1].prefixes = vec![];
    agent.set_directory(directory(1, nodes.clone()));
    let mut observed = bare();
    observed.links.push(link(10, "veth10", LinkKind::Veth, &[]));
    agent
        .add_endpoint(pod(10, "a", "10.244.7.7"), &observed.state)
        .unwrap();
    converge(&mut agent, &mut observed);
    assert_eq!(
        observed.state.routes[&pods_route("10.244.7.7/32", metric::ROUTE)],
        Route::Throw
    );
    nodes[1].prefixes = std::mem::take(&mut nodes[0].prefixes);
    agent.set_directory(directory(2, nodes));
    converge(&mut agent, &mut observed);
    let route = observed.state.routes[&pods_route("10.244.7.7/32", metric::ROUTE)];
    assert!(matches!(route, Route::Tunnel { .. }));
}

#[test]
fn identities_come_from_the_directory_only_for_pods_on_the_node_that_owns_their_address() {
    let mut agent = agent();
    let record = |ip: &str, node: &str, uid: &str, identity| WorkloadRecord {
        ip: ip.parse().unwrap(),
        node: node.into(),
        identity: IdentityId(identity),
        pod: PodRef {
            namespace: "demo".into(),
            name: uid.into(),
            uid: uid.into(),
        },
        policy_audit: false,
    };
    let mut contents = directory(1, vec![node(1), node(2)]);
    contents.workloads = [
        record("10.244.2.5", "node2", "x", 300),
        record("10.244.2.6", "node3", "liar", 301),
        record("10.244.1.10", "node1", "a", 302),
    ]
    .map(|workload| (workload.ip, workload))
    .into();
    agent.set_directory(contents);
    let mut observed = bare();
    observed.links.push(link(10, "veth10", LinkKind::Veth, &[]));
    agent
        .add_endpoint(pod(10, "a", "10.244.1.10"), &observed.state)
        .unwrap();
    converge(&mut agent, &mut observed);
    assert_eq!(
        observed.state.owners[&"10.244.2.5/32".parse().unwrap()].identity,
        IdentityId(300)
    );
    assert!(
        !observed
            .state
            .owners
            .contains_key(&"10.244.2.6/32".parse().unwrap())
    );
    assert_eq!(observed.state.endpoints[&10].identity, IdentityId(302));
    assert_eq!(agent.problems().len(), 1);
}

#[test]
fn a_directory_is_acknowledged_only_when_a_plan_was_made_from_it() {
    let mut agent = agent();
    agent.set_directory(directory(1, vec![node(1), node(2)]));
    let mut observed = bare();
    assert!(!agent.mapping_settled() && !agent.identities_settled());
    converge(&mut agent, &mut observed);
    assert!(agent.mapping_settled() && agent.identities_settled());
    let change = |version, upserts| Change {
        epoch: 1,
        version,
        upserts,
        ..Change::default()
    };
    // A node that goes, and right behind it a version that is about policy alone.
    let gone = Change {
        removes: vec![EntryKey::Node("node2".into())],
        ..change(2, vec![])
    };
    agent.change_directory(&gone);
    agent.change_directory(&change(3, vec![]));
    assert_eq!(agent.directory_version(), Some((1, 3)));
    assert!(!agent.mapping_settled() && !agent.identities_settled());
    converge(&mut agent, &mut observed);
    assert!(agent.mapping_settled() && agent.identities_settled());
    // Policy alone needs no plan.
    agent.change_directory(&change(4, vec![]));
    assert!(agent.mapping_settled() && agent.identities_settled());
}

#[test]
fn bridges_of_the_cni_are_left_free_and_their_other_ports_are_not() {
    let mut agent = agent();
    agent.set_directory(directory(1, vec![node(1)]));
    let mut observed = bare();
    observed
        .links
        .push(link(5, "cni0", LinkKind::Bridge, &["10.244.1.1"]));
    observed
        .links
        .push(link(6, "docker0", LinkKind::Bridge, &["192.168.0.1"]));
    let mut port = link(7, "eth1", LinkKind::Other, &[]);
    port.master = Some(5);
    observed.links.push(port);
    converge(&mut agent, &mut observed);
    assert!(!barred(&observed, 5) && barred(&observed, 6) && barred(&observed, 7));
    assert_eq!(observed.state.programs.get(&1), None, "loopback is free");
}

#[test]
fn failed_steps_wait_and_hold_back_only_what_rests_on_them() {
    let mut agent = agent();
    agent.set_directory(directory(1, vec![node(1), node(2), node(3)]));
    let mut observed = bare();
    let bad = |step: &Action| matches!(step, Action::SetPeer { peer, .. } if *peer == key(2));
    for step in agent.plan(&observed, Duration::ZERO) {
        if !agent.may_run(&step) {
            assert!(
                matches!(step, Action::AddAllowedIp { peer, .. } if peer == key(2)),
                "{step}"
            );
        } else if bad(&step) {
            agent.report(&step, Err("no".into()), Duration::ZERO);
        } else {
            apply(&mut observed.state, &step);
            agent.report(&step, Ok(()), Duration::ZERO);
        }
    }
    assert_eq!(agent.failing().len(), 1);
    assert!(observed.state.devices[&0].wireguard.peers.contains_key(&key(3)));
    let left = agent.plan(&observed, Duration::ZERO);
    assert!(
        !left.iter().any(|step| bad(step) || agent.may_run(step)),
        "the peer waits, and so do its prefixes"
    );
    let due = agent.next_retry().unwrap();
    for step in agent.plan(&observed, due) {
        assert!(agent.may_run(&step));
        apply(&mut observed.state, &step);
        agent.report(&step, Ok(()), due);
    }
    assert_eq!(agent.plan(&observed, due), []);
    assert_eq!((agent.failing().len(), agent.next_retry()), (0, None));
}

#[test]
fn without_encryption_only_pods_are_kept_and_a_former_mesh_is_taken_down() {
    let mut observed = bare();
    observed.links.push(link(10, "veth10", LinkKind::Veth, &[]));
    let mut before = agent();
    before.set_directory(directory(1, vec![node(1), node(2)]));
    before
        .add_endpoint(pod(10, "a", "10.244.1.10"), &observed.state)
        .unwrap();
    converge(&mut before, &mut observed);
    let plain = warren_model::ClusterConfig {
        encryption: false,
        ..config()
    };
    let mut agent = common::agent_with(plain);
    agent.set_directory(directory(1, vec![node(1), node(2)]));
    agent
        .add_endpoint(pod(10, "a", "10.244.1.10"), &observed.state)
        .unwrap();
    converge(&mut agent, &mut observed);
    let state = &observed.state;
    assert!(state.routes.is_empty() && state.rules.is_empty() && state.firewall.is_none());
    assert_eq!(state.programs.iter().collect::<Vec<_>>(), [(&10, &Programs::Pod)]);
    assert!(state.devices[&0].wireguard.peers.is_empty() && state.devices[&0].wireguard.public_key.is_none());
    assert_eq!(state.endpoints.len(), 1);
    assert_eq!(agent.plan(&observed, Duration::ZERO), []);
}

#[test]
fn a_deleted_device_is_a_mismatch_and_is_built_again() {
    let mut agent = agent();
    agent.set_directory(directory(1, vec![node(1), node(2)]));
    let mut observed = bare();
    converge(&mut agent, &mut observed);
    let name = |key: &_| agent.node_of_key(key).unwrap().to_string();
    assert_eq!(mismatches(agent.desired(), &observed, name), Vec::<String>::new());
    observed.state.devices.clear();
    observed
        .state
        .routes
        .retain(|_, route| !matches!(route, Route::Tunnel { .. }));
    assert!(covered(&observed.state, "10.244.2.0/24".parse().unwrap()));
    let faults = mismatches(agent.desired(), &observed, name);
    assert!(
        faults.contains(&"warren0 does not exist".to_owned()),
        "{faults:?}"
    );
    let wanted = comparable(agent.desired());
    converge(&mut agent, &mut observed);
    assert_eq!(comparable(&observed.state), wanted);
}

#[test]
fn node_indexes_survive_a_restart() {
    let mut before = agent();
    before.set_directory(directory(1, vec![node(1), node(2), node(3)]));
    let mut observed = bare();
    converge(&mut before, &mut observed);
    before.set_directory(directory(2, vec![node(1), node(3)]));
    converge(&mut before, &mut observed);
    let mut after = agent();
    after.set_directory(directory(2, vec![node(1), node(3)]));
    assert_eq!(converge(&mut after, &mut observed), []);
    assert_eq!(
        observed.state.paths.values().collect::<Vec<_>>(),
        [&NodePath { slot: 0, receive: 1 }]
    );
}

/// The change that a directory is, to another one.
fn change(nodes: Vec<NodeRecord>, removes: &[&str], whole: bool) -> Change {
    Change {
        epoch: 1,
        version: 9,
        whole,
        upserts: nodes.into_iter().map(Entry::Node).collect(),
        removes: removes
            .iter()
            .map(|name| EntryKey::Node((*name).into()))
            .collect(),
        ..Change::default()
    }
}

#[test]
fn a_directory_whose_time_is_over_keeps_its_peers_and_takes_no_new_ones() {
    let mut agent = agent();
    agent.set_directory(directory(1, vec![node(1), node(2), node(3), node(4)]));
    let mut machine = bare();
    converge(&mut agent, &mut machine);
    let before = machine.state.clone();
    assert!(agent.set_expired(true));
    assert!(!agent.set_expired(true));
    assert!(
        agent.plan(&machine, Duration::ZERO).is_empty(),
        "the peers that there are stay"
    );

    // A new node, a new incarnation, a new key, a prefix and an address that were another's: nothing of it is taken. Who is
    // gone is gone.
    let mut reborn = node(3);
    reborn.uid = "another".into();
    let mut moved = node(2);
    moved.slots[0].public_key = key(99);
    moved.prefixes.push("10.244.4.0/24".parse().unwrap());
    moved.addresses.push("172.30.0.9".parse().unwrap());
    moved.endpoints = vec!["172.30.0.9".parse().unwrap()];
    agent.change_directory(&change(vec![node(5), reborn, moved], &["node4"], false));
    converge(&mut agent, &mut machine);
    let peers: Vec<_> = machine.state.devices[&0]
        .wireguard
        .peers
        .keys()
        .copied()
        .collect();
    assert!(peers.is_empty(), "{peers:?}");
    let owned = |state: &State, prefix: &str| state.owners.contains_key(&prefix.parse().unwrap());
    assert!(owned(&machine.state, "10.244.2.0/24"));
    for gone in ["10.244.3.0/24", "10.244.4.0/24", "10.244.5.0/24"] {
        assert!(!owned(&machine.state, gone), "{gone}");
    }
    // What was there comes back with the directory that has it, the rest only when the time is good.
    agent.change_directory(&change(vec![node(2), node(3), node(4), node(5)], &[], false));
    converge(&mut agent, &mut machine);
    assert_eq!(
        machine.state.devices[&0].wireguard.peers,
        before.devices[&0].wireguard.peers
    );
    assert!(agent.set_expired(false));
    converge(&mut agent, &mut machine);
    assert!(owned(&machine.state, "10.244.5.0/24"));
}

#[test]
fn with_hard_fail_no_peer_stays_and_nothing_leaves_in_clear() {
    let mut agent = agent_with(ClusterConfig {
        snapshot_hard_fail: true,
        ..config()
    });
    agent.set_directory(directory(1, vec![node(1), node(2)]));
    let mut machine = bare();
    converge(&mut agent, &mut machine);
    agent.set_expired(true);
    converge(&mut agent, &mut machine);
    assert!(machine.state.devices[&0].wireguard.peers.is_empty());
    assert!(machine.state.paths.is_empty());
    let pool = pods_route("10.244.0.0/16", metric::POOL);
    assert!(
        machine.state.routes.contains_key(&pool),
        "{:?}",
        machine.state.routes.keys()
    );
    agent.set_expired(false);
    converge(&mut agent, &mut machine);
    assert_eq!(machine.state.devices[&0].wireguard.peers.len(), 1);
}
