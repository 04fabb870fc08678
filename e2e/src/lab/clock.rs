//! Wall clocks of nodes, which can be set at run time: libfaketime between a program and the C library. The time since boot stays
//! the machine's.

use std::fs;

use anyhow::{Context as _, Result, ensure};

use super::Node;

/// Debian's package libfaketime.
const LIBRARY: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

/// What makes a program ask the node's clock.
pub(super) const ENVIRONMENT: [&str; 5] = [
    "LD_PRELOAD=/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
    "FAKETIME_TIMESTAMP_FILE=/etc/warren/clock",
    "FAKETIME_CACHE_DURATION=1",
    "FAKETIME_DONT_FAKE_MONOTONIC=1",
    "FAKETIME_DISABLE_SHM=1",
];

impl Node {
    /// Sets the wall clock of all of the node's programs: `+0` is the machine's, `-1h` and `+10y` differ from it by so much, and
    /// `@1970-01-01 00:00:10` is a time that goes on from there. Seen within two seconds.
    pub fn set_clock(&self, clock: &str) -> Result<()> {
        ensure!(
            fs::exists(LIBRARY)?,
            "{LIBRARY} is missing: install libfaketime (`cargo xtask setup`)"
        );
        let file = self.dir().join("etc/clock");
        let beside = self.dir().join("etc/.clock.new");
        fs::write(&beside, format!("{clock}\n"))?;
        fs::rename(&beside, &file).with_context(|| format!("cannot set the clock of {}", self.name))
    }

    /// What the node's programs take for the time, Unix seconds.
    pub fn clock(&self) -> Result<u64> {
        let words = ["env"].iter().chain(&ENVIRONMENT).chain(&["date", "+%s"]);
        let text = self.run(words)?;
        text.trim()
            .parse()
            .with_context(|| format!("{} says {text}", self.name))
    }
}
