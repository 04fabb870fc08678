//! `warren-fuzz`: random input against an independent judge.

use std::{
    fs,
    path::PathBuf,
    process::ExitCode,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use serde_json::json;
use warren_e2e::oracle::loaded;

/// Random input against an independent judge.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Random policies and packets: the eBPF programs, as loaded, against the oracle.
    Policy(Policy),
}

#[derive(Debug, clap::Args)]
struct Policy {
    /// Pairs of policy set and packet.
    #[arg(long, default_value_t = 1_000_000)]
    pairs: u64,
    /// Where the random numbers start; by default another one each time.
    #[arg(long)]
    seed: Option<u64>,
    /// Write the figures there.
    #[arg(long)]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    let What::Policy(arguments) = Args::parse().what;
    match policy(&arguments) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(mismatches) => {
            eprintln!("error: {mismatches} mismatches");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns the number of mismatches.
fn policy(arguments: &Policy) -> Result<u64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seed = arguments.seed.unwrap_or(now.as_nanos() as u64);
    println!("seed {seed}");
    let start = Instant::now();
    let mut shown = 0;
    let outcome = loaded::run(arguments.pairs, seed, |pairs| {
        let tenth = pairs * 10 / arguments.pairs.max(1);
        if tenth > shown {
            shown = tenth;
            println!("{pairs} pairs after {} s", start.elapsed().as_secs());
        }
    })?;
    for mismatch in &outcome.shown {
        println!("\n{mismatch}");
    }
    let report = &outcome.report;
    println!(
        "{} pairs, {} of them allowed, {} mismatches, {} s",
        report.pairs,
        report.allowed,
        outcome.mismatches,
        start.elapsed().as_secs()
    );
    if let Some(path) = &arguments.json {
        let figures = json!({"pairs": report.pairs, "mismatches": outcome.mismatches, "seed": seed});
        fs::write(path, format!("{figures:#}\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(outcome.mismatches)
}
