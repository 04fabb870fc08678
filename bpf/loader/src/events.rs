//! What the programs report, from their ring buffer.

use std::{
    fmt,
    net::IpAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    path::Path,
    time::Duration,
};

use aya::maps::{Map, MapData, MapError, RingBuf};
use warren_abi::{DropReason, Hook, names};

use crate::{
    Datapath, Error, PolicyDirection,
    maps::{Plain, address, map_error, read_plain},
};

pub use warren_abi::Outcome;

/// Something that the programs report. A report, not a promise: what is repeated within a second is told together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// When, since the start of the monotonic clock.
    pub time: Duration,
    /// What happened.
    pub outcome: Outcome,
    /// Name of the program.
    pub hook: &'static str,
    /// Why it was dropped, or would have been.
    pub reason: Option<&'static str>,
    /// Direction of the policy that was asked, where one was.
    pub direction: Option<PolicyDirection>,
    /// Index of the endpoint whose policy was asked, 0 = the host.
    pub endpoint: Option<u16>,
    /// Source; `None` where the packet could not be read that far.
    pub source: Option<IpAddr>,
    /// Destination.
    pub destination: Option<IpAddr>,
    /// Source port (ICMP: type).
    pub source_port: u16,
    /// Destination port (ICMP: code).
    pub destination_port: u16,
    /// IP protocol.
    pub protocol: u8,
    /// TCP flags.
    pub tcp_flags: u8,
    /// Identity of the source, 0 where not known.
    pub source_identity: u32,
    /// Identity of the destination, 0 where not known.
    pub destination_identity: u32,
    /// Rule that decided, 0 where none had to, or default deny.
    pub rule: u32,
    /// Device.
    pub ifindex: u32,
    /// Packets that it stands for, itself included.
    pub packets: u32,
    /// Bytes of this packet from its link-layer header on.
    pub length: u32,
}

/// No endpoint.
const NO_ENDPOINT: u16 = 0xffff;

/// Reads events. Of several readers each event reaches one. The descriptor is readable while there are any.
pub struct Events {
    ring: RingBuf<MapData>,
}

impl Events {
    pub(crate) fn open(maps: &Path) -> Result<Self, Error> {
        let open = || RingBuf::try_from(Map::RingBuf(MapData::from_pin(maps.join(names::EVENTS))?));
        let ring = open().map_err(|error: MapError| map_error(names::EVENTS, error))?;
        Ok(Self { ring })
    }

    /// The next event; `None` where there is none now. What this version does not know is skipped.
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator that ends is not over here"
    )]
    pub fn next(&mut self) -> Option<Event> {
        while let Some(bytes) = self.ring.next() {
            if let Some(event) =
                read_plain::<warren_abi::Event>(&bytes).and_then(|Plain(event)| parse(&event))
            {
                return Some(event);
            }
        }
        None
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

impl Datapath {
    /// A reader of events.
    pub fn events(&self) -> Result<Events, Error> {
        Events::open(&self.maps_dir)
    }

    /// Events that found no room, since the maps were made.
    pub fn events_lost(&self) -> Result<u64, Error> {
        self.maps.events_lost.total(0)
    }
}

fn parse(event: &warren_abi::Event) -> Option<Event> {
    let outcome = Outcome::parse(event.outcome)?;
    let of = |bytes| match event.family {
        4 | 6 => Some(address(bytes, event.family == 4)),
        _ => None,
    };
    let reason = DropReason::ALL.get(usize::from(event.reason))?;
    Some(Event {
        time: Duration::from_nanos(event.time),
        outcome,
        hook: Hook::ALL.get(usize::from(event.hook))?.name(),
        reason: (outcome != Outcome::Allowed).then(|| reason.name()),
        direction: PolicyDirection::parse(event.direction),
        endpoint: (event.endpoint != NO_ENDPOINT).then_some(event.endpoint),
        source: of(event.source),
        destination: of(event.destination),
        source_port: event.source_port,
        destination_port: event.destination_port,
        protocol: event.protocol,
        tcp_flags: event.tcp_flags,
        source_identity: event.source_identity,
        destination_identity: event.destination_identity,
        rule: event.rule,
        ifindex: event.ifindex,
        packets: event.packets,
        length: event.length,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event() -> warren_abi::Event {
        warren_abi::Event {
            source: [10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            family: 4,
            outcome: Outcome::Dropped as u8,
            reason: DropReason::Policy as u8,
            hook: Hook::ToPod as u8,
            endpoint: 0xffff,
            direction: 2,
            ..warren_abi::Event::default()
        }
    }

    #[test]
    fn what_events_say() {
        let parsed = parse(&event()).unwrap();
        assert_eq!(parsed.source, Some("10.0.0.1".parse().unwrap()));
        assert_eq!((parsed.hook, parsed.reason), ("to_pod", Some("policy")));
        assert_eq!((parsed.endpoint, parsed.direction), (None, None));
        let unread = warren_abi::Event { family: 0, ..event() };
        assert_eq!(parse(&unread).unwrap().source, None);
        let allowed = warren_abi::Event {
            outcome: Outcome::Allowed as u8,
            ..event()
        };
        assert_eq!(parse(&allowed).unwrap().reason, None);
    }

    #[test]
    fn what_no_version_of_ours_says() {
        for change in [
            |event: &mut warren_abi::Event| event.outcome = 9,
            |event: &mut warren_abi::Event| event.reason = 255,
            |event: &mut warren_abi::Event| event.hook = 255,
        ] {
            let mut event = event();
            change(&mut event);
            assert_eq!(parse(&event), None);
        }
    }
}
