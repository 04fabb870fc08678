//! Routing loops: datagrams of this process that come back by a TUN device to be sealed once more, for ever.
//!
//! A tunnel in a tunnel is good use, also on one device. It is a loop when what is sent to an endpoint would, by way of
//! one or more tunnels, be sent to that endpoint again. Each turn makes the datagram larger, until it is sent in two
//! fragments, which both go on turning. So datagrams of our own that come back are looked at, and those that close a
//! circle are dropped. The routes are not known here: what counts is what came back within the last second.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::packet;

const UDP: u8 = 17;

/// How long it is remembered that a datagram came back.
const RECENT: Duration = Duration::from_secs(1);

/// Endpoints that are remembered, and tunnels in tunnels that are followed.
const MOST: usize = 1024;
const DEPTH: usize = 16;

/// The ports of this process's sockets, a bit each.
static PORTS: [AtomicU64; 1024] = [const { AtomicU64::new(0) }; 1024];

static RETURNS: Mutex<Option<Returns>> = Mutex::new(None);

/// Notes a port of ours as long as it lives.
#[derive(Debug)]
pub(super) struct OwnPort(u16);

impl OwnPort {
    pub(super) fn new(port: u16) -> Self {
        PORTS[usize::from(port / 64)].fetch_or(1 << (port % 64), Ordering::Relaxed);
        Self(port)
    }

    pub(super) fn number(&self) -> u16 {
        self.0
    }
}

impl Drop for OwnPort {
    fn drop(&mut self) {
        PORTS[usize::from(self.0 / 64)].fetch_and(!(1 << (self.0 % 64)), Ordering::Relaxed);
    }
}

/// Where a message goes.
type Place = (IpAddr, u16);

/// Where a packet goes that comes from a port of ours.
pub(super) fn own(packet: &[u8]) -> Option<Place> {
    let udp = match packet.first()? >> 4 {
        4 if packet.get(9) == Some(&UDP) && packet[6] & 0x1f == 0 && packet[7] == 0 => {
            usize::from(packet[0] & 15) * 4
        }
        6 if packet.get(6) == Some(&UDP) => 40,
        _ => return None,
    };
    let ports = packet.get(udp..udp + 4)?;
    let (from, to) = (
        u16::from_be_bytes([ports[0], ports[1]]),
        u16::from_be_bytes([ports[2], ports[3]]),
    );
    let ours = PORTS[usize::from(from / 64)].load(Ordering::Relaxed) & (1 << (from % 64)) != 0;
    Some((packet::destination(packet).filter(|_| ours)?, to))
}

/// A datagram of ours to `to` is about to be sealed for who is at `by`. Whether it would come back for ever.
pub(super) fn closes_a_circle(to: Place, by: Place, now: Instant) -> bool {
    let mut returns = RETURNS.lock().unwrap_or_else(PoisonError::into_inner);
    returns.get_or_insert_default().note(to, by, now)
}

/// By way of which endpoint a datagram to an endpoint was sent last, and when.
#[derive(Default)]
struct Returns(HashMap<Place, (Place, Instant)>);

impl Returns {
    fn note(&mut self, to: Place, by: Place, now: Instant) -> bool {
        if self.0.len() >= MOST {
            self.0.clear();
        }
        self.0.insert(to, (by, now));
        let mut at = by;
        for _ in 0..DEPTH {
            match self.0.get(&at) {
                _ if at == to => return true,
                Some((next, seen)) if now.saturating_duration_since(*seen) < RECENT => at = *next,
                _ => return false,
            }
        }
        // A circle behind this one, or deeper than anything of use.
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::testing::{self, Shape};

    fn place(n: u8) -> Place {
        ([192, 0, 2, n].into(), 51871)
    }

    #[test]
    fn circles_are_found_and_tunnels_in_tunnels_are_none() {
        let now = Instant::now();
        let mut returns = Returns::default();
        assert!(returns.note(place(1), place(1), now), "by way of itself");
        let mut returns = Returns::default();
        for n in 1..DEPTH as u8 {
            assert!(!returns.note(place(n), place(n + 1), now), "{n} in {}", n + 1);
        }
        assert!(!returns.note(place(100), place(200), now));
        assert!(returns.note(place(DEPTH as u8 - 1), place(3), now), "a circle");
        assert!(returns.note(place(101), place(3), now), "into the circle");
        let later = now + RECENT;
        assert!(
            !returns.note(place(3), place(4), later),
            "what was before is forgotten"
        );
        for n in 0..=2 * MOST as u32 {
            returns.note((IpAddr::V4(n.into()), 1), place(9), later);
        }
        assert!(returns.0.len() <= MOST);
    }

    #[test]
    fn only_datagrams_of_ours_are_looked_at() {
        let port = OwnPort::new(40_404);
        for v6 in [false, true] {
            let mut shape = Shape {
                v6,
                udp: true,
                ports: [port.number(), 7],
                ..Shape::default()
            };
            let packet = testing::packet(&shape, b"x");
            assert_eq!(own(&packet), packet::destination(&packet).map(|to| (to, 7)));
            for len in 0..packet.len() - 5 {
                assert_eq!(own(&packet[..len]), None, "{len}");
            }
            shape.ports = [7, port.number()];
            assert_eq!(own(&testing::packet(&shape, b"x")), None, "from another");
            (shape.ports, shape.udp) = ([port.number(), 7], false);
            assert_eq!(own(&testing::packet(&shape, b"x")), None, "TCP");
        }
        drop(port);
        let shape = Shape {
            udp: true,
            ports: [40_404, 7],
            ..Shape::default()
        };
        assert_eq!(own(&testing::packet(&shape, b"x")), None, "not any more");
    }
}
