//! A thousand pods start under fire; nothing may reach one that its policy denies.

use std::process::ExitCode;

use clap::Parser;
use warren_e2e::first_packet::{FirstPacketArgs, run};

/// A thousand pods start under fire; nothing may reach one that its policy denies.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(flatten)]
    arguments: FirstPacketArgs,
}

fn main() -> ExitCode {
    match run(&Arguments::parse().arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("warren-first-packet: {error:#}");
            ExitCode::FAILURE
        }
    }
}
