//! `cargo xtask bench bpf`: what the eBPF programs cost.

use anyhow::Result;

use crate::lab::{Passed, stand_alone};

/// See `warren-bench --help`.
pub(crate) fn run(passed: &Passed) -> Result<()> {
    stand_alone("warren-bench", &passed.behind("bpf"))
}
