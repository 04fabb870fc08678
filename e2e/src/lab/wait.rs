//! Waiting for a condition instead of for a time.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Time between two looks at a condition that cannot be subscribed to.
const STEP: Duration = Duration::from_millis(20);

/// Calls `look` until it returns a value; after `limit` fails with the last reason that it gave.
pub fn wait_until<T>(limit: Duration, what: &str, mut look: impl FnMut() -> Result<T>) -> Result<T> {
    let start = Instant::now();
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
