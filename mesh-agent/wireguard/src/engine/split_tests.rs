use proptest::prelude::*;

use super::*;
use crate::engine::testing::{self, Shape};

/// What the kernel would hand over: one packet with all the payload, and the header that says how to cut it.
fn super_packet(shape: &Shape, payload: &[u8], segment: u16) -> (Virtio, Vec<u8>) {
    let mut packet = testing::packet(shape, payload);
    let transport = shape.network_len();
    let offset = if shape.udp { 6 } else { 16 };
    let sum = checksum::pseudo_header(
        &packet,
        if shape.udp { UDP } else { TCP },
        packet.len() - transport,
    );
    packet[transport + offset..transport + offset + 2].copy_from_slice(&checksum::fold(sum));
    let header = Virtio {
        kind: if shape.udp { Kind::Udp } else { Kind::Tcp },
        v6: (!shape.udp).then_some(shape.v6),
        needs_checksum: true,
        // The kernel's is larger than the headers now and then.
        header_len: 200,
        segment,
        checksum_start: transport as u16,
        checksum_offset: offset as u16,
    };
    (header, packet)
}

proptest! {
    /// Bytes in are bytes out, and every packet stands on its own.
    #[test]
    fn every_packet_is_whole(
        shape in testing::shape(),
        payload in prop::collection::vec(any::<u8>(), 1..9000),
        segment in 1u16..1500,
    ) {
        // What a test takes must stay finite.
        let segment = segment.max((payload.len() / 64) as u16 + 1);
        let (header, mut packet) = super_packet(&shape, &payload, segment);
        let split = Split::new(header, &mut packet).unwrap();
        prop_assert_eq!(split.count(), payload.len().div_ceil(segment.into()));
        for (number, part) in payload.chunks(segment.into()).enumerate() {
            let mut out = vec![0xaa; split.len(number)];
            split.write(number, &mut out);
            // The slow reference builds each packet from nothing.
            let last = number + 1 == split.count();
            let expected = testing::packet(&shape.segment(number, segment.into(), last), part);
            prop_assert_eq!(&out, &expected, "packet {}", number);
        }
    }

    /// Headers that do not fit their packet, and packets that are none.
    #[test]
    fn nonsense_is_refused_and_never_panics(
        bytes in prop::array::uniform10(any::<u8>()),
        shape in testing::shape(),
        payload in prop::collection::vec(any::<u8>(), 0..300),
        cut in 0usize..400,
        flip in prop::option::of((0usize..80, any::<u8>())),
    ) {
        let (mut header, mut packet) = super_packet(&shape, &payload, 100);
        if let Some(other) = Virtio::parse(bytes)
            && bytes[9] & 1 == 0
        {
            header = other;
        }
        if let Some((at, value)) = flip && at < packet.len() {
            packet[at] = value;
        }
        packet.truncate(cut);
        if let Ok(split) = Split::new(header, &mut packet) {
            for number in 0..split.count() {
                let mut out = vec![0; split.len(number)];
                split.write(number, &mut out);
            }
        }
    }
}

#[test]
fn a_single_packet_gets_its_checksum() {
    for udp in [false, true] {
        for v6 in [false, true] {
            let shape = Shape {
                udp,
                v6,
                ..Shape::default()
            };
            let (header, mut packet) = super_packet(&shape, b"odd", 100);
            let header = Virtio {
                kind: Kind::Single,
                v6: None,
                ..header
            };
            let split = Split::new(header, &mut packet).unwrap();
            let mut out = vec![0; split.len(0)];
            split.write(0, &mut out);
            assert_eq!(out, testing::packet(&shape, b"odd"));
        }
    }
}

/// RFC 8200, section 8.1: a receiver drops a UDP checksum of zero over IPv6.
#[test]
fn a_udp_checksum_of_zero_is_sent_as_ones() {
    let shape = Shape {
        udp: true,
        v6: true,
        ..Shape::default()
    };
    let mut payload = [0u8; 2];
    // The payload that brings the sum to zero: the checksum of the rest.
    let rest = testing::packet(&shape, &payload);
    payload.copy_from_slice(&rest[46..48]);
    let (header, mut packet) = super_packet(&shape, &payload, 100);
    let split = Split::new(
        Virtio {
            kind: Kind::Single,
            v6: None,
            ..header
        },
        &mut packet,
    )
    .unwrap();
    let mut out = vec![0; split.len(0)];
    split.write(0, &mut out);
    assert_eq!(out[46..48], [0xff, 0xff]);
}
