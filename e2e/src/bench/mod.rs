//! What policy costs: nanoseconds per packet in the programs, goodput and requests through the lab. And what rotation and
//! revocation of keys and the ends of processes cost: nothing lost, and little time.

mod life;
mod programs;
mod revoke;
pub mod rotation;
mod traffic;

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result};
use serde::Serialize;

pub use self::{
    life::{LifeArgs, life},
    programs::{Costs, Programs},
    revoke::{RevokeArgs, revoke},
    rotation::{RotationArgs, rotation},
    traffic::{RoundsArgs, Traffic, rounds},
};

/// What `warren-bench bpf` takes.
#[derive(Debug, clap::Args)]
pub struct BpfArgs {
    /// Write the figures to this file.
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Rounds in the lab, each with policy and without.
    #[arg(long, default_value_t = 12)]
    pub rounds: u32,
    /// Seconds of each measurement in the lab.
    #[arg(long, default_value_t = 1)]
    pub seconds: u32,
    /// Measure the programs only, no lab.
    #[arg(long)]
    pub no_lab: bool,
}

/// All figures.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Figures {
    /// The programs by themselves.
    #[serde(flatten)]
    pub programs: Programs,
    /// Through the lab.
    #[serde(flatten)]
    pub traffic: Option<Traffic>,
}

/// Measures, prints and writes.
pub fn bpf(args: &BpfArgs) -> Result<()> {
    let mut figures = Figures {
        programs: programs::measure()?,
        traffic: None,
    };
    if !args.no_lab {
        figures.traffic = Some(traffic::measure(args.rounds, args.seconds)?);
    }
    let text = serde_json::to_string_pretty(&figures)?;
    println!("{text}");
    if let Some(path) = &args.json {
        fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The smallest of the sorted values that at least `percent` of them do not exceed; nothing of none.
pub(crate) fn percentile<T: Copy + Default>(sorted: &[T], percent: usize) -> T {
    let at = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(at).copied().unwrap_or_default()
}

/// The middle one.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!((percentile(&values, 50), percentile(&values, 99)), (50.0, 99.0));
        assert_eq!((percentile(&[3.0], 50), percentile(&[3.0], 99)), (3.0, 3.0));
        assert_eq!(percentile::<f64>(&[], 99), 0.0);
    }
}
