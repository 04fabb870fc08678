//! The time that keyd signs with and judges by: it goes forward at the pace of the time since boot, whatever the wall clock does.
//!
//! The wall clock says where it begins, and may move it forward by as much as a machine may have been off or slow. It never
//! moves it back, and a leap of years is not believed: a certificate, a token or a directory must neither end early nor live
//! on because a clock is wrong. What was signed last is stored, so that a new process, or another machine, goes on from there.

/// No clock is right that says less: 2026-01-01, Unix milliseconds.
const LEAST: u64 = 1_767_225_600_000;
/// The farthest that the wall clock may move the time forward at once: five years.
const FARTHEST_MS: u64 = 5 * 365 * 86_400_000;

/// A clock of Unix milliseconds. `wall_ms` is the wall clock, `boot_ms` any clock that only goes forward, sleep included.
#[derive(Debug, Clone, Copy)]
pub struct Timeline {
    base_ms: u64,
    base_boot_ms: u64,
    /// What is stored is known.
    anchored: bool,
    /// The wall clock has not been set yet, and nothing was stored by one that was: any time that it says next is better.
    open: bool,
}

impl Timeline {
    /// Begins with the wall clock; what is stored comes with [`Self::anchor`].
    pub fn new(wall_ms: u64, boot_ms: u64) -> Self {
        Self {
            base_ms: wall_ms.max(LEAST),
            base_boot_ms: boot_ms,
            anchored: false,
            open: wall_ms < LEAST,
        }
    }

    /// The last time that was signed, by this process or another one.
    pub fn anchor(&mut self, signed_ms: u64, wall_ms: u64, boot_ms: u64) {
        if signed_ms >= LEAST {
            // The wall clock at the start may have been years ahead.
            if !self.anchored || signed_ms > self.at(boot_ms) {
                (self.base_ms, self.base_boot_ms) = (signed_ms, boot_ms);
            }
            self.open = false;
        }
        self.anchored = true;
        self.now(wall_ms, boot_ms);
    }

    /// The time.
    pub fn now(&mut self, wall_ms: u64, boot_ms: u64) -> u64 {
        let own = self.at(boot_ms);
        let believed = self.open || wall_ms.saturating_sub(own) <= FARTHEST_MS;
        if wall_ms > own && believed {
            (self.base_ms, self.base_boot_ms) = (wall_ms, boot_ms);
            self.open = false;
            return wall_ms;
        }
        own
    }

    fn at(&self, boot_ms: u64) -> u64 {
        self.base_ms
            .saturating_add(boot_ms.saturating_sub(self.base_boot_ms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = LEAST + 1_000_000_000;
    const HOUR: u64 = 3_600_000;
    const YEAR: u64 = 365 * 86_400_000;

    fn anchored() -> Timeline {
        let mut timeline = Timeline::new(NOW, 0);
        timeline.anchor(NOW - HOUR, NOW, 0);
        timeline
    }

    #[test]
    fn the_wall_clock_is_followed_forward_and_never_back() {
        let mut timeline = anchored();
        assert_eq!(timeline.now(NOW + 10, 10), NOW + 10);
        // Slow, set by NTP.
        assert_eq!(timeline.now(NOW + 500, 20), NOW + 500);
        // An hour back, a clock of 1970.
        assert_eq!(timeline.now(NOW - HOUR, 30), NOW + 510);
        assert_eq!(timeline.now(5, 1030), NOW + 1510);
        // Off for a week.
        assert_eq!(timeline.now(NOW + 168 * HOUR, 1030), NOW + 168 * HOUR);
    }

    #[test]
    fn ten_years_at_once_are_not_believed_at_run_time_nor_after_a_restart() {
        let mut timeline = anchored();
        assert_eq!(timeline.now(NOW + 10 * YEAR, 5), NOW + 5);
        assert_eq!(timeline.now(NOW + 10 * YEAR + 5, 10), NOW + 10);
        assert_eq!(timeline.now(NOW + 20, 15), NOW + 20);
        let mut restarted = Timeline::new(NOW + 10 * YEAR, 50);
        restarted.anchor(NOW, NOW + 10 * YEAR, 50);
        assert_eq!(restarted.now(NOW + 10 * YEAR, 60), NOW + 10);
    }

    #[test]
    fn what_was_signed_is_not_fallen_behind() {
        for wall in [5, NOW - HOUR, NOW - 1] {
            let mut restarted = Timeline::new(wall, 0);
            restarted.anchor(NOW, wall, 0);
            assert_eq!(restarted.now(wall + 7, 7), NOW + 7);
            // Another keyd led meanwhile.
            restarted.anchor(NOW + HOUR, wall + 8, 8);
            assert_eq!(restarted.now(wall + 9, 9), NOW + HOUR + 1);
            restarted.anchor(NOW, wall + 9, 9);
            assert_eq!(restarted.now(wall + 9, 9), NOW + HOUR + 1);
        }
    }

    #[test]
    fn a_cluster_that_begins_without_a_clock_takes_the_first_good_one() {
        let mut timeline = Timeline::new(12, 0);
        timeline.anchor(0, 12, 0);
        assert_eq!(timeline.now(22, 10), LEAST + 10);
        assert_eq!(timeline.now(NOW + 9 * YEAR, 20), NOW + 9 * YEAR);
        assert_eq!(timeline.now(NOW + 19 * YEAR, 30), NOW + 9 * YEAR + 10);
    }
}
