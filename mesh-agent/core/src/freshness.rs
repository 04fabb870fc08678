//! How old the directory is, by its own signed times and the time since boot. The wall clock has no say: one that jumps must
//! neither cut a node off nor make an old directory good again.

/// The time that is known to have been reached, and when the directory ends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Freshness {
    /// (signed time, time since boot at which it had been reached), milliseconds.
    reached: Option<(u64, u64)>,
    expires_ms: Option<u64>,
}

impl Freshness {
    /// A time that had been reached at this time since boot: from a process before this one.
    pub fn reached(&mut self, signed_ms: u64, boot_ms: u64) {
        if self.now(boot_ms).is_none_or(|now| signed_ms > now) {
            self.reached = Some((signed_ms, boot_ms));
        }
    }

    /// A directory was taken, issued and ending at these signed times.
    pub fn directory(&mut self, issued_ms: u64, expires_ms: u64, boot_ms: u64) {
        self.reached(issued_ms, boot_ms);
        self.expires_ms = Some(expires_ms);
    }

    /// The time, Unix milliseconds: not later than it really is by the clock of whoever signs. `None` before any is known.
    pub fn now(&self, boot_ms: u64) -> Option<u64> {
        let (signed, at) = self.reached?;
        Some(signed.saturating_add(boot_ms.saturating_sub(at)))
    }

    /// For how long the directory is over, milliseconds; `None` while it is good, or where there is none.
    pub fn expired_ms(&self, boot_ms: u64) -> Option<u64> {
        let (now, expires) = (self.now(boot_ms)?, self.expires_ms?);
        (now >= expires).then(|| now - expires)
    }

    /// Whether a directory with these times would be over.
    pub fn would_be_expired(&self, issued_ms: u64, expires_ms: u64, boot_ms: u64) -> bool {
        let mut then = *self;
        then.directory(issued_ms, expires_ms, boot_ms);
        then.expired_ms(boot_ms).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: u64 = 1_800_000_000_000;

    #[test]
    fn a_directory_ends_by_the_time_since_boot() {
        let mut fresh = Freshness::default();
        assert_eq!((fresh.now(5), fresh.expired_ms(5)), (None, None));
        fresh.directory(T, T + 1000, 100);
        assert_eq!(fresh.expired_ms(1099), None);
        assert_eq!(fresh.expired_ms(1100), Some(0));
        assert_eq!(fresh.expired_ms(1500), Some(400));
        // A fresh signature.
        fresh.directory(T + 1400, T + 2400, 1500);
        assert_eq!(fresh.expired_ms(1500), None);
    }

    #[test]
    fn an_old_directory_does_not_become_good_again() {
        let mut fresh = Freshness::default();
        fresh.directory(T, T + 1000, 0);
        assert!(fresh.would_be_expired(T - 2000, T - 1000, 10));
        assert!(!fresh.would_be_expired(T - 20, T + 980, 10));
        // Replayed later: its issue sets nothing back.
        fresh.directory(T - 2000, T - 1000, 10);
        assert_eq!(fresh.now(10), Some(T + 10));
        assert_eq!(fresh.expired_ms(10), Some(1010));
    }

    #[test]
    fn what_an_earlier_process_knew_counts() {
        let mut fresh = Freshness::default();
        fresh.reached(T + 5000, 10);
        fresh.directory(T, T + 1000, 20);
        assert_eq!(fresh.expired_ms(20), Some(4010));
        fresh.reached(T, 30);
        assert_eq!(fresh.now(30), Some(T + 5020));
    }
}
