//! `cargo xtask bench`: how fast, beside others.

mod tunnel;

use anyhow::Result;
use clap::Subcommand;

use crate::{
    image::Profile,
    lab::{Passed, in_cluster, stand_alone},
};

/// What can be measured.
#[derive(Subcommand)]
pub(crate) enum Bench {
    /// The tunnel engine beside wireguard-go, boringtun-cli and gotatun-cli, between two namespaces: medians and ratios.
    /// `--json FILE`, `--rounds N`, `--seconds N`, `--only TEST,...`, `--peers NAME,...`, `--profile FILE`.
    Tunnel(Passed),
    /// The eBPF programs: nanoseconds per packet, with few and with many rules; goodput and requests with policy on over
    /// off. `--json FILE` (established_ns, new_allowed_ns, denied_ns, ratio_16k_over_16, goodput_ratio, rr_ratio).
    Bpf(Passed),
    /// From a policy's change to the new verdict on the wire, in a Kubernetes cluster with 1,000 policies.
    /// `--json FILE` (p50_ms, p99_ms, ...), `--changes N`, `--policies N`.
    Policy(Passed),
    /// Keys rotate under traffic, in labs of 3 and 5 nodes: nothing may be lost, and of old keys nothing may be left.
    /// `--rotations N` (of the cluster, and as many of single nodes), `--json FILE` (rotations, sent, lost, duplicated,
    /// resets, plaintext_packets, power_check_plaintext_packets, seconds_p50, seconds_p99).
    Rotation(Passed),
    /// Agents are killed and started again while packets flow, and tunnel processes are killed: nothing may be lost by the
    /// former, nothing may be in clear. `--restarts N`, `--kills N`, `--json FILE` (agent_restarts, sent, lost, duplicated,
    /// tunnel_gap_max_ms, plaintext_packets, ...).
    Life(Passed),
    /// From a Node's deletion, or `warren keys revoke`, until no agent has its keys any more. `--runs N`,
    /// `--json FILE` (p99_s).
    Revoke(Passed),
}

/// Measures.
pub(crate) fn run(bench: &Bench) -> Result<()> {
    match bench {
        Bench::Tunnel(passed) => tunnel::run(passed),
        Bench::Bpf(passed) => in_lab("bpf", passed),
        Bench::Rotation(passed) => in_lab("rotation", passed),
        Bench::Life(passed) => in_lab("life", passed),
        Bench::Revoke(passed) => in_lab("revoke", passed),
        Bench::Policy(passed) => in_cluster("bench-policy", Profile::Fast, passed),
    }
}

/// A verb of `warren-bench`, in a stand-alone lab of programs as quick as those that are shipped.
fn in_lab(verb: &str, passed: &Passed) -> Result<()> {
    stand_alone("warren-bench", Profile::Fast, &passed.behind(verb))
}
