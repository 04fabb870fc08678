//! How much a peer may cause.

use std::time::Duration;

/// A number of things at once, and one more after each interval.
#[derive(Debug)]
pub struct Allowance {
    most: u32,
    interval: Duration,
    left: u32,
    /// Up to when `left` was filled.
    filled: Duration,
}

impl Allowance {
    pub(super) fn new(most: u32, interval: Duration) -> Self {
        Self {
            most,
            interval,
            left: most,
            filled: Duration::ZERO,
        }
    }

    /// Uses one up, where one is left at `now`.
    pub fn take(&mut self, now: Duration) -> bool {
        let passed = now.saturating_sub(self.filled).as_nanos() / self.interval.as_nanos().max(1);
        match u32::try_from(passed)
            .ok()
            .filter(|more| *more < self.most - self.left)
        {
            Some(more) => {
                self.left += more;
                self.filled += self.interval * more;
            }
            None => (self.left, self.filled) = (self.most, now),
        }
        let is_left = self.left > 0;
        self.left = self.left.saturating_sub(1);
        is_left
    }
}

impl Default for Allowance {
    /// What an end of an exchange may say: far more than an honest one does.
    fn default() -> Self {
        Self::new(16, Duration::from_millis(200))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_and_then_one_at_a_time() {
        let mut allowance = Allowance::new(3, Duration::from_secs(2));
        let at = Duration::from_secs;
        let taken = |allowance: &mut Allowance, now| (0..10).filter(|_| allowance.take(now)).count();
        assert_eq!(taken(&mut allowance, at(100)), 3);
        assert_eq!(taken(&mut allowance, at(101)), 0);
        assert_eq!(taken(&mut allowance, at(103)), 1);
        assert_eq!(taken(&mut allowance, at(104)), 1);
        assert_eq!(taken(&mut allowance, at(1000)), 3);
        // A clock never goes back, but it may be asked for the same moment.
        assert_eq!(taken(&mut allowance, at(1000)), 0);
    }
}
