//! Cuts what a TUN device hands over, up to 64 KiB with one set of headers, into packets of the wire.

use super::{
    checksum,
    virtio::{Kind, Virtio},
};

const TCP: u8 = 6;
const UDP: u8 = 17;

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// A packet of a TUN device: one packet, or several that share their headers.
#[derive(Debug)]
pub(super) struct Split<'a> {
    packet: &'a [u8],
    kind: Kind,
    /// Where the transport header begins.
    transport: usize,
    /// Bytes of all headers.
    headers: usize,
    /// Payload bytes of every packet but the last.
    segment: usize,
    count: usize,
}

/// The header in front of the packet does not fit the packet.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Malformed;

impl<'a> Split<'a> {
    /// Completes a missing checksum of a single packet in place.
    pub(super) fn new(header: Virtio, packet: &'a mut [u8]) -> Result<Self, Malformed> {
        match header.kind {
            Kind::Single => {
                if header.needs_checksum {
                    complete(header, packet)?;
                }
                Ok(Self {
                    segment: packet.len(),
                    kind: Kind::Single,
                    transport: 0,
                    headers: 0,
                    count: 1,
                    packet,
                })
            }
            kind => Self::several(kind, header, packet),
        }
    }

    /// The length of the headers is read from the packet: the field for it is a hint (virtio 1.2, section 5.1.6.2).
    fn several(kind: Kind, header: Virtio, packet: &'a [u8]) -> Result<Self, Malformed> {
        let transport = usize::from(header.checksum_start);
        let version = packet.first().ok_or(Malformed)? >> 4;
        let network = match version {
            4 => usize::from(packet[0] & 15) * 4,
            6 => 40,
            _ => return Err(Malformed),
        };
        let least = if version == 4 { 20 } else { 40 };
        let family = header.v6.is_none_or(|v6| v6 == (version == 6));
        // IPv6 may have extension headers in between.
        let begins = match version {
            4 => transport == network,
            _ => transport >= network,
        };
        let (fixed, checksum_at) = match kind {
            Kind::Udp => (8, 6),
            _ => (20, 16),
        };
        if network < least
            || !family
            || !begins
            || header.segment == 0
            || usize::from(header.checksum_offset) != checksum_at
            || packet.len() < transport + fixed
        {
            return Err(Malformed);
        }
        let own = match kind {
            Kind::Udp => 8,
            _ => usize::from(packet[transport + 12] >> 4) * 4,
        };
        let headers = transport + own;
        if own < fixed || packet.len() < headers {
            return Err(Malformed);
        }
        let segment = usize::from(header.segment);
        Ok(Self {
            count: (packet.len() - headers).div_ceil(segment).max(1),
            packet,
            kind,
            transport,
            headers,
            segment,
        })
    }

    /// What was handed over: the headers of the first packet, and more.
    pub(super) fn first(&self) -> &'a [u8] {
        self.packet
    }

    /// How many packets there are.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Bytes of packet `number`.
    pub(super) fn len(&self, number: usize) -> usize {
        match self.kind {
            Kind::Single => self.packet.len(),
            _ => self.headers + self.payload(number).len(),
        }
    }

    fn payload(&self, number: usize) -> &'a [u8] {
        let start = self.headers + number * self.segment;
        let end = (start + self.segment).min(self.packet.len());
        &self.packet[start..end]
    }

    /// Writes packet `number` to `out`, which has its length.
    pub(super) fn write(&self, number: usize, out: &mut [u8]) {
        if self.kind == Kind::Single {
            return out.copy_from_slice(self.packet);
        }
        out[..self.headers].copy_from_slice(&self.packet[..self.headers]);
        out[self.headers..].copy_from_slice(self.payload(number));
        self.fix_network(number, out);
        match self.kind {
            Kind::Udp => self.fix_udp(out),
            _ => self.fix_tcp(number, out),
        }
    }

    fn fix_network(&self, number: usize, out: &mut [u8]) {
        if out[0] >> 4 == 4 {
            let length = (out.len() as u16).to_be_bytes();
            out[2..4].copy_from_slice(&length);
            // One more for each, as the kernel counts them.
            let id = u16::from_be_bytes([out[4], out[5]]).wrapping_add(number as u16);
            out[4..6].copy_from_slice(&id.to_be_bytes());
            out[10..12].fill(0);
            // Without extension headers the transport header follows the options.
            let sum = checksum::finish(checksum::add(0, &out[..self.transport]));
            out[10..12].copy_from_slice(&sum);
        } else {
            let length = ((out.len() - 40) as u16).to_be_bytes();
            out[4..6].copy_from_slice(&length);
        }
    }

    fn fix_tcp(&self, number: usize, out: &mut [u8]) {
        let at = self.transport;
        let sequence = u32::from_be_bytes([out[at + 4], out[at + 5], out[at + 6], out[at + 7]]);
        let sequence = sequence.wrapping_add((number * self.segment) as u32);
        out[at + 4..at + 8].copy_from_slice(&sequence.to_be_bytes());
        if number + 1 != self.count {
            out[at + 13] &= !(FIN | PSH);
        }
        if number != 0 {
            out[at + 13] &= !CWR;
        }
        fix_checksum(out, at, TCP, 16);
    }

    fn fix_udp(&self, out: &mut [u8]) {
        let at = self.transport;
        let length = ((out.len() - at) as u16).to_be_bytes();
        out[at + 4..at + 6].copy_from_slice(&length);
        fix_checksum(out, at, UDP, 6);
    }
}

/// Computes the checksum of the transport header at `at`.
fn fix_checksum(packet: &mut [u8], at: usize, protocol: u8, offset: usize) {
    packet[at + offset..at + offset + 2].fill(0);
    let sum = checksum::pseudo_header(packet, protocol, packet.len() - at);
    let sum = checksum::finish(checksum::add(sum, &packet[at..]));
    store(packet, at + offset, sum, protocol == UDP);
}

/// A UDP checksum of zero would mean that there is none (RFC 768; refused over IPv6 by RFC 8200, section 8.1).
fn store(packet: &mut [u8], at: usize, sum: [u8; 2], udp: bool) {
    let sum = if udp && sum == [0, 0] { [0xff, 0xff] } else { sum };
    packet[at..at + 2].copy_from_slice(&sum);
}

/// Completes a checksum whose field holds the sum of the pseudo header.
fn complete(header: Virtio, packet: &mut [u8]) -> Result<(), Malformed> {
    let start = usize::from(header.checksum_start);
    let at = start + usize::from(header.checksum_offset);
    if at + 2 > packet.len() {
        return Err(Malformed);
    }
    let sum = checksum::finish(checksum::add(0, &packet[start..]));
    // UDP's checksum is at 6, TCP's at 16, ICMPv6's at 2; of these only UDP has a zero that means something.
    store(packet, at, sum, header.checksum_offset == 6);
    Ok(())
}

#[cfg(test)]
#[path = "split_tests.rs"]
mod tests;
