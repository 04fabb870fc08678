//! `demo`, `lab` and `cluster`: programs of `warren-e2e`, with everything they need in place.

use anyhow::Result;

use crate::{
    command::{cargo, command, run},
    image::{self, Profile},
    paths,
    setup::{Group, ensure},
};

/// Everything after the command goes to the program behind it.
#[derive(clap::Args)]
pub(crate) struct Passed {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) arguments: Vec<String>,
}

impl Passed {
    /// The same arguments behind a word.
    pub(crate) fn behind(&self, word: &str) -> Self {
        let words = std::iter::once(word.to_owned()).chain(self.arguments.iter().cloned());
        Self {
            arguments: words.collect(),
        }
    }
}

/// See `warren-demo --help`.
pub(crate) fn demo(passed: &Passed) -> Result<()> {
    stand_alone("warren-demo", Profile::Dev, passed)
}

/// See `warren-lab --help`.
pub(crate) fn lab(passed: &Passed) -> Result<()> {
    stand_alone("warren-lab", Profile::Dev, passed)
}

/// See `warren-first-packet --help`.
pub(crate) fn first_packet(passed: &Passed) -> Result<()> {
    stand_alone("warren-first-packet", Profile::Dev, passed)
}

/// Builds everything and runs a program that needs root and namespaces.
pub(crate) fn stand_alone(program: &str, profile: Profile, passed: &Passed) -> Result<()> {
    ensure(&[Group::Base, Group::Bpf])?;
    println!("building (minutes the first time) ...");
    run(cargo().args(["build", "--workspace", "--profile", profile.names().0]))?;
    start(program, profile, passed)
}

/// See `warren-cluster --help`. Only `up` builds anything else.
pub(crate) fn cluster(passed: &Passed) -> Result<()> {
    if passed.arguments.first().is_some_and(|first| first == "up") {
        ensure(&[Group::Base, Group::Bpf, Group::Kubernetes])?;
        let kubernetes = ["lab-app", "pause", "coredns", "cyclonus-worker"].map(String::from);
        let plain = passed.arguments.iter().any(|argument| argument == "--no-warren");
        image::build(if plain { &kubernetes } else { &[] }, Profile::Dev)?;
    }
    run(cargo().args(["build", "--quiet", "--workspace"]))?;
    start("warren-cluster", Profile::Dev, passed)
}

/// A verb of `warren-cluster` that starts a cluster of its own, with Warren in it, built like this.
pub(crate) fn in_cluster(verb: &str, profile: Profile, passed: &Passed) -> Result<()> {
    ensure(&[Group::Base, Group::Bpf, Group::Kubernetes])?;
    image::build(&[], profile)?;
    run(cargo().args(["build", "--quiet", "--workspace", "--bins"]))?;
    start("warren-cluster", Profile::Dev, &passed.behind(verb))
}

fn start(program: &str, profile: Profile, passed: &Passed) -> Result<()> {
    let folder = paths::target().join(profile.names().1);
    run(command(folder.join(program)).args(&passed.arguments))
}
