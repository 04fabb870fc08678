//! The state of a flow, as a function of what was known and of a packet.
//!
//! ```text
//!            opens             packet the other way            FIN            FIN the other way
//!   (none) --------> new  -------------------------> replied ------> closing -----------------> closed
//!                     |                                 |               |                          |
//!                     '------------- RST ---------------+---------------+--> reset -- any other --> as before
//! ```
//!
//! A state is a set of flags and how long it lasts without a packet. What opens a connection, comes against a flow's
//! direction or to one that is closing, and is denied, changes nothing.

use warren_abi::{
    FLOW_EGRESS, FLOW_FIN_LOCAL, FLOW_FIN_REMOTE, FLOW_JUDGED, FLOW_REPLY, FLOW_RESET, FlowValue,
};

use crate::{
    Step,
    transport::{ICMP, ICMPV6, SCTP, TCP, UDP},
};

/// Seconds without a packet. TCP: a SYN is repeated after 64 s at most; a connection in use has keepalives every two
/// hours or none; the last ACKs come within a minute.
mod seconds {
    pub(super) const TCP_NEW: u32 = 120;
    pub(super) const TCP_REPLIED: u32 = 6 * 3600;
    pub(super) const TCP_CLOSING: u32 = 600;
    pub(super) const TCP_CLOSED: u32 = 60;
    pub(super) const RESET: u32 = 10;
    pub(super) const UDP_NEW: u32 = 30;
    pub(super) const UDP_REPLIED: u32 = 180;
    pub(super) const ECHO: u32 = 30;
    pub(super) const SCTP_NEW: u32 = 120;
    pub(super) const SCTP_REPLIED: u32 = 3600;
    pub(super) const OTHER_NEW: u32 = 60;
    pub(super) const OTHER_REPLIED: u32 = 600;
}

const FINISHED: u8 = FLOW_FIN_LOCAL | FLOW_FIN_REMOTE;

/// What an entry means for a packet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Standing {
    /// Nothing, or as much as nothing: it is over, or the packet opens another flow, or is somebody else's.
    #[default]
    Fresh,
    /// It waits for this judgement: the packet goes the way of a flow that is not judged.
    Waiting,
    /// The packet answers a flow that is not judged on this tuple.
    Untranslated,
    /// The packet belongs to a flow that was judged under this policy.
    Current,
    /// The packet belongs to a flow that was judged under another policy.
    Stale,
}

/// How a packet relates to the endpoint that a flow belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Look {
    /// It leaves the endpoint.
    pub(crate) outbound: bool,
    pub(crate) step: Step,
    /// Where it comes from, as [`FlowValue::peer_mark`]; `None` where that cannot be told.
    pub(crate) from: Option<u32>,
    pub(crate) now: u32,
    pub(crate) revision: u32,
}

/// What an entry means for a packet.
#[inline(always)]
pub(crate) fn standing(value: &FlowValue, look: &Look) -> Standing {
    if is_over(value, look.now) {
        return Standing::Fresh;
    }
    let forward = is_forward(value.flags, look.outbound);
    let closing = value.flags & (FINISHED | FLOW_RESET) != 0;
    if matches!(look.step, Step::Open) && (!forward || closing) {
        return Standing::Fresh;
    }
    // A masqueraded address may be another sender's next time.
    let stranger = matches!(look.from, Some(from) if from != value.peer_mark);
    if forward && !look.outbound && stranger {
        return Standing::Fresh;
    }
    match (value.flags & FLOW_JUDGED != 0, forward) {
        (false, true) => Standing::Waiting,
        (false, false) => Standing::Untranslated,
        (true, _) if value.revision == look.revision => Standing::Current,
        (true, _) => Standing::Stale,
    }
}

/// No packet for too long.
#[inline(always)]
pub(crate) fn is_over(value: &FlowValue, now: u32) -> bool {
    now.saturating_sub(value.last_seen) > value.lifetime
}

/// The packet goes the way of the one that opened the flow.
#[inline(always)]
pub(crate) const fn is_forward(flags: u8, outbound: bool) -> bool {
    (flags & FLOW_EGRESS != 0) == outbound
}

/// Flags after a packet.
#[inline(always)]
pub(crate) const fn advance(flags: u8, step: Step, outbound: bool) -> u8 {
    let reset = matches!(step, Step::Reset);
    let mut next = flags & !FLOW_RESET;
    if reset {
        next |= FLOW_RESET;
    } else if !is_forward(flags, outbound) {
        next |= FLOW_REPLY;
    }
    if matches!(step, Step::Finish) {
        next |= if outbound { FLOW_FIN_LOCAL } else { FLOW_FIN_REMOTE };
    }
    next
}

/// Seconds that a state lasts without a packet.
#[inline(always)]
pub(crate) const fn lifetime(protocol: u8, flags: u8) -> u32 {
    let replied = flags & FLOW_REPLY != 0;
    if flags & FLOW_RESET != 0 {
        return seconds::RESET;
    }
    match protocol {
        TCP if flags & FINISHED == FINISHED => seconds::TCP_CLOSED,
        TCP if flags & FINISHED != 0 && replied => seconds::TCP_CLOSING,
        TCP if replied => seconds::TCP_REPLIED,
        TCP => seconds::TCP_NEW,
        UDP if replied => seconds::UDP_REPLIED,
        UDP => seconds::UDP_NEW,
        SCTP if replied => seconds::SCTP_REPLIED,
        SCTP => seconds::SCTP_NEW,
        ICMP | ICMPV6 => seconds::ECHO,
        _ if replied => seconds::OTHER_REPLIED,
        _ => seconds::OTHER_NEW,
    }
}
