//! When a rotation with a schedule runs again.

/// Whether a run is due at `unix_seconds`, for one that last began at `last`. Missed runs are made up for by one. A
/// `last` in the future (the clock was set back) counts as now: the caller stores the returned time as the new
/// `last` where it differs.
///
/// Returns (due, last).
pub fn due(unix_seconds: u64, last: u64, every_seconds: u64) -> (bool, u64) {
    let last = last.min(unix_seconds);
    (unix_seconds - last >= every_seconds.max(1), last)
}
