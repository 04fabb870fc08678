//! Puts packets that follow each other in a flow together, so that one write to the TUN device hands over up to 64 KiB.
//!
//! The order within a flow stays as it was; between flows it may change. What is put together is cut again by the stack
//! exactly as it was: same headers, same sizes. A packet whose checksum is wrong is never put together with another:
//! the stack would compute a right one for it.

use std::{io::IoSlice, ops::Range};

use super::{
    checksum,
    virtio::{HEADER, Kind, Virtio},
};

const TCP: u8 = 6;
const UDP: u8 = 17;

const PSH: u8 = 0x08;
const ACK: u8 = 0x10;

/// Bytes of the largest IP packet.
const LARGEST: usize = 65_535;

/// Packets in one write: what the stack accepts of UDP, and more than TCP of the usual sizes needs.
pub(super) const MOST: usize = 64;

/// How many writes back a flow is looked for.
const WINDOW: usize = 16;

/// Bytes of the largest headers that are put together: IPv6 and TCP with all its options.
const HEADERS: usize = 100;

/// What belongs to one flow has the same of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Flow {
    v6: bool,
    protocol: u8,
    ports: [u8; 4],
    addresses: [u8; 32],
}

/// A packet that others may follow or that may follow others.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    kind: Kind,
    transport: usize,
    headers: usize,
    payload: usize,
    sequence: u32,
    push: bool,
}

/// One write to be.
#[derive(Debug)]
struct Item {
    flow: Option<Flow>,
    candidate: Option<Candidate>,
    /// A packet that may be of any flow: a fragment, or one with options.
    opaque: bool,
    /// Takes nothing more.
    closed: bool,
    push: bool,
    count: usize,
    /// Payload bytes of all packets together.
    payload: usize,
    first: usize,
    last: usize,
}

/// A packet in the buffer, and the next of its item.
#[derive(Debug)]
struct Part {
    range: Range<usize>,
    next: usize,
}

/// Which packets may be put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Merging {
    pub(super) tcp: bool,
    pub(super) udp: bool,
}

/// Packets in a buffer, on their way to the TUN device.
#[derive(Debug, Default)]
pub(super) struct Merger {
    items: Vec<Item>,
    parts: Vec<Part>,
}

/// The bytes of one write.
pub(super) struct Write<'a> {
    /// How many packets they hold.
    pub(super) count: usize,
    pub(super) kind: Kind,
    virtio: [u8; HEADER],
    headers: [u8; HEADERS],
    headers_len: usize,
    merger: &'a Merger,
    item: &'a Item,
    buffer: &'a [u8],
}

impl Merger {
    /// Adds a packet of `buffer`. All packets until [`Self::clear`] are of the same buffer, which stays as it is.
    pub(super) fn push(&mut self, buffer: &[u8], range: Range<usize>, merging: Merging) {
        let packet = &buffer[range.clone()];
        let (flow, candidate) = classify(packet, merging);
        let number = self.parts.len();
        self.parts.push(Part {
            range,
            next: usize::MAX,
        });
        let payload = candidate.map_or(0, |candidate| candidate.payload);
        if let Some(flow) = &flow
            && let Some(place) = self.find(flow)
        {
            if let Some(candidate) = &candidate
                && self.follows(buffer, place, packet, candidate)
            {
                let item = &mut self.items[place];
                self.parts[item.last].next = number;
                item.last = number;
                item.count += 1;
                item.closed =
                    candidate.push || candidate.payload < item.candidate.map_or(0, |first| first.payload);
                item.push |= candidate.push;
                item.payload += candidate.payload;
                return;
            }
            self.items[place].closed = true;
        }
        self.items.push(Item {
            opaque: flow.is_none() && !is_icmp(packet),
            flow,
            closed: candidate.is_none_or(|candidate| candidate.push),
            push: candidate.is_some_and(|candidate| candidate.push),
            candidate,
            count: 1,
            payload,
            first: number,
            last: number,
        });
    }

    /// The last write that has packets of the flow. Behind a packet that may be of any flow none is looked for.
    fn find(&self, flow: &Flow) -> Option<usize> {
        let places = (0..self.items.len()).rev().take(WINDOW);
        places
            .into_iter()
            .take_while(|place| !self.items[*place].opaque)
            .find(|place| self.items[*place].flow.as_ref() == Some(flow))
    }

    /// Whether the packet is the next of the item.
    fn follows(&self, buffer: &[u8], place: usize, packet: &[u8], candidate: &Candidate) -> bool {
        let item = &self.items[place];
        let Some(first) = &item.candidate else {
            return false;
        };
        let first_packet = &buffer[self.parts[item.first].range.clone()];
        !item.closed
            && item.count < MOST
            && candidate.headers == first.headers
            && candidate.payload <= first.payload
            && first.headers + item.payload + candidate.payload <= LARGEST
            && (candidate.kind == Kind::Udp
                || candidate.sequence == first.sequence.wrapping_add(item.payload as u32))
            && same_headers(first_packet, packet, first)
    }

    /// The writes, in order.
    pub(super) fn writes<'a>(&'a self, buffer: &'a [u8]) -> impl Iterator<Item = Write<'a>> {
        self.items.iter().map(move |item| Write::new(self, item, buffer))
    }

    /// How many packets there are.
    pub(super) fn len(&self) -> usize {
        self.parts.len()
    }

    /// Forgets all packets.
    pub(super) fn clear(&mut self) {
        self.items.clear();
        self.parts.clear();
    }
}

impl<'a> Write<'a> {
    fn new(merger: &'a Merger, item: &'a Item, buffer: &'a [u8]) -> Self {
        let mut write = Self {
            count: item.count,
            kind: Kind::Single,
            virtio: Virtio::SINGLE.bytes(),
            headers: [0; HEADERS],
            headers_len: 0,
            merger,
            item,
            buffer,
        };
        if let Some(candidate) = &item.candidate
            && item.count > 1
        {
            write.kind = candidate.kind;
            write.build(candidate);
        }
        write
    }

    /// The headers of all packets together: lengths and the checksum's pseudo header are those of the whole.
    fn build(&mut self, candidate: &Candidate) {
        let first = self.merger.parts[self.item.first].range.start;
        let Candidate {
            transport, headers, ..
        } = *candidate;
        self.headers_len = headers;
        let out = &mut self.headers[..headers];
        out.copy_from_slice(&self.buffer[first..first + headers]);
        let total = headers + self.item.payload;
        let v6 = out[0] >> 4 == 6;
        if v6 {
            out[4..6].copy_from_slice(&((total - 40) as u16).to_be_bytes());
        } else {
            out[2..4].copy_from_slice(&(total as u16).to_be_bytes());
            out[10..12].fill(0);
            let sum = checksum::finish(checksum::add(0, &out[..transport]));
            out[10..12].copy_from_slice(&sum);
        }
        let (protocol, offset) = match candidate.kind {
            Kind::Udp => (UDP, 6),
            _ => (TCP, 16),
        };
        let sum = checksum::pseudo_header(out, protocol, total - transport);
        if candidate.kind == Kind::Udp {
            out[transport + 4..transport + 6].copy_from_slice(&((total - transport) as u16).to_be_bytes());
        } else if self.item.push {
            out[transport + 13] |= PSH;
        }
        out[transport + offset..transport + offset + 2].copy_from_slice(&checksum::fold(sum));
        self.virtio = Virtio {
            kind: candidate.kind,
            v6: Some(v6),
            needs_checksum: true,
            header_len: headers as u16,
            segment: candidate.payload as u16,
            checksum_start: transport as u16,
            checksum_offset: offset as u16,
        }
        .bytes();
    }

    /// The packets, each as it came.
    pub(super) fn packets(&self) -> impl Iterator<Item = &'a [u8]> {
        let mut next = self.item.first;
        let (parts, buffer) = (&self.merger.parts, self.buffer);
        std::iter::from_fn(move || {
            let part = parts.get(next)?;
            next = part.next;
            Some(&buffer[part.range.clone()])
        })
    }

    /// Hands the bytes to `write`, with the virtio header in front.
    pub(super) fn slices<T>(&self, write: impl FnOnce(&[IoSlice<'_>]) -> T) -> T {
        let mut slices = [IoSlice::new(&[]); MOST + 2];
        slices[0] = IoSlice::new(&self.virtio);
        let mut used = 1;
        if self.headers_len > 0 {
            slices[1] = IoSlice::new(&self.headers[..self.headers_len]);
            used = 2;
        }
        for packet in self.packets() {
            slices[used] = IoSlice::new(&packet[self.headers_len..]);
            used += 1;
        }
        write(&slices[..used])
    }
}

/// The flow of a packet, and whether it can be put together with others.
fn classify(packet: &[u8], merging: Merging) -> (Option<Flow>, Option<Candidate>) {
    let (v6, transport, protocol) = match packet.first().map(|byte| byte >> 4) {
        // No options; not a fragment.
        Some(4) if packet.len() >= 28 && packet[0] & 15 == 5 && packet[6] & 0x3f == 0 && packet[7] == 0 => {
            (false, 20, packet[9])
        }
        Some(6) if packet.len() >= 48 => (true, 40, packet[6]),
        _ => return (None, None),
    };
    let length = match v6 {
        true => 40 + usize::from(u16::from_be_bytes([packet[4], packet[5]])),
        false => usize::from(u16::from_be_bytes([packet[2], packet[3]])),
    };
    if !matches!(protocol, TCP | UDP) || length != packet.len() {
        return (None, None);
    }
    let mut addresses = [0; 32];
    if v6 {
        addresses.copy_from_slice(&packet[8..40]);
    } else {
        addresses[..8].copy_from_slice(&packet[12..20]);
    }
    let mut ports = [0; 4];
    ports.copy_from_slice(&packet[transport..transport + 4]);
    let flow = Flow {
        v6,
        protocol,
        ports,
        addresses,
    };
    let candidate = match protocol {
        TCP if merging.tcp => tcp(packet, transport),
        UDP if merging.udp => udp(packet, transport),
        _ => None,
    };
    (Some(flow), candidate)
}

/// Whether no flow of TCP or UDP can be hidden in the packet.
fn is_icmp(packet: &[u8]) -> bool {
    match packet.first().map(|byte| byte >> 4) {
        Some(4) => packet.get(9) == Some(&1),
        Some(6) => packet.get(6) == Some(&58),
        _ => false,
    }
}

fn tcp(packet: &[u8], transport: usize) -> Option<Candidate> {
    if packet.len() < transport + 20 {
        return None;
    }
    let headers = transport + usize::from(packet[transport + 12] >> 4) * 4;
    // Nothing but data: no SYN, FIN, RST, URG, and no signs of congestion.
    let flags = packet[transport + 13] & !PSH;
    if flags != ACK || headers < transport + 20 || packet.len() <= headers || !sound(packet, transport, TCP) {
        return None;
    }
    let sequence = &packet[transport + 4..transport + 8];
    Some(Candidate {
        kind: Kind::Tcp,
        transport,
        headers,
        payload: packet.len() - headers,
        sequence: u32::from_be_bytes([sequence[0], sequence[1], sequence[2], sequence[3]]),
        push: packet[transport + 13] & PSH != 0,
    })
}

fn udp(packet: &[u8], transport: usize) -> Option<Candidate> {
    let at = |offset: usize| u16::from_be_bytes([packet[transport + offset], packet[transport + offset + 1]]);
    let headers = transport + 8;
    // A checksum of zero is none, which cutting would change.
    if usize::from(at(4)) != packet.len() - transport
        || packet.len() <= headers
        || at(6) == 0
        || !sound(packet, transport, UDP)
    {
        return None;
    }
    Some(Candidate {
        kind: Kind::Udp,
        transport,
        headers,
        payload: packet.len() - headers,
        sequence: 0,
        push: false,
    })
}

/// Whether the checksums are right: of the IPv4 header and of the transport.
fn sound(packet: &[u8], transport: usize, protocol: u8) -> bool {
    if packet[0] >> 4 == 4 && checksum::finish(checksum::add(0, &packet[..transport])) != [0, 0] {
        return false;
    }
    let sum = checksum::pseudo_header(packet, protocol, packet.len() - transport);
    checksum::finish(checksum::add(sum, &packet[transport..])) == [0, 0]
}

/// Whether all is equal that cutting copies from the first packet to the others. Both are of the same flow and have as
/// many bytes of headers.
fn same_headers(first: &[u8], packet: &[u8], candidate: &Candidate) -> bool {
    let same = |range: Range<usize>| first[range.clone()] == packet[range];
    let network = if first[0] >> 4 == 4 {
        // Service class, flags, lifetime. The identification is counted anew.
        same(1..2) && same(6..9)
    } else {
        same(0..4) && same(6..8)
    };
    let at = candidate.transport;
    let transport = match candidate.kind {
        // Acknowledgment, length of the header, window, urgent pointer, options.
        Kind::Tcp => same(at + 8..at + 13) && same(at + 14..at + 16) && same(at + 18..candidate.headers),
        _ => true,
    };
    network && transport
}

#[cfg(test)]
#[path = "merge_tests.rs"]
mod tests;
