//! Packets for tests, built from nothing: a slow reference for what is cut and put together.

use proptest::prelude::*;

use super::checksum;

/// A TCP or UDP packet but for its payload.
#[derive(Debug, Clone, Default)]
pub(super) struct Shape {
    pub(super) v6: bool,
    pub(super) udp: bool,
    pub(super) tos: u8,
    pub(super) ttl: u8,
    pub(super) id: u16,
    pub(super) dont_fragment: bool,
    pub(super) ports: [u16; 2],
    pub(super) sequence: u32,
    pub(super) acknowledgment: u32,
    pub(super) flags: u8,
    pub(super) window: u16,
    /// Options, a multiple of four bytes.
    pub(super) options: Vec<u8>,
    /// Last byte of the source address.
    pub(super) host: u8,
}

impl Shape {
    pub(super) fn network_len(&self) -> usize {
        if self.v6 { 40 } else { 20 }
    }

    /// The shape of packet `number` of what was cut into `size` bytes of payload each.
    pub(super) fn segment(&self, number: usize, size: usize, last: bool) -> Self {
        let mut flags = self.flags;
        if !last {
            flags &= !0x09;
        }
        if number != 0 {
            flags &= !0x80;
        }
        Self {
            id: self.id.wrapping_add(number as u16),
            sequence: self.sequence.wrapping_add((number * size) as u32),
            flags,
            ..self.clone()
        }
    }
}

pub(super) fn shape() -> impl Strategy<Value = Shape> {
    let words = prop::collection::vec(any::<[u8; 4]>(), 0..=10);
    (
        any::<(bool, bool, u8, u8, u16, bool)>(),
        any::<([u16; 2], u32, u32, u8, u16, u8)>(),
        words,
    )
        .prop_map(|(network, transport, options)| Shape {
            v6: network.0,
            udp: network.1,
            tos: network.2,
            ttl: network.3,
            id: network.4,
            dont_fragment: network.5,
            ports: transport.0,
            sequence: transport.1,
            acknowledgment: transport.2,
            flags: transport.3,
            window: transport.4,
            options: options.concat(),
            host: transport.5,
        })
}

/// The whole packet with right checksums.
pub(super) fn packet(shape: &Shape, payload: &[u8]) -> Vec<u8> {
    let mut transport = Vec::new();
    for port in shape.ports {
        transport.extend(port.to_be_bytes());
    }
    if shape.udp {
        transport.extend(((8 + payload.len()) as u16).to_be_bytes());
        transport.extend([0; 2]);
    } else {
        transport.extend(shape.sequence.to_be_bytes());
        transport.extend(shape.acknowledgment.to_be_bytes());
        transport.extend([((5 + shape.options.len() / 4) << 4) as u8, shape.flags]);
        transport.extend(shape.window.to_be_bytes());
        transport.extend([0; 4]);
        transport.extend(&shape.options);
    }
    transport.extend(payload);
    let length = transport.len();
    let (protocol, offset) = if shape.udp { (17, 6) } else { (6, 16) };
    let mut packet = Vec::new();
    if shape.v6 {
        packet.extend([0x60 | shape.tos >> 4, shape.tos << 4, 0, 0]);
        packet.extend((length as u16).to_be_bytes());
        packet.extend([protocol, shape.ttl]);
        packet.extend([0xfd; 15]);
        packet.push(shape.host);
        packet.extend([0xfe; 16]);
    } else {
        packet.extend([0x45, shape.tos]);
        packet.extend(((20 + length) as u16).to_be_bytes());
        packet.extend(shape.id.to_be_bytes());
        packet.extend([if shape.dont_fragment { 0x40 } else { 0 }, 0]);
        packet.extend([shape.ttl, protocol, 0, 0]);
        packet.extend([10, 0, 0, shape.host, 10, 0, 0, 255]);
        let sum = checksum::finish(checksum::add(0, &packet));
        packet[10..12].copy_from_slice(&sum);
    }
    let sum = checksum::pseudo_header(&packet, protocol, length);
    let sum = checksum::finish(checksum::add(sum, &transport));
    let sum = if shape.udp && sum == [0, 0] {
        [0xff; 2]
    } else {
        sum
    };
    transport[offset..offset + 2].copy_from_slice(&sum);
    packet.extend(transport);
    packet
}
