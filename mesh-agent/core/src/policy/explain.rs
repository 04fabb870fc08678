//! What a policy says, for people: its entries, and the statements that cover a packet.

use std::collections::BTreeMap;

use ipnet::IpNet;
use warren_model::{
    IdentityId,
    policy::{Action, Direction, PolicyRef},
};

use super::{
    compile::EndpointPolicy,
    engine::PolicyEngine,
    event::RuleName,
    map::{Maps, Packet, PeerKind, VerdictValue},
    port::PortCover,
};

/// Ports that share their verdicts: prefixes of protocol and port (bits, length of 24).
pub type PortPrefixes = Vec<(u32, u8)>;

/// One entry of a policy: for whom, on which ports, what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExplainedEntry {
    /// The direction.
    pub direction: Direction,
    /// The ports.
    pub ports: PortPrefixes,
    /// For whom.
    pub peer: ExplainedPeer,
    /// What.
    pub verdict: VerdictValue,
}

/// Whom an entry is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExplainedPeer {
    /// An identity.
    Identity(IdentityId),
    /// Everybody who has no entry of their own.
    Everybody,
    /// Addresses of the world.
    World(IpNet),
    /// Addresses of pods and nodes.
    Members(IpNet),
}

impl PolicyEngine {
    /// All entries of an endpoint's policy; none where it is closed.
    pub fn explain(&self, endpoint: u16) -> Vec<ExplainedEntry> {
        let Some(policy) = self.policy(endpoint) else {
            return Vec::new();
        };
        let prefixes: BTreeMap<u32, IpNet> =
            self.prefixes().map(|(prefix, number)| (number, prefix)).collect();
        let mut out = Vec::new();
        for direction in Direction::ALL {
            let of = policy.directions.of(direction);
            for (class, table) in &of.classes {
                let of_class = of.ports.iter().filter(|(_, other)| *other == class);
                let ports: PortPrefixes = of_class.map(|(prefix, _)| *prefix).collect();
                for (kind, id, verdict) in table.entries() {
                    let prefix = || prefixes.get(&id).copied();
                    let peer = match kind {
                        PeerKind::Identity => Some(ExplainedPeer::Identity(IdentityId(id))),
                        PeerKind::Everybody => Some(ExplainedPeer::Everybody),
                        PeerKind::WorldPrefix => prefix().map(ExplainedPeer::World),
                        PeerKind::MemberPrefix => prefix().map(ExplainedPeer::Members),
                    };
                    out.extend(peer.map(|peer| ExplainedEntry {
                        direction,
                        ports: ports.clone(),
                        peer,
                        verdict,
                    }));
                }
            }
        }
        out
    }

    /// Every statement that covers a packet, with what it does.
    pub fn covering(&self, packet: &Packet) -> Vec<(RuleName, Action)> {
        let Some(policy) = self.policy(packet.endpoint) else {
            return Vec::new();
        };
        let world = matches!(
            packet.peer,
            IdentityId::WORLD | IdentityId::WORLD_IPV4 | IdentityId::WORLD_IPV6
        );
        let address = IpNet::from(packet.address);
        let on_port = |cover: &PortCover| match cover {
            PortCover::All => true,
            PortCover::Ranges(ranges) => ranges.iter().any(|(protocol, first, last)| {
                *protocol == packet.protocol && (*first..=*last).contains(&packet.port)
            }),
        };
        let member = |id, identity| self.has_member(id, identity);
        let mut out: Vec<(RuleName, Action)> = policy
            .directions
            .of(packet.direction)
            .flats
            .iter()
            .filter(|flat| on_port(&flat.cover))
            .filter(|flat| flat.covers(packet.peer, &member) || flat.covers_prefix(&address, world))
            .filter_map(|flat| Some((self.rule(flat.rule)?.clone(), flat.action)))
            .collect();
        out.sort();
        out.dedup();
        out
    }

    /// The part of [`Self::contents`] that decides about one endpoint.
    pub fn contents_of(&self, endpoint: u16) -> Maps {
        let mut maps = Maps::default();
        if let Some(policy) = self.policy(endpoint) {
            self.add_policy(policy, &mut maps);
        }
        self.add_prefixes_to(&mut maps);
        maps.endpoints
            .extend(self.written(endpoint).map(|value| (endpoint, value)));
        maps
    }

    /// Numbers and names of an object's statements.
    pub fn rules_of_object<'a>(
        &'a self,
        policy: &'a PolicyRef,
    ) -> impl Iterator<Item = (u32, &'a RuleName)> + 'a {
        let first = RuleName {
            policy: policy.clone(),
            place: String::new(),
        };
        self.names_from(first)
            .take_while(move |(_, name)| name.policy == *policy)
    }
}

impl EndpointPolicy {
    /// Whether a direction is in default deny.
    pub fn enforces(&self, direction: Direction) -> bool {
        self.directions.of(direction).default_deny
    }
}
