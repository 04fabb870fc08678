//! Connection tracking and events.

use core::mem::size_of;

/// A flow as one endpoint sees it.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// The endpoint's address as the packet shows it; IPv4 in the first four bytes.
    pub local: [u8; 16],
    /// The peer's address.
    pub remote: [u8; 16],
    /// The endpoint's port; identifier of an ICMP echo that the endpoint asked for; else 0. Network byte order.
    pub local_port: [u8; 2],
    /// The peer's port; identifier of an ICMP echo that the peer asked for; else 0. Network byte order.
    pub remote_port: [u8; 2],
    /// Index of the endpoint, 0 = the host, [`MASQUERADED`].
    pub endpoint: u16,
    /// IP protocol.
    pub protocol: u8,
    /// 4 or 6.
    pub family: u8,
}

/// In [`FlowKey::endpoint`]: a pod's flow that left this node with an address of the node, beside the pod's own entry.
/// What answers it without ports, or reports an error about it, passes the host's policy. Not judged, not counted.
pub const MASQUERADED: u16 = 0xffff;

/// Flag of [`FlowValue`]: the endpoint opened the flow (else the peer did).
pub const FLOW_EGRESS: u8 = 1;
/// Flag of [`FlowValue`]: policy has allowed it. Without it the entry only lets replies from translated addresses in.
pub const FLOW_JUDGED: u8 = 2;
/// Flag of [`FlowValue`]: policy denies it, audit mode lets it pass.
pub const FLOW_AUDIT: u8 = 4;
/// Flag of [`FlowValue`]: a packet against its direction was seen.
pub const FLOW_REPLY: u8 = 8;
/// Flag of [`FlowValue`]: the endpoint has sent FIN.
pub const FLOW_FIN_LOCAL: u8 = 16;
/// Flag of [`FlowValue`]: the peer has sent FIN.
pub const FLOW_FIN_REMOTE: u8 = 32;
/// Flag of [`FlowValue`]: reset.
pub const FLOW_RESET: u8 = 64;

/// In [`FlowValue::peer_mark`]: the peer's packets came in by a device, without a mark.
pub const PEER_FORWARDED: u32 = u32::MAX;

/// What is known of a flow. Times are seconds of the monotonic clock.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FlowValue {
    /// Last packet.
    pub last_seen: u32,
    /// After this long without a packet it is over.
    pub lifetime: u32,
    /// First packet.
    pub created: u32,
    /// Revision of policy that it was judged under.
    pub revision: u32,
    /// Rule that allowed it.
    pub rule: u32,
    /// Identity of the peer at that time.
    pub peer: u32,
    /// Where the peer's packets come from: encoded mark (not judged) of a local endpoint, maybe masqueraded; the tunnel
    /// mark; [`PEER_FORWARDED`]; 0 for this host. 0 also where the endpoint opened the flow to somebody who is no
    /// local endpoint.
    pub peer_mark: u32,
    /// Destination port, or ICMP type, of its first packet: what policy is asked again with. Host byte order.
    pub port: u16,
    /// `FLOW_...`.
    pub flags: u8,
    /// Zero.
    pub padding: u8,
}

/// What holds for all flows.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FlowState {
    /// Raised after every change of policy, identities or owners. Never 0.
    pub revision: u32,
    /// When the agent last collected, seconds of the monotonic clock: limits hold while this is recent.
    pub collected: u32,
    /// Most flows of one endpoint.
    pub limit: u32,
    /// First and last NodePort, as `first << 16 | last`; 0 = none.
    pub node_ports: u32,
    /// First and last port of WireGuard on this node, as `first << 16 | last`; 0 = none. Host policy never stands in
    /// their way.
    pub wireguard_ports: u32,
    /// Until when, seconds of the monotonic clock, TCP and SCTP packets in the middle of a connection may open a flow:
    /// for a while after new maps. Later they are judged one by one.
    pub adopt_until: u32,
}

/// A datagram in fragments.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct FragmentKey {
    /// Source address.
    pub source: [u8; 16],
    /// Destination address.
    pub destination: [u8; 16],
    /// Identification.
    pub id: u32,
    /// The device that it was seen on: translated addresses are others.
    pub ifindex: u32,
    /// IP protocol.
    pub protocol: u8,
    /// 4 or 6.
    pub family: u8,
    /// Zero.
    pub padding: [u8; 2],
}

/// What its first fragment said.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FragmentValue {
    /// Source port, network byte order. Of an ICMP echo as in [`FlowKey`].
    pub source_port: [u8; 2],
    /// Destination port, network byte order.
    pub destination_port: [u8; 2],
    /// When, seconds of the monotonic clock.
    pub seen: u32,
    /// What policy is asked with: destination port, or ICMP type. Host byte order.
    pub port: u16,
    /// IP protocol of the payload: IPv6 may have extension headers in its fragments.
    pub protocol: u8,
    /// Zero.
    pub padding: u8,
}

/// What an event says happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Outcome {
    /// A new flow was allowed.
    Allowed = 1,
    /// Dropped.
    Dropped = 2,
    /// Audit mode: would have been dropped.
    Audited = 3,
}

impl Outcome {
    /// The outcome of a number.
    pub const fn parse(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Allowed),
            2 => Some(Self::Dropped),
            3 => Some(Self::Audited),
            _ => None,
        }
    }
}

/// One event. A report, not a promise: repeated ones are told together.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Event {
    /// Nanoseconds of the monotonic clock.
    pub time: u64,
    /// Source address, IPv4 in the first four bytes.
    pub source: [u8; 16],
    /// Destination address.
    pub destination: [u8; 16],
    /// Identity of the source, 0 where not known.
    pub source_identity: u32,
    /// Identity of the destination.
    pub destination_identity: u32,
    /// Rule that decided, 0 where none had to or default deny.
    pub rule: u32,
    /// Device.
    pub ifindex: u32,
    /// How many packets this stands for, itself included.
    pub packets: u32,
    /// Bytes of this packet from its link-layer header on.
    pub length: u32,
    /// Source port (ICMP: type). Host byte order.
    pub source_port: u16,
    /// Destination port (ICMP: code).
    pub destination_port: u16,
    /// Endpoint whose policy was asked, 0 = the host; 0xffff = none.
    pub endpoint: u16,
    /// IP protocol.
    pub protocol: u8,
    /// 4 or 6; 0 where the packet could not be read that far.
    pub family: u8,
    /// [`Hook`](crate::Hook) as a number.
    pub hook: u8,
    /// [`Outcome`] as a number.
    pub outcome: u8,
    /// [`DropReason`](crate::DropReason) as a number, where it was dropped or would have been.
    pub reason: u8,
    /// 0 ingress, 1 egress, 2 not asked.
    pub direction: u8,
    /// TCP flags.
    pub tcp_flags: u8,
    /// Zero.
    pub padding: [u8; 7],
}

/// What makes events the same for a second.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct RepeatKey {
    /// Source address.
    pub source: [u8; 16],
    /// Destination address.
    pub destination: [u8; 16],
    /// Destination port.
    pub port: u16,
    /// IP protocol.
    pub protocol: u8,
    /// [`Hook`](crate::Hook).
    pub hook: u8,
    /// [`Outcome`].
    pub outcome: u8,
    /// [`DropReason`](crate::DropReason).
    pub reason: u8,
    /// Direction.
    pub direction: u8,
    /// 4 or 6.
    pub family: u8,
}

/// Since the last event of the kind.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RepeatValue {
    /// When it was told, nanoseconds.
    pub told: u64,
    /// Packets since.
    pub packets: u32,
    /// Zero.
    pub padding: u32,
}

const _: () = {
    assert!(size_of::<FlowKey>() == 40);
    assert!(size_of::<FlowValue>() == 32);
    assert!(size_of::<FlowState>() == 24);
    assert!(size_of::<FragmentKey>() == 44 && size_of::<FragmentValue>() == 12);
    assert!(size_of::<Event>() == 88);
    assert!(size_of::<RepeatKey>() == 40 && size_of::<RepeatValue>() == 16);
};
