//! `cargo xtask bench tunnel`: builds the engine with optimisation and hands over to the `tunnel_bench` example of
//! `warren-wireguard`, which says how it measures.

use anyhow::Result;

use crate::{
    command::{cargo, run as execute},
    lab::Passed,
    setup::{Group, ensure},
};

pub(crate) fn run(passed: &Passed) -> Result<()> {
    ensure(&[Group::Base, Group::Peers, Group::Bench])?;
    let mut command = cargo();
    command.args(["run", "--profile", "fast", "-p", "warren-wireguard"]);
    command.args(["--example", "tunnel_bench", "--"]);
    execute(command.args(&passed.arguments))
}
