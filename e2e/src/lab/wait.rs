//! Waiting for a condition instead of for a time.

use std::{
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Time between two looks at a condition that cannot be subscribed to.
const STEP: Duration = Duration::from_millis(20);

/// Multiplies every limit, for machines that are slower than any real one (emulated ones).
pub const PATIENCE_VARIABLE: &str = "WARREN_LAB_PATIENCE";

/// `limit`, times what [`PATIENCE_VARIABLE`] says.
pub fn patient(limit: Duration) -> Duration {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    let factor = FACTOR.get_or_init(|| {
        let value = std::env::var(PATIENCE_VARIABLE).ok();
        value.and_then(|value| value.parse().ok()).unwrap_or(1).max(1)
    });
    limit * *factor
}

/// Calls `look` until it returns a value; after `limit` (see [`patient`]) fails with the last reason that it gave.
pub fn wait_until<T>(limit: Duration, what: &str, mut look: impl FnMut() -> Result<T>) -> Result<T> {
    let (start, limit) = (Instant::now(), patient(limit));
    loop {
        match look() {
            Ok(value) => return Ok(value),
            Err(error) if start.elapsed() >= limit => {
                bail!(
                    "waited {} s for this, in vain: {what}. Last seen: {error:#}",
                    limit.as_secs()
                );
            }
            Err(_) => thread::sleep(STEP),
        }
    }
}

/// [`wait_until`] for a plain condition.
pub fn wait_for(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) -> Result<()> {
    wait_until(limit, what, || {
        if holds() {
            Ok(())
        } else {
            bail!("it does not hold")
        }
    })
}
