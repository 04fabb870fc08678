//! `cargo xtask`: every command that a person or CI runs.
//!
//! Starts other programs and reads what they print; it links no crate of the workspace, so that a fresh
//! machine compiles it in seconds. It may install packages and write to the cache and to `target`; it never
//! touches the machine's network.

mod bench;
mod command;
mod conformance;
mod deps;
mod disk;
mod fuzz;
mod generate;
mod image;
mod lab;
mod paths;
mod permissions;
mod setup;
mod sim;
mod soak;
mod test;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The commands of Warren's workshop.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a Debian machine ready: packages, eBPF toolchain, Kubernetes parts. Does only what is missing.
    Setup(setup::Arguments),
    /// Three nodes, a three-tier application, a packet capture: the tour, in a minute.
    Demo(lab::Passed),
    /// Every check and test; the last line counts them.
    Test(test::Arguments),
    /// Leave a stand-alone lab running and print how to enter its nodes and pods.
    Lab(lab::Passed),
    /// A real Kubernetes cluster in namespaces: `up`, `down`, `status`, `kubectl ...`.
    Cluster(lab::Passed),
    /// Build the container images as OCI archives into target/images.
    Image(image::Arguments),
    /// Write the generated files (CRDs), or check that they are up to date.
    Generate(generate::Arguments),
    /// Check that dependencies between the crates point one way.
    Deps,
    /// Ten minutes through the tunnel engine, at least four rekeys, nothing may be lost.
    Soak(lab::Passed),
    /// Key rotation in simulated worlds, from seeds; and one of a large mesh.
    Sim(lab::Passed),
    /// How fast it is, beside others.
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Random input against an independent judge.
    #[command(subcommand)]
    Fuzz(fuzz::Fuzz),
    /// All of cyclonus' generated network policies in a real Kubernetes cluster; every case must pass. `--json FILE`.
    Conformance(lab::Passed),
    /// A thousand pods start while others send to them: nothing that their policy denies may arrive. `--json FILE`.
    FirstPacket(lab::Passed),
    /// What needs WireGuard in the kernel, or another kernel, in a virtual machine.
    Vm(vm::Arguments),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Setup(arguments) => setup::run(&arguments),
        Command::Demo(passed) => lab::demo(&passed),
        Command::Test(arguments) => test::run(&arguments),
        Command::Lab(passed) => lab::lab(&passed),
        Command::Cluster(passed) => lab::cluster(&passed),
        Command::Image(arguments) => image::run(&arguments),
        Command::Generate(arguments) => generate::run(&arguments),
        Command::Deps => deps::run(),
        Command::Soak(passed) => soak::run(&passed),
        Command::Sim(passed) => sim::run(&passed),
        Command::Bench(bench) => bench::run(&bench),
        Command::Fuzz(fuzz) => fuzz::run(&fuzz),
        Command::Conformance(passed) => conformance::run(&passed),
        Command::FirstPacket(passed) => lab::first_packet(&passed),
        Command::Vm(arguments) => vm::run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cargo xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
