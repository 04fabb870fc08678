//! Entries of the maps, writes to them, and the look-up. See the module's documentation for the layout.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use warren_model::{
    IdentityId,
    policy::{Direction, Directions},
};

/// What a verdict is filed under beside its class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum PeerKind {
    /// An identity.
    Identity = 0,
    /// Every identity that has no entry of its own; `id` is 0.
    Everybody = 1,
    /// The number of the prefix that holds an address of the world.
    WorldPrefix = 2,
    /// The number of the prefix that holds the address of a pod or a node.
    MemberPrefix = 3,
}

/// Key of `POLICY_VERDICTS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VerdictKey {
    /// The port's class.
    pub class: u32,
    /// What `id` is.
    pub kind: PeerKind,
    /// Who.
    pub id: u32,
}

/// Value of `POLICY_VERDICTS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct VerdictValue {
    /// Allowed or denied.
    pub allow: bool,
    /// The statement that decides; 0 where none had to (no default deny, or the node reaching its own pod).
    pub rule: u32,
}

/// Key of `POLICY_PORTS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortKey {
    /// The policy.
    pub policy: u32,
    /// The direction.
    pub direction: Direction,
    /// Protocol and port as one number of 24 bits, `protocol << 16 | port`; bits behind `length` are 0.
    pub bits: u32,
    /// How many of the 24 bits count: 0, or 8 to 24.
    pub length: u8,
}

impl PortKey {
    /// Whether the key covers a protocol and port.
    pub fn covers(&self, protocol: u8, port: u16) -> bool {
        let bits = u32::from(protocol) << 16 | u32::from(port);
        let mask = if self.length == 0 {
            0
        } else {
            0xff_ffff << (24 - self.length) & 0xff_ffff
        };
        bits & mask == self.bits
    }
}

/// Value of `POLICY_PORTS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PortValue {
    /// The class of the ports.
    pub class: u32,
    /// Whether the class has entries for prefixes: else their look-up is left out.
    pub has_cidrs: bool,
}

/// Key of `POLICY_CIDRS4` and `POLICY_CIDRS6`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CidrKey {
    /// The table, one per life of an agent.
    pub table: u32,
    /// The prefix.
    pub prefix: IpNet,
}

/// Value of `POLICY_ENDPOINTS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EndpointValue {
    /// Its policy.
    pub policy: u32,
    /// The table of prefixes that the policy goes with.
    pub cidr_table: u32,
    /// Denials are reported, not enforced.
    pub audit: bool,
    /// Everything is allowed, without a further look-up.
    pub open: Directions<bool>,
}

/// One write to the maps. Setting replaces; deleting what is absent succeeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapWrite {
    /// `POLICY_VERDICTS`.
    SetVerdict(VerdictKey, VerdictValue),
    /// `POLICY_VERDICTS`.
    DeleteVerdict(VerdictKey),
    /// `POLICY_PORTS`.
    SetPort(PortKey, PortValue),
    /// `POLICY_PORTS`.
    DeletePort(PortKey),
    /// `POLICY_CIDRS4` or `POLICY_CIDRS6`.
    SetCidr(CidrKey, u32),
    /// `POLICY_CIDRS4` or `POLICY_CIDRS6`.
    DeleteCidr(CidrKey),
    /// `POLICY_ENDPOINTS`.
    SetEndpoint(u16, EndpointValue),
    /// `POLICY_ENDPOINTS`.
    DeleteEndpoint(u16),
    /// Wait until every program that started before has ended.
    Grace,
}

/// The maps as values: what the programs see after some writes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Maps {
    /// `POLICY_ENDPOINTS`.
    pub endpoints: BTreeMap<u16, EndpointValue>,
    /// `POLICY_PORTS`.
    pub ports: BTreeMap<PortKey, PortValue>,
    /// `POLICY_VERDICTS`.
    pub verdicts: BTreeMap<VerdictKey, VerdictValue>,
    /// `POLICY_CIDRS4` and `POLICY_CIDRS6`.
    pub cidrs: BTreeMap<CidrKey, u32>,
}

impl Maps {
    /// Carries out one write.
    pub fn apply(&mut self, write: &MapWrite) {
        match *write {
            MapWrite::SetVerdict(key, value) => {
                self.verdicts.insert(key, value);
            }
            MapWrite::DeleteVerdict(key) => {
                self.verdicts.remove(&key);
            }
            MapWrite::SetPort(key, value) => {
                self.ports.insert(key, value);
            }
            MapWrite::DeletePort(key) => {
                self.ports.remove(&key);
            }
            MapWrite::SetCidr(key, number) => {
                self.cidrs.insert(key, number);
            }
            MapWrite::DeleteCidr(key) => {
                self.cidrs.remove(&key);
            }
            MapWrite::SetEndpoint(index, value) => {
                self.endpoints.insert(index, value);
            }
            MapWrite::DeleteEndpoint(index) => {
                self.endpoints.remove(&index);
            }
            MapWrite::Grace => {}
        }
    }

    /// The writes that turn what maps hold into what they should, in an order that leads to nothing incomplete: after a
    /// restart (all numbers are new then) and for the periodic comparison. Entries of endpoints that `wanted` does not
    /// know are removed: not to be used before the first full directory.
    pub fn repair(&self, wanted: &Self) -> Vec<MapWrite> {
        let mut out = Vec::new();
        out.extend(
            wanted
                .verdicts
                .iter()
                .filter(|(key, value)| self.verdicts.get(key) != Some(value))
                .map(|(key, value)| MapWrite::SetVerdict(*key, *value)),
        );
        out.extend(
            wanted
                .cidrs
                .iter()
                .filter(|(key, number)| self.cidrs.get(key) != Some(number))
                .map(|(key, number)| MapWrite::SetCidr(*key, *number)),
        );
        let mut ports: Vec<_> = wanted
            .ports
            .iter()
            .filter(|(key, value)| self.ports.get(key) != Some(value))
            .collect();
        ports.sort_by_key(|(key, _)| std::cmp::Reverse(key.length));
        out.extend(
            ports
                .into_iter()
                .map(|(key, value)| MapWrite::SetPort(*key, *value)),
        );
        out.extend(
            wanted
                .endpoints
                .iter()
                .filter(|(index, value)| self.endpoints.get(index) != Some(value))
                .map(|(index, value)| MapWrite::SetEndpoint(*index, *value)),
        );
        let mut gone: Vec<MapWrite> = Vec::new();
        let lost = |index: &&u16| !wanted.endpoints.contains_key(index);
        gone.extend(
            self.endpoints
                .keys()
                .filter(lost)
                .map(|index| MapWrite::DeleteEndpoint(*index)),
        );
        let mut ports: Vec<_> = self
            .ports
            .keys()
            .filter(|key| !wanted.ports.contains_key(key))
            .collect();
        ports.sort_by_key(|key| key.length);
        gone.extend(ports.into_iter().map(|key| MapWrite::DeletePort(*key)));
        let cidrs = self.cidrs.keys().filter(|key| !wanted.cidrs.contains_key(key));
        gone.extend(cidrs.map(|key| MapWrite::DeleteCidr(*key)));
        let verdicts: Vec<_> = self
            .verdicts
            .keys()
            .filter(|key| !wanted.verdicts.contains_key(key))
            .collect();
        if !verdicts.is_empty() {
            gone.push(MapWrite::Grace);
            gone.extend(verdicts.into_iter().map(|key| MapWrite::DeleteVerdict(*key)));
        }
        if !gone.is_empty() {
            out.push(MapWrite::Grace);
            out.append(&mut gone);
        }
        out
    }

    /// The longest prefix that covers, as an LPM trie finds it.
    fn port(&self, policy: u32, direction: Direction, protocol: u8, port: u16) -> Option<PortValue> {
        let bits = u32::from(protocol) << 16 | u32::from(port);
        (0..=24u8).rev().find_map(|length| {
            let mask = if length == 0 {
                0
            } else {
                0xff_ffff << (24 - length) & 0xff_ffff
            };
            self.ports
                .get(&PortKey {
                    policy,
                    direction,
                    bits: bits & mask,
                    length,
                })
                .copied()
        })
    }

    /// The number of the longest prefix that holds the address, as an LPM trie finds it.
    fn cidr(&self, table: u32, address: IpAddr) -> Option<u32> {
        let holds = |(key, _): &(&CidrKey, &u32)| key.table == table && key.prefix.contains(&address);
        self.cidrs
            .iter()
            .filter(holds)
            .max_by_key(|(key, _)| key.prefix.prefix_len())
            .map(|(_, number)| *number)
    }

    fn verdict(&self, class: u32, kind: PeerKind, id: u32) -> Option<VerdictValue> {
        self.verdicts.get(&VerdictKey { class, kind, id }).copied()
    }
}

/// What of a packet policy looks at, seen from one endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Packet {
    /// The endpoint that is asked: the receiver for ingress, the sender for egress. 0 is the host.
    pub endpoint: u16,
    /// Which way the connection is opened.
    pub direction: Direction,
    /// Identity of the other end: from its mark or its address; [`IdentityId::UNKNOWN`] where its owner is not known.
    pub peer: IdentityId,
    /// Address of the other end: the pod's own where a mark names it.
    pub address: IpAddr,
    /// Protocol number.
    pub protocol: u8,
    /// Destination port, or ICMP type, or 0.
    pub port: u16,
}

/// Why policy denies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DropCause {
    /// The endpoint has no policy yet.
    NoPolicy,
    /// A deny statement, by number.
    Denied(u32),
    /// Default deny, and nothing allows it.
    Default,
}

/// What happens to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// It passes; the statement that allows it, 0 where none had to.
    Allow(u32),
    /// It is dropped.
    Drop(DropCause),
    /// It would be dropped, but passes: audit mode.
    Audit(DropCause),
}

impl Verdict {
    /// Whether policy lets the packet pass, audit mode aside.
    pub fn allows(self) -> bool {
        match self {
            Self::Allow(_) => true,
            Self::Drop(_) | Self::Audit(_) => false,
        }
    }
}

/// The verdict for a packet that belongs to no established flow.
pub fn lookup(maps: &Maps, packet: &Packet) -> Verdict {
    let Some(endpoint) = maps.endpoints.get(&packet.endpoint) else {
        return Verdict::Drop(DropCause::NoPolicy);
    };
    match judge(maps, endpoint, packet) {
        Ok(rule) => Verdict::Allow(rule),
        Err(cause) if endpoint.audit => Verdict::Audit(cause),
        Err(cause) => Verdict::Drop(cause),
    }
}

fn judge(maps: &Maps, endpoint: &EndpointValue, packet: &Packet) -> Result<u32, DropCause> {
    if *endpoint.open.of(packet.direction) {
        return Ok(0);
    }
    let Some(port) = maps.port(endpoint.policy, packet.direction, packet.protocol, packet.port) else {
        return Err(DropCause::NoPolicy);
    };
    let by_identity = maps
        .verdict(port.class, PeerKind::Identity, packet.peer.0)
        .or_else(|| maps.verdict(port.class, PeerKind::Everybody, 0));
    let mut by_prefix = None;
    if port.has_cidrs
        && let Some(number) = maps.cidr(endpoint.cidr_table, packet.address)
    {
        let world = matches!(
            packet.peer,
            IdentityId::WORLD | IdentityId::WORLD_IPV4 | IdentityId::WORLD_IPV6
        );
        let kind = if world {
            PeerKind::WorldPrefix
        } else {
            PeerKind::MemberPrefix
        };
        by_prefix = maps.verdict(port.class, kind, number);
    }
    for value in [by_identity, by_prefix].into_iter().flatten() {
        if !value.allow {
            return Err(DropCause::Denied(value.rule));
        }
    }
    match (by_identity, by_prefix) {
        (Some(value), _) | (None, Some(value)) => Ok(value.rule),
        (None, None) => Err(DropCause::Default),
    }
}
