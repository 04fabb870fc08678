//! The packet that an ICMP error quotes.

use crate::{
    Ip, Packet, Scratch, Transport,
    transport::{ICMP, ICMPV6, SCTP, TCP, UDP},
};

/// Bytes of an ICMP error before the quoted packet.
const ERROR_HEADER: usize = 8;

/// The ends of a quoted packet.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Quoted {
    source: [u8; 16],
    destination: [u8; 16],
    source_port: [u8; 2],
    destination_port: [u8; 2],
    protocol: u8,
    /// It could be read.
    pub(crate) known: bool,
}

/// Reads what an ICMP error quotes; what cannot be read is not known.
///
/// A quote is often cut off, so its length says nothing. Extension headers in it are not looked through, and later
/// fragments have no ports.
#[inline(always)]
pub(crate) fn read<P: Packet>(packet: &P, scratch: &mut Scratch, ip: &Ip, transport: &Transport) {
    let start = transport.offset + ERROR_HEADER;
    let quoted = &mut scratch.quoted;
    let header = if scratch.tuple.family == 4 {
        header_v4(packet, quoted, ip, start)
    } else {
        header_v6(packet, quoted, ip, start)
    };
    if let Some(offset) = header {
        let offset = packet.forget(offset);
        quoted.known = ports(packet, quoted, ip, offset);
    }
}

/// Addresses and protocol; where the transport header starts.
#[inline(always)]
fn header_v4<P: Packet>(packet: &P, quoted: &mut Quoted, ip: &Ip, start: usize) -> Option<usize> {
    let h = ip.load::<20, _>(packet, start).ok()?;
    let length = usize::from(h[0] & 0xf) * 4;
    if h[0] >> 4 != 4 || length < 20 || u16::from_be_bytes([h[6], h[7]]) & 0x1fff != 0 {
        return None;
    }
    quoted.protocol = h[9];
    quoted.source = [h[12], h[13], h[14], h[15], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    quoted.destination = [h[16], h[17], h[18], h[19], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    Some(start + length)
}

#[inline(always)]
fn header_v6<P: Packet>(packet: &P, quoted: &mut Quoted, ip: &Ip, start: usize) -> Option<usize> {
    let h = ip.load::<8, _>(packet, start).ok()?;
    if h[0] >> 4 != 6 {
        return None;
    }
    quoted.protocol = h[6];
    quoted.source = ip.load::<16, _>(packet, start + 8).ok()?;
    quoted.destination = ip.load::<16, _>(packet, start + 24).ok()?;
    Some(start + 40)
}

/// Ports, and identifiers of echoes as in [`Tuple`](crate::Tuple).
#[inline(always)]
fn ports<P: Packet>(packet: &P, quoted: &mut Quoted, ip: &Ip, offset: usize) -> bool {
    quoted.source_port = [0; 2];
    quoted.destination_port = [0; 2];
    match quoted.protocol {
        TCP | UDP | SCTP => match ip.load::<4, _>(packet, offset) {
            Ok(p) => {
                quoted.source_port = [p[0], p[1]];
                quoted.destination_port = [p[2], p[3]];
            }
            Err(_) => return false,
        },
        ICMP | ICMPV6 => match ip.load::<8, _>(packet, offset) {
            Ok([8 | 128, _, _, _, a, b, _, _]) => quoted.source_port = [a, b],
            Ok([0 | 129, _, _, _, a, b, _, _]) => quoted.destination_port = [a, b],
            Ok(_) | Err(_) => return false,
        },
        _ => {}
    }
    true
}

/// Makes `scratch.key` that of the quoted packet, as the endpoint of `scratch.way` sees it. `false` where there is none,
/// or where it contradicts the error: an error goes to who sent the packet.
#[inline(always)]
pub(crate) fn key(scratch: &mut Scratch) -> bool {
    let (quoted, key, way) = (&scratch.quoted, &mut scratch.key, &scratch.way);
    if !quoted.known || quoted.source != scratch.tuple.destination {
        return false;
    }
    key.endpoint = way.endpoint;
    key.protocol = quoted.protocol;
    key.family = scratch.tuple.family;
    // The quoted packet went the other way.
    if way.outbound {
        key.local = quoted.destination;
        key.local_port = quoted.destination_port;
        key.remote = quoted.source;
        key.remote_port = quoted.source_port;
    } else {
        key.local = quoted.source;
        key.local_port = quoted.source_port;
        key.remote = quoted.destination;
        key.remote_port = quoted.destination_port;
    }
    true
}
