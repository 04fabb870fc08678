//! `warren-bench`: what policy costs, and how keys rotate and go.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use warren_e2e::bench::{
    BpfArgs, LifeArgs, RevokeArgs, RotationArgs, RoundsArgs, bpf, life, revoke, rotation, rounds,
};

/// What policy costs, and how keys rotate and go.
#[derive(Debug, Parser)]
#[command(version)]
enum Verb {
    /// The eBPF programs: nanoseconds per packet, and goodput and requests through the lab.
    Bpf(BpfArgs),
    /// Keys rotate under traffic: nothing may be lost, and nothing may be left of old keys.
    Rotation(RotationArgs),
    /// From a node's revocation to the last agent's removal of its keys.
    Revoke(RevokeArgs),
    /// Agents that are killed and started again while packets flow, and tunnel processes that are killed.
    Life(LifeArgs),
    /// The client of a measurement, inside a pod.
    #[command(hide = true)]
    Rounds(RoundsArgs),
}

fn main() -> ExitCode {
    match run(&Verb::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: &Verb) -> Result<()> {
    match verb {
        Verb::Bpf(arguments) => bpf(arguments),
        Verb::Rotation(arguments) => rotation(arguments),
        Verb::Revoke(arguments) => revoke(arguments),
        Verb::Life(arguments) => life(arguments),
        Verb::Rounds(arguments) => {
            println!("{}", rounds(arguments)?);
            Ok(())
        }
    }
}
