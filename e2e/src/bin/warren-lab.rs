//! `warren-lab`: a stand-alone lab to look around in.

use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use nix::sys::signal::{SigSet, Signal};
use warren_e2e::lab::{Lab, LabOptions, PodSpec, running};
use warren_model::PrefixSource;

/// A stand-alone lab: nodes and pods as namespaces of this machine.
#[derive(Debug, Parser)]
#[command(version)]
enum Verb {
    /// Builds a lab and keeps it until Ctrl-C.
    Up(Up),
    /// Removes labs: the named ones, or the only one.
    Down {
        /// Ids, as `list` prints them.
        ids: Vec<String>,
        /// Every lab on this machine.
        #[arg(long, conflicts_with = "ids")]
        all: bool,
    },
    /// Lists the labs that run.
    List,
}

#[derive(Debug, clap::Args)]
struct Up {
    /// How many nodes.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=100))]
    nodes: u8,
    /// How many pods on each node.
    #[arg(long, default_value_t = 1)]
    pods: u8,
    /// Traffic in clear, for comparison.
    #[arg(long)]
    no_encryption: bool,
    /// Without Warren: a plain routed cluster.
    #[arg(long)]
    plain: bool,
    /// Prefixes are single pod addresses instead of podCIDRs.
    #[arg(long)]
    pod_ip: bool,
    /// Returns at once and leaves the lab running.
    #[arg(long)]
    detach: bool,
}

fn main() -> ExitCode {
    let done = match Verb::parse() {
        Verb::Up(up) => self::up(&up),
        Verb::Down { ids, all } => down(&ids, all),
        Verb::List => list(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn up(args: &Up) -> Result<()> {
    // Until the lab is up the default action holds: this process ends and the reaper cleans up.
    let mut stop = SigSet::empty();
    stop.add(Signal::SIGINT);
    stop.add(Signal::SIGTERM);
    let options = LabOptions {
        nodes: args.nodes,
        encryption: !args.no_encryption,
        warren: !args.plain,
        prefix_source: if args.pod_ip {
            PrefixSource::PodIp
        } else {
            PrefixSource::PodCidr
        },
        ..LabOptions::default()
    };
    let lab = Lab::start(options)?;
    let mut pods = Vec::new();
    for (serial, (pod, node)) in (1..=args.pods)
        .flat_map(|pod| (1..=args.nodes).map(move |node| (pod, node)))
        .enumerate()
    {
        let mut spec = PodSpec::new(
            &format!(
                "pod{node}{}",
                if args.pods > 1 {
                    format!("-{pod}")
                } else {
                    String::new()
                }
            ),
            node,
        );
        if args.pod_ip {
            let serial = u8::try_from(serial + 10).context("too many pods for --pod-ip")?;
            spec.addresses = Some(warren_e2e::lab::net::shared_address(serial));
        }
        pods.push(lab.add_pod(spec)?);
    }
    println!(
        "lab {} is up; logs: {}",
        lab.id(),
        lab.dir().join("logs").display()
    );
    for line in lab.how_to_enter() {
        println!("  {line}");
    }
    for pod in &pods {
        let addresses: Vec<_> = pod.addresses().iter().map(ToString::to_string).collect();
        println!(
            "  {:<16} {}   # {}",
            pod.name(),
            pod.place().how_to_enter(),
            addresses.join(" ")
        );
    }
    println!(
        "  on a node: mesh-agent encrypt status; in a pod: warren-lab-app ask --protocol tcp --to ADDRESS:8080"
    );
    if args.detach {
        pods.iter_mut().for_each(warren_e2e::lab::Pod::release);
        lab.detach()?;
        println!("remove it with: warren-lab down");
        return Ok(());
    }
    println!("Ctrl-C removes it.");
    stop.thread_block().context("cannot block signals")?;
    stop.wait().context("cannot wait for a signal")?;
    println!("removing lab {}", lab.id());
    drop(lab);
    Ok(())
}

fn down(ids: &[String], all: bool) -> Result<()> {
    let labs = running()?;
    let chosen: Vec<_> = if all || (ids.is_empty() && labs.len() == 1) {
        labs
    } else {
        ensure!(
            !ids.is_empty() || labs.is_empty(),
            "several labs run: name one (see `warren-lab list`) or --all"
        );
        for id in ids {
            ensure!(labs.iter().any(|lab| lab.id == *id), "no lab {id} runs");
        }
        labs.into_iter().filter(|lab| ids.contains(&lab.id)).collect()
    };
    if chosen.is_empty() {
        println!("no lab runs");
    }
    for lab in chosen {
        lab.remove()?;
        println!("lab {} removed", lab.id);
    }
    Ok(())
}

fn list() -> Result<()> {
    for lab in running()? {
        println!("{}  {}  reaper {}", lab.id, lab.dir.display(), lab.reaper);
    }
    Ok(())
}
