//! Where a program keeps what it knows of its packet. The stack has 512 bytes; this lies in a per-CPU map, and it
//! also makes the verifier forget which way a value came by, so that it does not follow each one apart.

use warren_abi::{
    DropReason, Event, FlowKey, FlowValue, FragmentKey, FragmentValue, Hook, RepeatKey, SettingsValue,
};

use crate::{
    Address, Ip, Meta, Transport, Tuple,
    flows::{Entry, Way},
    policy::Answer,
    quote::Quoted,
};

/// In [`Asked::endpoint`]: nobody's policy was asked.
pub(crate) const NOBODY: u16 = 0xffff;
/// In [`Asked::direction`]: policy was not asked.
pub(crate) const NOT_ASKED: u8 = 2;

/// What policy was asked last, and what it said: for events.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Asked {
    /// Its endpoint.
    pub(crate) endpoint: u16,
    /// Direction that was asked for.
    pub(crate) direction: u8,
    /// The packet leaves the endpoint.
    pub(crate) outbound: bool,
    /// Identity of the endpoint.
    pub(crate) own: u32,
    /// Identity of the peer.
    pub(crate) peer: u32,
    /// The rule that decided.
    pub(crate) rule: u32,
    /// Where the peer's packets come from: what a flow keeps as its peer's mark.
    pub(crate) from: u32,
    /// What policy is asked with.
    pub(crate) port: u16,
    /// Bits of the key that the peer's address has.
    pub(crate) address: [u8; 16],
}

/// What holds while a program runs.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Now {
    /// Nanoseconds.
    pub(crate) nanoseconds: u64,
    /// Seconds.
    pub(crate) seconds: u32,
    /// The program.
    pub(crate) hook: u8,
    /// The sender's egress was judged already.
    pub(crate) judged: bool,
    /// Where the packet comes from: 0 = made on this host; [`PEER_FORWARDED`](warren_abi::PEER_FORWARDED) = by a
    /// device, without a mark; the tunnel mark; the mark (not judged) of a local endpoint.
    pub(crate) from: u32,
    pub(crate) ifindex: u32,
    pub(crate) ingress_ifindex: u32,
    pub(crate) length: u32,
    pub(crate) tunnel_mark: u32,
    pub(crate) mark_mask: u32,
}

/// A program's memory beside its stack.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Scratch {
    pub(crate) now: Now,
    /// The IP header, once it was read.
    pub(crate) ip: Ip,
    pub(crate) tuple: Tuple,
    /// Where the transport header is, once the tuple is known.
    pub(crate) transport: Transport,
    pub(crate) quoted: Quoted,
    /// What is planned.
    pub(crate) ways: [Way; 2],
    /// What is done.
    pub(crate) way: Way,
    pub(crate) asked: Asked,
    pub(crate) answer: Answer,
    /// The first of the ways judged the packet.
    pub(crate) judged: bool,
    pub(crate) entry: Entry,
    /// The revision of policy that is asked.
    pub(crate) revision: u32,
    pub(crate) key: FlowKey,
    pub(crate) value: FlowValue,
    pub(crate) fragment: FragmentKey,
    pub(crate) ports: FragmentValue,
    pub(crate) repeat: RepeatKey,
    pub(crate) event: Event,
}

impl Scratch {
    /// Forgets the packet before.
    #[inline(always)]
    pub(crate) fn begin(&mut self, hook: Hook, meta: &Meta, length: usize, nanoseconds: u64) {
        self.now.nanoseconds = nanoseconds;
        self.now.seconds = (nanoseconds / 1_000_000_000) as u32;
        self.now.hook = hook as u8;
        self.now.judged = false;
        self.now.from = 0;
        self.now.ifindex = meta.ifindex;
        self.now.ingress_ifindex = meta.ingress_ifindex;
        self.now.length = length as u32;
        self.now.tunnel_mark = 0;
        self.tuple = Tuple::default();
        self.quoted.known = false;
        self.ways = [Way::default(); 2];
        self.asked.endpoint = NOBODY;
        self.asked.direction = NOT_ASKED;
        self.asked.outbound = false;
        self.asked.own = 0;
        self.asked.peer = 0;
        self.asked.rule = 0;
    }

    /// Reads the mark.
    #[inline(always)]
    pub(crate) fn provenance(&mut self, settings: &SettingsValue, meta: &Meta) {
        let mark = meta.mark & settings.mark_mask;
        let tunnel = settings.tunnel_mark;
        self.now.tunnel_mark = tunnel;
        self.now.mark_mask = settings.mark_mask;
        self.now.judged = mark & tunnel != 0 && mark != tunnel;
        self.now.from = if mark == tunnel {
            tunnel
        } else if mark != 0 {
            mark & !tunnel
        } else if meta.ingress_ifindex != 0 {
            warren_abi::PEER_FORWARDED
        } else {
            0
        };
    }

    /// The packet comes from a local endpoint.
    #[inline(always)]
    pub(crate) fn is_from_endpoint(&self) -> bool {
        self.now.from != 0
            && self.now.from != warren_abi::PEER_FORWARDED
            && self.now.from != self.now.tunnel_mark
    }

    /// The peer's address in the key.
    #[inline(always)]
    pub(crate) fn remote(&self) -> Address {
        Address::of(self.key.family, &self.key.remote)
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            now: Now {
                nanoseconds: 0,
                seconds: 0,
                hook: 0,
                judged: false,
                from: 0,
                ifindex: 0,
                ingress_ifindex: 0,
                length: 0,
                tunnel_mark: 0,
                mark_mask: 0,
            },
            ip: Ip::default(),
            tuple: Tuple::default(),
            transport: Transport::default(),
            quoted: Quoted::default(),
            ways: [Way::default(); 2],
            way: Way::default(),
            asked: Asked {
                endpoint: NOBODY,
                direction: NOT_ASKED,
                outbound: false,
                own: 0,
                peer: 0,
                rule: 0,
                from: 0,
                port: 0,
                address: [0; 16],
            },
            answer: Answer::Denied(DropReason::NoPolicy),
            judged: false,
            entry: Entry::default(),
            revision: 0,
            key: FlowKey::default(),
            value: FlowValue::default(),
            fragment: FragmentKey::default(),
            ports: FragmentValue::default(),
            repeat: RepeatKey::default(),
            event: Event::default(),
        }
    }
}
