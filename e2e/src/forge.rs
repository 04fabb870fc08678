//! Packets that no honest stack would send, for tests of what must be dropped.

use std::net::IpAddr;

use crate::app::ping::internet_checksum;

/// A VLAN tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tag {
    /// 802.1Q.
    Vlan(u16),
    /// 802.1ad, the outer one of two.
    Service(u16),
}

/// An Ethernet frame around an IP packet.
pub fn ethernet(source: [u8; 6], destination: [u8; 6], tags: &[Tag], packet: &[u8]) -> Vec<u8> {
    let mut frame = [destination, source].concat();
    for tag in tags {
        let (kind, id) = match tag {
            Tag::Vlan(id) => (0x8100u16, id),
            Tag::Service(id) => (0x88a8, id),
        };
        frame.extend(kind.to_be_bytes());
        frame.extend(id.to_be_bytes());
    }
    let kind: u16 = if packet.first().is_some_and(|byte| byte >> 4 == 6) {
        0x86dd
    } else {
        0x0800
    };
    frame.extend(kind.to_be_bytes());
    frame.extend(packet);
    frame
}

/// An IP packet, checksum included.
///
/// # Panics
/// Where the families differ or the payload is longer than a packet can be.
pub fn ip_packet(source: IpAddr, destination: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len() + 20).expect("a payload that fits");
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut packet = vec![0x45, 0];
            packet.extend(length.to_be_bytes());
            packet.extend([0, 1, 0, 0, 64, protocol, 0, 0]);
            packet.extend(source.octets());
            packet.extend(destination.octets());
            let sum = internet_checksum(&packet);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            packet.extend(payload);
            packet
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let mut packet = vec![0x60, 0, 0, 0];
            packet.extend((length - 20).to_be_bytes());
            packet.extend([protocol, 64]);
            packet.extend(source.octets());
            packet.extend(destination.octets());
            packet.extend(payload);
            packet
        }
        _ => panic!("{source} and {destination} are of different families"),
    }
}

/// A UDP datagram with its checksum (RFC 768, RFC 8200 section 8.1).
pub fn udp(source: IpAddr, destination: IpAddr, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() + 8) as u16;
    let mut datagram = Vec::with_capacity(payload.len() + 8);
    for field in [ports.0, ports.1, length, 0] {
        datagram.extend(field.to_be_bytes());
    }
    datagram.extend(payload);
    let mut covered = Vec::new();
    for address in [source, destination] {
        match address {
            IpAddr::V4(address) => covered.extend(address.octets()),
            IpAddr::V6(address) => covered.extend(address.octets()),
        }
    }
    covered.extend([0, 17]);
    covered.extend(length.to_be_bytes());
    covered.extend(&datagram);
    // 0 means "none"; the other zero means zero.
    let sum = match internet_checksum(&covered) {
        0 => 0xffff,
        sum => sum,
    };
    datagram[6..8].copy_from_slice(&sum.to_be_bytes());
    datagram
}
