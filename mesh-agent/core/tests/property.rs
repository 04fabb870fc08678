//! Whatever directories, pods and devices come in whatever order: a plan leads to what is wanted, a second plan is
//! empty, a broken-off plan is taken up, and at no step is a remote pod prefix without cover.

mod common;

use std::{collections::BTreeSet, time::Duration};

use common::{apply, bare, comparable, config, covered, directory, key, link};
use ipnet::IpNet;
use proptest::{collection::vec, prelude::*};
use warren_agent_core::{Agent, Endpoint, EndpointKey, LinkKind, Observed, State};
use warren_model::{IdentityId, NodeRecord, PodRef, WorkloadRecord};

/// A node whose key, prefixes and addresses may collide with those of others.
fn any_node() -> impl Strategy<Value = NodeRecord> {
    let prefix = (
        1u8..6,
        0u8..3,
        prop_oneof![Just(24u8), Just(32), Just(26)],
        any::<bool>(),
    );
    (1u8..6, 1u8..8, vec(prefix, 0..4), prop::option::of(1u8..8)).prop_map(|(n, host, prefixes, public)| {
        let mut node = common::node(n);
        node.addresses = vec![[172, 30, 0, host].into()];
        node.endpoints = node.addresses.clone();
        node.prefixes = prefixes
            .into_iter()
            .map(|(third, fourth, length, ipv6)| match ipv6 {
                false => format!("10.244.{third}.{fourth}/{length}")
                    .parse::<IpNet>()
                    .unwrap()
                    .trunc(),
                true => format!("fd00:10:244:{third}::{fourth}/{}", length + 40)
                    .parse::<IpNet>()
                    .unwrap()
                    .trunc(),
            })
            .collect();
        match public {
            Some(public) => node.slots[0].public_key = key(public),
            None => node.slots.clear(),
        }
        node
    })
}

#[derive(Debug, Clone)]
enum Step {
    Directory(Vec<NodeRecord>, Vec<(u8, u8, u32)>),
    Pod(u8, u8, u8),
    PodGone(u8),
    NewLink(u8, bool),
    TunnelDeleted,
    Mtu(u32),
    /// Executes only the first so many steps of the plan.
    BreakOff(usize),
    Restart,
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (vec(any_node(), 0..5), vec((1u8..6, 0u8..4, 256u32..300), 0..5)).prop_map(|(n, w)| Step::Directory(n, w)),
        3 => (10u8..14, 1u8..6, 0u8..4).prop_map(|(link, third, fourth)| Step::Pod(link, third, fourth)),
        1 => (10u8..14).prop_map(Step::PodGone),
        1 => (20u8..23, any::<bool>()).prop_map(|(link, bridge)| Step::NewLink(link, bridge)),
        1 => Just(Step::TunnelDeleted),
        1 => prop_oneof![Just(1500), Just(9000), Just(1280)].prop_map(Step::Mtu),
        2 => (0usize..40).prop_map(Step::BreakOff),
        1 => Just(Step::Restart),
    ]
}

fn happen(
    step: Step,
    agent: &mut Agent,
    observed: &mut Observed,
    last: &mut Option<warren_agent_core::Directory>,
) {
    match step {
        Step::Directory(mut nodes, workloads) => {
            let mut seen = BTreeSet::new();
            nodes.retain(|node| seen.insert(node.name.clone()));
            let mut contents = directory(1, nodes);
            contents.workloads = workloads
                .into_iter()
                .map(|(third, fourth, identity)| WorkloadRecord {
                    ip: [10, 244, third, fourth].into(),
                    node: format!("node{third}").into(),
                    identity: IdentityId(identity),
                    pod: PodRef {
                        namespace: "n".into(),
                        name: "p".into(),
                        uid: "u".into(),
                    },
                    policy_audit: false,
                })
                .map(|workload| (workload.ip, workload))
                .collect();
            *last = Some(contents.clone());
            agent.set_directory(contents);
        }
        Step::Pod(ifindex, third, fourth) => {
            let ifindex = u32::from(ifindex);
            if !observed.links.iter().any(|link| link.ifindex == ifindex) {
                observed
                    .links
                    .push(link(ifindex, &format!("veth{ifindex}"), LinkKind::Veth, &[]));
            }
            let endpoint = Endpoint {
                key: Some(EndpointKey {
                    container_id: format!("{ifindex}-{third}"),
                    ifname: "eth0".into(),
                }),
                pod: None,
                ifindex,
                mac: [2, 0, 0, 0, 0, 1],
                addresses: [[10, 244, third, fourth].into()].into(),
                identity: IdentityId::INIT,
                deleted: false,
            };
            agent.add_endpoint(endpoint, &observed.state).unwrap();
        }
        Step::PodGone(ifindex) => {
            observed.links.retain(|link| link.ifindex != u32::from(ifindex));
            agent.links_seen(observed);
        }
        Step::NewLink(ifindex, bridge) => {
            observed.links.retain(|link| link.ifindex != u32::from(ifindex));
            let kind = if bridge { LinkKind::Bridge } else { LinkKind::Other };
            observed
                .links
                .push(link(ifindex.into(), &format!("x{ifindex}"), kind, &[]));
        }
        Step::TunnelDeleted => {
            observed.state.devices.clear();
            observed
                .state
                .routes
                .retain(|_, route| !matches!(route, warren_agent_core::Route::Tunnel { .. }));
        }
        Step::Mtu(mtu) => observed.links[1].mtu = mtu,
        Step::BreakOff(count) => {
            for step in agent.plan(observed, Duration::ZERO).into_iter().take(count) {
                apply(&mut observed.state, &step);
                agent.report(&step, Ok(()), Duration::ZERO);
            }
        }
        Step::Restart => {
            let endpoints = agent.endpoints().clone();
            *agent = common::agent_with(config());
            agent.restore_endpoints(endpoints);
            if let Some(contents) = last.clone() {
                agent.set_directory(contents);
            }
        }
    }
}

/// Executes a whole plan; at each step what was covered stays covered, as far as it is a remote pod prefix then.
fn converge(agent: &mut Agent, observed: &mut Observed) {
    let plan = agent.plan(observed, Duration::ZERO);
    let own = agent.settings().node.clone();
    let owners = agent
        .desired()
        .owners
        .iter()
        .filter(|(_, owner)| owner.pods && owner.node != 0);
    let remote: Vec<IpNet> = owners.map(|(prefix, _)| *prefix).collect();
    let mut was: Vec<bool> = remote
        .iter()
        .map(|prefix| covered(&observed.state, *prefix))
        .collect();
    for step in &plan {
        assert!(agent.may_run(step), "{step}");
        apply(&mut observed.state, step);
        agent.report(step, Ok(()), Duration::ZERO);
        for (prefix, was) in remote.iter().zip(&mut was) {
            let is = covered(&observed.state, *prefix);
            assert!(is || !*was, "{own}: {prefix} lost its cover by: {step}");
            *was = is;
        }
    }
    assert!(was.iter().all(|covered| *covered), "{remote:?} {was:?}");
}

/// What is wanted, where no endpoint is wanted for a peer with the one that the device has: an endpoint cannot be
/// taken from a peer.
fn without_unset(desired: &State, found: &State) -> State {
    let mut desired = comparable(desired);
    for (slot, device) in &mut desired.devices {
        for (key, peer) in &mut device.wireguard.peers {
            let there = found
                .devices
                .get(slot)
                .and_then(|d| d.wireguard.peers.get(key))
                .and_then(|p| p.endpoint);
            peer.endpoint = peer.endpoint.or(there);
        }
    }
    desired
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn plans_lead_to_what_is_wanted(steps in vec(any_step(), 1..12)) {
        let mut agent = common::agent_with(config());
        let mut observed = bare();
        let mut last = None;
        let mut known = false;
        for step in steps {
            known |= matches!(step, Step::Directory(..));
            let settles = !matches!(step, Step::BreakOff(_));
            happen(step, &mut agent, &mut observed, &mut last);
            if settles {
                converge(&mut agent, &mut observed);
                prop_assert_eq!(agent.plan(&observed, Duration::ZERO), []);
                if known {
                    prop_assert_eq!(without_unset(agent.desired(), &observed.state), comparable(&observed.state));
                }
            }
        }
    }
}
