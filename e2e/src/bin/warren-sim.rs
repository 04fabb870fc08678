//! Key rotation in simulated worlds: `cargo xtask sim`.

use std::{
    path::PathBuf,
    process::ExitCode,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use anyhow::{Context as _, Result};
use clap::Parser;
use serde_json::json;
use warren_e2e::sim::{self, Sabotage};

/// Simulates rotations with faults and looks for violations of the invariants; then one rotation of a large mesh.
#[derive(Parser)]
#[command(name = "cargo xtask sim")]
struct Arguments {
    /// How many seeds.
    #[arg(long, default_value_t = 2_000)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Only this seed, and everything that happens in it.
    #[arg(long)]
    seed: Option<u64>,
    /// Nodes of the large mesh; 0 for none.
    #[arg(long, default_value_t = 500)]
    nodes: usize,
    /// Threads; 0 for one per processor.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Write the result here.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// A seed that failed, and what happened.
type Failed = (u64, Vec<String>);

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if let Some(seed) = arguments.seed {
        return Ok(replay(seed));
    }
    let began = Instant::now();
    let (failed, packets, commits) = seeds(&arguments);
    println!(
        "sim: {} seeds in {:.1} s, {commits} keys changed, {packets} packets judged, {} violations",
        arguments.seeds,
        began.elapsed().as_secs_f64(),
        failed.len()
    );
    for (seed, violations) in failed.iter().take(10) {
        println!("sim: seed {seed}: {}", violations.join("; "));
        println!("sim: replay it with `cargo xtask sim --seed {seed}`");
    }
    let large = (arguments.nodes > 1).then(|| sim::scale(arguments.nodes));
    if let Some(large) = &large {
        println!("sim: {large}");
    }
    let large_failed = large.as_ref().map_or(0, |large| large.violations.len());
    if let Some(path) = &arguments.json {
        let report = json!({
            "seeds": arguments.seeds,
            "first": arguments.first,
            "violations": failed.len() + large_failed,
            "failed_seeds": failed.iter().map(|(seed, _)| seed).collect::<Vec<_>>(),
            "packets": packets,
            "commits": commits,
            "large": large.as_ref().map(|large| json!({
                "nodes": large.nodes,
                "virtual_seconds": large.seconds,
                "messages_per_node": large.messages_per_node(),
                "bytes_per_node": large.bytes_per_node(),
                "node_writes": large.traffic.writes,
            })),
        });
        std::fs::write(path, format!("{report:#}\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(match failed.len() + large_failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

fn replay(seed: u64) -> ExitCode {
    let outcome = sim::run(seed, Sabotage::None, true);
    outcome.trace.iter().for_each(|line| println!("{line}"));
    for violation in &outcome.violations {
        println!("sim: seed {seed}: {violation}");
    }
    println!(
        "sim: {} events, {} violations",
        outcome.events,
        outcome.violations.len()
    );
    match outcome.violations.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

/// All seeds over some threads: what failed, packets judged, keys changed.
fn seeds(arguments: &Arguments) -> (Vec<Failed>, u64, u64) {
    let threads = match arguments.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    let next = AtomicU64::new(arguments.first);
    let end = arguments.first + arguments.seeds;
    let (packets, commits) = (AtomicU64::new(0), AtomicU64::new(0));
    let failed = Mutex::new(Vec::new());
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= end {
                return;
            }
            let outcome = sim::run(seed, Sabotage::None, false);
            packets.fetch_add(outcome.judged_packets, Ordering::Relaxed);
            commits.fetch_add(outcome.commits, Ordering::Relaxed);
            if !outcome.violations.is_empty() {
                let violations = outcome.violations.iter().map(ToString::to_string).collect();
                failed
                    .lock()
                    .unwrap_or_else(|e| e.into_inner())
                    .push((seed, violations));
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
    let mut failed = failed.into_inner().unwrap_or_else(|e| e.into_inner());
    failed.sort();
    (failed, packets.into_inner(), commits.into_inner())
}
