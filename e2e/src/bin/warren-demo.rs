//! `warren-demo`: see `warren_e2e::demo`.

use std::process::ExitCode;

use clap::Parser;
use warren_e2e::demo::{DemoArgs, run};

/// Shows the mesh at work: three nodes, a three-tier application, nothing in clear.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    demo: DemoArgs,
}

fn main() -> ExitCode {
    let faults = match run(&Args::parse().demo) {
        Ok(figures) => figures.faults(),
        Err(error) => vec![format!("{error:#}")],
    };
    for fault in &faults {
        eprintln!("error: {fault}");
    }
    if faults.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
