//! Policy: the core's entries <-> those of the maps.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use warren_agent_core::policy::{
    CidrKey, DropCause, EndpointValue, MapWrite, Maps, Packet, PeerKind, PortKey, PortValue, Verdict,
    VerdictKey, VerdictValue,
};
use warren_bpf::{
    Datapath, Error, PolicyContents, PolicyDirection, PolicyEndpoint, PolicyOutcome, PolicyPeerKind,
    PolicyPort, PolicyPortKey, PolicyQuestion, PolicyVerdict, PolicyVerdictKey,
};
use warren_model::policy::{Direction, Directions};

/// The programs and maps of this node. Policy and everything else write to them from threads of their own; nobody
/// keeps the lock longer than one operation takes.
#[derive(Clone)]
pub(crate) struct Programs(Arc<Mutex<Datapath>>);

impl Programs {
    /// Shares a datapath.
    pub(crate) fn new(datapath: Datapath) -> Self {
        Self(Arc::new(Mutex::new(datapath)))
    }

    /// Every operation is whole in itself: a thread that panicked leaves nothing half done.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Datapath> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Carries out one write.
pub(crate) fn write(datapath: &mut Datapath, step: &MapWrite) -> Result<(), Error> {
    match *step {
        MapWrite::SetVerdict(key, value) => datapath.set_policy_verdict(verdict_key(key), verdict(value)),
        MapWrite::DeleteVerdict(key) => datapath.remove_policy_verdict(verdict_key(key)),
        MapWrite::SetPort(key, value) => datapath.set_policy_port(port_key(key), port(value)),
        MapWrite::DeletePort(key) => datapath.remove_policy_port(port_key(key)),
        MapWrite::SetCidr(key, number) => datapath.set_policy_cidr(key.table, key.prefix, number),
        MapWrite::DeleteCidr(key) => datapath.remove_policy_cidr(key.table, key.prefix),
        MapWrite::SetEndpoint(index, value) => datapath.set_policy_endpoint(index, endpoint(value)),
        MapWrite::DeleteEndpoint(index) => datapath.remove_policy_endpoint(index),
        MapWrite::Grace => datapath.policy_grace(),
    }
}

/// What the maps hold, in the core's words.
pub(crate) fn maps(contents: PolicyContents) -> Maps {
    let endpoints = contents.endpoints.into_iter();
    let ports = contents.ports.into_iter();
    let verdicts = contents.verdicts.into_iter();
    let cidrs = contents.cidrs.into_iter();
    Maps {
        endpoints: endpoints
            .map(|(index, value)| (index, endpoint_from(value)))
            .collect(),
        ports: ports
            .map(|(key, value)| (port_key_from(key), port_from(value)))
            .collect(),
        verdicts: verdicts
            .map(|(key, value)| (verdict_key_from(key), verdict_from(value)))
            .collect(),
        cidrs: cidrs
            .map(|((table, prefix), number)| (CidrKey { table, prefix }, number))
            .collect(),
    }
}

/// What the maps answer for a packet.
pub(crate) fn judge(datapath: &Datapath, packet: &Packet) -> Result<Verdict, Error> {
    let answer = datapath.judge(&PolicyQuestion {
        endpoint: packet.endpoint,
        direction: direction(packet.direction),
        peer: packet.peer.0,
        address: packet.address,
        protocol: packet.protocol,
        port: packet.port,
    })?;
    let cause = match answer.outcome {
        PolicyOutcome::Open => return Ok(Verdict::Allow(0)),
        PolicyOutcome::Allowed { rule } => return Ok(Verdict::Allow(rule)),
        PolicyOutcome::Closed => DropCause::NoPolicy,
        PolicyOutcome::Denied { rule } => DropCause::Denied(rule),
        PolicyOutcome::DefaultDeny => DropCause::Default,
    };
    Ok(match answer.audit {
        true => Verdict::Audit(cause),
        false => Verdict::Drop(cause),
    })
}

/// A direction for the programs.
fn direction(direction: Direction) -> PolicyDirection {
    match direction {
        Direction::Ingress => PolicyDirection::Ingress,
        Direction::Egress => PolicyDirection::Egress,
    }
}

/// A direction as the core sees it.
pub(crate) fn direction_from(direction: PolicyDirection) -> Direction {
    match direction {
        PolicyDirection::Ingress => Direction::Ingress,
        PolicyDirection::Egress => Direction::Egress,
    }
}

fn endpoint(value: EndpointValue) -> PolicyEndpoint {
    PolicyEndpoint {
        policy: value.policy,
        cidr_table: value.cidr_table,
        audit: value.audit,
        ingress_open: value.open.ingress,
        egress_open: value.open.egress,
    }
}

fn endpoint_from(value: PolicyEndpoint) -> EndpointValue {
    EndpointValue {
        policy: value.policy,
        cidr_table: value.cidr_table,
        audit: value.audit,
        open: Directions {
            ingress: value.ingress_open,
            egress: value.egress_open,
        },
    }
}

fn port_key(key: PortKey) -> PolicyPortKey {
    PolicyPortKey {
        policy: key.policy,
        direction: direction(key.direction),
        bits: key.bits,
        length: key.length,
    }
}

fn port_key_from(key: PolicyPortKey) -> PortKey {
    PortKey {
        policy: key.policy,
        direction: direction_from(key.direction),
        bits: key.bits,
        length: key.length,
    }
}

fn port(value: PortValue) -> PolicyPort {
    PolicyPort {
        class: value.class,
        has_cidrs: value.has_cidrs,
    }
}

fn port_from(value: PolicyPort) -> PortValue {
    PortValue {
        class: value.class,
        has_cidrs: value.has_cidrs,
    }
}

fn verdict_key(key: VerdictKey) -> PolicyVerdictKey {
    PolicyVerdictKey {
        class: key.class,
        kind: match key.kind {
            PeerKind::Identity => PolicyPeerKind::Identity,
            PeerKind::Everybody => PolicyPeerKind::Everybody,
            PeerKind::WorldPrefix => PolicyPeerKind::WorldPrefix,
            PeerKind::MemberPrefix => PolicyPeerKind::MemberPrefix,
        },
        id: key.id,
    }
}

fn verdict_key_from(key: PolicyVerdictKey) -> VerdictKey {
    VerdictKey {
        class: key.class,
        kind: match key.kind {
            PolicyPeerKind::Identity => PeerKind::Identity,
            PolicyPeerKind::Everybody => PeerKind::Everybody,
            PolicyPeerKind::WorldPrefix => PeerKind::WorldPrefix,
            PolicyPeerKind::MemberPrefix => PeerKind::MemberPrefix,
        },
        id: key.id,
    }
}

fn verdict(value: VerdictValue) -> PolicyVerdict {
    PolicyVerdict {
        allow: value.allow,
        rule: value.rule,
    }
}

fn verdict_from(value: PolicyVerdict) -> VerdictValue {
    VerdictValue {
        allow: value.allow,
        rule: value.rule,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_survive_the_way_there_and_back() {
        for way in Direction::ALL {
            let key = PortKey {
                policy: 7,
                direction: way,
                bits: 0x06_1f90,
                length: 24,
            };
            assert_eq!(port_key_from(port_key(key)), key);
            for audit in [false, true] {
                let mut open = Directions::default();
                *open.of_mut(way) = true;
                let value = EndpointValue {
                    policy: 7,
                    cidr_table: 3,
                    audit,
                    open,
                };
                assert_eq!(endpoint_from(endpoint(value)), value);
            }
        }
        for kind in [
            PeerKind::Identity,
            PeerKind::Everybody,
            PeerKind::WorldPrefix,
            PeerKind::MemberPrefix,
        ] {
            let key = VerdictKey {
                class: 9,
                kind,
                id: 300,
            };
            assert_eq!(verdict_key_from(verdict_key(key)), key);
        }
    }
}
