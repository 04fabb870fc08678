//! `cargo xtask bench`: how fast, beside others.

mod bpf;
mod tunnel;

use anyhow::Result;
use clap::Subcommand;

use crate::{
    image::Profile,
    lab::{Passed, in_cluster},
};

/// What can be measured.
#[derive(Subcommand)]
pub(crate) enum Bench {
    /// The tunnel engine beside wireguard-go and boringtun-cli, between two namespaces: medians and ratios.
    /// `--json FILE`, `--rounds N`, `--seconds N`, `--only TEST,...`.
    Tunnel(Passed),
    /// The eBPF programs: nanoseconds per packet, with few and with many rules; goodput and requests with policy on over
    /// off. `--json FILE` (established_ns, new_allowed_ns, denied_ns, ratio_16k_over_16, goodput_ratio, rr_ratio).
    Bpf(Passed),
    /// From a policy's change to the new verdict on the wire, in a Kubernetes cluster with 1,000 policies.
    /// `--json FILE` (p50_ms, p99_ms, ...), `--changes N`, `--policies N`.
    Policy(Passed),
}

/// Measures.
pub(crate) fn run(bench: &Bench) -> Result<()> {
    match bench {
        Bench::Tunnel(passed) => tunnel::run(passed),
        Bench::Bpf(passed) => bpf::run(passed),
        Bench::Policy(passed) => in_cluster("bench-policy", Profile::Fast, passed),
    }
}
