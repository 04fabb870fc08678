//! Traffic between all pods of a lab, and how much of it arrived.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;

use crate::{
    app::load::Share,
    lab::{Lab, Load, PORT, Pod, PodSpec, wait::wait_for},
    scenario::{at, wait_answers},
};

/// How much of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Rates {
    /// Packets per second each way between the pods of the first two nodes.
    pub pair: u32,
    /// Packets per second each way on every other pair.
    pub others: u32,
    /// TCP connections per pair and family.
    pub connections: u32,
}

impl Rates {
    /// What issue 5 asks for, and less: a machine that cannot carry it without a rotation proves nothing by it.
    pub const LADDER: [Self; 6] = [
        Self::of(10_000, 500),
        Self::of(5_000, 500),
        Self::of(2_000, 500),
        Self::of(1_000, 200),
        Self::of(500, 100),
        Self::of(200, 50),
    ];

    const fn of(pair: u32, others: u32) -> Self {
        Self {
            pair,
            others,
            connections: 20,
        }
    }
}

/// What became of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// Numbered packets.
    pub sent: u64,
    /// Of these, those that did not arrive.
    pub lost: u64,
    /// Of these, those that arrived more than once.
    pub duplicated: u64,
    /// Of these, those that arrived behind a later one.
    pub reordered: u64,
    /// The longest time without a packet in any flow, milliseconds.
    pub longest_gap_ms: u64,
    /// TCP conversations.
    pub connections: u64,
    /// Questions that were answered in them.
    pub answers: u64,
    /// Conversations that broke.
    pub resets: u64,
}

impl Tally {
    /// Nothing is missing, and there was something.
    pub fn is_whole(&self) -> bool {
        self.sent > 0 && self.lost == 0 && self.duplicated == 0 && self.resets == 0
    }
}

/// A pod on every node.
pub fn pods(lab: &Lab) -> Result<Vec<Pod>> {
    let pods = lab
        .nodes()
        .iter()
        .map(|node| lab.add_pod(PodSpec::new(&format!("pod{}", node.number), node.number)))
        .collect::<Result<Vec<_>>>()?;
    for from in &pods {
        for to in pods.iter().filter(|to| to.name() != from.name()) {
            wait_answers(from, to)?;
        }
    }
    Ok(pods)
}

/// Traffic that flows.
#[derive(Debug)]
pub struct Traffic {
    loads: Vec<Load>,
    start: Instant,
}

impl Traffic {
    /// Between all pods, both ways and in both families, each of which has half of the packets.
    pub fn start(pods: &[Pod], rates: Rates) -> Result<Self> {
        let mut loads = Vec::new();
        for (index, from) in pods.iter().enumerate() {
            let (mut flows, mut tcp) = (Vec::new(), Vec::new());
            for (other, to) in pods.iter().enumerate().filter(|(other, _)| *other != index) {
                let rate = if index + other == 1 {
                    rates.pair
                } else {
                    rates.others
                };
                for v6 in [false, true] {
                    let to = at(to.address(v6)?, PORT);
                    let amount = (rate / 2).max(1);
                    flows.push(Share { to, amount });
                    if index < other && rates.connections > 0 {
                        let amount = rates.connections;
                        tcp.push(Share { to, amount });
                    }
                }
            }
            loads.push(Load::start(from, &flows, &tcp)?);
        }
        loads.iter_mut().try_for_each(Load::wait_ready)?;
        Ok(Self {
            loads,
            start: Instant::now(),
        })
    }

    /// For how long it has flowed.
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// Lets it flow for so long since its start. The traffic is the clock.
    pub fn flow_for(&self, time: Duration) -> Result<()> {
        let over = || self.start.elapsed() >= time;
        wait_for(time + Duration::from_secs(60), "the traffic has flowed", over)
    }

    /// Stops it and counts.
    pub fn finish(mut self) -> Result<Tally> {
        let time = self.start.elapsed().as_secs_f64();
        self.loads.iter_mut().for_each(Load::stop);
        let mut tally = Tally::default();
        for load in self.loads {
            let report = load.finish().context("a load did not end well")?;
            ensure!(!report.flows.is_empty(), "a load sent nothing");
            for flow in &report.flows {
                if let Some((first, last)) = flow.lost_runs.first() {
                    let after = *first as f64 * time / flow.sent as f64;
                    eprintln!(
                        "to {}: {} of {} lost, of {first} to {last} first, {after:.0} s after the start; the first runs: {:?}",
                        flow.receiver, flow.lost, flow.sent, flow.lost_runs
                    );
                }
                tally.sent += flow.sent;
                tally.lost += flow.lost;
                tally.duplicated += flow.duplicated;
                tally.reordered += flow.reordered;
                tally.longest_gap_ms = tally.longest_gap_ms.max(flow.longest_gap_ms);
            }
            tally.connections += report.connections;
            tally.answers += report.answers;
            tally.resets += report.resets.len() as u64;
            for reset in &report.resets {
                eprintln!("broken: {reset}");
            }
        }
        Ok(tally)
    }
}
