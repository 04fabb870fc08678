//! Slow and simple: what the kernel does with what is cut and put together. Shares no code with the engine but the names
//! of the header's fields.

use super::super::virtio::{Kind, Virtio};

/// RFC 1071, a word at a time.
fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes: Vec<u8> = parts.concat();
    let mut sum = 0u32;
    for word in bytes.chunks(2) {
        sum += u32::from(word[0]) << 8 | u32::from(word.get(1).copied().unwrap_or(0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Packets of a virtio header and what stands behind it; both are sound.
pub(super) fn cut(header: Virtio, packet: &[u8]) -> Vec<Vec<u8>> {
    let v6 = packet[0] >> 4 == 6;
    let transport = usize::from(header.checksum_start);
    if header.kind == Kind::Single {
        let mut packet = packet.to_vec();
        if header.needs_checksum {
            let at = transport + usize::from(header.checksum_offset);
            let sum = checksum(&[&packet[transport..]]);
            let udp = header.checksum_offset == 6;
            put(&mut packet, at, if udp && sum == 0 { 0xffff } else { sum });
        }
        return vec![packet];
    }
    let udp = header.kind == Kind::Udp;
    let headers = match udp {
        true => transport + 8,
        false => transport + usize::from(packet[transport + 12] >> 4) * 4,
    };
    let payload = &packet[headers..];
    let mut cuts: Vec<&[u8]> = payload.chunks(usize::from(header.segment)).collect();
    if cuts.is_empty() {
        cuts.push(&[]);
    }
    let count = cuts.len();
    let mut packets = Vec::new();
    for (number, cut) in cuts.into_iter().enumerate() {
        let mut one = [&packet[..headers], cut].concat();
        let len = one.len();
        if v6 {
            put(&mut one, 4, (len - 40) as u16);
        } else {
            put(&mut one, 2, len as u16);
            let id = u16::from_be_bytes([one[4], one[5]]).wrapping_add(number as u16);
            put(&mut one, 4, id);
            put(&mut one, 10, 0);
            let sum = checksum(&[&one[..transport]]);
            put(&mut one, 10, sum);
        }
        if udp {
            put(&mut one, transport + 4, (len - transport) as u16);
        } else {
            let field: [u8; 4] = one[transport + 4..transport + 8].try_into().unwrap();
            let sequence =
                u32::from_be_bytes(field).wrapping_add((number * usize::from(header.segment)) as u32);
            one[transport + 4..transport + 8].copy_from_slice(&sequence.to_be_bytes());
            if number + 1 < count {
                one[transport + 13] &= 0b1111_0110;
            }
            if number > 0 {
                one[transport + 13] &= 0b0111_1111;
            }
        }
        complete(&mut one, transport, v6, udp);
        packets.push(one);
    }
    packets
}

fn complete(packet: &mut [u8], transport: usize, v6: bool, udp: bool) {
    let at = transport + if udp { 6 } else { 16 };
    put(packet, at, 0);
    let addresses = if v6 { 8..40 } else { 12..20 };
    let protocol = if udp { 17 } else { 6 };
    let len = ((packet.len() - transport) as u32).to_be_bytes();
    let sum = checksum(&[
        &packet[addresses],
        &len,
        &[0, 0, 0, protocol],
        &packet[transport..],
    ]);
    put(packet, at, if udp && sum == 0 { 0xffff } else { sum });
}

fn put(packet: &mut [u8], at: usize, value: u16) {
    packet[at..at + 2].copy_from_slice(&value.to_be_bytes());
}
