//! `warren-bench`: what policy costs.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use warren_e2e::bench::{BpfArgs, RoundsArgs, bpf, rounds};

/// What policy costs.
#[derive(Debug, Parser)]
#[command(version)]
enum Verb {
    /// The eBPF programs: nanoseconds per packet, and goodput and requests through the lab.
    Bpf(BpfArgs),
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
        Verb::Rounds(arguments) => {
            println!("{}", rounds(arguments)?);
            Ok(())
        }
    }
}
