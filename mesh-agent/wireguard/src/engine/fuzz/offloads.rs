//! Bytes in are bytes out: cutting, and putting together, against a slow reference.

use super::{
    super::{
        checksum,
        merge::{Merger, Merging},
        packet,
        split::Split,
        testing::{self, Shape},
        virtio::{HEADER, Kind, Virtio},
    },
    Features, Source, reference,
};

fn shape(source: &mut Source<'_>) -> Shape {
    let bits = source.byte();
    let [tos, ttl, flags] = source.array();
    let number = |source: &mut Source<'_>| u32::from_le_bytes(source.array());
    Shape {
        v6: bits & 1 != 0,
        udp: bits & 2 != 0,
        dont_fragment: bits & 4 != 0,
        tos,
        ttl,
        // Most packets of a stream have nothing but ACK.
        flags: if bits & 8 != 0 { flags } else { 0x10 },
        id: source.u16(),
        ports: [u16::from(bits >> 4), 80],
        sequence: number(source),
        acknowledgment: number(source),
        window: source.u16(),
        options: vec![source.byte(); usize::from(bits >> 5) * 4],
        host: 0,
    }
}

/// What the kernel would hand over, or something that it would not, cut into packets.
pub(super) fn split(input: &[u8], features: &mut Features) {
    let mut source = Source(input);
    let shape = shape(&mut source);
    let segment = 1 + source.below(1500) as u16;
    let len = source.below(12_000).min(usize::from(segment) * 64);
    let seed = source.byte();
    let payload: Vec<u8> = (0..len)
        .map(|at| (at as u8).wrapping_mul(seed | 1) ^ seed)
        .collect();
    let mut packet = testing::packet(&shape, &payload);
    let (transport, offset) = (shape.network_len(), if shape.udp { 6 } else { 16 });
    let sum = checksum::pseudo_header(&packet, if shape.udp { 17 } else { 6 }, packet.len() - transport);
    packet[transport + offset..transport + offset + 2].copy_from_slice(&checksum::fold(sum));
    let mut header = Virtio {
        kind: [Kind::Tcp, Kind::Udp][usize::from(shape.udp)],
        v6: (!shape.udp).then_some(shape.v6),
        needs_checksum: true,
        header_len: source.u16(),
        segment,
        checksum_start: transport as u16,
        checksum_offset: offset as u16,
    };
    if source.flag() {
        (header.kind, header.v6) = (Kind::Single, None);
    }
    // Then anything may be wrong.
    let mut sound = true;
    while !source.is_empty() {
        let (at, value) = (source.below(packet.len() + HEADER), source.byte());
        let mut bytes = header.bytes();
        match at.checked_sub(HEADER) {
            Some(at) if at < packet.len() => packet[at] = value,
            _ => bytes[at.min(HEADER - 1)] = value,
        }
        match Virtio::parse(bytes) {
            Some(changed) => header = changed,
            None => return features.note(1, 0u8),
        }
        sound = false;
        if value == 0xff {
            packet.truncate(source.below(packet.len() + 1));
        }
        if packet.is_empty() {
            break;
        }
    }
    let expected = sound.then(|| reference::cut(header, &packet));
    let mut given = packet.clone();
    let Ok(split) = Split::new(header, &mut given) else {
        assert!(!sound, "a sound packet is refused");
        return features.note(2, 0u8);
    };
    let cut: Vec<Vec<u8>> = (0..split.count())
        .map(|number| {
            let mut out = vec![0xaa; split.len(number)];
            split.write(number, &mut out);
            out
        })
        .collect();
    features.size(3, cut.len());
    features.note(
        4,
        u8::from(sound) << 4 | u8::from(shape.v6) << 2 | u8::from(shape.udp) << 1,
    );
    if let Some(expected) = expected {
        assert_eq!(cut, expected, "{header:?}");
    }
}

/// Packets of some flows, put together; the stack cuts them again.
pub(super) fn merge(input: &[u8], features: &mut Features) {
    let mut source = Source(input);
    let bits = source.byte();
    let merging = Merging {
        tcp: bits & 1 == 0,
        udp: bits & 2 == 0,
    };
    let count = 1 + usize::from(bits >> 6);
    let mut shapes: Vec<Shape> = (0..count)
        .map(|host| Shape {
            host: host as u8,
            ..shape(&mut source)
        })
        .collect();
    let mut packets = Vec::new();
    while !source.is_empty() && packets.len() < 150 {
        let [step, size] = source.array();
        let which = usize::from(step >> 6) % count;
        let shape = &mut shapes[which];
        let repeat = if step & 0x20 != 0 {
            1 + usize::from(size >> 4) * 5
        } else {
            1
        };
        match step & 7 {
            0 => shape.sequence = shape.sequence.wrapping_add(u32::from(size) + 1),
            1 => shape.flags ^= 1 << (size & 7),
            2 => shape.window ^= 1,
            3 => shape.id = shape.id.wrapping_add(7),
            4 => shape.tos ^= size,
            _ => {}
        }
        for _ in 0..repeat {
            let payload = vec![size; usize::from(size) * 6];
            let mut packet = testing::packet(shape, &payload);
            if step & 0x1f == 0x1f {
                // A checksum that is wrong, or something that is no packet at all.
                let at = source.below(packet.len());
                packet[at] ^= source.byte() | 1;
            }
            shape.sequence = shape.sequence.wrapping_add(payload.len() as u32);
            shape.id = shape.id.wrapping_add(1);
            packets.push(packet);
        }
    }
    let buffer: Vec<u8> = packets.concat();
    let (mut merger, mut start) = (Merger::default(), 0);
    for packet in &packets {
        merger.push(&buffer, start..start + packet.len(), merging);
        start += packet.len();
    }
    // Packets come out once, whole, and in the order of their flow: as a sequence that is a shuffle of the flows.
    let mut out = Vec::new();
    for write in merger.writes(&buffer) {
        features.note(1, write.count as u64);
        features.note(2, write.kind as u8);
        let bytes: Vec<u8> = write.slices(|slices| slices.iter().flat_map(|slice| slice.to_vec()).collect());
        let (header, whole) = bytes.split_first_chunk::<HEADER>().unwrap();
        assert!(whole.len() <= 65_535);
        if write.count == 1 {
            out.push(whole.to_vec());
            continue;
        }
        let header = Virtio::parse(*header).unwrap();
        assert!(if header.kind == Kind::Udp {
            merging.udp
        } else {
            merging.tcp
        });
        let cut = reference::cut(header, whole);
        assert_eq!(cut.len(), write.count);
        out.extend(cut);
    }
    assert_eq!(out.len(), packets.len());
    // Changed bytes may move a packet to another flow: flows are told apart by what the packets say.
    let mut by_flow = std::collections::BTreeMap::<Vec<u8>, [Vec<Vec<u8>>; 2]>::new();
    for packet in &packets {
        by_flow.entry(flow_of(packet)).or_default()[0].push(without_id(packet));
    }
    for packet in &out {
        by_flow.entry(flow_of(packet)).or_default()[1].push(without_id(packet));
    }
    for [given, got] in by_flow.values() {
        let differs = given.iter().zip(got).position(|(given, got)| given != got);
        let heads = |packets: &[Vec<u8>]| -> Vec<String> {
            let head = |packet: &Vec<u8>| {
                format!(
                    "{} {}",
                    packet.len(),
                    hex::encode(&packet[..packet.len().min(48)])
                )
            };
            packets
                .iter()
                .skip(differs.unwrap_or(0))
                .take(3)
                .map(head)
                .collect()
        };
        assert!(
            given == got,
            "at {differs:?}: {:#?} became {:#?}",
            heads(given),
            heads(got)
        );
    }
}

/// Addresses, protocol and ports, as far as they are there.
fn flow_of(packet: &[u8]) -> Vec<u8> {
    match packet.first().map(|first| first >> 4) {
        Some(4) => [packet.get(9..10), packet.get(12..24)],
        _ => [packet.get(6..7), packet.get(8..44)],
    }
    .into_iter()
    .flatten()
    .flatten()
    .copied()
    .collect()
}

/// Identifications of IPv4 may be counted anew.
fn without_id(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet[0] >> 4 == 4 && packet.len() >= 20 {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    packet
}

/// What is read of a decrypted packet, byte by byte.
pub(super) fn inner(input: &[u8], features: &mut Features) {
    let at = |place: usize| input.get(place).copied();
    let length = |place: usize| Some(usize::from(at(place)?) << 8 | usize::from(at(place + 1)?));
    let (whole, addresses) = match at(0).map(|first| first >> 4) {
        Some(4) => (
            length(2).filter(|len| *len >= 20),
            (input.len() >= 20).then_some((12, 16, 4)),
        ),
        Some(6) => (
            length(4).map(|len| len + 40),
            (input.len() >= 40).then_some((8, 24, 16)),
        ),
        _ => (None, None),
    };
    let whole = whole.filter(|len| *len <= input.len());
    assert_eq!(packet::whole(input), whole);
    let octets = |address: Option<std::net::IpAddr>| match address {
        Some(std::net::IpAddr::V4(address)) => Some(address.octets().to_vec()),
        Some(std::net::IpAddr::V6(address)) => Some(address.octets().to_vec()),
        None => None,
    };
    let slow = |place: usize, len: usize| Some(input[place..place + len].to_vec());
    assert_eq!(
        octets(packet::source(input)),
        addresses.and_then(|(source, _, len)| slow(source, len))
    );
    assert_eq!(
        octets(packet::destination(input)),
        addresses.and_then(|(_, destination, len)| slow(destination, len))
    );
    for mtu in [0, 576, 1280, 1420, 65_535] {
        let padded = packet::padded(input.len(), mtu);
        assert!(padded >= input.len() && padded - input.len() < 16);
        assert!(padded == input.len() || (padded <= mtu && (padded.is_multiple_of(16) || padded == mtu)));
    }
    features.note(1, at(0).unwrap_or(0) >> 4);
    features.note(2, u8::from(whole.is_some()) << 1 | u8::from(addresses.is_some()));
    features.size(3, whole.unwrap_or(0));
}
