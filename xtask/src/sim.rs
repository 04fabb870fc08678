//! `sim`: key rotation in simulated worlds.

use anyhow::Result;

use crate::{
    command::{cargo, command, run as execute},
    lab::Passed,
    paths,
};

/// What the simulation spends its time in; everything else stays as it is in other builds.
const HOT: [&str; 4] = [
    "warren-e2e",
    "warren-keyd-core",
    "warren-agent-core",
    "warren-model",
];

/// See `warren-sim --help`.
pub(crate) fn run(passed: &Passed) -> Result<()> {
    let mut build = cargo();
    build.args(["build", "--quiet", "--workspace", "--bin", "warren-sim"]);
    for package in HOT {
        build.args(["--config", &format!("profile.dev.package.{package}.opt-level=3")]);
    }
    execute(&mut build)?;
    execute(command(paths::target().join("debug/warren-sim")).args(&passed.arguments))
}
