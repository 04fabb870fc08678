//! The state of a node as values: the same types say what is wanted and what is there.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use ipnet::IpNet;
use warren_model::{IdentityId, PskId, PublicKey};

/// Everything on this node that the agent owns.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    /// Tunnel devices by slot.
    pub devices: BTreeMap<u8, Device>,
    /// Routes of the agent's own tables, and its blackholes in `main`.
    pub routes: BTreeMap<RouteKey, Route>,
    /// Routing rules.
    pub rules: BTreeSet<Rule>,
    /// The packet filter's chains; `None` where there are none.
    pub firewall: Option<Firewall>,
    /// Programs on every device but the tunnel's, by interface index.
    pub programs: BTreeMap<u32, Programs>,
    /// Who owns an address: most specific prefix first.
    pub owners: BTreeMap<IpNet, Owner>,
    /// How a node is reached, by node index. A node without one cannot be reached.
    pub paths: BTreeMap<u16, NodePath>,
    /// Addresses of nodes, for the barrier; `true` for this node's own.
    pub node_addresses: BTreeMap<IpAddr, bool>,
    /// Local pods by the host's end of their veth.
    pub endpoints: BTreeMap<u32, EndpointEntry>,
}

/// A tunnel device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Device {
    /// The device exists.
    pub exists: bool,
    /// Administratively up.
    pub up: bool,
    /// MTU in bytes.
    pub mtu: u32,
    /// `tun_eg` and `tun_in` are attached.
    pub programs: bool,
    /// The link-scope address that keeps reverse-path filters content.
    pub address: Option<IpNet>,
    /// The link-local address of the exchange of pre-shared keys. Wanted `None`: whatever is there stays.
    pub link: Option<Ipv6Addr>,
    /// The WireGuard side.
    pub wireguard: WireGuard,
}

/// The WireGuard side of a device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WireGuard {
    /// The device's own public key.
    pub public_key: Option<PublicKey>,
    /// UDP port; 0 for none.
    pub port: u16,
    /// Peers by key.
    pub peers: BTreeMap<PublicKey, Peer>,
}

/// A peer of a device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Peer {
    /// The pre-shared key.
    pub pre_shared: Option<PskId>,
    /// Where packets are sent to.
    pub endpoint: Option<SocketAddr>,
    /// Persistent keepalive in seconds, 0 for off.
    pub keepalive: u16,
    /// Prefixes that the peer may use as source and that are sent to it.
    pub allowed_ips: BTreeSet<IpNet>,
    /// Wanted: the endpoint is newer than what the device was given; set it even where the peer has roamed.
    pub endpoint_is_new: bool,
    /// Observed: the last handshake is so old (or never was) that the device's endpoint proves nothing.
    pub silent: bool,
    /// Observed: bytes received from the peer on this device.
    pub received: u64,
}

/// The tables that the agent writes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Table {
    /// 4151: remote pod prefixes.
    Pods,
    /// 4152: remote node addresses, for packets that come from pods.
    Nodes,
    /// The system's main table.
    Main,
}

/// Route metrics.
pub mod metric {
    /// Routes into the tunnel, and throws.
    pub const ROUTE: u32 = 100;
    /// The blackhole behind a prefix. So bad that any other route wins.
    pub const COVER: u32 = 4_000_000_000;
    /// The blackhole behind a whole pod pool.
    pub const POOL: u32 = 4_000_000_001;
}

/// What makes a route the same route for the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteKey {
    /// Which table.
    pub table: Table,
    /// Destination.
    pub prefix: IpNet,
    /// Metric: the lower wins.
    pub metric: u32,
}

/// What a route does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Route {
    /// Into the tunnel device of a slot, with an explicit source for packets of the host's own.
    Tunnel {
        /// The slot.
        slot: u8,
        /// Preferred source.
        source: Option<IpAddr>,
    },
    /// Drops.
    Blackhole,
    /// Continues with the next rule.
    Throw,
}

/// A routing rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Rule {
    /// The lower is asked first.
    pub preference: u32,
    /// IPv6 rather than IPv4.
    pub ipv6: bool,
    /// Only packets from here; `None` for all.
    pub from: Option<IpNet>,
    /// Where to look.
    pub table: Table,
}

/// What the packet filter has to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Firewall {
    /// All addresses that pods may have.
    pub pod_pools: Vec<IpNet>,
    /// Addresses of nodes.
    pub node_addresses: BTreeSet<IpAddr>,
    /// Devices by which mesh traffic may go in clear: pods' veths and bridges that pods hang on.
    pub safe: BTreeSet<u32>,
    /// This node's own IPv4 address.
    pub source_v4: Option<Ipv4Addr>,
    /// This node's own IPv6 address.
    pub source_v6: Option<Ipv6Addr>,
    /// The bits of the packet mark that are ours.
    pub mark_mask: u32,
}

/// What is attached to a device that is no tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Programs {
    /// `barrier_in` and `barrier_out`.
    Barrier,
    /// `from_pod` and `to_pod`.
    Pod,
    /// Observed only: a part is missing or foreign, or the device is gone.
    Broken,
}

/// Who owns a prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// Index of the node; 0 is this node.
    pub node: u16,
    /// Pods rather than the node itself.
    pub pods: bool,
    /// Identity of the one who has the address; [`IdentityId::UNKNOWN`] for a prefix of many.
    pub identity: IdentityId,
}

/// How a node is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodePath {
    /// The slot that sends to it.
    pub slot: u8,
    /// The slots that may receive from it, a bit per slot.
    pub receive: u8,
}

/// A local pod as the programs see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointEntry {
    /// Number in the packet mark, 1 to 4095.
    pub index: u16,
    /// MAC address of the pod's end.
    pub mac: [u8; 6],
    /// The pod's addresses, without those that a newer endpoint of this node has.
    pub addresses: BTreeSet<IpAddr>,
    /// Its identity.
    pub identity: IdentityId,
}

/// What kind of device a link is, as far as the agent cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkKind {
    /// `lo`.
    Loopback,
    /// A bridge.
    Bridge,
    /// A veth.
    Veth,
    /// The tunnel device of a slot.
    Tunnel(u8),
    /// Anything else.
    Other,
}

/// A network device of the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Interface index.
    pub ifindex: u32,
    /// Name.
    pub name: String,
    /// Kind.
    pub kind: LinkKind,
    /// The bridge or bond that it is a port of.
    pub master: Option<u32>,
    /// MTU in bytes.
    pub mtu: u32,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// What the drivers read from the machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// All devices.
    pub links: Vec<Link>,
    /// The part that the agent owns.
    pub state: State,
}

/// A handshake that is older than this proves nothing any more (WireGuard's reject-after time).
pub(crate) const SILENT_AFTER: Duration = Duration::from_secs(180);

impl Peer {
    /// Whether it is there for the exchange of pre-shared keys only.
    pub fn is_exchange(&self) -> bool {
        let link_local = |prefix: &IpNet| match prefix {
            IpNet::V4(_) => false,
            IpNet::V6(prefix) => prefix.addr().is_unicast_link_local(),
        };
        !self.allowed_ips.is_empty() && self.allowed_ips.iter().all(link_local)
    }

    /// Whether a peer with this age of its last handshake counts as silent.
    pub fn is_silent(handshake_age: Option<Duration>) -> bool {
        handshake_age.is_none_or(|age| age > SILENT_AFTER)
    }
}
