//! What policy and connection tracking see of a packet: its ends, and what it does to a connection.

use warren_abi::{DropReason, FragmentValue};

use crate::{
    Fragment, Ip, Maps, Packet, Scratch, Transport, neighbour, quote,
    transport::{ICMP, ICMPV6, SCTP, TCP, UDP},
};

/// What a packet does to the connection that it belongs to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// Nothing that opens one, and an answer at that: it never does.
    #[default]
    Answer,
    /// Opens one, and only that: TCP SYN, SCTP INIT.
    Open,
    /// Any packet of a protocol that does not say.
    Any,
    /// Goes on with one.
    Continue,
    /// Ends one direction: TCP FIN.
    Finish,
    /// Ends it.
    Reset,
}

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;

/// Chunks of SCTP (RFC 9260).
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const ABORT: u8 = 6;
const COOKIE_ACK: u8 = 11;
const SHUTDOWN_COMPLETE: u8 = 14;

/// A first fragment is remembered this long, in seconds: the stack waits as long for the others.
const FRAGMENT_LIFETIME: u32 = 60;

/// The ends of a packet.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Tuple {
    /// Source address, IPv4 in the first four bytes.
    pub source: [u8; 16],
    /// Destination address.
    pub destination: [u8; 16],
    /// Source port; identifier of an echo request. Network byte order.
    pub source_port: [u8; 2],
    /// Destination port; identifier of an echo reply. Network byte order.
    pub destination_port: [u8; 2],
    /// What policy is asked with: destination port, ICMP type, or 0. Host byte order.
    pub port: u16,
    /// Type and code of ICMP.
    pub icmp: [u8; 2],
    /// IP protocol.
    pub protocol: u8,
    /// 4 or 6.
    pub family: u8,
    /// Flags of TCP.
    pub tcp_flags: u8,
    /// What it does.
    pub step: Step,
    /// It is an ICMP error, which quotes a packet.
    pub error: bool,
    /// The ports were read.
    pub known: bool,
    /// It is neighbour or listener discovery, which policy does not judge.
    pub discovery: bool,
}

/// Reads the transport header, its ports, flags and types, once per packet. Later fragments get what the first said; one
/// that is not known, or would overwrite the transport header that was judged, is an error.
///
/// A function of its own in the kernel too, as its callers and it do not fit onto the stack in one.
#[inline(never)]
pub(crate) fn read<P: Packet, M: Maps>(
    packet: &P,
    maps: &M,
    scratch: &mut Scratch,
) -> Result<(), DropReason> {
    if scratch.tuple.known {
        return Ok(());
    }
    let ip = &{ scratch.ip };
    let transport = Transport::parse(packet, ip)?;
    scratch.transport = transport;
    scratch.tuple.protocol = transport.protocol;
    match transport.fragment {
        Fragment::Later => later(maps, scratch, &transport)?,
        Fragment::Whole | Fragment::First => {
            let first = transport.fragment == Fragment::First;
            match whole(packet, scratch, ip, &transport) {
                Err(DropReason::Truncated) if first => return Err(DropReason::TinyFragment),
                other => other?,
            }
            if first {
                note_first(maps, scratch, &transport);
            } else {
                scratch.tuple.discovery = neighbour::is_discovery(packet, ip, &transport);
            }
        }
    }
    scratch.tuple.known = true;
    if scratch.tuple.error {
        quote::read(packet, scratch, ip, &transport);
    }
    Ok(())
}

#[inline(always)]
fn whole<P: Packet>(
    packet: &P,
    scratch: &mut Scratch,
    ip: &Ip,
    transport: &Transport,
) -> Result<(), DropReason> {
    let at = transport.offset;
    let tuple = &mut scratch.tuple;
    match transport.protocol {
        TCP => {
            let h = ip.load::<20, _>(packet, at)?;
            if h[12] >> 4 < 5 {
                return Err(DropReason::Malformed);
            }
            ports(tuple, [h[0], h[1], h[2], h[3]]);
            tuple.tcp_flags = h[13];
            tuple.step = tcp_step(h[13]);
        }
        UDP => {
            let h = ip.load::<8, _>(packet, at)?;
            ports(tuple, [h[0], h[1], h[2], h[3]]);
            tuple.step = Step::Any;
        }
        SCTP => {
            let h = ip.load::<12, _>(packet, at)?;
            ports(tuple, [h[0], h[1], h[2], h[3]]);
            // A packet without a chunk says nothing, and opens nothing.
            tuple.step = match ip.load::<1, _>(packet, at + 12) {
                Ok([chunk]) => sctp_step(chunk),
                Err(_) => Step::Answer,
            };
        }
        ICMP | ICMPV6 => {
            let h = ip.load::<8, _>(packet, at)?;
            tuple.icmp = [h[0], h[1]];
            tuple.port = u16::from(h[0]);
            icmp(tuple, transport.protocol, h[0], [h[4], h[5]]);
        }
        _ => tuple.step = Step::Any,
    }
    Ok(())
}

#[inline(always)]
fn ports(tuple: &mut Tuple, p: [u8; 4]) {
    tuple.source_port = [p[0], p[1]];
    tuple.destination_port = [p[2], p[3]];
    tuple.port = u16::from_be_bytes([p[2], p[3]]);
}

/// What the flags mean. SYN with FIN opens nothing: no stack takes it.
#[inline(always)]
const fn tcp_step(flags: u8) -> Step {
    if flags & RST != 0 {
        Step::Reset
    } else if flags & (SYN | ACK) == SYN | ACK {
        Step::Answer
    } else if flags & (SYN | FIN) == SYN {
        Step::Open
    } else if flags & FIN != 0 {
        Step::Finish
    } else {
        Step::Continue
    }
}

#[inline(always)]
const fn sctp_step(chunk: u8) -> Step {
    match chunk {
        INIT => Step::Open,
        INIT_ACK | COOKIE_ACK => Step::Answer,
        ABORT | SHUTDOWN_COMPLETE => Step::Reset,
        _ => Step::Continue,
    }
}

/// Echoes are a flow: who asks has the identifier as its port. Other messages stand alone.
#[inline(always)]
fn icmp(tuple: &mut Tuple, protocol: u8, kind: u8, id: [u8; 2]) {
    let v6 = protocol == ICMPV6;
    if kind == if v6 { ECHO_REQUEST_V6 } else { ECHO_REQUEST } {
        tuple.source_port = id;
        tuple.step = Step::Any;
    } else if kind == if v6 { ECHO_REPLY_V6 } else { ECHO_REPLY } {
        tuple.destination_port = id;
        tuple.step = Step::Answer;
    } else {
        tuple.step = Step::Answer;
        // Unreachable, time exceeded, parameter problem; for IPv6 too big (RFC 792, 4443). Redirects are none: they
        // change routes.
        tuple.error = if v6 {
            matches!(kind, 1..=4)
        } else {
            matches!(kind, 3 | 11 | 12)
        };
    }
}

#[inline(always)]
fn fragment_key(scratch: &mut Scratch, transport: &Transport) {
    let key = &mut scratch.fragment;
    key.source = scratch.tuple.source;
    key.destination = scratch.tuple.destination;
    key.id = transport.fragment_id;
    key.ifindex = scratch.now.ifindex;
    key.protocol = transport.fragment_protocol;
    key.family = scratch.tuple.family;
    key.padding = [0; 2];
}

/// Notes what a first fragment says, for those that follow.
#[inline(always)]
fn note_first<M: Maps>(maps: &M, scratch: &mut Scratch, transport: &Transport) {
    fragment_key(scratch, transport);
    scratch.ports = FragmentValue {
        source_port: scratch.tuple.source_port,
        destination_port: scratch.tuple.destination_port,
        seen: scratch.now.seconds,
        port: scratch.tuple.port,
        protocol: scratch.tuple.protocol,
        padding: 0,
    };
    maps.insert_fragment(&scratch.fragment, &scratch.ports);
}

/// Ports of a later fragment. It goes on with a flow, and opens none that is not there.
#[inline(always)]
fn later<M: Maps>(maps: &M, scratch: &mut Scratch, transport: &Transport) -> Result<(), DropReason> {
    fragment_key(scratch, transport);
    let ports = maps
        .fragment(&scratch.fragment)
        .ok_or(DropReason::UnknownFragment)?;
    if scratch.now.seconds.saturating_sub(ports.seen) > FRAGMENT_LIFETIME {
        return Err(DropReason::UnknownFragment);
    }
    let header = match ports.protocol {
        TCP => 20,
        SCTP => 12,
        UDP | ICMP | ICMPV6 => 8,
        _ => 0,
    };
    if transport.fragment_offset * 8 < header {
        return Err(DropReason::OverlappingFragment);
    }
    let tuple = &mut scratch.tuple;
    tuple.source_port = ports.source_port;
    tuple.destination_port = ports.destination_port;
    tuple.port = ports.port;
    tuple.protocol = ports.protocol;
    if matches!(ports.protocol, ICMP | ICMPV6) {
        tuple.icmp = [ports.port as u8, 0];
    }
    tuple.step = match ports.protocol {
        TCP | SCTP => Step::Continue,
        _ => Step::Answer,
    };
    Ok(())
}
