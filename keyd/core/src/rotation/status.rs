//! What a rotation has done so far.

use std::collections::BTreeMap;

use warren_model::{NodeName, NodeUid, PublicKey, keys::PathState};

use super::{Phase, flight::Member};

/// Where a rotation stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum RotationPhase {
    /// Another one runs.
    #[default]
    Pending,
    /// Nodes are on their way.
    Running,
    /// All chosen nodes have new keys (or are gone).
    Succeeded,
    /// Some kept their old key, or still have both.
    Failed,
    /// Somebody asked to stop; nodes past the point of no return were finished.
    Aborted,
}

impl RotationPhase {
    /// Whether nothing more happens in this run.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Aborted)
    }
}

/// How a node's rotation ended, where it did not end well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It keeps its old key: a sentence.
    Failed(String),
    /// Both keys work; the old one goes when the stragglers are back: a sentence.
    Stalled(String),
    /// It was not begun, or taken back, because somebody asked to.
    Aborted,
    /// The node does not exist any more.
    Gone,
}

/// A node of the plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    /// UID of the node that was meant.
    pub uid: NodeUid,
    /// Its active generation when the run began.
    pub from: u64,
    /// `None` while it is on its way, and when it has a newer key.
    pub outcome: Option<Outcome>,
}

/// The durable progress of a rotation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// Where it stands.
    pub phase: RotationPhase,
    /// Which run this is, from 1.
    pub run: u64,
    /// Unix seconds at which the run began; 0 for never.
    pub started: u64,
    /// Unix seconds at which it ended; 0 while it runs.
    pub completed: u64,
    /// The chosen nodes.
    pub plan: BTreeMap<NodeName, Planned>,
}

/// Nodes by phase.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Chosen.
    pub total: u32,
    /// Not begun.
    pub pending: u32,
    /// Making a key.
    pub preparing: u32,
    /// Handshakes on the new paths.
    pub verifying: u32,
    /// Moving to the new paths.
    pub switching: u32,
    /// Waiting for the last packets.
    pub draining: u32,
    /// Destroying the old key.
    pub retiring: u32,
    /// New key only.
    pub done: u32,
    /// Failed, stalled or aborted.
    pub failed: u32,
    /// Deleted meanwhile.
    pub gone: u32,
}

impl Counts {
    pub(super) fn add(&mut self, phase: Phase) {
        self.total += 1;
        *match phase {
            Phase::Pending => &mut self.pending,
            Phase::Preparing => &mut self.preparing,
            Phase::Verifying => &mut self.verifying,
            Phase::Switching => &mut self.switching,
            Phase::Draining => &mut self.draining,
            Phase::Retiring => &mut self.retiring,
            Phase::Done => &mut self.done,
            Phase::Failed => &mut self.failed,
            Phase::Gone => &mut self.gone,
        } += 1;
    }
}

/// How far a rotation is, as the machine sees it now.
#[derive(Debug)]
pub struct Standing<'a> {
    /// What is durable of it.
    pub progress: &'a Progress,
    /// Nodes by phase.
    pub counts: Counts,
    /// The nodes of the plan with the phase of each, and the node that it waits for.
    pub nodes: Vec<(&'a NodeName, Phase, Option<&'a NodeName>)>,
}

/// What an agent has said since it connected.
#[derive(Debug)]
pub struct Reported<'a> {
    pub(super) member: &'a Member,
}

impl<'a> Reported<'a> {
    /// The keys that it holds; `None` where it has not said.
    pub fn held(&self) -> Option<&'a BTreeMap<u64, PublicKey>> {
        self.member.held.as_ref()
    }

    /// Its paths to this incarnation of a peer; `None` where it has not said.
    pub fn paths(&self, peer: &NodeName, uid: &NodeUid) -> Option<&'a [PathState]> {
        self.member.reports.of(peer, uid)
    }
}
