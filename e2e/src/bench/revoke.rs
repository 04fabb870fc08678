//! `bench revoke`: from the deletion of a Node, or `warren keys revoke`, until no device of any other node has its keys.

use std::{
    fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;

use super::percentile;
use crate::lab::{Lab, LabOptions, Node, manifests::node_file, wait::wait_until};

/// The limit ends a broken run.
const LIMIT: Duration = Duration::from_secs(60);

/// What `warren-bench revoke` takes.
#[derive(Debug, clap::Args)]
pub struct RevokeArgs {
    /// Write the figures to this file.
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// How often: half of them by deleting the Node, half by `warren keys revoke`.
    #[arg(long, default_value_t = 100)]
    pub runs: u32,
    /// Nodes that have to forget the keys.
    #[arg(long, default_value_t = 3)]
    pub nodes: u8,
}

/// Seconds.
#[derive(Debug, Clone, Copy, Default, Serialize)]
struct Figures {
    /// How often.
    runs: usize,
    /// Agents that had to remove keys in each run.
    agents: u8,
    /// The middle one.
    p50_s: f64,
    /// 99 % were quicker.
    p99_s: f64,
    /// The slowest.
    max_s: f64,
    /// Of those by deleting the Node.
    delete_p99_s: f64,
    /// Of those by `warren keys revoke`.
    revoke_p99_s: f64,
}

/// Measures, prints and writes; 5 s or more (P6) are an error.
pub fn revoke(args: &RevokeArgs) -> Result<()> {
    ensure!(args.runs > 0 && args.nodes > 1, "at least one run and two nodes");
    let (mut deleted, mut revoked) = (Vec::new(), Vec::new());
    let options = LabOptions {
        nodes: args.nodes,
        ..LabOptions::default()
    };
    Lab::run(options, |lab| {
        for run in 0..args.runs {
            let by_deletion = run % 2 == 0;
            let seconds = once(lab, args.nodes + 1, by_deletion)?;
            eprintln!("run {run}: {seconds:.2} s");
            if by_deletion { &mut deleted } else { &mut revoked }.push(seconds);
        }
        Ok(())
    })?;
    let figures = figures(args.nodes, deleted, revoked);
    let text = serde_json::to_string_pretty(&figures)?;
    println!("{text}");
    if let Some(path) = &args.json {
        fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    ensure!(
        figures.p99_s < 5.0,
        "p99 is {:.2} s; it must be under 5 s",
        figures.p99_s
    );
    Ok(())
}

fn figures(agents: u8, mut deleted: Vec<f64>, mut revoked: Vec<f64>) -> Figures {
    let mut all = [deleted.clone(), revoked.clone()].concat();
    for values in [&mut deleted, &mut revoked, &mut all] {
        values.sort_by(f64::total_cmp);
    }
    Figures {
        runs: all.len(),
        agents,
        p50_s: percentile(&all, 50),
        p99_s: percentile(&all, 99),
        max_s: all.last().copied().unwrap_or_default(),
        delete_p99_s: percentile(&deleted, 99),
        revoke_p99_s: percentile(&revoked, 99),
    }
}

/// A node comes, another one of the same name each time, and its keys go. Returns the seconds until the last agent has removed them.
fn once(lab: &Lab, number: u8, by_deletion: bool) -> Result<f64> {
    let others = lab.nodes();
    let guest = lab.add_node(number)?;
    let peers = others.len();
    guest.wait_ready(peers, LIMIT)?;
    let key = public_key(&guest)?;
    for node in &others {
        wait_until(LIMIT, "every node has the guest for a peer", || {
            let has = node.device_dump()?.contains(&key);
            ensure!(has, "{} has not", node.name);
            Ok(())
        })?;
    }
    let start = Instant::now();
    if by_deletion {
        lab.manifests().remove(&node_file(&guest.name))?;
    } else {
        let command = ["keys", "revoke", &guest.name, "--timeout", "0", "-o", "json"];
        let output = lab.warren(&command)?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let seconds = last_removal(&others, &key, start)?;
    if !by_deletion {
        lab.manifests().remove(&node_file(&guest.name))?;
    }
    lab.forget_node(number)?;
    Ok(seconds)
}

/// The first of the hexadecimal public keys that its devices have.
fn public_key(node: &Node) -> Result<String> {
    let status = node.encrypt_status()?;
    let key = status
        .interfaces
        .iter()
        .find_map(|interface| interface.public_key);
    let key = key.with_context(|| format!("{} has no key", node.name))?;
    Ok(key.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn last_removal(others: &[std::sync::Arc<Node>], key: &str, start: Instant) -> Result<f64> {
    thread::scope(|scope| {
        let threads: Vec<_> = others
            .iter()
            .map(|node| {
                scope.spawn(move || {
                    wait_until(LIMIT, "the keys are removed", || {
                        let dump = node.device_dump()?;
                        ensure!(!dump.contains(key), "{} still has the key", node.name);
                        Ok(start.elapsed().as_secs_f64())
                    })
                })
            })
            .collect();
        let mut last = 0.0_f64;
        for thread in threads {
            let seconds = thread.join().map_err(|_| anyhow::anyhow!("a look panicked"))??;
            last = last.max(seconds);
        }
        Ok(last)
    })
}
