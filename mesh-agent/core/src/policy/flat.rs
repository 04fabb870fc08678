//! Statements made ready for compiling: no names of ports, nothing that cannot be enforced.

use std::collections::{BTreeMap, BTreeSet};

use warren_model::{
    IdentityId,
    policy::{
        Action, AddressScope, CidrSet, Direction, NamedPorts, Peers, PortMatch, Ports, Protocol, SelectorId,
        Statement,
    },
};

use super::port::PortCover;

/// The name of a port, with its protocol.
pub(super) type PortName = (String, Protocol);

/// Which identities have a port of a name: the numbers and who has them.
pub(super) type NamedIndex = BTreeMap<PortName, BTreeMap<u16, BTreeSet<IdentityId>>>;

/// One statement with numbers for ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Flat {
    pub(super) rule: u32,
    pub(super) action: Action,
    /// Everybody, `only` aside.
    pub(super) any: bool,
    pub(super) selectors: Vec<SelectorId>,
    pub(super) cidrs: Vec<CidrSet>,
    pub(super) cover: PortCover,
    /// Only these of the peers: those that have the named port.
    pub(super) only: Option<BTreeSet<IdentityId>>,
}

impl Flat {
    /// Whether it covers an identity; `member` says who belongs to a selector.
    pub(super) fn covers(
        &self,
        identity: IdentityId,
        member: &impl Fn(SelectorId, IdentityId) -> bool,
    ) -> bool {
        self.only.as_ref().is_none_or(|only| only.contains(&identity))
            && (self.any || self.selectors.iter().any(|selector| member(*selector, identity)))
    }

    /// Whether it covers every identity there is.
    pub(super) fn covers_everybody(&self) -> bool {
        self.any && self.only.is_none()
    }

    /// Whether it covers the addresses of a prefix; `world`: they have no owner.
    pub(super) fn covers_prefix(&self, prefix: &ipnet::IpNet, world: bool) -> bool {
        let counts = |set: &CidrSet| match set.scope {
            AddressScope::World => world,
            AddressScope::Any => true,
        };
        self.cidrs.iter().any(|set| counts(set) && set.covers(prefix))
    }
}

/// The flat statements of one; several where an egress port has a name, none where an allow cannot be enforced.
pub(super) fn flatten(
    rule: u32,
    statement: &Statement<SelectorId>,
    own_ports: &NamedPorts,
    peer_ports: &NamedIndex,
) -> Vec<Flat> {
    if statement.action == Action::Allow && !statement.unenforced.is_empty() {
        return Vec::new();
    }
    let flat = |cover: PortCover| Flat {
        rule,
        action: statement.action,
        any: statement.peers == Peers::Any,
        selectors: statement.selectors().copied().collect(),
        cidrs: statement.cidrs().cloned().collect(),
        cover,
        only: None,
    };
    let specs = match &statement.ports {
        Ports::All => return vec![flat(PortCover::All)],
        Ports::These(specs) => specs,
    };
    let mut ranges = Vec::new();
    let mut out = Vec::new();
    for spec in specs {
        let protocol = spec.protocol.number();
        match &spec.ports {
            PortMatch::Range(first, last) => ranges.push((protocol, *first, *last)),
            PortMatch::Name(name) if statement.direction == Direction::Ingress => {
                ranges.extend(
                    own_ports
                        .number(spec.protocol, name)
                        .map(|port| (protocol, port, port)),
                );
            }
            PortMatch::Name(name) => {
                let numbers = peer_ports.get(&(name.clone(), spec.protocol));
                for (port, having) in numbers.into_iter().flatten() {
                    let cover = PortCover::Ranges(vec![(protocol, *port, *port)]);
                    // Addresses have no port names.
                    out.push(Flat {
                        cidrs: Vec::new(),
                        only: Some(having.clone()),
                        ..flat(cover)
                    });
                }
                if statement.action == Action::Deny {
                    // Whose ports are not known may have any of that name.
                    let cover = PortCover::Ranges(vec![(protocol, 0, spec.protocol.last_port())]);
                    let only = Some(UNSETTLED.into());
                    out.push(Flat {
                        any: true,
                        cidrs: Vec::new(),
                        only,
                        ..flat(cover)
                    });
                }
            }
        }
    }
    if !ranges.is_empty() {
        out.push(flat(PortCover::Ranges(ranges)));
    }
    out
}

/// Peers whose labels are not known yet: they may turn out to be whom a deny statement means.
pub(super) const UNSETTLED: [IdentityId; 2] = [IdentityId::UNKNOWN, IdentityId::INIT];
