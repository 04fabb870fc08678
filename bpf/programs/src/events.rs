//! Events: what happened to a packet, told at most once a second for the same ends and outcome.

use warren_abi::{DropReason, EGRESS, Outcome, RepeatValue};

use crate::{
    Maps, Scratch,
    scratch::{NOBODY, NOT_ASKED},
    transport::{ICMP, ICMPV6},
};

/// How long the same events are told together, in nanoseconds.
const TOGETHER: u64 = 1_000_000_000;

/// Tells what happened to the packet: `reason` where it was dropped, or would have been.
///
/// A function of its own in the kernel too, as it is called from several places.
#[inline(never)]
pub(crate) fn report<M: Maps>(maps: &M, scratch: &mut Scratch, outcome: Outcome, reason: u8) {
    let port = u16::from_be_bytes(scratch.tuple.destination_port);
    let is_icmp = matches!(scratch.tuple.protocol, ICMP | ICMPV6);
    let key = &mut scratch.repeat;
    key.source = scratch.tuple.source;
    key.destination = scratch.tuple.destination;
    key.port = if is_icmp {
        u16::from_be_bytes(scratch.tuple.icmp)
    } else {
        port
    };
    key.protocol = scratch.tuple.protocol;
    key.hook = scratch.now.hook;
    key.outcome = outcome as u8;
    key.reason = reason;
    key.direction = scratch.asked.direction;
    key.family = scratch.tuple.family;
    let Some(packets) = due(maps, scratch) else { return };
    fill(scratch, packets, outcome, reason, is_icmp);
    maps.emit(&scratch.event);
}

/// How many packets the event stands for, itself included; `None` where it is only counted.
#[inline(always)]
fn due<M: Maps>(maps: &M, scratch: &Scratch) -> Option<u32> {
    let now = scratch.now.nanoseconds;
    match maps.repeat(&scratch.repeat) {
        Some(told) if now.saturating_sub(told.told.get()) < TOGETHER => {
            told.packets.set(told.packets.get().saturating_add(1));
            None
        }
        Some(told) => {
            let packets = told.packets.get().saturating_add(1);
            told.told.set(now);
            told.packets.set(0);
            Some(packets)
        }
        None => {
            let value = RepeatValue {
                told: now,
                ..RepeatValue::default()
            };
            maps.insert_repeat(&scratch.repeat, &value);
            Some(1)
        }
    }
}

#[inline(always)]
fn fill(scratch: &mut Scratch, packets: u32, outcome: Outcome, reason: u8, is_icmp: bool) {
    let (tuple, asked, event) = (&scratch.tuple, &scratch.asked, &mut scratch.event);
    event.time = scratch.now.nanoseconds;
    event.source = tuple.source;
    event.destination = tuple.destination;
    (event.source_identity, event.destination_identity) = if asked.outbound {
        (asked.own, asked.peer)
    } else {
        (asked.peer, asked.own)
    };
    event.rule = asked.rule;
    event.ifindex = scratch.now.ifindex;
    event.packets = packets;
    event.length = scratch.now.length;
    if is_icmp {
        event.source_port = u16::from(tuple.icmp[0]);
        event.destination_port = u16::from(tuple.icmp[1]);
    } else {
        event.source_port = u16::from_be_bytes(tuple.source_port);
        event.destination_port = u16::from_be_bytes(tuple.destination_port);
    }
    event.endpoint = asked.endpoint;
    event.protocol = tuple.protocol;
    event.family = tuple.family;
    event.hook = scratch.now.hook;
    event.outcome = outcome as u8;
    event.reason = reason;
    event.direction = asked.direction;
    event.tcp_flags = tuple.tcp_flags;
    event.padding = [0; 7];
}

/// Tells of a drop. Where policy was asked, but something else dropped the packet, it was not policy.
#[inline(always)]
pub(crate) fn report_drop<M: Maps>(maps: &M, scratch: &mut Scratch, reason: DropReason) {
    if !is_policys(reason) {
        scratch.asked.endpoint = NOBODY;
        scratch.asked.direction = NOT_ASKED;
        scratch.asked.own = 0;
        scratch.asked.peer = 0;
        scratch.asked.rule = 0;
    }
    report(maps, scratch, Outcome::Dropped, reason as u8);
}

#[inline(always)]
const fn is_policys(reason: DropReason) -> bool {
    matches!(
        reason,
        DropReason::Policy
            | DropReason::DefaultDeny
            | DropReason::NoPolicy
            | DropReason::FlowLimit
            | DropReason::FlowTable
    )
}

/// The direction's number.
#[inline(always)]
pub(crate) const fn direction(outbound: bool) -> u8 {
    if outbound { EGRESS } else { warren_abi::INGRESS }
}
