//! `fuzz engine`: the targets in `mesh-agent/wireguard/src/engine/fuzz`, which are tests, optimised and for longer.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::command::{cargo, stream};

/// What begins the line with a target's figures.
const RESULT: &str = "fuzz-result ";

/// Arguments of `fuzz engine`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Only this target: sessions, datagrams, images, splitting, coalescing, inner_packets, configuration_socket,
    /// lanes_of_the_cipher.
    #[arg(long, default_value = "")]
    target: String,
    /// How long each target runs.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Where random numbers begin; chosen, and told, by default.
    #[arg(long)]
    seed: Option<u64>,
    /// Write inputs that showed something new to the corpus.
    #[arg(long)]
    save: bool,
    /// Where the figures go: target, seed, replayed, tried, features, kept.
    #[arg(long)]
    json: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let mut command = cargo();
    command.args(["test", "--quiet", "--workspace", "--lib"]);
    // Checks of the usual build, at ten times its speed; everything else stays as it is in other builds.
    command.args(["--config", "profile.dev.package.warren-wireguard.opt-level=3"]);
    command.arg(format!("engine::fuzz::{}", arguments.target));
    command.args(["--", "--nocapture", "--test-threads", "2"]);
    command.env("WARREN_FUZZ_SECONDS", arguments.seconds.to_string());
    if let Some(seed) = arguments.seed {
        command.env("WARREN_FUZZ_SEED", seed.to_string());
    }
    if arguments.save {
        command.env("WARREN_FUZZ_SAVE", "1");
    }
    let mut results: Vec<serde_json::Value> = Vec::new();
    let succeeded = stream(&mut command, |line| {
        let found = line.find(RESULT).map(|at| &line[at + RESULT.len()..]);
        results.extend(found.and_then(|text| serde_json::from_str(text).ok()));
    })?;
    if let Some(path) = &arguments.json {
        let text = serde_json::to_string_pretty(&results)?;
        fs::write(path, text + "\n").with_context(|| path.display().to_string())?;
    }
    if !succeeded {
        bail!("an input failed: the line `fuzz TARGET failed for input ...` above has it");
    }
    if results.is_empty() {
        bail!("there is no target `{}`", arguments.target);
    }
    Ok(())
}
