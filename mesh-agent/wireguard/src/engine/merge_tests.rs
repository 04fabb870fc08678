use proptest::prelude::*;

use super::*;
use crate::engine::{
    split::Split,
    testing::{self, Shape},
};

const ALL: Merging = Merging { tcp: true, udp: true };

/// What a merger writes for these packets.
fn merged(packets: &[Vec<u8>], merging: Merging) -> Vec<(usize, Vec<u8>)> {
    let buffer = packets.concat();
    let mut merger = Merger::default();
    let mut start = 0;
    for packet in packets {
        merger.push(&buffer, start..start + packet.len(), merging);
        start += packet.len();
    }
    assert_eq!(merger.len(), packets.len());
    merger
        .writes(&buffer)
        .map(|write| {
            let bytes = write.slices(|slices| slices.iter().flat_map(|slice| slice.to_vec()).collect());
            (write.count, bytes)
        })
        .collect()
}

/// Cuts a write as the stack does.
fn cut(mut write: Vec<u8>) -> Vec<Vec<u8>> {
    let mut packet = write.split_off(HEADER);
    let header = Virtio::parse(write.try_into().unwrap()).unwrap();
    let split = Split::new(header, &mut packet).unwrap();
    (0..split.count())
        .map(|number| {
            let mut out = vec![0; split.len(number)];
            split.write(number, &mut out);
            out
        })
        .collect()
}

/// A flow of `sizes`, as a sender that cuts makes it.
fn flow(shape: &Shape, sizes: &[usize]) -> Vec<Vec<u8>> {
    let mut shape = shape.clone();
    sizes
        .iter()
        .map(|size| {
            let payload: Vec<u8> = (0..*size).map(|n| n as u8 ^ shape.sequence as u8).collect();
            let packet = testing::packet(&shape, &payload);
            shape.sequence = shape.sequence.wrapping_add(*size as u32);
            shape.id = shape.id.wrapping_add(1);
            packet
        })
        .collect()
}

/// Identifications of IPv4 may be counted anew.
fn without_id(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet[0] >> 4 == 4 {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    packet
}

#[test]
fn a_stream_becomes_one_write() {
    for v6 in [false, true] {
        for udp in [false, true] {
            let shape = Shape {
                v6,
                udp,
                flags: ACK,
                ..Shape::default()
            };
            let packets = flow(&shape, &[1000, 1000, 1000, 10]);
            let writes = merged(&packets, ALL);
            assert_eq!(writes.iter().map(|write| write.0).collect::<Vec<_>>(), [4]);
            assert_eq!(cut(writes[0].1.clone()), packets);
        }
    }
}

#[test]
fn what_does_not_follow_stays_alone() {
    let shape = Shape {
        flags: ACK,
        ..Shape::default()
    };
    let counts = |packets: &[Vec<u8>]| {
        merged(packets, ALL)
            .iter()
            .map(|write| write.0)
            .collect::<Vec<_>>()
    };
    // A gap, a short one in the middle, one that is longer.
    let mut packets = flow(&shape, &[100, 100, 100]);
    packets.remove(1);
    assert_eq!(counts(&packets), [1, 1]);
    assert_eq!(counts(&flow(&shape, &[100, 50, 100, 100])), [2, 2]);
    assert_eq!(counts(&flow(&shape, &[100, 200, 200])), [1, 2]);
    // PSH ends a write; SYN, FIN and a pure acknowledgment stay alone and keep their place.
    let push = Shape {
        flags: ACK | PSH,
        ..shape.clone()
    };
    assert_eq!(counts(&flow(&push, &[100, 100])), [1, 1]);
    for flags in [0x02, 0x11, 0x14, 0x30, 0x50, 0x90, 0] {
        let mut packets = flow(&shape, &[100, 100, 100, 100]);
        let other = Shape {
            flags,
            ..shape.clone()
        };
        packets.insert(2, testing::packet(&other, b"x"));
        assert_eq!(counts(&packets), [2, 1, 2], "{flags:x}");
    }
    // Different headers.
    for other in [
        Shape {
            tos: 4,
            ..shape.clone()
        },
        Shape {
            ttl: 9,
            ..shape.clone()
        },
        Shape {
            window: 9,
            ..shape.clone()
        },
        Shape {
            acknowledgment: 9,
            ..shape.clone()
        },
        Shape {
            dont_fragment: true,
            ..shape.clone()
        },
        Shape {
            options: vec![1; 4],
            ..shape.clone()
        },
        Shape {
            host: 7,
            ..shape.clone()
        },
        Shape {
            ports: [7, 0],
            ..shape.clone()
        },
    ] {
        let second = Shape {
            sequence: 100,
            ..other
        };
        let packets = [
            testing::packet(&shape, &[1; 100]),
            testing::packet(&second, &[2; 100]),
        ];
        assert_eq!(counts(&packets), [1, 1], "{second:?}");
    }
}

/// A fragment may be of the flow: what comes behind it is not put in front of it.
#[test]
fn nothing_overtakes_a_fragment() {
    let shape = Shape {
        udp: true,
        ..Shape::default()
    };
    let mut packets = flow(&shape, &[100; 6]);
    // "More fragments", and a sound header.
    packets[2][6] = 0x20;
    packets[2][10..12].fill(0);
    let sum = checksum::finish(checksum::add(0, &packets[2][..20]));
    packets[2][10..12].copy_from_slice(&sum);
    let counts: Vec<_> = merged(&packets, ALL).iter().map(|write| write.0).collect();
    assert_eq!(counts, [2, 1, 3]);
}

#[test]
fn a_wrong_checksum_is_not_made_right() {
    for udp in [false, true] {
        let shape = Shape {
            udp,
            flags: ACK,
            ..Shape::default()
        };
        let mut packets = flow(&shape, &[100; 3]);
        let last = packets[1].len() - 1;
        packets[1][last] ^= 1;
        let writes = merged(&packets, ALL);
        assert_eq!(writes.len(), 3);
        assert_eq!(writes[1].1[HEADER..], packets[1]);
    }
    // No checksum at all is legal over IPv4.
    let shape = Shape {
        udp: true,
        ..Shape::default()
    };
    let mut packets = flow(&shape, &[100; 2]);
    for packet in &mut packets {
        packet[26..28].fill(0);
    }
    assert_eq!(merged(&packets, ALL).len(), 2);
}

#[test]
fn limits_of_size_and_count() {
    let shape = Shape {
        flags: ACK,
        ..Shape::default()
    };
    let counts = |sizes: &[usize], udp| {
        let shape = Shape { udp, ..shape.clone() };
        let writes = merged(&flow(&shape, sizes), ALL);
        assert!(writes.iter().all(|write| write.1.len() <= HEADER + LARGEST));
        writes.iter().map(|write| write.0).collect::<Vec<_>>()
    };
    assert_eq!(counts(&[1368; 60], false), [47, 13]);
    assert_eq!(counts(&[10; 130], true), [64, 64, 2]);
    assert_eq!(counts(&[10; 130], false), [64, 64, 2]);
}

#[test]
fn a_device_that_takes_no_udp_gets_none() {
    let shape = Shape {
        udp: true,
        ..Shape::default()
    };
    assert_eq!(
        merged(
            &flow(&shape, &[100; 3]),
            Merging {
                tcp: true,
                udp: false
            }
        )
        .len(),
        3
    );
    let shape = Shape {
        flags: ACK,
        ..Shape::default()
    };
    assert_eq!(
        merged(
            &flow(&shape, &[100; 3]),
            Merging {
                tcp: false,
                udp: true
            }
        )
        .len(),
        3
    );
}

proptest! {
    /// Whatever comes in goes out, whole, and in order within its flow.
    #[test]
    fn nothing_is_lost_changed_or_reordered(
        shapes in prop::collection::vec(testing::shape(), 1..4),
        plain in prop::collection::vec(any::<bool>(), 4),
        steps in prop::collection::vec((0usize..4, 0usize..400, 0u8..12), 1..150),
        merging in (any::<bool>(), any::<bool>()).prop_map(|(tcp, udp)| Merging { tcp, udp }),
    ) {
        let mut shapes: Vec<Shape> = shapes;
        for (number, shape) in shapes.iter_mut().enumerate() {
            shape.host = number as u8;
            if plain[number] {
                shape.flags = ACK;
            }
        }
        let mut flows: Vec<Vec<Vec<u8>>> = vec![Vec::new(); shapes.len()];
        let mut packets = Vec::new();
        for (which, size, change) in steps {
            let which = which % shapes.len();
            let shape = &mut shapes[which];
            match change {
                0 => shape.sequence = shape.sequence.wrapping_add(1),
                1 => shape.window ^= 1,
                2 => shape.flags ^= PSH,
                _ => {}
            }
            let size = if change < 6 { size } else { 300 };
            let payload = vec![change; size];
            let mut packet = testing::packet(shape, &payload);
            if change == 3 {
                let last = packet.len() - 1;
                packet[last] ^= 0x10;
            }
            shape.sequence = shape.sequence.wrapping_add(size as u32);
            shape.id = shape.id.wrapping_add(1);
            flows[which].push(packet.clone());
            packets.push(packet);
        }
        let mut out: Vec<Vec<Vec<u8>>> = vec![Vec::new(); shapes.len()];
        for (count, write) in merged(&packets, merging) {
            let parts = if count == 1 { vec![write[HEADER..].to_vec()] } else { cut(write) };
            prop_assert_eq!(parts.len(), count);
            for part in parts {
                let host = if part[0] >> 4 == 4 { part[15] } else { part[23] };
                out[usize::from(host)].push(part);
            }
        }
        for (out, flow) in out.iter().zip(&flows) {
            let out: Vec<_> = out.iter().map(|packet| without_id(packet)).collect();
            let flow: Vec<_> = flow.iter().map(|packet| without_id(packet)).collect();
            prop_assert_eq!(out, flow);
        }
    }

    #[test]
    fn nonsense_passes_as_it_is(packets in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..200), 1..20)) {
        let writes = merged(&packets, ALL);
        prop_assert_eq!(writes.iter().map(|write| write.0).sum::<usize>(), packets.len());
    }
}
