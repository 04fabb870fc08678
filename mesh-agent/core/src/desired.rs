//! What this node should look like, as a function of configuration, directory, local pods and devices.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;
use warren_abi::limits;
use warren_model::{
    ClusterConfig, IdentityId, NodeKeys, NodeName, NodeRecord, PublicKey, WorkloadRecord, directory::Checked,
    link_address,
};

use crate::{
    directory::Directory,
    endpoint::Endpoints,
    index::NodeIndexes,
    psk::PskUse,
    slots::{self, Pairs, Path},
    state::{
        Device, EndpointEntry, Firewall, Link, LinkKind, Owner, Peer, Programs, Route, RouteKey, Rule, State,
        Table, WireGuard, metric,
    },
};

/// Names of tunnel devices begin with this.
pub const TUNNEL_PREFIX: &str = "warren";
/// Bytes that WireGuard adds on an IPv6 underlay, and 8 that are kept for the identity tag.
const OVERHEAD_V6: u32 = 88;
/// The same on an IPv4 underlay.
const OVERHEAD_V4: u32 = 68;
/// IPv6 needs at least this (RFC 8200 section 5).
const SMALLEST_MTU: u32 = 1280;
/// What an underlay is taken for until its device is known.
const USUAL_MTU: u32 = 1500;
/// The slot whose device carries all routes.
const FIRST_SLOT: u8 = 0;
/// Rule preference for [`Table::Pods`].
const PODS_PREFERENCE: u32 = 90;
/// Rule preference for [`Table::Nodes`].
const NODES_PREFERENCE: u32 = 91;

/// The name of a slot's device.
pub fn slot_device(slot: u8) -> String {
    format!("{TUNNEL_PREFIX}{slot}")
}

/// The link-scope address of a slot's device.
pub fn slot_address(slot: u8) -> IpNet {
    IpNet::from(IpAddr::from([169, 254, 41, 51 + slot]))
}

/// What the desired state is made from.
pub(crate) struct Inputs<'a> {
    pub(crate) config: &'a ClusterConfig,
    pub(crate) node: &'a NodeName,
    /// This node's keys as the directory has them; `None` without a record of it.
    pub(crate) own: Option<&'a NodeKeys>,
    /// What each peer is reached by.
    pub(crate) pairs: &'a Pairs,
    /// The directory after its rules were applied; `None` until one is known.
    pub(crate) directory: Option<(&'a Directory, &'a Checked)>,
    pub(crate) endpoints: &'a Endpoints,
    pub(crate) indexes: &'a NodeIndexes,
    /// The endpoints that devices were given, by slot and peer.
    pub(crate) given: &'a BTreeMap<(u8, PublicKey), SocketAddr>,
    pub(crate) links: &'a [Link],
    /// What is there: the node addresses are kept while there is no directory.
    pub(crate) held: &'a State,
}

/// The desired state, and what in the input is wrong: a sentence each.
pub(crate) fn desired(inputs: &Inputs<'_>) -> (State, Vec<String>) {
    let mut state = State::default();
    let mut problems = Vec::new();
    let owners = Owners::new(inputs, &mut problems);
    inputs.endpoints(&owners, &mut state);
    inputs.programs(&mut state);
    if !inputs.config.encryption {
        return (state, problems);
    }
    inputs.addresses(&mut state);
    inputs.covers(&mut state);
    inputs.rules(&mut state);
    inputs.throws(&owners, &mut state);
    inputs.peers(&mut state);
    state.owners.extend(owners.entries);
    state.firewall = Some(inputs.firewall(&state));
    (state, problems)
}

/// Addresses of pods on other nodes, of one family. The rest of the map is for nodes and this node's pods: without their
/// entries there is no mesh.
const POD_OWNERS: usize = (limits::OWNERS - limits::OWNERS / 4) as usize;

/// Ownership of addresses over all nodes.
struct Owners<'a> {
    entries: BTreeMap<IpNet, Owner>,
    /// Node of each prefix and node address.
    nodes: HashMap<IpNet, &'a NodeName>,
    /// Records of pods that live on the node that owns their address.
    workloads: HashMap<IpAddr, &'a WorkloadRecord>,
    /// Prefix lengths in use, longest first, IPv4 and IPv6.
    lengths: [Vec<u8>; 2],
}

impl<'a> Owners<'a> {
    fn new(inputs: &Inputs<'a>, problems: &mut Vec<String>) -> Self {
        let mut owners = Self {
            entries: BTreeMap::new(),
            nodes: HashMap::new(),
            workloads: HashMap::new(),
            lengths: Default::default(),
        };
        let Some((directory, checked)) = inputs.directory else {
            return owners;
        };
        let mut lengths = [BTreeSet::new(), BTreeSet::new()];
        for node in checked.nodes.values() {
            let Some(index) = inputs.index(&node.name) else {
                problems.push(format!("node {}: no node index is free", node.name));
                continue;
            };
            let own = node.name == *inputs.node;
            let apiserver = directory
                .facts
                .get(&node.name)
                .is_some_and(|facts| facts.runs_apiserver);
            let host = match (own, apiserver) {
                (true, _) => IdentityId::HOST,
                (false, true) => IdentityId::KUBE_APISERVER,
                (false, false) => IdentityId::REMOTE_NODE,
            };
            let addresses = node
                .addresses
                .iter()
                .map(|&address| (IpNet::from(address), false, host));
            let prefixes = node
                .prefixes
                .iter()
                .map(|&prefix| (prefix, true, IdentityId::UNKNOWN));
            for (prefix, pods, identity) in addresses.chain(prefixes) {
                lengths[usize::from(prefix.addr().is_ipv6())].insert(prefix.prefix_len());
                owners.nodes.insert(prefix, &node.name);
                owners.entries.insert(
                    prefix,
                    Owner {
                        node: index,
                        pods,
                        identity,
                    },
                );
            }
        }
        owners.lengths = lengths.map(|set| set.into_iter().rev().collect());
        let (mut room, mut unnamed) = ([POD_OWNERS; 2], 0_usize);
        for workload in directory.workloads.values() {
            match owners.node_of(workload.ip) {
                Some(node) if *node == workload.node => {
                    let Some(index) = inputs.index(node) else { continue };
                    owners.workloads.insert(workload.ip, workload);
                    // The pods of this node have their room beside the others'.
                    if node != inputs.node {
                        let room = &mut room[usize::from(workload.ip.is_ipv6())];
                        let Some(rest) = room.checked_sub(1) else {
                            unnamed += 1;
                            continue;
                        };
                        *room = rest;
                    }
                    let owner = Owner {
                        node: index,
                        pods: true,
                        identity: workload.identity,
                    };
                    owners.entries.insert(workload.ip.into(), owner);
                }
                Some(node) => problems.push(format!(
                    "pod {}: its address {} belongs to node {node}, not to {}",
                    workload.pod, workload.ip, workload.node
                )),
                None => problems.push(format!(
                    "pod {}: no node owns its address {}",
                    workload.pod, workload.ip
                )),
            }
        }
        if unnamed > 0 {
            problems.push(format!(
                "{unnamed} addresses of pods on other nodes have no identity here: there is room for {POD_OWNERS} of each \
                 family; what they send counts as of an unknown pod"
            ));
        }
        owners
    }

    /// The node of the most specific prefix around an address.
    fn node_of(&self, address: IpAddr) -> Option<&'a NodeName> {
        let lengths = &self.lengths[usize::from(address.is_ipv6())];
        let prefix = |length: &u8| IpNet::new(address, *length).ok().map(|prefix| prefix.trunc());
        lengths
            .iter()
            .filter_map(prefix)
            .find_map(|prefix| self.nodes.get(&prefix).copied())
    }
}

impl Inputs<'_> {
    fn own_record(&self) -> Option<&NodeRecord> {
        self.directory
            .and_then(|(_, checked)| checked.nodes.get(self.node))
    }

    /// The number of a node; 0 is this one.
    fn index(&self, node: &NodeName) -> Option<u16> {
        if node == self.node {
            Some(0)
        } else {
            self.indexes.of(node)
        }
    }

    fn nodes(&self) -> impl Iterator<Item = &NodeRecord> {
        self.directory
            .into_iter()
            .flat_map(|(_, checked)| checked.nodes.values())
    }

    fn remote_nodes(&self) -> impl Iterator<Item = &NodeRecord> {
        self.nodes().filter(|node| node.name != *self.node)
    }

    fn in_pools(&self, address: IpAddr) -> bool {
        self.config.pod_pools.iter().any(|pool| pool.contains(&address))
    }

    /// Addresses of this node in the underlay: on a device, and the directory's (or, before there is one, inside
    /// the node pools).
    fn underlay(&self) -> impl Iterator<Item = (IpAddr, &Link)> {
        let own = self.own_record();
        let here = self
            .links
            .iter()
            .flat_map(|link| link.addresses.iter().map(move |address| (*address, link)));
        here.filter(move |(address, _)| match own {
            Some(record) => record.addresses.contains(address),
            None => self.config.node_pools.iter().any(|pool| pool.contains(address)),
        })
    }

    fn source(&self, ipv6: bool) -> Option<IpAddr> {
        let of_family = |address: &IpAddr| address.is_ipv6() == ipv6;
        let here: BTreeSet<IpAddr> = self
            .underlay()
            .map(|(address, _)| address)
            .filter(of_family)
            .collect();
        match self.own_record() {
            Some(record) => record
                .addresses
                .iter()
                .copied()
                .find(|address| here.contains(address)),
            None => here.first().copied(),
        }
    }

    fn addresses(&self, state: &mut State) {
        if self.directory.is_none() {
            state.node_addresses.clone_from(&self.held.node_addresses);
            state
                .node_addresses
                .extend(self.underlay().map(|(address, _)| (address, true)));
        }
        for node in self.nodes() {
            let own = node.name == *self.node;
            state
                .node_addresses
                .extend(node.addresses.iter().map(|&address| (address, own)));
        }
    }

    fn firewall(&self, state: &State) -> Firewall {
        let pods = self.endpoints.iter().map(|(_, endpoint)| endpoint.ifindex);
        let bridges = self
            .links
            .iter()
            .filter(|link| link.kind == LinkKind::Bridge && self.is_cni_bridge(link));
        let source = |ipv6| self.source(ipv6);
        Firewall {
            pod_pools: self.config.pod_pools.clone(),
            node_addresses: state.node_addresses.keys().copied().collect(),
            safe: pods.chain(bridges.map(|link| link.ifindex)).collect(),
            source_v4: source(false).and_then(|address| match address {
                IpAddr::V4(address) => Some(address),
                IpAddr::V6(_) => None,
            }),
            source_v6: source(true).and_then(|address| match address {
                IpAddr::V4(_) => None,
                IpAddr::V6(address) => Some(address),
            }),
            mark_mask: self.config.mark_mask,
        }
    }

    /// The blackholes: behind all pods, behind each prefix and node, and behind the node's own prefixes.
    fn covers(&self, state: &mut State) {
        let mut cover = |table, prefix, metric| {
            state.routes.insert(
                RouteKey {
                    table,
                    prefix,
                    metric,
                },
                Route::Blackhole,
            )
        };
        for pool in &self.config.pod_pools {
            cover(Table::Pods, *pool, metric::POOL);
        }
        for node in self.remote_nodes() {
            for prefix in &node.prefixes {
                cover(Table::Pods, *prefix, metric::COVER);
            }
            for address in &node.addresses {
                cover(Table::Nodes, (*address).into(), metric::COVER);
            }
        }
        for prefix in self.own_record().into_iter().flat_map(|node| &node.prefixes) {
            cover(Table::Main, *prefix, metric::COVER);
        }
    }

    fn rules(&self, state: &mut State) {
        for pool in &self.config.pod_pools {
            let ipv6 = pool.addr().is_ipv6();
            state.rules.insert(Rule {
                preference: PODS_PREFERENCE,
                ipv6,
                from: None,
                table: Table::Pods,
            });
            state.rules.insert(Rule {
                preference: NODES_PREFERENCE,
                ipv6,
                from: Some(*pool),
                table: Table::Nodes,
            });
        }
    }

    /// Own prefixes and local pods go back to `main`; a local pod's address that another node owns by now does not.
    fn throws(&self, owners: &Owners<'_>, state: &mut State) {
        let own = self
            .own_record()
            .into_iter()
            .flat_map(|node| node.prefixes.iter().copied());
        let local = self
            .endpoints
            .iter()
            .flat_map(|(_, endpoint)| endpoint.addresses.iter().copied());
        let local = local
            .filter(|address| self.in_pools(*address))
            .filter(|address| owners.node_of(*address).is_none_or(|node| node == self.node))
            .map(IpNet::from);
        for prefix in own.chain(local) {
            state.routes.insert(
                RouteKey {
                    table: Table::Pods,
                    prefix,
                    metric: metric::ROUTE,
                },
                Route::Throw,
            );
        }
    }

    /// The tunnel devices, their peers, the routes into them and the paths. The first device has all routes, whichever
    /// one sends; a device that no path needs is left as it is, without key and peers.
    fn peers(&self, state: &mut State) {
        let mut peers: [BTreeMap<PublicKey, Peer>; slots::KEY_SLOTS as usize] = Default::default();
        let mut over_ipv6 = self.underlay().any(|(address, _)| address.is_ipv6());
        for node in self.remote_nodes() {
            let (Some(pair), Some(index)) = (self.pairs.get(&node.name), self.index(&node.name)) else {
                continue;
            };
            let settings = pair.paths.iter().zip(&pair.keepalives).zip(&pair.psks);
            for ((path, keepalive), psk) in settings {
                let mut add = |slot: u8, peer: Peer| {
                    let given = self.given.get(&(slot, path.key)).copied();
                    over_ipv6 |= peer.endpoint.is_some_and(|endpoint| endpoint.is_ipv6());
                    let peer = Peer {
                        endpoint_is_new: peer.endpoint.is_some() && given != peer.endpoint,
                        ..peer
                    };
                    if let Some(peers) = peers.get_mut(usize::from(slot)) {
                        peers.insert(path.key, peer);
                    }
                };
                if let Some(port) = path.exchange {
                    add(path.exchange_slot(), self.exchange_peer(node, path, port));
                }
                let pre_shared = match psk {
                    PskUse::Awaited => continue,
                    PskUse::Without => None,
                    PskUse::With(id) => Some(*id),
                };
                let peer = Peer {
                    pre_shared,
                    endpoint: self.endpoint_of(node, path.port),
                    keepalive: *keepalive,
                    allowed_ips: slots::prefixes(node),
                    ..Peer::default()
                };
                add(path.slot, peer);
            }
            if let Some(path) = slots::node_path(&pair.paths, pair.sending) {
                state.paths.insert(index, path);
                self.routes_to(node, state);
            }
        }
        let underlay = self
            .underlay()
            .map(|(_, link)| link.mtu)
            .min()
            .unwrap_or(USUAL_MTU);
        let overhead = if over_ipv6 { OVERHEAD_V6 } else { OVERHEAD_V4 };
        let mtu = underlay.saturating_sub(overhead).max(SMALLEST_MTU);
        for ((slot, open), peers) in (0..).zip(self.pairs.open()).zip(peers) {
            if open.is_none() && slot != FIRST_SLOT {
                continue;
            }
            let key = open.and_then(|generation| self.own?.key(generation));
            let wireguard = WireGuard {
                public_key: key,
                port: key.map_or(0, |_| self.config.slot_port(slot)),
                peers,
            };
            let address = Some(slot_address(slot));
            let agrees = open.is_some_and(|generation| self.own.is_some_and(|own| own.agrees(generation)));
            let link = key.filter(|_| agrees).map(|key| link_address(&key));
            if let Some(link) = link {
                let owner = Owner {
                    node: 0,
                    pods: false,
                    identity: IdentityId::HOST,
                };
                state.owners.insert(IpAddr::from(link).into(), owner);
            }
            state.devices.insert(
                slot,
                Device {
                    exists: true,
                    up: true,
                    mtu,
                    programs: true,
                    address,
                    link,
                    wireguard,
                },
            );
        }
    }

    /// The peer with which the pre-shared key of a path is agreed on.
    fn exchange_peer(&self, node: &NodeRecord, path: &Path, port: u16) -> Peer {
        Peer {
            endpoint: self.endpoint_of(node, port),
            allowed_ips: [IpAddr::from(link_address(&path.key)).into()].into(),
            ..Peer::default()
        }
    }

    fn routes_to(&self, node: &NodeRecord, state: &mut State) {
        let pods = node.prefixes.iter().map(|&prefix| (Table::Pods, prefix));
        let hosts = node
            .addresses
            .iter()
            .map(|&address| (Table::Nodes, IpNet::from(address)));
        for (table, prefix) in pods.chain(hosts) {
            let source = self.source(prefix.addr().is_ipv6());
            state.routes.insert(
                RouteKey {
                    table,
                    prefix,
                    metric: metric::ROUTE,
                },
                Route::Tunnel {
                    slot: FIRST_SLOT,
                    source,
                },
            );
        }
    }

    /// The peer's best endpoint of a family that this node has in the underlay.
    fn endpoint_of(&self, node: &NodeRecord, port: u16) -> Option<SocketAddr> {
        let families: BTreeSet<bool> = self.underlay().map(|(address, _)| address.is_ipv6()).collect();
        // Where none of the own addresses is on a device, the order of the directory decides.
        let usable = |address: &&IpAddr| families.is_empty() || families.contains(&address.is_ipv6());
        node.endpoints
            .iter()
            .find(usable)
            .map(|address| SocketAddr::new(*address, port))
    }

    fn endpoints(&self, owners: &Owners<'_>, state: &mut State) {
        for (index, endpoint) in self.endpoints.iter() {
            let newest = |address: &IpAddr| {
                self.endpoints
                    .by_address(*address)
                    .is_some_and(|(i, _)| i == index)
            };
            let addresses: BTreeSet<IpAddr> = endpoint.addresses.iter().copied().filter(newest).collect();
            let known = addresses
                .iter()
                .filter_map(|address| owners.workloads.get(address))
                .find(|workload| {
                    workload.node == *self.node
                        && endpoint
                            .pod
                            .as_ref()
                            .is_none_or(|pod| pod.uid == workload.pod.uid)
                });
            let identity = known.map_or(endpoint.identity, |workload| workload.identity);
            state.endpoints.insert(
                endpoint.ifindex,
                EndpointEntry {
                    index,
                    mac: endpoint.mac,
                    addresses,
                    identity,
                },
            );
        }
    }

    fn programs(&self, state: &mut State) {
        for link in self.links {
            let is_pod = self.endpoints.by_link(link.ifindex).is_some();
            let programs = match link.kind {
                LinkKind::Loopback | LinkKind::Tunnel(_) => continue,
                _ if is_pod => Programs::Pod,
                _ if !self.config.encryption => continue,
                LinkKind::Bridge if self.is_cni_bridge(link) => continue,
                LinkKind::Bridge | LinkKind::Veth | LinkKind::Other => Programs::Barrier,
            };
            state.programs.insert(link.ifindex, programs);
        }
    }

    /// A bridge that pods hang on: its ports are judged one by one, and it carries the host's own traffic to them.
    fn is_cni_bridge(&self, bridge: &Link) -> bool {
        let gateway = bridge.addresses.iter().any(|address| self.in_pools(*address));
        let ports = || {
            self.links
                .iter()
                .filter(|link| link.master == Some(bridge.ifindex))
        };
        gateway || ports().any(|port| self.endpoints.by_link(port.ifindex).is_some())
    }
}
