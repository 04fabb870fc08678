//! Ports and ICMP messages.

use warren_model::policy::{PortSpec, Protocol};

use super::faults::{Faults, Path};
use crate::cilium::spec::{IcmpField, IcmpType, PortProtocol};

/// The most entries that a list of ports or ICMP messages may have.
pub(super) const MOST: usize = 40;

/// What `ports[i]` means; `ANY`, and no protocol, are all protocols that have ports.
pub(super) fn ports(path: &Path, port: &PortProtocol, faults: &mut Faults) -> Vec<PortSpec> {
    let protocols: &[Protocol] = match port.protocol.as_deref() {
        None | Some("" | "ANY") => &Protocol::WITH_PORTS,
        Some("TCP") => &[Protocol::Tcp],
        Some("UDP") => &[Protocol::Udp],
        Some("SCTP") => &[Protocol::Sctp],
        Some("ICMP") => &[Protocol::Icmp],
        Some("ICMPv6") => &[Protocol::Icmpv6],
        Some(other) => {
            let problem = format!("{other:?} is no protocol: write TCP, UDP, SCTP, ICMP, ICMPv6 or ANY");
            return fault(faults, &path.member("protocol"), problem);
        }
    };
    let icmp = matches!(protocols, [Protocol::Icmp | Protocol::Icmpv6]);
    let end = port.end_port.filter(|end| *end != 0);
    let text = port.port.as_deref().unwrap_or_default();
    if text.is_empty() {
        return fault(
            faults,
            &path.member("port"),
            "the port is missing: write a number or a name",
        );
    }
    if icmp && end.is_some() {
        return fault(
            faults,
            &path.member("endPort"),
            "ICMP messages have no ranges: list each type",
        );
    }
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        if end.is_some() {
            return fault(
                faults,
                &path.member("endPort"),
                "a range needs a number as its first port, not a name",
            );
        }
        if icmp || !is_port_name(text) {
            let problem = format!(
                "{text:?} is neither a port number nor a port name (at most 15 lower-case letters, digits and dashes)"
            );
            return fault(faults, &path.member("port"), problem);
        }
        return protocols
            .iter()
            .map(|protocol| PortSpec::named(*protocol, text))
            .collect();
    }
    let Some(first) = text
        .parse::<u16>()
        .ok()
        .filter(|n| protocols.iter().all(|p| *n <= p.last_port()))
    else {
        return fault(
            faults,
            &path.member("port"),
            format!("{text} is larger than any port"),
        );
    };
    let last = match end {
        None if first == 0 && !icmp => u16::MAX,
        None => first,
        Some(end) => match u16::try_from(end) {
            Ok(last) if first != 0 && last >= first => last,
            _ => {
                let problem = format!("{end} does not end a range that starts at port {first}");
                return fault(faults, &path.member("endPort"), problem);
            }
        },
    };
    protocols
        .iter()
        .map(|protocol| PortSpec::range(*protocol, first, last))
        .collect()
}

/// A name as Kubernetes wants it (RFC 6335): at least one letter, no dash at the ends or doubled.
pub(super) fn is_port_name(text: &str) -> bool {
    text.len() <= 15
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && text.bytes().any(|b| b.is_ascii_lowercase())
        && !text.starts_with('-')
        && !text.ends_with('-')
        && !text.contains("--")
}

/// One ICMP message.
pub(super) fn icmp(path: &Path, field: &IcmpField, faults: &mut Faults) -> Option<PortSpec> {
    let protocol = match field.family.as_deref() {
        None | Some("" | "IPv4") => Protocol::Icmp,
        Some("IPv6") => Protocol::Icmpv6,
        Some(other) => {
            faults.add(
                &path.member("family"),
                format!("{other:?} is no family: write IPv4 or IPv6"),
            );
            return None;
        }
    };
    let at = path.member("type");
    let number = match &field.kind {
        None => {
            faults.add(&at, "the type is missing: write a number or a name");
            return None;
        }
        Some(IcmpType::Number(number)) => u8::try_from(*number).map_err(|_| number.to_string()),
        Some(IcmpType::Name(text)) => text
            .parse::<u8>()
            .ok()
            .or_else(|| type_number(protocol, text))
            .ok_or_else(|| text.clone()),
    };
    match number {
        Ok(number) => Some(PortSpec::range(protocol, number.into(), number.into())),
        Err(text) => {
            faults.add(&at, format!("{text:?} is no {protocol} message type"));
            None
        }
    }
}

/// Numbers of the named types (IANA, ICMP and ICMPv6 type numbers).
fn type_number(protocol: Protocol, name: &str) -> Option<u8> {
    const V4: [(&str, u8); 13] = [
        ("EchoReply", 0),
        ("DestinationUnreachable", 3),
        ("Redirect", 5),
        ("Echo", 8),
        ("EchoRequest", 8),
        ("RouterAdvertisement", 9),
        ("RouterSelection", 10),
        ("TimeExceeded", 11),
        ("ParameterProblem", 12),
        ("Timestamp", 13),
        ("TimestampReply", 14),
        ("ExtendedEchoRequest", 42),
        ("ExtendedEchoReply", 43),
    ];
    const V6: [(&str, u8); 14] = [
        ("DestinationUnreachable", 1),
        ("PacketTooBig", 2),
        ("TimeExceeded", 3),
        ("ParameterProblem", 4),
        ("EchoRequest", 128),
        ("EchoReply", 129),
        ("MulticastListenerQuery", 130),
        ("MulticastListenerReport", 131),
        ("MulticastListenerDone", 132),
        ("RouterSolicitation", 133),
        ("RouterAdvertisement", 134),
        ("NeighborSolicitation", 135),
        ("NeighborAdvertisement", 136),
        ("RedirectMessage", 137),
    ];
    let table: &[_] = if protocol == Protocol::Icmp { &V4 } else { &V6 };
    table
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, number)| *number)
}

fn fault<T>(faults: &mut Faults, path: &Path, problem: impl Into<String>) -> Vec<T> {
    faults.add(path, problem);
    Vec::new()
}
