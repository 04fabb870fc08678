//! `bench rotation`: keys rotate under traffic; nothing may be lost, and of old keys nothing may be left.

pub mod gone;
pub mod load;

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Serialize;

use self::{
    gone::Former,
    load::{Rates, Tally, Traffic, pods},
};
use super::percentile;
use crate::{
    lab::{Lab, LabOptions, Pod, QUICKLY},
    scenario::two_nodes,
};

/// What `warren-bench rotation` takes.
#[derive(Debug, clap::Args)]
pub struct RotationArgs {
    /// Write the figures to this file.
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Rotations of the whole cluster, and as many of single nodes, in each lab.
    #[arg(long, default_value_t = 50)]
    pub rotations: u32,
    /// Nodes of the labs, one after the other.
    #[arg(long, value_delimiter = ',', default_values_t = [3, 5])]
    pub nodes: Vec<u8>,
    /// Seconds of the control run without a rotation.
    #[arg(long, default_value_t = 20)]
    pub control: u64,
    /// Packets per second each way on the first pair [default: 10,000, or what the control run carries without loss].
    #[arg(long, requires = "others")]
    pub rate: Option<u32>,
    /// Packets per second each way on every other pair.
    #[arg(long, requires = "rate")]
    pub others: Option<u32>,
}

impl RotationArgs {
    fn ladder(&self) -> Vec<Rates> {
        match (self.rate, self.others) {
            (Some(pair), Some(others)) => vec![Rates {
                pair,
                others,
                ..Rates::LADDER[0]
            }],
            _ => Rates::LADDER.to_vec(),
        }
    }
}

/// What a lab showed.
#[derive(Debug, Clone, Serialize)]
pub struct Run {
    /// Nodes of the lab.
    pub nodes: u8,
    /// Traffic: what the control run carried without loss.
    pub rates: Rates,
    /// What became of the control run.
    pub control: Tally,
    /// What became of the traffic.
    pub tally: Tally,
    /// Rotations of all nodes.
    pub cluster_rotations: u32,
    /// Rotations of one node.
    pub node_rotations: u32,
    /// Keys that were replaced, and of which nothing was found anywhere afterwards.
    pub keys_gone: usize,
    /// Packets in clear between the nodes.
    pub plaintext_packets: u64,
    /// How long each rotation took.
    pub seconds: Vec<f64>,
}

/// All figures.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Figures {
    /// Rotations that succeeded.
    pub rotations: u32,
    /// Numbered packets.
    pub sent: u64,
    /// Of these, those that did not arrive.
    pub lost: u64,
    /// Of these, those that arrived more than once.
    pub duplicated: u64,
    /// TCP conversations that broke.
    pub resets: u64,
    /// Packets in clear between the nodes.
    pub plaintext_packets: u64,
    /// Packets in clear that the same capture saw of the same traffic with encryption off.
    pub power_check_plaintext_packets: u64,
    /// Keys that were replaced, and of which nothing was found anywhere afterwards.
    pub keys_gone: usize,
    /// How long a rotation took: the middle one.
    pub seconds_p50: f64,
    /// How long a rotation took: 99 % were quicker.
    pub seconds_p99: f64,
    /// The labs.
    pub runs: Vec<Run>,
}

impl Figures {
    /// Sums up.
    pub fn of(runs: Vec<Run>, power_check: u64) -> Self {
        let sum = |of: fn(&Run) -> u64| runs.iter().map(of).sum::<u64>();
        let mut seconds: Vec<f64> = runs.iter().flat_map(|run| run.seconds.clone()).collect();
        seconds.sort_by(f64::total_cmp);
        Self {
            rotations: runs
                .iter()
                .map(|run| run.cluster_rotations + run.node_rotations)
                .sum(),
            sent: sum(|run| run.tally.sent),
            lost: sum(|run| run.tally.lost),
            duplicated: sum(|run| run.tally.duplicated),
            resets: sum(|run| run.tally.resets),
            plaintext_packets: sum(|run| run.plaintext_packets),
            power_check_plaintext_packets: power_check,
            keys_gone: runs.iter().map(|run| run.keys_gone).sum(),
            seconds_p50: percentile(&seconds, 50),
            seconds_p99: percentile(&seconds, 99),
            runs,
        }
    }

    /// What is not as it must be, a sentence each.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        for (count, what) in [
            (self.lost, "packets were lost"),
            (self.duplicated, "packets came more than once"),
            (self.resets, "connections broke"),
            (self.plaintext_packets, "packets crossed in clear"),
        ] {
            if count > 0 {
                faults.push(format!("{count} {what}"));
            }
        }
        for (is, what) in [
            (self.rotations == 0, "nothing was rotated"),
            (self.sent == 0, "nothing was sent"),
            (self.keys_gone == 0, "no key was replaced"),
            (
                self.power_check_plaintext_packets == 0,
                "the power check saw no plaintext: the capture proves nothing",
            ),
        ] {
            if is {
                faults.push(what.to_owned());
            }
        }
        faults
    }
}

/// Measures, prints and writes; bad figures are an error.
pub fn rotation(args: &RotationArgs) -> Result<()> {
    ensure!(args.rotations > 0, "--rotations 0 measures nothing");
    let mut runs = Vec::new();
    for nodes in &args.nodes {
        let options = Options {
            nodes: *nodes,
            ladder: args.ladder(),
            control: Duration::from_secs(args.control),
            cluster: args.rotations,
            single: args.rotations,
        };
        runs.push(in_lab(&options)?);
    }
    let rates = runs.last().map_or(Rates::LADDER[5], |run| run.rates);
    let figures = Figures::of(runs, power_check(rates)?);
    let text = serde_json::to_string_pretty(&figures)?;
    println!("{text}");
    if let Some(path) = &args.json {
        fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    let faults = figures.faults();
    ensure!(faults.is_empty(), "{}", faults.join("; "));
    Ok(())
}

/// What to do in a lab.
#[derive(Debug, Clone)]
pub struct Options {
    /// Nodes.
    pub nodes: u8,
    /// The first of these that the control run carries without loss is what flows.
    pub ladder: Vec<Rates>,
    /// How long the control run is.
    pub control: Duration,
    /// Rotations of all nodes.
    pub cluster: u32,
    /// Rotations of one node after the other.
    pub single: u32,
}

/// Rotates in a lab of its own.
pub fn in_lab(options: &Options) -> Result<Run> {
    let lab_options = LabOptions {
        nodes: options.nodes,
        ..LabOptions::default()
    };
    let mut run = None;
    Lab::run(lab_options, |lab| {
        run = Some(rotate_all(lab, options)?);
        Ok(())
    })?;
    run.context("the lab did not run")
}

fn rotate_all(lab: &Lab, options: &Options) -> Result<Run> {
    let pods = pods(lab)?;
    let (rates, control) = carried(lab, &pods, options)?;
    let capture = lab.capture()?;
    let traffic = Traffic::start(&pods, rates)?;
    let all: Vec<u8> = lab.nodes().iter().map(|node| node.number).collect();
    let (mut seconds, mut keys_gone) = (Vec::new(), 0);
    for number in 0..options.cluster {
        let former = Former::note(lab, &all, number == 0)?;
        seconds.push(rotate_once(lab, &traffic, &["--all"])?);
        keys_gone += behind_all_others(|| former.gone(lab))?;
    }
    for number in 0..options.single {
        let node = all[number as usize % all.len()];
        let former = Former::note(lab, &[node], false)?;
        seconds.push(rotate_once(lab, &traffic, &["--node", &lab.node(node).name])?);
        keys_gone += behind_all_others(|| former.gone(lab))?;
    }
    let tally = traffic.finish()?;
    eprintln!("{} nodes: {tally:?}", options.nodes);
    let counts = capture.finish()?;
    for sample in &counts.plaintext_samples {
        eprintln!("in clear: {sample}");
    }
    Ok(Run {
        nodes: options.nodes,
        rates,
        control,
        tally,
        cluster_rotations: options.cluster,
        node_rotations: options.single,
        keys_gone,
        plaintext_packets: counts.plaintext,
        seconds,
    })
}

/// Does work while everything else is served first. A search of all memories has a processor to itself for seconds, and a
/// scheduler that is fair to sessions (`CONFIG_SCHED_AUTOGROUP`) gives it as much as it gives a tunnel with thousands of
/// packets a second, whose queue then overflows. Without that feature it changes nothing.
fn behind_all_others<T>(work: impl FnOnce() -> T) -> T {
    let nice = |value: &str| {
        let _ = fs::write("/proc/self/autogroup", value);
    };
    nice("19");
    let done = work();
    nice("0");
    done
}

/// The highest rates that the machine carries without a rotation, and what became of that run. The capture runs as well: it
/// needs its share of the machine, and must keep up.
fn carried(lab: &Lab, pods: &[Pod], options: &Options) -> Result<(Rates, Tally)> {
    for rates in &options.ladder {
        let capture = lab.capture()?;
        let traffic = Traffic::start(pods, *rates)?;
        traffic.flow_for(options.control)?;
        let tally = traffic.finish()?;
        let captured = capture.finish();
        let verdict = match &captured {
            Ok(_) if tally.is_whole() => "without loss",
            Ok(_) => "not without loss",
            Err(_) => "more than the capture can count",
        };
        eprintln!(
            "{} nodes, control run: {rates:?}: {verdict}: {tally:?}",
            options.nodes
        );
        if captured.is_ok() && tally.is_whole() {
            return Ok((*rates, tally));
        }
    }
    bail!("the machine carries none of the rates without loss, also without a rotation: is it too busy?")
}

/// A rotation; how long it took, in seconds.
fn rotate_once(lab: &Lab, traffic: &Traffic, which: &[&str]) -> Result<f64> {
    let (start, flowed) = (Instant::now(), traffic.elapsed().as_secs());
    lab.rotate(&[which, &QUICKLY].concat())?;
    let seconds = start.elapsed().as_secs_f64();
    eprintln!("after {flowed} s: {} rotated in {seconds:.1} s", which.join(" "));
    Ok(seconds)
}

/// The same traffic between two nodes without encryption: how many packets in clear the capture sees.
pub fn power_check(rates: Rates) -> Result<u64> {
    let mut seen = 0;
    Lab::run(two_nodes(false), |lab| {
        let pods = pods(lab)?;
        let capture = lab.capture()?;
        let traffic = Traffic::start(&pods, rates)?;
        traffic.flow_for(Duration::from_secs(1))?;
        let tally = traffic.finish()?;
        seen = capture.finish()?.plaintext;
        ensure!(
            seen >= tally.sent / 2,
            "of {} packets in clear {seen} were seen",
            tally.sent
        );
        Ok(())
    })?;
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bad_figure_is_a_fault() {
        let good = Figures {
            rotations: 1,
            sent: 1,
            keys_gone: 1,
            power_check_plaintext_packets: 1,
            ..Figures::default()
        };
        assert_eq!(good.faults(), Vec::<String>::new());
        let changes: [fn(&mut Figures); 8] = [
            |figures| figures.rotations = 0,
            |figures| figures.sent = 0,
            |figures| figures.lost = 1,
            |figures| figures.duplicated = 1,
            |figures| figures.resets = 1,
            |figures| figures.plaintext_packets = 1,
            |figures| figures.keys_gone = 0,
            |figures| figures.power_check_plaintext_packets = 0,
        ];
        for change in changes {
            let mut bad = good.clone();
            change(&mut bad);
            assert_eq!(bad.faults().len(), 1, "{bad:?}");
        }
    }
}
