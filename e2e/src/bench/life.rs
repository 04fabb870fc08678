//! `bench life`: agents that are killed and started again while numbered packets flow, and tunnel processes that are killed.

use std::{
    fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;

use super::percentile;
use crate::{
    app::wire::FlowReport,
    lab::{Flow, Lab, LabOptions, Pod, PodSpec},
};

/// The limit ends a broken run.
const LIMIT: Duration = Duration::from_secs(60);

/// Restarts that one set of flows lives through: a report keeps a bit for each packet.
const TOGETHER: u32 = 20;

/// Traffic before and behind the end of a tunnel process.
const AROUND: Duration = Duration::from_secs(2);

/// What `warren-bench life` takes.
#[derive(Debug, clap::Args)]
pub struct LifeArgs {
    /// Write the figures to this file.
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// How often an agent is killed and started again.
    #[arg(long, default_value_t = 200)]
    pub restarts: u32,
    /// How often a tunnel process is killed.
    #[arg(long, default_value_t = 10)]
    pub kills: u32,
    /// Packets a second of each of the four flows.
    #[arg(long, default_value_t = 500)]
    pub rate: u32,
}

/// What became of it.
#[derive(Debug, Clone, Default, Serialize)]
struct Figures {
    /// How often an agent was killed and started again.
    agent_restarts: u32,
    /// Numbered packets meanwhile, both directions and families.
    sent: u64,
    lost: u64,
    duplicated: u64,
    /// Until the agent was ready again.
    restart_p50_s: f64,
    restart_p99_s: f64,
    /// How often a tunnel process was killed.
    tunnel_kills: u32,
    /// The longest time that a flow stood still.
    tunnel_gap_p50_ms: u64,
    tunnel_gap_max_ms: u64,
    /// Packets in clear between the nodes, during all of it.
    plaintext_packets: u64,
    encrypted_packets: u64,
}

/// Measures, prints and writes; a packet lost by an agent's restart, one in clear, and a second without traffic after a
/// kill of a tunnel are errors.
pub fn life(args: &LifeArgs) -> Result<()> {
    let mut figures = Figures::default();
    let options = LabOptions {
        nodes: 2,
        ..LabOptions::default()
    };
    Lab::run(options, |lab| {
        let pods = [
            lab.add_pod(PodSpec::new("first", 1))?,
            lab.add_pod(PodSpec::new("second", 2))?,
        ];
        for address in pods[1].addresses() {
            pods[0].ping(*address, 3, 56)?;
        }
        let capture = lab.capture()?;
        agents(lab, &pods, args, &mut figures)?;
        tunnels(lab, &pods, args, &mut figures)?;
        let seen = capture.finish()?;
        (figures.plaintext_packets, figures.encrypted_packets) = (seen.plaintext, seen.encrypted);
        Ok(())
    })?;
    let text = serde_json::to_string_pretty(&figures)?;
    println!("{text}");
    if let Some(path) = &args.json {
        fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    ensure!(
        figures.lost == 0,
        "{} packets were lost by restarts",
        figures.lost
    );
    ensure!(
        figures.plaintext_packets == 0 && figures.encrypted_packets > figures.sent / 2,
        "packets in clear: {}",
        figures.plaintext_packets
    );
    ensure!(
        figures.tunnel_gap_max_ms < 1000,
        "traffic stood still for {} ms",
        figures.tunnel_gap_max_ms
    );
    Ok(())
}

/// Both directions, both families.
fn flows(pods: &[Pod; 2], rate: u32) -> Result<Vec<Flow>> {
    let [first, second] = pods;
    let mut flows = Vec::new();
    for (from, to) in [(first, second), (second, first)] {
        for address in to.addresses() {
            flows.push(from.flow(*address, rate)?);
        }
    }
    Ok(flows)
}

fn finish(mut flows: Vec<Flow>) -> Result<Vec<FlowReport>> {
    flows.iter_mut().for_each(Flow::stop);
    flows.into_iter().map(Flow::finish).collect()
}

fn agents(lab: &Lab, pods: &[Pod; 2], args: &LifeArgs, figures: &mut Figures) -> Result<()> {
    let restarts = args.restarts;
    let mut seconds = Vec::new();
    while figures.agent_restarts < restarts {
        let running = flows(pods, args.rate)?;
        for _ in 0..TOGETHER.min(restarts - figures.agent_restarts) {
            let node = lab.node(1 + (figures.agent_restarts % 2) as u8);
            let start = Instant::now();
            node.kill_agent()?;
            node.start_agent()?;
            node.wait_ready(1, LIMIT)?;
            seconds.push(start.elapsed().as_secs_f64());
            figures.agent_restarts += 1;
        }
        for report in finish(running)? {
            figures.sent += report.sent;
            figures.lost += report.lost;
            figures.duplicated += report.duplicated;
        }
        eprintln!(
            "{} restarts: {} sent, {} lost",
            figures.agent_restarts, figures.sent, figures.lost
        );
    }
    seconds.sort_by(f64::total_cmp);
    figures.restart_p50_s = percentile(&seconds, 50);
    figures.restart_p99_s = percentile(&seconds, 99);
    Ok(())
}

/// The agent starts the tunnel again and configures it.
fn tunnels(lab: &Lab, pods: &[Pod; 2], args: &LifeArgs, figures: &mut Figures) -> Result<()> {
    let mut gaps = Vec::new();
    for kill in 0..args.kills {
        let running = flows(pods, args.rate)?;
        // The flows are the clock.
        thread::sleep(AROUND);
        lab.node(1 + (kill % 2) as u8).kill_tunnel()?;
        thread::sleep(AROUND);
        gaps.extend(finish(running)?.iter().map(|report| report.longest_gap_ms));
        for node in lab.nodes() {
            node.wait_ready(1, LIMIT)?;
        }
        figures.tunnel_kills += 1;
    }
    gaps.sort_unstable();
    figures.tunnel_gap_p50_ms = percentile(&gaps, 50);
    figures.tunnel_gap_max_ms = gaps.last().copied().unwrap_or_default();
    Ok(())
}
