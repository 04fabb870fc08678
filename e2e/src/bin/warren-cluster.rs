//! `warren-cluster`: a real Kubernetes cluster to look around in, and the processes 1 of its nodes.

use std::{
    io::Write as _,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use warren_e2e::cluster::{
    self, Cluster, Left, Options,
    bench::{self, BenchArgs},
    conformance::{self, ConformanceArgs},
    hello::{HelloArgs, hello},
    inside::{self, JoinArgs},
};

/// A real Kubernetes cluster in namespaces of this machine.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Which cluster, by its id, where more than one runs.
    #[arg(long, global = true)]
    id: Option<String>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    /// Start a cluster, install Warren, and leave it running.
    Up(Up),
    /// Remove a cluster; with --all every one.
    Down {
        /// Every cluster on this machine.
        #[arg(long)]
        all: bool,
    },
    /// What runs, and how to enter it.
    Status,
    /// kubectl, as the administrator.
    #[command(disable_help_flag = true)]
    Kubectl {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Measure how long a change of a policy takes.
    BenchPolicy(BenchArgs),
    /// Run cyclonus' generated network policies.
    Conformance(ConformanceArgs),
    /// One Hello to keyd.
    #[command(hide = true)]
    Hello(HelloArgs),
    #[command(hide = true)]
    NodeOuter {
        #[arg(long)]
        spec: PathBuf,
    },
    #[command(hide = true)]
    Node {
        #[arg(long)]
        spec: PathBuf,
    },
    #[command(hide = true)]
    Join(JoinArgs),
    #[command(hide = true)]
    Exec {
        #[arg(trailing_var_arg = true, required = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
}

#[derive(clap::Args)]
struct Up {
    /// How many nodes.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=9))]
    nodes: u8,
    /// Only Kubernetes.
    #[arg(long)]
    no_warren: bool,
    /// IPv6 is the first family.
    #[arg(long)]
    ipv6_first: bool,
    /// Values for the chart, as Helm's --set takes them.
    #[arg(long)]
    set: Vec<String>,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(error) => {
            eprintln!("warren-cluster: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<i32> {
    let id = arguments.id.as_deref();
    match arguments.verb {
        Verb::Up(up) => self::up(&up).map(|()| 0),
        Verb::Down { all } => down(id, all).map(|()| 0),
        Verb::Status => status().map(|()| 0),
        Verb::Kubectl { arguments } => kubectl(id, &arguments),
        Verb::BenchPolicy(arguments) => bench::run(&arguments).map(|()| 0),
        Verb::Conformance(arguments) => conformance::run(&arguments).map(|()| 0),
        Verb::Hello(arguments) => hello(&arguments).map(|()| 0),
        Verb::NodeOuter { spec } => inside::node_outer(&spec),
        Verb::Node { spec } => inside::node(&spec).map(|()| 0),
        Verb::Join(arguments) => inside::join(&arguments),
        Verb::Exec { command } => inside::exec(&command).map(|()| 0),
    }
}

fn up(up: &Up) -> Result<()> {
    let cluster = Cluster::start(Options {
        nodes: up.nodes,
        warren: !up.no_warren,
        verbose: true,
        ipv6_first: up.ipv6_first,
    })?;
    let installed = if up.no_warren {
        cluster.wait_pods(std::time::Duration::from_secs(120))
    } else {
        let set: Vec<&str> = up.set.iter().map(String::as_str).collect();
        cluster.install(&set)
    };
    // Left running also when the installation failed: to look into.
    let folder = cluster.folder().to_owned();
    let left = cluster.leave()?;
    describe(&folder, &left);
    installed
}

fn down(id: Option<&str>, all: bool) -> Result<()> {
    let clusters = if all { cluster::left() } else { vec![the_one(id)?] };
    for (folder, left) in clusters {
        cluster::down(&folder)?;
        println!("cluster {} is gone", left.id);
    }
    Ok(())
}

fn status() -> Result<()> {
    let clusters = cluster::left();
    if clusters.is_empty() {
        println!("no cluster runs here; `cargo xtask cluster up` starts one");
    }
    for (folder, left) in clusters {
        describe(&folder, &left);
        let control = left.control.to_string();
        let mut command = Command::new("nsenter");
        command.args(["-t", &control, "-n"]).args(&left.kubectl).args([
            "get",
            "nodes,pods",
            "-A",
            "-o",
            "wide",
        ]);
        command.status().context("cannot run nsenter (util-linux)")?;
    }
    Ok(())
}

fn describe(folder: &Path, left: &Left) {
    let mut text = format!("cluster {} in {} (logs below it)\n", left.id, folder.display());
    text += &format!("  control plane: nsenter -t {} -n\n", left.control);
    for (index, pid) in left.nodes.iter().enumerate() {
        text += &format!("  node{}:         nsenter -t {pid} -n -m -u -i -p\n", index + 1);
    }
    text += "  pods:          cargo xtask cluster kubectl exec -it POD -- sh\n";
    text += "  remove it:     cargo xtask cluster down\n";
    // A reader that has seen enough (`| head`) is no failure.
    let _ = std::io::stdout().write_all(text.as_bytes());
}

fn kubectl(id: Option<&str>, arguments: &[String]) -> Result<i32> {
    let (_, left) = the_one(id)?;
    let mut command = Command::new("nsenter");
    command
        .args(["-t", &left.control.to_string(), "-n"])
        .args(&left.kubectl)
        .args(arguments);
    Err(command.exec()).context("cannot run nsenter (util-linux)")
}

/// The cluster with this id, or the only one.
fn the_one(id: Option<&str>) -> Result<(PathBuf, Left)> {
    let mut clusters = cluster::left();
    if let Some(id) = id {
        clusters.retain(|(_, left)| left.id == id);
        ensure!(
            !clusters.is_empty(),
            "there is no cluster {id}: `cargo xtask cluster status` lists them"
        );
    }
    match clusters.len() {
        1 => Ok(clusters.remove(0)),
        0 => bail!("no cluster runs here; `cargo xtask cluster up` starts one"),
        n => bail!("{n} clusters run here: choose one with --id (`cargo xtask cluster status` lists them)"),
    }
}
