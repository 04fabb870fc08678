//! A part of cyclonus' cases; `cargo xtask conformance` runs all of them.

use anyhow::{Result, ensure};
use warren_e2e::cluster::conformance::ConformanceArgs;

use crate::scene::Scene;

/// Every so many of its 230 cases.
const EVERY: u32 = 24;

pub(crate) fn cyclonus_sample(scene: &mut Scene) -> Result<()> {
    let summary = scene.cluster.conformance(&ConformanceArgs {
        every: Some(EVERY),
        ..ConformanceArgs::default()
    })?;
    ensure!(summary.cases >= 9, "only {} cases ran", summary.cases);
    ensure!(summary.failed == 0, "{:?}", summary.failures);
    let command = ["delete", "namespace", "x", "y", "z", "--wait"];
    scene.cluster.kubectl(command).map(drop)
}
