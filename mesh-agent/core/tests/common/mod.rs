//! A model of the machine: what each step does to it.
#![allow(dead_code, reason = "each test binary uses a part of this module")]

use std::net::IpAddr;

use warren_agent_core::{
    Action, Agent, Device, Directory, Link, LinkKind, Observed, Programs, Route, RouteKey, Settings, State,
    Table, WireGuard, slots::Keyring,
};
use warren_model::{ClusterConfig, Datapath, NodeRecord, PublicKey, SlotKey};

pub(crate) fn config() -> ClusterConfig {
    ClusterConfig {
        cluster_name: "test".into(),
        encryption: true,
        pod_pools: vec![
            "10.244.0.0/16".parse().unwrap(),
            "fd00:10:244::/48".parse().unwrap(),
        ],
        node_pools: vec!["172.30.0.0/24".parse().unwrap(), "fd00:30::/64".parse().unwrap()],
        service_cidrs: vec![],
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
        pods_may_audit: false,
        ignored_labels: warren_model::config::default_ignored_labels(),
        identities_per_namespace: warren_model::config::default_identities_per_namespace(),
        snapshot_expiry_seconds: 86400,
        snapshot_hard_fail: false,
        signing_key_max_age_seconds: 0,
    }
}

pub(crate) fn key(n: u8) -> PublicKey {
    PublicKey::from_bytes([n + 2; 32]).unwrap()
}

pub(crate) fn settings(config: ClusterConfig) -> Settings {
    Settings {
        config,
        node: "node1".into(),
    }
}

/// An agent of node 1 with its first key.
pub(crate) fn agent_with(config: ClusterConfig) -> Agent {
    Agent::new(settings(config), Keyring::new([(1, key(1))]))
}

pub(crate) fn node(n: u8) -> NodeRecord {
    let addresses: Vec<IpAddr> = vec![[172, 30, 0, n].into(), format!("fd00:30::{n}").parse().unwrap()];
    NodeRecord {
        name: format!("node{n}").into(),
        uid: format!("uid{n}").into(),
        endpoints: addresses.clone(),
        addresses,
        prefixes: vec![
            format!("10.244.{n}.0/24").parse().unwrap(),
            format!("fd00:10:244:{n}::/64").parse().unwrap(),
        ],
        slots: vec![SlotKey {
            slot: 0,
            port: 51871,
            generation: 1,
            public_key: key(n),
            pre_shared_keys: false,
        }],
        active: 1,
        last: 1,
        datapath: Some(Datapath::Userspace),
    }
}

pub(crate) fn directory(version: u64, nodes: Vec<NodeRecord>) -> Directory {
    Directory {
        epoch: 1,
        version,
        nodes: nodes.into_iter().map(|node| (node.name.clone(), node)).collect(),
        ..Directory::default()
    }
}

pub(crate) fn link(ifindex: u32, name: &str, kind: LinkKind, addresses: &[&str]) -> Link {
    let addresses = addresses.iter().map(|a| a.parse().unwrap()).collect();
    Link {
        ifindex,
        name: name.into(),
        kind,
        master: None,
        mtu: 1500,
        addresses,
    }
}

/// A node with an underlay device and nothing of ours.
pub(crate) fn bare() -> Observed {
    let links = vec![
        link(1, "lo", LinkKind::Loopback, &["127.0.0.1"]),
        link(2, "eth0", LinkKind::Other, &["172.30.0.1", "fd00:30::1"]),
    ];
    Observed {
        links,
        state: State::default(),
    }
}

/// Does to the machine what a driver would do.
pub(crate) fn apply(state: &mut State, action: &Action) {
    match action.clone() {
        Action::Attach(ifindex, programs) => {
            state.programs.insert(ifindex, programs);
        }
        Action::Detach(ifindex) => {
            state.programs.remove(&ifindex);
        }
        Action::SetFirewall(firewall) => state.firewall = Some(firewall),
        Action::RemoveFirewall => state.firewall = None,
        Action::SetRoute(key, route) => {
            state.routes.insert(key, route);
        }
        Action::RemoveRoute(key, _) => {
            state.routes.remove(&key);
        }
        Action::AddRule(rule) => {
            state.rules.insert(rule);
        }
        Action::RemoveRule(rule) => {
            state.rules.remove(&rule);
        }
        Action::SetNodeAddress(address, own) => {
            state.node_addresses.insert(address, own);
        }
        Action::RemoveNodeAddress(address) => {
            state.node_addresses.remove(&address);
        }
        Action::SetOwner(prefix, owner) => {
            state.owners.insert(prefix, owner);
        }
        Action::RemoveOwner(prefix) => {
            state.owners.remove(&prefix);
        }
        Action::SetPath(node, path) | Action::WidenPath(node, path) | Action::NarrowPath(node, path) => {
            state.paths.insert(node, path);
        }
        Action::RemovePath(node) => {
            state.paths.remove(&node);
        }
        Action::SetEndpoint(ifindex, entry) => {
            state.endpoints.insert(ifindex, entry);
        }
        Action::RemoveEndpoint(ifindex) => {
            state.endpoints.remove(&ifindex);
        }
        device => apply_device(state, device),
    }
}

fn apply_device(state: &mut State, action: Action) {
    match action {
        Action::CreateDevice { slot, mtu } => {
            state.devices.insert(
                slot,
                Device {
                    exists: true,
                    mtu,
                    ..Device::default()
                },
            );
        }
        Action::AttachTunnel(slot) => device(state, slot).programs = true,
        Action::SetMtu { slot, mtu } => device(state, slot).mtu = mtu,
        Action::SetAddress { slot, address } => device(state, slot).address = Some(address),
        Action::SetLink { slot, address } => device(state, slot).link = Some(address),
        Action::DeviceUp(slot) => device(state, slot).up = true,
        Action::SetKey {
            slot,
            public_key,
            port,
        } => {
            let wireguard = &mut device(state, slot).wireguard;
            (wireguard.public_key, wireguard.port) = (Some(public_key), port);
        }
        Action::SetPeer {
            slot,
            peer,
            pre_shared,
            endpoint,
            keepalive,
        } => {
            let peers = &mut device(state, slot).wireguard.peers;
            let added = !peers.contains_key(&peer);
            let found = peers.entry(peer).or_default();
            // A peer that is there keeps its sessions, so its pre-shared key may not change.
            assert!(added || pre_shared.is_none());
            (found.pre_shared, found.keepalive) = (pre_shared.or(found.pre_shared), keepalive);
            found.endpoint = endpoint.or(found.endpoint);
        }
        Action::RemovePeer { slot, peer } => {
            device(state, slot).wireguard.peers.remove(&peer);
        }
        Action::AddAllowedIp { slot, peer, prefix } => {
            let peers = &mut device(state, slot).wireguard.peers;
            peers.values_mut().for_each(|other| {
                other.allowed_ips.remove(&prefix);
            });
            peers
                .get_mut(&peer)
                .expect("a prefix for a peer that exists")
                .allowed_ips
                .insert(prefix);
        }
        Action::RemoveAllowedIp { slot, peer, prefix } => {
            if let Some(peer) = device(state, slot).wireguard.peers.get_mut(&peer) {
                peer.allowed_ips.remove(&prefix);
            }
        }
        Action::ClearDevice(slot) => device(state, slot).wireguard = WireGuard::default(),
        other => panic!("{other} is not about a device"),
    }
}

fn device(state: &mut State, slot: u8) -> &mut Device {
    let device = state
        .devices
        .get_mut(&slot)
        .expect("a step on a device that exists");
    assert!(device.exists);
    device
}

/// Wanted and observed in a form that can be compared: without what only one of them knows.
pub(crate) fn comparable(state: &State) -> State {
    let mut state = state.clone();
    for device in state.devices.values_mut() {
        for peer in device.wireguard.peers.values_mut() {
            (peer.endpoint_is_new, peer.silent, peer.received) = (false, false, 0);
        }
    }
    state
}

/// Plans and executes until nothing is left to do; returns all steps.
pub(crate) fn converge(agent: &mut Agent, observed: &mut Observed) -> Vec<Action> {
    let steps = agent.plan(observed, Default::default());
    for step in &steps {
        assert!(agent.may_run(step));
        apply(&mut observed.state, step);
        agent.report(step, Ok(()), Default::default());
    }
    steps
}

/// Whether a packet to a prefix is either tunnelled or dropped by the routes.
pub(crate) fn covered(state: &State, prefix: ipnet::IpNet) -> bool {
    let ipv6 = prefix.addr().is_ipv6();
    if !state
        .rules
        .iter()
        .any(|rule| rule.table == Table::Pods && rule.ipv6 == ipv6 && rule.from.is_none())
    {
        return false;
    }
    let around = |(key, _): &(&RouteKey, &Route)| key.table == Table::Pods && key.prefix.contains(&prefix);
    let best = state
        .routes
        .iter()
        .filter(around)
        .max_by_key(|(key, _)| (key.prefix.prefix_len(), std::cmp::Reverse(key.metric)));
    matches!(best, Some((_, Route::Tunnel { .. } | Route::Blackhole)))
}

/// The devices that must have the barrier have it.
pub(crate) fn barred(observed: &Observed, ifindex: u32) -> bool {
    observed.state.programs.get(&ifindex) == Some(&Programs::Barrier)
}
