//! The clocks: time since boot, and what is known of the real time. The wall clock is for people alone.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::time::{ClockId, clock_gettime};
use warren_agent_core::Freshness;

/// Milliseconds since boot, sleep included.
pub(crate) fn boot_ms() -> u64 {
    // Linux has had this clock since 2.6.39.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| {
        u64::try_from(Duration::from(time).as_millis()).unwrap_or(u64::MAX)
    })
}

/// How old the directory is, for all tasks. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct SignedClock(Arc<Mutex<Freshness>>);

impl SignedClock {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Freshness> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A time that has been reached, Unix milliseconds; `None` before any is known.
    pub(crate) fn now_ms(&self) -> Option<u64> {
        self.lock().now(boot_ms())
    }
}
