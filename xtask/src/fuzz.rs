//! `cargo xtask fuzz`: random input against an independent judge.

mod engine;

use anyhow::Result;
use clap::Subcommand;

use crate::{
    image::Profile,
    lab::{Passed, stand_alone},
};

/// What can be fuzzed.
#[derive(Subcommand)]
pub(crate) enum Fuzz {
    /// Random policies and packets: the eBPF programs, as the kernel has loaded them, against the oracle.
    /// `--pairs N`, `--seed S`, `--json FILE` (pairs, mismatches, seed).
    Policy(Passed),
    /// The tunnel engine: messages and sessions, handover images, cutting and putting together, the configuration socket,
    /// the cipher.
    Engine(engine::Arguments),
}

/// See `warren-fuzz --help`.
pub(crate) fn run(fuzz: &Fuzz) -> Result<()> {
    match fuzz {
        Fuzz::Policy(passed) => stand_alone("warren-fuzz", Profile::Dev, &passed.behind("policy")),
        Fuzz::Engine(arguments) => engine::run(arguments),
    }
}
