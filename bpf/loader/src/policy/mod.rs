//! Policy: the entries of its maps as values. What they mean, and in which order to write them, is told in
//! `mesh-agent/core/src/policy`. All numbers are those of the agent.

mod convert;
mod judge;
mod write;

use std::collections::BTreeMap;

use ipnet::IpNet;

pub use self::judge::{PolicyAnswer, PolicyOutcome, PolicyQuestion};

/// Which way a connection is opened, seen from the endpoint whose policy is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PolicyDirection {
    /// To the endpoint.
    Ingress,
    /// From the endpoint.
    Egress,
}

/// The policy of an endpoint. An endpoint without one is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PolicyEndpoint {
    /// Number of the policy.
    pub policy: u32,
    /// Number of the table of prefixes that goes with it.
    pub cidr_table: u32,
    /// Denials are reported, not enforced.
    pub audit: bool,
    /// Everything is allowed to the endpoint: no look-up, no flow.
    pub ingress_open: bool,
    /// Everything is allowed from the endpoint: no look-up, no flow.
    pub egress_open: bool,
}

/// Protocol and ports of a policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyPortKey {
    /// Number of the policy.
    pub policy: u32,
    /// Direction.
    pub direction: PolicyDirection,
    /// 24 bits: `protocol << 16 | port`; those behind `length` are 0.
    pub bits: u32,
    /// How many of the 24 bits count: 0, or 8 to 24.
    pub length: u8,
}

/// The class of ports: the same statements cover them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PolicyPort {
    /// Its number.
    pub class: u32,
    /// The class has verdicts for prefixes.
    pub has_cidrs: bool,
}

/// What a verdict is filed under beside its class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum PolicyPeerKind {
    /// An identity.
    Identity = warren_abi::PEER_IDENTITY,
    /// Every identity that has no entry of its own; the number is 0.
    Everybody = warren_abi::PEER_EVERYBODY,
    /// Number of the prefix that holds an address of the world.
    WorldPrefix = warren_abi::PEER_WORLD_PREFIX,
    /// Number of the prefix that holds the address of a pod or a node.
    MemberPrefix = warren_abi::PEER_MEMBER_PREFIX,
}

/// Who a verdict is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyVerdictKey {
    /// Class of the ports.
    pub class: u32,
    /// What `id` is.
    pub kind: PolicyPeerKind,
    /// Who.
    pub id: u32,
}

/// A verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PolicyVerdict {
    /// Allowed or denied.
    pub allow: bool,
    /// The rule that decides, 0 where none had to.
    pub rule: u32,
}

/// Everything that the policy maps hold: what a new agent adopts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PolicyContents {
    /// By index of the endpoint, 0 = the host.
    pub endpoints: BTreeMap<u16, PolicyEndpoint>,
    /// Ports of all policies.
    pub ports: BTreeMap<PolicyPortKey, PolicyPort>,
    /// Verdicts of all classes.
    pub verdicts: BTreeMap<PolicyVerdictKey, PolicyVerdict>,
    /// Numbers of prefixes, by table and prefix.
    pub cidrs: BTreeMap<(u32, IpNet), u32>,
}

/// How full a map is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Name of the map.
    pub map: &'static str,
    /// Entries that it holds.
    pub entries: u32,
    /// Most that it can hold.
    pub limit: u32,
}
