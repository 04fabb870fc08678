//! `cargo xtask setup`: from a fresh Debian 12 to a machine that builds and tests everything.
//!
//! What is there already is left alone: packages are asked of dpkg, everything built has a stamp whose content is
//! the hash of what it was built from.

mod built;
mod packages;

use std::{fs::File, time::Instant};

use anyhow::{Context as _, Result};
use clap::ValueEnum;

use crate::paths;

/// Arguments of `setup`.
#[derive(clap::Args, Default)]
pub(crate) struct Arguments {
    /// Only this group, and what it needs; may be given more than once.
    #[arg(long, value_enum)]
    pub(crate) only: Vec<Group>,
}

/// What belongs together.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    /// What every build and the stand-alone lab need: packages.
    Base,
    /// The compiler and linker for the eBPF programs.
    Bpf,
    /// Tools of the checks: cargo-deny.
    Checks,
    /// Other WireGuard implementations to talk to: wireguard-go, boringtun-cli.
    Peers,
    /// Implementations that are only measured against: gotatun-cli. Not by default: `cargo xtask bench tunnel` asks for it.
    Bench,
    /// A Kubernetes control plane, kubelet, kube-proxy, CoreDNS, kubectl, helm and the lab's own helpers.
    Kubernetes,
    /// QEMU and what starts a kernel in it.
    Vm,
}

/// Does what is missing.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let groups = if arguments.only.is_empty() {
        let all = Group::value_variants().iter().copied();
        all.filter(|group| *group != Group::Bench).collect()
    } else {
        arguments.only.clone()
    };
    ensure(&groups)
}

/// Does what is missing of these groups. Says nothing when nothing is.
pub(crate) fn ensure(groups: &[Group]) -> Result<()> {
    let cache = paths::cache()?;
    std::fs::create_dir_all(&cache).with_context(|| {
        format!(
            "cannot create {}: set WARREN_CACHE to a directory that can be written",
            cache.display()
        )
    })?;
    // Two setups at once would build the same files.
    let lock = File::create(cache.join("lock"))?;
    lock.lock().context("cannot lock the cache")?;

    packages::install(groups)?;
    for part in built::parts()? {
        if groups.contains(&part.group) {
            part.ensure()?;
        }
    }
    Ok(())
}

/// Announces a step, runs it, says how long it took; a failure ends with what to do next.
fn step(what: &str, why: &str, next: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    println!("setup: {what} ({why}) ...");
    let start = Instant::now();
    work().with_context(|| format!("setup: {what} failed. Next: {next}"))?;
    println!("setup: {what}: done in {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}
