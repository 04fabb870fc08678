//! What a frame on the underlay is. Pure functions over bytes.

use std::net::IpAddr;

use ipnet::IpNet;
use warren_model::ClusterConfig;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// WireGuard.
    Encrypted,
    /// Mesh traffic in clear.
    Plaintext,
    /// `keyd` or API server.
    Control,
    /// ARP or neighbour discovery.
    Neighbour,
    /// Anything else.
    Other,
}

/// What makes an address a pod's or a node's, and a port WireGuard's.
#[derive(Debug, Clone)]
pub struct Mesh {
    pods: Vec<IpNet>,
    nodes: Vec<IpNet>,
    wireguard: std::ops::RangeInclusive<u16>,
    control: [u16; 2],
}

impl Mesh {
    /// The mesh of a configuration.
    pub fn of(config: &ClusterConfig) -> Self {
        Self {
            pods: config.pod_pools.clone(),
            nodes: config.node_pools.clone(),
            wireguard: config.wireguard_port..=config.slot_port(warren_model::node::SLOTS - 1),
            control: [config.keyd_port, config.apiserver_port],
        }
    }

    fn pod(&self, address: IpAddr) -> bool {
        self.pods.iter().any(|pool| pool.contains(&address))
    }

    fn node(&self, address: IpAddr) -> bool {
        self.nodes.iter().any(|pool| pool.contains(&address))
    }

    fn in_clear(&self, packet: &Packet<'_>) -> bool {
        let (source, destination) = (packet.source, packet.destination);
        let member = |address| self.pod(address) || self.node(address);
        (self.pod(source) && member(destination)) || (self.pod(destination) && member(source))
    }
}

/// Classifies an Ethernet frame. Mesh traffic inside VLAN tags, VXLAN or IP in IP is in clear all the same.
pub fn classify(mesh: &Mesh, frame: &[u8]) -> Class {
    classify_frame(mesh, frame, 3)
}

/// One line about a frame, for messages.
pub(super) fn describe(mesh: &Mesh, frame: &[u8]) -> String {
    match payload_of(frame) {
        Some((_, bytes)) => match Packet::parse(bytes) {
            Some(packet) => format!(
                "{} -> {} protocol {} ports {:?}{}",
                packet.source,
                packet.destination,
                packet.protocol,
                packet.ports(),
                if mesh.in_clear(&packet) {
                    ""
                } else {
                    " (encapsulated)"
                }
            ),
            None => "no IP".into(),
        },
        None => "a short frame".into(),
    }
}

fn classify_frame(mesh: &Mesh, frame: &[u8], depth: u8) -> Class {
    match payload_of(frame) {
        Some((ARP, _)) => Class::Neighbour,
        Some((IPV4 | IPV6, bytes)) => {
            Packet::parse(bytes).map_or(Class::Other, |packet| classify_packet(mesh, &packet, depth))
        }
        _ => Class::Other,
    }
}

fn classify_packet(mesh: &Mesh, packet: &Packet<'_>, depth: u8) -> Class {
    if mesh.in_clear(packet) {
        return Class::Plaintext;
    }
    if depth > 0
        && let Some(inner) = inner_class(mesh, packet, depth - 1)
    {
        return inner;
    }
    let between_nodes = mesh.node(packet.source) && mesh.node(packet.destination);
    match (packet.protocol, packet.ports()) {
        (UDP, Some((from, to)))
            if between_nodes && (mesh.wireguard.contains(&from) || mesh.wireguard.contains(&to)) =>
        {
            Class::Encrypted
        }
        // Later fragments have no ports; what the nodes' own stacks fragment is WireGuard's.
        (UDP, None) if between_nodes && packet.later_fragment => Class::Encrypted,
        (TCP, Some((from, to))) if mesh.control.contains(&from) || mesh.control.contains(&to) => {
            Class::Control
        }
        (ICMPV6, _)
            if packet
                .payload
                .first()
                .is_some_and(|kind| (133..=137).contains(kind)) =>
        {
            Class::Neighbour
        }
        _ => Class::Other,
    }
}

/// The class of an encapsulated packet, if there is one and it is in clear.
fn inner_class(mesh: &Mesh, packet: &Packet<'_>, depth: u8) -> Option<Class> {
    let class = match packet.protocol {
        IPIP | IPV6_IN_IP => classify_packet(mesh, &Packet::parse(packet.payload)?, depth),
        UDP if packet.ports().is_some_and(|(_, to)| VXLAN_PORTS.contains(&to)) => {
            classify_frame(mesh, packet.payload.get(16..)?, depth)
        }
        _ => return None,
    };
    (class == Class::Plaintext).then_some(class)
}

const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
const IPIP: u8 = 4;
const IPV6_IN_IP: u8 = 41;
/// The IANA port and Linux's own.
const VXLAN_PORTS: [u16; 2] = [4789, 8472];

/// Protocol and payload of a frame behind its VLAN tags.
fn payload_of(frame: &[u8]) -> Option<(u16, &[u8])> {
    let mut at = 12;
    loop {
        let kind = word(frame, at)?;
        at += 2;
        match kind {
            0x8100 | 0x88a8 | 0x9100 => at += 2,
            kind => return Some((kind, frame.get(at..)?)),
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// The parts of an IP packet that matter here.
#[derive(Debug)]
struct Packet<'a> {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    later_fragment: bool,
    payload: &'a [u8],
}

impl<'a> Packet<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        match bytes.first()? >> 4 {
            4 => Self::parse_v4(bytes),
            6 => Self::parse_v6(bytes),
            _ => None,
        }
    }

    fn parse_v4(bytes: &'a [u8]) -> Option<Self> {
        let address = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?));
        let header = usize::from(bytes[0] & 15) * 4;
        Some(Self {
            source: address(12)?,
            destination: address(16)?,
            protocol: *bytes.get(9)?,
            later_fragment: word(bytes, 6)? & 0x1fff != 0,
            payload: bytes.get(header..).unwrap_or_default(),
        })
    }

    fn parse_v6(bytes: &'a [u8]) -> Option<Self> {
        let address = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(bytes.get(at..at + 16)?).ok()?));
        let (source, destination) = (address(8)?, address(24)?);
        let (mut protocol, mut at, mut later_fragment) = (*bytes.get(6)?, 40, false);
        // RFC 8200 section 4: hop-by-hop, routing and destination options carry their length; a fragment
        // header is 8 bytes.
        while matches!(protocol, 0 | 43 | 44 | 60) {
            let Some(&next) = bytes.get(at) else { break };
            let length = bytes.get(at + 1).copied().unwrap_or(0);
            if protocol == 44 {
                later_fragment |= word(bytes, at + 2).unwrap_or(0) & 0xfff8 != 0;
                at += 8;
            } else {
                at += (usize::from(length) + 1) * 8;
            }
            protocol = next;
        }
        let payload = bytes.get(at..).unwrap_or_default();
        Some(Self {
            source,
            destination,
            protocol,
            later_fragment,
            payload,
        })
    }

    fn ports(&self) -> Option<(u16, u16)> {
        if self.later_fragment || !matches!(self.protocol, TCP | UDP) {
            return None;
        }
        Some((word(self.payload, 0)?, word(self.payload, 2)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forge::{Tag, ethernet, ip_packet, udp};

    fn mesh() -> Mesh {
        Mesh {
            pods: crate::lab::net::pod_pools().to_vec(),
            nodes: crate::lab::net::node_pools().to_vec(),
            wireguard: 51871..=51874,
            control: [4250, 6443],
        }
    }

    fn frame(source: &str, destination: &str, ports: (u16, u16), tags: &[Tag]) -> Vec<u8> {
        let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
        let packet = ip_packet(
            source,
            destination,
            UDP,
            &udp(source, destination, ports, b"hello"),
        );
        ethernet([2; 6], [4; 6], tags, &packet)
    }

    #[test]
    fn pods_at_either_end_are_in_clear_whatever_is_around_them() {
        for (source, destination) in [
            ("10.244.1.2", "10.244.2.2"),
            ("10.244.1.2", "172.30.0.2"),
            ("172.30.0.1", "10.244.2.2"),
            ("fd00:10:244:1::2", "fd00:10:244:2::2"),
            ("fd00:30::1", "fd00:10:244:2::2"),
        ] {
            for tags in [&[][..], &[Tag::Vlan(5)], &[Tag::Service(7), Tag::Vlan(5)]] {
                let bytes = frame(source, destination, (1, 2), tags);
                assert_eq!(
                    classify(&mesh(), &bytes),
                    Class::Plaintext,
                    "{source} {destination} {tags:?}"
                );
            }
        }
    }

    #[test]
    fn a_pod_and_the_world_are_nobodys_business() {
        assert_eq!(
            classify(&mesh(), &frame("10.244.1.2", "192.0.2.1", (1, 2), &[])),
            Class::Other
        );
    }

    #[test]
    fn wireguard_is_encrypted_only_between_nodes() {
        assert_eq!(
            classify(&mesh(), &frame("172.30.0.1", "172.30.0.2", (51871, 51872), &[])),
            Class::Encrypted
        );
        assert_eq!(
            classify(&mesh(), &frame("fd00:30::1", "fd00:30::2", (51874, 51874), &[])),
            Class::Encrypted
        );
        assert_eq!(
            classify(&mesh(), &frame("10.244.1.2", "172.30.0.2", (51871, 51871), &[])),
            Class::Plaintext
        );
        assert_eq!(
            classify(&mesh(), &frame("172.30.0.1", "172.30.0.2", (1, 2), &[])),
            Class::Other
        );
    }

    #[test]
    fn an_overlay_hides_nothing() {
        let (outer_from, outer_to) = ("172.30.0.1".parse().unwrap(), "172.30.0.2".parse().unwrap());
        let inner = frame("10.244.1.2", "10.244.2.2", (1, 2), &[]);
        let vxlan = [&[8, 0, 0, 0, 0, 0, 1, 0][..], &inner].concat();
        let packet = ip_packet(
            outer_from,
            outer_to,
            UDP,
            &udp(outer_from, outer_to, (999, 8472), &vxlan),
        );
        assert_eq!(
            classify(&mesh(), &ethernet([2; 6], [4; 6], &[], &packet)),
            Class::Plaintext
        );
        let ipip = ip_packet(outer_from, outer_to, IPIP, &inner[14..]);
        assert_eq!(
            classify(&mesh(), &ethernet([2; 6], [4; 6], &[], &ipip)),
            Class::Plaintext
        );
    }

    #[test]
    fn neighbours_and_garbage_have_their_classes() {
        let mut arp = vec![0; 60];
        arp[12..14].copy_from_slice(&[8, 6]);
        assert_eq!(classify(&mesh(), &arp), Class::Neighbour);
        for length in 0..60 {
            classify(
                &mesh(),
                &frame("fd00:30::1", "fd00:10:244:2::2", (1, 2), &[Tag::Vlan(1)])[..length],
            );
        }
        assert_eq!(classify(&mesh(), &[]), Class::Other);
    }
}
