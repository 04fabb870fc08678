//! Keys and values of the maps. Addresses are in network byte order, numbers in the host's.

use core::mem::{align_of, size_of};

use crate::MAX_ENDPOINT_ADDRESSES;

/// Names of the maps: in the object, and of their pins. The kernel keeps 15 bytes of a name.
pub mod names {
    /// Array, one [`SettingsValue`](crate::SettingsValue).
    pub const SETTINGS: &str = "SETTINGS";
    /// Hash, ifindex to [`DeviceValue`](crate::DeviceValue).
    pub const DEVICES: &str = "DEVICES";
    /// Hash, ifindex to [`EndpointValue`](crate::EndpointValue).
    pub const ENDPOINTS: &str = "ENDPOINTS";
    /// Hash, encoded mark of an endpoint (not judged) to [`MarkValue`](crate::MarkValue).
    pub const IDENTITIES: &str = "IDENTITIES";
    /// LPM trie, IPv4 prefix to [`OwnerValue`](crate::OwnerValue).
    pub const OWNERS4: &str = "OWNERS4";
    /// LPM trie, IPv6 prefix to [`OwnerValue`](crate::OwnerValue).
    pub const OWNERS6: &str = "OWNERS6";
    /// Hash, node number to [`PathValue`](crate::PathValue).
    pub const PATHS: &str = "PATHS";
    /// LPM trie, IPv4 pools of pods and of services to [`POOL_PODS`](crate::POOL_PODS) or
    /// [`POOL_SERVICES`](crate::POOL_SERVICES).
    pub const POOLS4: &str = "POOLS4";
    /// LPM trie, IPv6 pools of pods and of services to [`POOL_PODS`](crate::POOL_PODS) or
    /// [`POOL_SERVICES`](crate::POOL_SERVICES).
    pub const POOLS6: &str = "POOLS6";
    /// Hash, [`NodeKey`](crate::NodeKey) to [`NodeValue`](crate::NodeValue).
    pub const NODES: &str = "NODES";
    /// Per-CPU array, `hook * limits::REASONS + reason` to packets.
    pub const DROPS: &str = "DROPS";
    /// Array, one [`TraceValue`](crate::TraceValue).
    pub const TRACE: &str = "TRACE";
    /// Per-CPU array, the kernel's drop reason to packets; the last entry collects larger numbers.
    pub const STACK_DROPS: &str = "STACK_DROPS";

    /// Per-CPU hash, address of the kernel's code to packets that it dropped without a reason.
    pub const STACK_SITES: &str = "STACK_SITES";
    /// Hash, endpoint index to [`PolicyValue`](crate::PolicyValue).
    pub const POLICY_ENDPOINTS: &str = "POLICY_ENDPTS";
    /// LPM trie, [`PortKey`](crate::PortKey) to [`PortValue`](crate::PortValue).
    pub const POLICY_PORTS: &str = "POLICY_PORTS";
    /// Hash, [`VerdictKey`](crate::VerdictKey) to [`VerdictValue`](crate::VerdictValue).
    pub const POLICY_VERDICTS: &str = "POLICY_VERDICT";
    /// LPM trie, table and IPv4 prefix to the prefix's number.
    pub const POLICY_CIDRS4: &str = "POLICY_CIDRS4";
    /// LPM trie, table and IPv6 prefix to the prefix's number.
    pub const POLICY_CIDRS6: &str = "POLICY_CIDRS6";
    /// Hash, [`FlowKey`](crate::FlowKey) to [`FlowValue`](crate::FlowValue): flows that have seen a reply.
    pub const FLOWS: &str = "FLOWS";
    /// LRU hash, the same: flows that have not.
    pub const FLOWS_NEW: &str = "FLOWS_NEW";
    /// Array, endpoint index to the number of its flows in both maps.
    pub const FLOW_COUNTS: &str = "FLOW_COUNTS";
    /// Array, one [`FlowState`](crate::FlowState).
    pub const FLOW_STATE: &str = "FLOW_STATE";
    /// LRU hash, [`FragmentKey`](crate::FragmentKey) to [`FragmentValue`](crate::FragmentValue).
    pub const FRAGMENTS: &str = "FRAGMENTS";
    /// Ring buffer of [`Event`](crate::Event).
    pub const EVENTS: &str = "EVENTS";
    /// LRU hash, [`RepeatKey`](crate::RepeatKey) to [`RepeatValue`](crate::RepeatValue): events told together.
    pub const EVENT_REPEATS: &str = "EVENT_REPEATS";
    /// Per-CPU array, one counter: events that found no room.
    pub const EVENTS_LOST: &str = "EVENTS_LOST";

    /// All of them.
    pub const ALL: [&str; 27] = [
        SETTINGS,
        DEVICES,
        ENDPOINTS,
        IDENTITIES,
        OWNERS4,
        OWNERS6,
        PATHS,
        POOLS4,
        POOLS6,
        NODES,
        DROPS,
        TRACE,
        STACK_DROPS,
        STACK_SITES,
        POLICY_ENDPOINTS,
        POLICY_PORTS,
        POLICY_VERDICTS,
        POLICY_CIDRS4,
        POLICY_CIDRS6,
        FLOWS,
        FLOWS_NEW,
        FLOW_COUNTS,
        FLOW_STATE,
        FRAGMENTS,
        EVENTS,
        EVENT_REPEATS,
        EVENTS_LOST,
    ];
}

/// How much the maps hold.
pub mod limits {
    /// Devices with programs.
    pub const DEVICES: u32 = 16_384;
    /// Pods of this node: as many as the mark can name.
    pub const ENDPOINTS: u32 = 4_096;
    /// Owned prefixes of one family.
    pub const OWNERS: u32 = 262_144;
    /// Nodes with a path.
    pub const PATHS: u32 = 65_536;
    /// Pools of pods and services of one family.
    pub const POOLS: u32 = 1_024;
    /// Addresses of nodes.
    pub const NODES: u32 = 262_144;
    /// Room for drop reasons per hook; more than there are, so that new ones fit into a pinned map.
    pub const REASONS: u32 = 64;
    /// Room for hooks.
    pub const HOOKS: u32 = 16;
    /// The kernel's drop reasons that are told apart.
    pub const STACK_REASONS: u32 = 256;
    /// Places in the kernel that drop without a reason.
    pub const STACK_SITES: u32 = 1_024;
    /// Policies of endpoints, the host's included: one for each number that the mark can hold.
    pub const POLICY_ENDPOINTS: u32 = 4_096;
    /// Ports and ranges of ports, over all policies.
    pub const POLICY_PORTS: u32 = 262_144;
    /// Verdicts, over all policies.
    pub const POLICY_VERDICTS: u32 = 1_048_576;
    /// Prefixes of one family that rules name.
    pub const POLICY_CIDRS: u32 = 65_536;
    /// Flows that have seen a reply.
    pub const FLOWS: u32 = 262_144;
    /// Flows that have not.
    pub const FLOWS_NEW: u32 = 65_536;
    /// Datagrams in fragments.
    pub const FRAGMENTS: u32 = 8_192;
    /// Bytes of the ring buffer of events: a power of two.
    pub const EVENTS: u32 = 1 << 20;
    /// Events that are told together.
    pub const EVENT_REPEATS: u32 = 8_192;
}

/// What a pool's addresses are: pods.
pub const POOL_PODS: u32 = 1;
/// What a pool's addresses are: services, which the stack translates.
pub const POOL_SERVICES: u32 = 2;

/// What holds for all packets. All zero until the loader wrote it: the programs then drop everything.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SettingsValue {
    /// [`VERSION`](crate::VERSION) of who wrote it; 0 = nobody did.
    pub version: u32,
    /// The bits of the mark that are Warren's.
    pub mark_mask: u32,
    /// Encoded mark of decrypted packets.
    pub tunnel_mark: u32,
    /// 1: packets from remote pods must carry `tunnel_mark`.
    pub encryption: u32,
}

/// A device that the loader attached programs to.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeviceValue {
    /// Bytes before the IP header: 14 (Ethernet) or 0.
    pub l2_length: u8,
    /// Tunnel: bit of its slot. Others: 0.
    pub slot_bit: u8,
    /// Tunnel: number of its slot.
    pub slot: u8,
    /// [`RoleTag`] as a number.
    pub role: u8,
}

/// Roles of devices as numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum RoleTag {
    /// Host end of a pod's veth.
    Pod = 1,
    /// WireGuard device.
    Tunnel = 2,
    /// Any other device.
    Barrier = 3,
}

impl RoleTag {
    /// The role of a number.
    pub const fn parse(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Pod),
            2 => Some(Self::Tunnel),
            3 => Some(Self::Barrier),
            _ => None,
        }
    }
}

/// A pod, by the ifindex of its host veth.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EndpointValue {
    /// Encoded mark of the packets that it sends.
    pub mark: u32,
    /// Identity.
    pub identity: u32,
    /// Number in the mark.
    pub index: u16,
    /// MAC address of the pod's end.
    pub mac: [u8; 6],
    /// IPv4 addresses, all zero = unused.
    pub v4: [[u8; 4]; MAX_ENDPOINT_ADDRESSES],
    /// IPv6 addresses, all zero = unused.
    pub v6: [[u8; 16]; MAX_ENDPOINT_ADDRESSES],
}

/// Owner kinds as numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum OwnerTag {
    /// Pod of this node.
    LocalPod = 1,
    /// Pod of another node.
    RemotePod = 2,
    /// This node.
    LocalNode = 3,
    /// Another node.
    RemoteNode = 4,
}

impl OwnerTag {
    /// The kind of a number.
    pub const fn parse(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::LocalPod),
            2 => Some(Self::RemotePod),
            3 => Some(Self::LocalNode),
            4 => Some(Self::RemoteNode),
            _ => None,
        }
    }
}

/// Owner of a prefix.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OwnerValue {
    /// Identity; 0 = not known.
    pub identity: u32,
    /// Node number; 0 = this node.
    pub node: u16,
    /// [`OwnerTag`] as a number.
    pub tag: u8,
    /// Zero.
    pub padding: u8,
}

/// Path of a node.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PathValue {
    /// Device that sends.
    pub ifindex: u32,
    /// Bits of the slots that packets are accepted from.
    pub receive_slots: u8,
    /// Zero.
    pub padding: [u8; 3],
}

/// An address of a node.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NodeKey {
    /// The address; IPv4 in the first four bytes, the others zero.
    pub address: [u8; 16],
    /// 4 or 6.
    pub family: u32,
}

impl NodeKey {
    /// Key of an IPv4 address.
    pub const fn v4(a: [u8; 4]) -> Self {
        Self {
            address: [a[0], a[1], a[2], a[3], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            family: 4,
        }
    }

    /// Key of an IPv6 address.
    pub const fn v6(address: [u8; 16]) -> Self {
        Self { address, family: 6 }
    }
}

/// What is known of a node's address.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NodeValue {
    /// 1: this node's.
    pub own: u32,
}

/// Where the kernel keeps what the drop tracer reads; bytes from the start of the struct named.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TraceValue {
    /// Inode number of the network namespace whose drops count; 0 = none.
    pub netns: u32,
    /// `sk_buff.dev`.
    pub skb_dev: u32,
    /// `sk_buff.sk`.
    pub skb_sk: u32,
    /// `net_device.nd_net`.
    pub dev_net: u32,
    /// `sock.__sk_common.skc_net`.
    pub sock_net: u32,
    /// `net.ns.inum`.
    pub net_inum: u32,
    /// The reason that says nothing: these drops are counted by place.
    pub unspecified: u32,
    /// Reasons that are no drop of the stack or counted by our own programs: never counted.
    pub ignored: [u32; 5],
}

const _: () = {
    assert!(size_of::<SettingsValue>() == 16 && align_of::<SettingsValue>() == 4);
    assert!(size_of::<DeviceValue>() == 4 && align_of::<DeviceValue>() == 1);
    assert!(size_of::<EndpointValue>() == 4 + 4 + 2 + 6 + 20 * MAX_ENDPOINT_ADDRESSES);
    assert!(align_of::<EndpointValue>() == 4);
    assert!(size_of::<OwnerValue>() == 8 && align_of::<OwnerValue>() == 4);
    assert!(size_of::<PathValue>() == 8 && align_of::<PathValue>() == 4);
    assert!(size_of::<NodeKey>() == 20 && align_of::<NodeKey>() == 4);
    assert!(size_of::<NodeValue>() == 4);
    assert!(size_of::<TraceValue>() == 48 && align_of::<TraceValue>() == 4);
    assert!(crate::DropReason::COUNT <= limits::REASONS && crate::Hook::COUNT <= limits::HOOKS);
};
