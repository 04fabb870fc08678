//! The clocks.

use std::{
    sync::{LazyLock, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::time::{ClockId, clock_gettime};
use warren_keyd_core::Timeline;

static TIMELINE: LazyLock<Mutex<Timeline>> =
    LazyLock::new(|| Mutex::new(Timeline::new(wall_ms(), monotonic_ms())));

fn timeline() -> MutexGuard<'static, Timeline> {
    TIMELINE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn milliseconds(since: Duration) -> u64 {
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Milliseconds since boot, sleep included: the core's time.
pub(crate) fn monotonic_ms() -> u64 {
    // Linux has had this clock since 2.6.39.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| milliseconds(time.into()))
}

/// The wall clock, which may be wrong. Nothing is judged by it.
fn wall_ms() -> u64 {
    milliseconds(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// Unix milliseconds, going forward whatever the wall clock does: what is signed and judged by.
pub(crate) fn unix_ms() -> u64 {
    timeline().now(wall_ms(), monotonic_ms())
}

/// What was signed last, as it is stored.
pub(crate) fn anchor(signed_ms: u64) {
    let (wall, boot) = (wall_ms(), monotonic_ms());
    let mut timeline = timeline();
    timeline.anchor(signed_ms, wall, boot);
    let now = timeline.now(wall, boot);
    drop(timeline);
    if wall.abs_diff(now) > 3_600_000 {
        tracing::warn!(
            "this node's clock is {} s away from the time that was signed last: set it; keyd goes on with its own time",
            wall.abs_diff(now) / 1000
        );
    }
}
