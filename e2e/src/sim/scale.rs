//! One rotation of a large mesh, without faults: how many messages and bytes it takes.

use std::fmt;

use warren_keyd_core::rotation::{Pace, RotationSpec};

use super::{
    NodeId, SECOND, Sabotage,
    faults::Fault,
    stream::{Down, Up},
    world::{Event, World},
};

/// Messages and bytes between keyd and the agents, and writes to the API server, since the rotation began. Bytes are
/// those of the protocol's encoding, without TLS and HTTP, for names and UIDs of usual length.
#[derive(Debug, Clone, Default)]
pub struct Traffic {
    counts: bool,
    /// (messages, bytes) from each agent.
    pub up: Vec<(u64, u64)>,
    /// (messages, bytes) to each agent.
    pub down: Vec<(u64, u64)>,
    /// Pairs that all agents reported together.
    pub pairs: u64,
    /// Writes of a MeshNode.
    pub writes: u64,
}

/// What came of it.
#[derive(Debug, Clone)]
pub struct Scale {
    /// Nodes.
    pub nodes: usize,
    /// Virtual seconds that the rotation took.
    pub seconds: f64,
    /// Messages and bytes.
    pub traffic: Traffic,
    /// Violations, and what was not finished.
    pub violations: Vec<super::Violation>,
}

impl Scale {
    fn per_node(&self, of: &[(u64, u64)]) -> (f64, f64) {
        let count = self.nodes.max(1) as f64;
        let (messages, bytes) = of.iter().fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        (messages as f64 / count, bytes as f64 / count)
    }

    /// Bytes per node, both directions.
    pub fn bytes_per_node(&self) -> f64 {
        self.per_node(&self.traffic.up).1 + self.per_node(&self.traffic.down).1
    }

    /// Messages per node, both directions.
    pub fn messages_per_node(&self) -> f64 {
        self.per_node(&self.traffic.up).0 + self.per_node(&self.traffic.down).0
    }
}

impl fmt::Display for Scale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (up, down) = (self.per_node(&self.traffic.up), self.per_node(&self.traffic.down));
        write!(
            f,
            "{} nodes rotated in {:.0} s: per node {:.0} messages and {:.1} KiB to keyd, {:.0} messages and {:.1} KiB from \
             keyd, {:.1} pair reports per peer; {} writes of MeshNodes in all",
            self.nodes,
            self.seconds,
            up.0,
            up.1 / 1024.0,
            down.0,
            down.1 / 1024.0,
            self.traffic.pairs as f64 / (self.nodes * (self.nodes - 1)).max(1) as f64,
            self.traffic.writes,
        )
    }
}

/// Rotates all keys of a mesh of so many nodes once.
pub fn scale(nodes: usize) -> Scale {
    let start = 20 * SECOND;
    let mut world = World::new(1, nodes, Sabotage::None, false);
    world.probes = false;
    world.scan = 30 * SECOND;
    world.publish_delay = SECOND / 5;
    world.traffic = Some(Traffic {
        up: vec![(0, 0); nodes],
        down: vec![(0, 0); nodes],
        ..Traffic::default()
    });
    world.at(0, Event::Lead);
    (0..nodes).for_each(|node| world.at(0, Event::Fault(Fault::Create(node))));
    world.calm = u64::MAX;
    world.end = start + 3600 * SECOND;
    world.at(start, Event::Fault(Fault::RotateAll));
    world.at(start + SECOND, Event::Check);
    world.run();
    let seconds = (world.now - start) as f64 / SECOND as f64;
    let traffic = world.traffic.take().unwrap_or_default();
    Scale {
        nodes,
        seconds,
        traffic,
        violations: world.outcome().violations,
    }
}

impl World {
    pub(super) fn rotate_all(&mut self) {
        if let Some(traffic) = &mut self.traffic {
            traffic.counts = true;
        }
        let spec = RotationSpec {
            pace: Pace::default(),
            ..RotationSpec::default()
        };
        self.put_rotation("all", spec);
    }
}

/// Usual lengths of what is written out, with their tags.
const NAME: u64 = 22;
const UID: u64 = 38;
const MANIFEST: u64 = 170;

pub(super) fn count_up(world: &mut World, node: NodeId, message: &Up) {
    let Some(traffic) = world.traffic.as_mut().filter(|traffic| traffic.counts) else {
        return;
    };
    let bytes = match message {
        Up::Hello => 1_000,
        Up::Held(keys) => 4 + 38 * keys.len() as u64,
        Up::Report(pairs) => {
            traffic.pairs += pairs.len() as u64;
            pairs
                .iter()
                .map(|pair| 2 + NAME + UID + 12 * pair.paths.len() as u64)
                .sum()
        }
        Up::Offer(slots) => 45 * slots.len() as u64,
    };
    traffic.up[node].0 += 1;
    traffic.up[node].1 += bytes;
}

pub(super) fn count_down(world: &mut World, node: NodeId, message: &Down) {
    let Some(traffic) = world.traffic.as_mut().filter(|traffic| traffic.counts) else {
        return;
    };
    let bytes = match message {
        Down::Ask(_) => 4,
        Down::Forget(_) => 2 + NAME + 4 + 18,
        Down::Update(update) => {
            let entry = |keys: &Option<_>| match keys {
                // Two addresses and two prefixes of both families beside the keys.
                Some(keys) => 2 * NAME + UID + 124 + 45 * slots_in(keys),
                None => NAME + 4,
            };
            MANIFEST + update.nodes.iter().map(|(_, keys)| entry(keys)).sum::<u64>()
        }
    };
    traffic.down[node].0 += 1;
    traffic.down[node].1 += bytes;
}

fn slots_in(keys: &std::rc::Rc<warren_agent_core::slots::NodeKeys>) -> u64 {
    keys.slots.len() as u64
}

pub(super) fn count_write(world: &mut World, _node: NodeId) {
    if let Some(traffic) = world.traffic.as_mut().filter(|traffic| traffic.counts) {
        traffic.writes += 1;
    }
}
