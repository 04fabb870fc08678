//! A steady rate.

use std::time::Duration;

/// What a sender that was late makes up for at once.
const LATE: Duration = Duration::from_millis(50);

/// When the packets of a flow are due, by the time since its start.
///
/// A sender that was away for longer than [`LATE`] goes on from there: thousands of packets at once would fill queues that an
/// even flow never fills, and what they lose would be taken for a fault of the path.
#[derive(Debug)]
pub(super) struct Pace {
    interval: Duration,
    next: Duration,
}

impl Pace {
    /// `rate` packets a second; at least one.
    pub(super) fn new(rate: u64) -> Self {
        Self {
            interval: Duration::from_nanos(1_000_000_000 / rate.max(1)),
            next: Duration::ZERO,
        }
    }

    /// When the next packet is due.
    pub(super) fn next(&self) -> Duration {
        self.next
    }

    /// Whether a packet is due; if so, it is taken for sent.
    pub(super) fn take(&mut self, now: Duration) -> bool {
        if now < self.next {
            return false;
        }
        self.next = self.next.max(now.saturating_sub(LATE)) + self.interval;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn due(pace: &mut Pace, now: u64) -> usize {
        let now = Duration::from_millis(now);
        std::iter::from_fn(|| pace.take(now).then_some(())).count()
    }

    #[test]
    fn a_late_sender_makes_up_for_a_little_and_goes_on() {
        let mut pace = Pace::new(1000);
        assert_eq!(due(&mut pace, 0), 1);
        assert_eq!(due(&mut pace, 10), 10);
        assert_eq!(due(&mut pace, 10), 0);
        assert_eq!(due(&mut pace, 50), 40);
        // Away for ten seconds.
        assert_eq!(due(&mut pace, 10_050), 51);
        assert_eq!(due(&mut pace, 10_060), 10);
    }
}
