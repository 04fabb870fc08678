//! `cargo xtask soak`: the tunnel engine over several rekeys.

use anyhow::Result;

use crate::{
    command::{cargo, run as execute},
    lab::Passed,
    setup::{Group, ensure},
};

/// See the `soak` example of `warren-wireguard`.
pub(crate) fn run(passed: &Passed) -> Result<()> {
    ensure(&[Group::Base])?;
    let mut command = cargo();
    command.args([
        "run",
        "--release",
        "-p",
        "warren-wireguard",
        "--example",
        "soak",
        "--",
    ]);
    execute(command.args(&passed.arguments))
}
