//! How far those behind the hub are behind: while they are, several changes become one version.
//!
//! A thousand objects that are applied at once would otherwise be a thousand versions, more than a stream's queue
//! holds. What most agents can take counts, so that one that does not read slows nobody down; its stream ends.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

/// So many versions may be under way before the hub waits at all.
const TOLERATED: usize = 8;
/// It never waits longer.
const LONGEST: Duration = Duration::from_millis(100);

/// Versions that are not with the agents yet.
#[derive(Debug, Default)]
pub(crate) struct Lag {
    unpublished: AtomicUsize,
    queued: AtomicUsize,
}

impl Lag {
    /// The hub made a version.
    pub(crate) fn made(&self) {
        self.unpublished.fetch_add(1, Ordering::Relaxed);
    }

    /// The publisher queued a version; `queues`: how much waits for each agent now.
    pub(crate) fn published(&self, queues: impl Iterator<Item = usize>) {
        let mut queues: Vec<_> = queues.collect();
        queues.sort_unstable();
        let most = queues.len().saturating_sub(1) / 2;
        let median = queues.get(most).copied().unwrap_or_default();
        self.queued.store(median, Ordering::Relaxed);
        self.unpublished.fetch_sub(1, Ordering::Relaxed);
    }

    /// How long to collect changes before the next version: a millisecond per version that is under way.
    pub(crate) fn pause(&self) -> Option<Duration> {
        let behind = self.unpublished.load(Ordering::Relaxed) + self.queued.load(Ordering::Relaxed);
        let pause = Duration::from_millis(u64::try_from(behind).unwrap_or(u64::MAX));
        (behind > TOLERATED).then(|| pause.min(LONGEST))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn most_agents_decide_and_the_pause_is_short() {
        let lag = Lag::default();
        let after = |queues: &[usize]| {
            lag.made();
            lag.published(queues.iter().copied());
            lag.pause()
        };
        assert_eq!(after(&[]), None);
        assert_eq!(after(&[1, 0, 2]), None);
        assert_eq!(after(&[256, 0]), None, "one of two does not read");
        assert_eq!(after(&[256, 20, 30]), Some(Duration::from_millis(30)));
        assert_eq!(after(&[256, 256]), Some(LONGEST));
        assert_eq!(after(&[0]), None, "they have caught up");
        for _ in 0..10 {
            lag.made();
        }
        assert_eq!(
            lag.pause(),
            Some(Duration::from_millis(10)),
            "the publisher is behind"
        );
    }
}
