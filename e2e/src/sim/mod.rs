//! Key rotation on a virtual clock: the machine of `keyd`'s core and the slots of the agent's core, unchanged, in a
//! simulated world.
//!
//! Simulated are WireGuard's handshakes and sessions, the network between the nodes (delay, loss, reordering,
//! partitions), the streams between agents and `keyd` (delay, silent breaks), the API server (compare-and-swap,
//! watches that lag, outages), disks (directory and keys, also stale or replaced ones), processes that are killed
//! between any two of their steps, nodes that reboot, come, go and come back, and leaders that do not know yet
//! that they are deposed. Everything follows from the seed.
//!
//! The judge ([`judge`]) knows nothing of phases. It sees packets, devices and what is durable:
//!
//! 1. A packet that the network carries is sent and accepted, between any two nodes that have exchanged packets since
//!    the last reboot of one of them or partition of the two. Packets are sent all the time, and right before
//!    and after every single change of a device or map, with the shortest and the longest delay.
//! 2. A generation has one key, for ever; `active` and `last` never go back.
//! 3. An agent never goes back an epoch or a version while its node runs.
//! 4. When everything has healed, all rotations end, every pair has a path on the active keys alone, and no other key
//!    is left on any disk, in any memory, on any device.
//! 5. No packet travels in a session without a pre-shared key where both keys were made with them, nor in one with a
//!    pre-shared key where they were not. In the end both ends have the same one.
//!
//! That the judge can find something is tested with [`Sabotage`].

mod agent;
mod apply;
mod control;
mod exchange;
mod faults;
mod judge;
mod kernel;
mod network;
mod scale;
mod stream;
#[cfg(test)]
mod tests;
mod world;

pub use judge::Violation;
pub use scale::{Scale, Traffic, scale};

/// Virtual time in microseconds.
type Micros = u64;
/// Index of a node.
type NodeId = usize;

const MILLI: Micros = 1_000;
const SECOND: Micros = 1_000_000;

/// A fault built in, to see whether the judge finds it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Sabotage {
    /// None.
    #[default]
    None,
    /// The store overwrites instead of comparing.
    ForcedWrites,
    /// Agents report every path as verified, and move as soon as the directory says so.
    Blind,
    /// Agents report every path as quiet and moved.
    EarlyMoved,
    /// A leader publishes what it wrote without asking whether it still leads.
    Unfenced,
    /// Agents apply whatever directory is on their disk.
    TrustStaleDisk,
    /// Agents move without having heard the peer.
    MoveUnheard,
    /// Agents do not wait for a pre-shared key, and add it later.
    WithoutPsk,
}

/// What came of one seed.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// What the judge found.
    pub violations: Vec<Violation>,
    /// Packets that the judge expected to arrive.
    pub judged_packets: u64,
    /// Key changes that were made active.
    pub commits: u64,
    /// Candidates that were withdrawn.
    pub withdrawals: u64,
    /// Pre-shared keys that an end agreed on.
    pub pre_shared_keys: u64,
    /// How often `keyd` had one forgotten.
    pub forgotten: u64,
    /// Events that were simulated.
    pub events: u64,
    /// What happened, where `trace` was asked for.
    pub trace: Vec<String>,
}

/// Simulates one seed.
pub fn run(seed: u64, sabotage: Sabotage, trace: bool) -> Outcome {
    let mut world = faults::world(seed, sabotage, trace);
    world.run();
    world.outcome()
}
