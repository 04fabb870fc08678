//! Answers about policy.

use std::net::IpAddr;

use warren_agent_api::{
    EndpointPolicyStatus, PolicyEntryStatus, Response, TraceAnswer, TraceRequest, TraceVerdict,
};
use warren_agent_core::policy::{
    DropCause, ExplainedPeer, Packet, PolicyEngine, PortPrefixes, Verdict, lookup,
};
use warren_model::{
    IdentityId,
    policy::{Action, Direction, Protocol},
};

use super::{enforcer::Enforcer, names};
use crate::machine;

/// Most events that are told at once.
pub(crate) fn event_limit(limit: u32) -> usize {
    usize::try_from(limit).unwrap_or(usize::MAX)
}

/// The packet that a request asks about, as the endpoint sees it.
pub(crate) fn packet(endpoint: u16, request: &TraceRequest) -> Packet {
    Packet {
        endpoint,
        direction: request.direction,
        peer: request.peer,
        address: request.address,
        protocol: request.protocol,
        port: request.port,
    }
}

/// Fills in what policy knows of endpoints.
pub(super) fn describe(
    enforcer: &Enforcer,
    mut endpoints: Vec<EndpointPolicyStatus>,
    entries: bool,
) -> Vec<EndpointPolicyStatus> {
    for endpoint in &mut endpoints {
        let index = endpoint.endpoint;
        endpoint.closed = !enforcer.is_written(index);
        if let Some(policy) = enforcer.engine.policy(index) {
            endpoint.ingress_enforced = !policy.directions.ingress.is_open();
            endpoint.egress_enforced = !policy.directions.egress.is_open();
        }
        endpoint.audit = enforcer.engine.written(index).is_some_and(|value| value.audit);
        if entries {
            endpoint.entries = entries_of(enforcer, index);
        }
    }
    endpoints
}

fn entries_of(enforcer: &Enforcer, index: u16) -> Vec<PolicyEntryStatus> {
    let explained = enforcer.engine.explain(index).into_iter();
    explained
        .map(|entry| PolicyEntryStatus {
            direction: entry.direction,
            ports: ports_text(&entry.ports),
            peer: match entry.peer {
                ExplainedPeer::Identity(identity) => identity_text(enforcer, identity),
                ExplainedPeer::Everybody => "everybody".into(),
                ExplainedPeer::World(prefix) => format!("cidr {prefix} (world)"),
                ExplainedPeer::Members(prefix) => format!("cidr {prefix} (pods and nodes)"),
            },
            allow: entry.verdict.allow,
            rule: rule(&enforcer.engine, entry.verdict.rule).unwrap_or_default(),
        })
        .collect()
}

fn identity_text(enforcer: &Enforcer, identity: IdentityId) -> String {
    match (identity.reserved_name(), enforcer.source.labels(identity)) {
        (Some(name), _) => format!("identity {identity} ({name})"),
        (None, Some(labels)) => format!("identity {identity} ({labels})"),
        (None, None) => format!("identity {identity}"),
    }
}

fn rule(engine: &PolicyEngine, number: u32) -> Option<String> {
    engine.rule(number).map(names::text)
}

/// What maps and model say of a packet, and who has a say in it.
pub(super) fn trace(enforcer: &Enforcer, packet: &Packet) -> Response {
    let judged = machine::judge_policy(&enforcer.shared.programs.lock(), packet);
    let maps = match judged {
        Ok(verdict) => verdict,
        Err(error) => {
            return Response::Error {
                message: format!("the policy maps cannot be asked: {error}"),
                retry: true,
            };
        }
    };
    let model = lookup(&enforcer.engine.contents_of(packet.endpoint), packet);
    let statements = enforcer.engine.covering(packet).into_iter();
    Response::Trace(Box::new(TraceAnswer {
        endpoint: packet.endpoint,
        maps: verdict(enforcer, maps),
        model: verdict(enforcer, model),
        statements: statements
            .map(|(name, action)| (names::text(&name), action == Action::Allow))
            .collect(),
    }))
}

fn verdict(enforcer: &Enforcer, verdict: Verdict) -> TraceVerdict {
    let because = |cause: DropCause| match cause {
        DropCause::NoPolicy => ("no-policy", None),
        DropCause::Denied(number) => ("denied", rule(&enforcer.engine, number)),
        DropCause::Default => ("default-deny", None),
    };
    let (allowed, audit, (reason, rule)) = match verdict {
        Verdict::Allow(0) => (true, false, ("no-rule-applies", None)),
        Verdict::Allow(number) => (true, false, ("allowed", rule(&enforcer.engine, number))),
        Verdict::Drop(cause) => (false, false, because(cause)),
        Verdict::Audit(cause) => (false, true, because(cause)),
    };
    TraceVerdict {
        allowed,
        audit,
        reason: reason.into(),
        rule,
    }
}

/// Ports in words, as in `TCP/80,8080-8095`. What a shorter prefix covers is everything that no other entry does.
fn ports_text(prefixes: &PortPrefixes) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut ranges: Vec<(u8, u32, u32)> = Vec::new();
    for &(bits, length) in prefixes {
        let protocol = (bits >> 16) as u8;
        match length {
            0 => parts.push("ANY".into()),
            8 => parts.push(protocol_name(protocol)),
            _ => {
                let first = bits & 0xffff;
                let last = first | (0xff_ffff_u32 >> length.min(24));
                match ranges.last_mut() {
                    Some((of, _, end)) if *of == protocol && *end + 1 == first => *end = last,
                    _ => ranges.push((protocol, first, last)),
                }
            }
        }
    }
    let range = |(protocol, first, last): (u8, u32, u32)| match first == last {
        true => format!("{}/{first}", protocol_name(protocol)),
        false => format!("{}/{first}-{last}", protocol_name(protocol)),
    };
    parts.extend(ranges.into_iter().map(range));
    parts.join(",")
}

/// The name of a protocol, or its number.
pub(super) fn protocol_name(number: u8) -> String {
    let known = Protocol::ALL
        .into_iter()
        .find(|protocol| protocol.number() == number);
    known.map_or_else(|| number.to_string(), |protocol| protocol.name().to_owned())
}

/// An endpoint about which nothing is known yet.
pub(crate) fn unknown(
    endpoint: u16,
    pod: Option<warren_model::PodRef>,
    addresses: Vec<IpAddr>,
    identity: IdentityId,
    labels: Vec<String>,
) -> EndpointPolicyStatus {
    EndpointPolicyStatus {
        endpoint,
        pod,
        addresses,
        identity,
        labels,
        closed: true,
        ingress_enforced: false,
        egress_enforced: false,
        audit: false,
        entries: Vec::new(),
    }
}

/// A direction in one word.
pub(super) fn direction_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_read_well() {
        let prefix = |protocol: u32, port: u32, length| (protocol << 16 | port, length);
        assert_eq!(ports_text(&vec![(0, 0)]), "ANY");
        assert_eq!(ports_text(&vec![prefix(6, 0, 8)]), "TCP");
        assert_eq!(ports_text(&vec![prefix(6, 80, 24)]), "TCP/80");
        let range = vec![
            prefix(6, 8080, 20),
            prefix(17, 53, 24),
            prefix(17, 54, 23),
            prefix(47, 0, 8),
        ];
        assert_eq!(ports_text(&range), "47,TCP/8080-8095,UDP/53-55");
    }
}
