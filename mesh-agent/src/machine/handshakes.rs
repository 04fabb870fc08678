//! How long ago handshakes were. Devices tell it by the wall clock, which may have jumped since: a handshake is as old as the
//! time since boot that has passed since it was first seen.

use std::{
    collections::HashMap,
    time::{Duration, SystemTime},
};

use warren_model::PublicKey;

/// What was seen of the peers of all slots.
#[derive(Debug, Default)]
pub(super) struct Handshakes(HashMap<(u8, PublicKey), Seen>);

#[derive(Debug, Clone, Copy)]
struct Seen {
    /// The device's word.
    last: Option<SystemTime>,
    /// What that meant when it was first seen, and when that was, since boot.
    age: Option<Duration>,
    since: Duration,
    /// When the device was looked at last.
    looked: Duration,
}

impl Handshakes {
    /// A look at the peers of a slot: (key, the device's word). Peers that are not among them are forgotten.
    pub(super) fn look(
        &mut self,
        slot: u8,
        peers: impl IntoIterator<Item = (PublicKey, Option<SystemTime>)>,
        wall: SystemTime,
        boot: Duration,
    ) {
        let mut seen = HashMap::new();
        for (key, last) in peers {
            let before = self.0.get(&(slot, key)).copied();
            let entry = match before.filter(|before| before.last == last) {
                Some(same) => Seen { looked: boot, ..same },
                None => Seen {
                    last,
                    age: first_age(before, last, wall, boot),
                    since: boot,
                    looked: boot,
                },
            };
            seen.insert((slot, key), entry);
        }
        self.0.retain(|(other, _), _| *other != slot);
        self.0.extend(seen);
    }

    /// How long ago a peer's last handshake was; `None`: there was none, or nobody knows when.
    pub(super) fn age(&self, slot: u8, key: PublicKey, boot: Duration) -> Option<Duration> {
        let seen = self.0.get(&(slot, key))?;
        Some(seen.age? + boot.saturating_sub(seen.since))
    }
}

fn first_age(
    before: Option<Seen>,
    last: Option<SystemTime>,
    wall: SystemTime,
    boot: Duration,
) -> Option<Duration> {
    let by_clock = wall.duration_since(last?).ok();
    match before {
        // It was between the two looks, whatever the clock says.
        Some(before) => {
            let passed = boot.saturating_sub(before.looked);
            Some(by_clock.map_or(passed, |age| age.min(passed)))
        }
        // One of the future was before the clock was set back: nobody knows how long.
        None => by_clock,
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    fn key() -> PublicKey {
        PublicKey::from_bytes([9; 32]).unwrap()
    }

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Looks at one peer: the device's word and both clocks, in seconds.
    fn look(all: &mut Handshakes, last: Option<u64>, wall: u64, boot: u64) -> Option<Duration> {
        let last = last.map(|last| UNIX_EPOCH + s(last));
        all.look(0, [(key(), last)], UNIX_EPOCH + s(wall), s(boot));
        all.age(0, key(), s(boot))
    }

    #[test]
    fn a_clock_that_jumps_changes_no_age() {
        const DECADE: u64 = 320_000_000;
        for jump in [1_000_000_u64, 1_000_000 + DECADE, 5, 1_000_000 - 3600] {
            let mut all = Handshakes::default();
            assert_eq!(look(&mut all, Some(999_990), 1_000_000, 50), Some(s(10)));
            // The clock jumps; the next handshake is told in its time.
            assert_eq!(look(&mut all, Some(999_990), jump, 60), Some(s(20)), "{jump}");
            assert_eq!(
                look(&mut all, Some(jump + 8), jump + 10, 70),
                Some(s(2)),
                "{jump}"
            );
            assert_eq!(
                look(&mut all, Some(jump + 8), 1_000_020, 80),
                Some(s(12)),
                "{jump}"
            );
            // Between a handshake and the look at it.
            assert!(look(&mut all, Some(1_000_025), jump, 90).unwrap() <= s(10));
        }
    }

    #[test]
    fn what_was_never_seen_before_is_believed_unless_it_is_of_the_future() {
        let mut all = Handshakes::default();
        assert_eq!(look(&mut all, Some(2000), 1000, 5), None);
        assert_eq!(look(&mut all, None, 1000, 6), None);
        // The first handshake of a peer that was there.
        assert_eq!(look(&mut all, Some(2000), 1000, 9), Some(s(3)));
        all.look(0, [], UNIX_EPOCH, s(10));
        assert_eq!(all.age(0, key(), s(10)), None);
    }
}
