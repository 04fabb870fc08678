//! Policy: keys and values of its maps. The layout is explained in `mesh-agent/core/src/policy`.

use core::mem::size_of;

/// Direction as a number: to the endpoint.
pub const INGRESS: u8 = 0;
/// Direction as a number: from the endpoint.
pub const EGRESS: u8 = 1;

/// Kind of a verdict's key: an identity.
pub const PEER_IDENTITY: u32 = 0;
/// Kind of a verdict's key: every identity without an entry of its own; `id` is 0.
pub const PEER_EVERYBODY: u32 = 1;
/// Kind of a verdict's key: number of the prefix that holds an address of the world.
pub const PEER_WORLD_PREFIX: u32 = 2;
/// Kind of a verdict's key: number of the prefix that holds the address of a pod or a node.
pub const PEER_MEMBER_PREFIX: u32 = 3;

/// Flag of [`PolicyValue`]: denials are reported, not enforced.
pub const POLICY_AUDIT: u32 = 1;
/// Flag of [`PolicyValue`]: everything is allowed to the endpoint, no look-up needed.
pub const POLICY_INGRESS_OPEN: u32 = 2;
/// Flag of [`PolicyValue`]: everything is allowed from the endpoint, no look-up needed.
pub const POLICY_EGRESS_OPEN: u32 = 4;

/// The policy of an endpoint. None = the endpoint is closed.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PolicyValue {
    /// Number of the policy.
    pub policy: u32,
    /// Number of the table of prefixes.
    pub cidr_table: u32,
    /// [`POLICY_AUDIT`], [`POLICY_INGRESS_OPEN`], [`POLICY_EGRESS_OPEN`].
    pub flags: u32,
}

/// Data of the LPM key of `POLICY_PORTS`, behind the prefix length. All in network byte order. The prefix length is
/// 40 (direction only), 48 (with protocol) to 64.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PortKey {
    /// Number of the policy.
    pub policy: [u8; 4],
    /// [`INGRESS`] or [`EGRESS`].
    pub direction: u8,
    /// IP protocol.
    pub protocol: u8,
    /// Destination port, ICMP type, or 0.
    pub port: [u8; 2],
}

/// The class of ports.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PortValue {
    /// Its number.
    pub class: u32,
    /// 1: the class has verdicts for prefixes.
    pub has_cidrs: u32,
}

/// What a verdict is filed under.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct VerdictKey {
    /// The port's class.
    pub class: u32,
    /// `PEER_...`.
    pub kind: u32,
    /// Who.
    pub id: u32,
}

/// A verdict.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VerdictValue {
    /// 1 = allowed, anything else = denied.
    pub allow: u32,
    /// The rule that decides, 0 where none had to.
    pub rule: u32,
}

/// Data of the LPM key of `POLICY_CIDRS4`. The prefix length is 32 + that of the prefix.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cidr4Key {
    /// Number of the table, network byte order.
    pub table: [u8; 4],
    /// Address.
    pub address: [u8; 4],
}

/// Data of the LPM key of `POLICY_CIDRS6`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cidr6Key {
    /// Number of the table, network byte order.
    pub table: [u8; 4],
    /// Address.
    pub address: [u8; 16],
}

/// A local endpoint, by the encoded mark of its index.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MarkValue {
    /// Identity.
    pub identity: u32,
    /// Number of the endpoint.
    pub index: u16,
    /// Zero.
    pub padding: [u8; 2],
    /// Its first IPv4 address: what prefixes are asked for where the packet shows a masqueraded one. Zero = none.
    pub v4: [u8; 4],
    /// Its first IPv6 address. Zero = none.
    pub v6: [u8; 16],
}

const _: () = {
    assert!(size_of::<PolicyValue>() == 12);
    assert!(size_of::<PortKey>() == 8);
    assert!(size_of::<PortValue>() == 8);
    assert!(size_of::<VerdictKey>() == 12);
    assert!(size_of::<VerdictValue>() == 8);
    assert!(size_of::<Cidr4Key>() == 8 && size_of::<Cidr6Key>() == 20);
    assert!(size_of::<MarkValue>() == 28);
};
