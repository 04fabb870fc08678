//! The lab's tool inside its namespaces: the processes that hold them, and the applications of the pods.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Result;
use clap::Parser;
use serde::Serialize;
use warren_e2e::{
    app::{
        ask::{AskArgs, ask},
        flood::{FloodArgs, flood},
        flow::{self, FlowArgs},
        hammer::{HammerArgs, hammer},
        load::{LoadArgs, load},
        ping::{PingArgs, ping},
        probe::{ProbeArgs, probe},
        serve,
        session::{SessionArgs, session},
        stamps::{StampsArgs, stamps},
        transfer::{TransferArgs, transfer},
    },
    inside::{self, EnterArgs, ExecArgs, PodArgs, ReaperArgs, SandboxArgs},
};

/// The lab's tool inside its namespaces.
#[derive(Debug, Parser)]
#[command(version)]
enum Verb {
    /// Answers with a name, on TCP, HTTP and UDP.
    Serve {
        /// The name.
        #[arg(long)]
        name: String,
        /// Where; may be given more than once.
        #[arg(long, required = true)]
        listen: Vec<SocketAddr>,
    },
    /// One question, one answer.
    Ask(AskArgs),
    /// ICMP echo.
    Ping(PingArgs),
    /// A TCP transfer, every byte checked.
    Transfer(TransferArgs),
    /// Numbered UDP packets at a steady rate.
    Flow(FlowArgs),
    /// Many questions at once: some must be answered, the others must meet silence.
    Probe(ProbeArgs),
    /// A long conversation; a line per answer.
    Session(SessionArgs),
    /// Datagrams and connections to addresses, whether anybody lives there or not.
    Hammer(HammerArgs),
    /// Numbered packets and long conversations with many at once.
    Load(LoadArgs),
    /// Says when each datagram arrived.
    Stamps(StampsArgs),
    /// One datagram from every port.
    Flood(FloodArgs),
    /// Runs a command in another process's namespaces.
    Enter(EnterArgs),
    /// The child of `enter`.
    #[command(hide = true)]
    Exec(ExecArgs),
    /// Removes the lab when the harness ends.
    #[command(hide = true)]
    Reaper(ReaperArgs),
    /// PID 1 of the lab.
    #[command(hide = true)]
    Underlay {
        /// The lab's id.
        #[arg(long)]
        id: String,
    },
    /// Makes a node's namespaces.
    #[command(hide = true)]
    NodeOuter {
        /// The node's description.
        #[arg(long)]
        spec: PathBuf,
    },
    /// PID 1 of a node.
    #[command(hide = true)]
    Node {
        /// The node's description.
        #[arg(long)]
        spec: PathBuf,
    },
    /// Makes or removes a pod's network namespace.
    #[command(hide = true)]
    Sandbox(SandboxArgs),
    /// Makes a pod's other namespaces.
    #[command(hide = true)]
    PodOuter(PodArgs),
    /// PID 1 of a pod.
    #[command(hide = true)]
    Pod(PodArgs),
}

fn main() -> ExitCode {
    match run(Verb::parse()) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<i32> {
    match verb {
        Verb::Serve { name, listen } => {
            for address in listen {
                serve::start(&name, address)?;
            }
            loop {
                std::thread::park();
            }
        }
        Verb::Ask(args) => {
            let timeout = Duration::from_millis(args.timeout);
            print(&ask(args.protocol, args.to, args.from, args.size, timeout)?)
        }
        Verb::Ping(args) => print(&ping(&args)?),
        Verb::Transfer(args) => print(&transfer(
            args.to,
            args.bytes,
            Duration::from_millis(args.timeout),
        )?),
        Verb::Flow(args) => print(&flow::run(&args)?),
        Verb::Probe(args) => print(&probe(&args)?),
        Verb::Session(args) => session(&args).map(|()| 0),
        Verb::Hammer(args) => print(&hammer(&args)?),
        Verb::Load(args) => print(&load(&args)?),
        Verb::Stamps(args) => stamps(&args).map(|()| 0),
        Verb::Flood(args) => print(&flood(&args)?),
        Verb::Enter(args) => inside::enter(&args),
        Verb::Exec(args) => inside::exec_child(&args).map(|()| 0),
        Verb::Reaper(args) => inside::reaper(&args).map(|()| 0),
        Verb::Underlay { id } => inside::underlay(&id).map(|()| 0),
        Verb::NodeOuter { spec } => inside::node_outer(&spec),
        Verb::Node { spec } => inside::node(&spec).map(|()| 0),
        Verb::Sandbox(args) => inside::sandbox(&args).map(|()| 0),
        Verb::PodOuter(args) => inside::pod_outer(&args),
        Verb::Pod(args) => inside::pod(&args).map(|()| 0),
    }
}

fn print(value: &impl Serialize) -> Result<i32> {
    println!("{}", serde_json::to_string(value)?);
    Ok(0)
}
