//! What a rotation is asked for.

use std::collections::{BTreeMap, BTreeSet};

use warren_model::NodeName;

/// Which nodes. Both parts empty: all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection {
    /// By name.
    pub names: BTreeSet<NodeName>,
    /// By labels of the Node, all of which must be there.
    pub labels: BTreeMap<String, String>,
}

impl Selection {
    /// Whether a node is meant. Where both parts are given, both must hold.
    pub fn selects(&self, name: &NodeName, labels: &BTreeMap<String, String>) -> bool {
        (self.names.is_empty() || self.names.contains(name))
            && self
                .labels
                .iter()
                .all(|(key, value)| labels.get(key) == Some(value))
    }
}

/// How many nodes at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Concurrency {
    /// So many.
    Nodes(u32),
    /// So many of a hundred of the chosen ones, at least one.
    Percent(u32),
}

impl Concurrency {
    /// The number of nodes for so many chosen ones.
    pub fn of(self, total: usize) -> usize {
        let wanted = match self {
            Self::Nodes(nodes) => nodes as usize,
            Self::Percent(percent) => total * (percent.min(100) as usize) / 100,
        };
        wanted.max(1)
    }
}

/// The pace. Times in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Nodes at once.
    pub concurrency: Concurrency,
    /// Each node's start is delayed by up to this.
    pub jitter_ms: u64,
    /// How long an old path must be unused and quiet before it goes; at least 1,000.
    pub drain_ms: u64,
    /// How long one node may take.
    pub deadline_ms: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            concurrency: Concurrency::Percent(10),
            jitter_ms: 0,
            drain_ms: 15_000,
            deadline_ms: 600_000,
        }
    }
}

/// What happens to peers whose agent is not connected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Stragglers {
    /// The node waits for them until its deadline; then it keeps its old key.
    #[default]
    Wait,
    /// The same, but pairs that have no traffic to lose are passed over.
    Leave,
    /// At the deadline their keys are revoked.
    Revoke,
}

/// A rotation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RotationSpec {
    /// Which nodes.
    pub selection: Selection,
    /// How fast.
    pub pace: Pace,
    /// Whom not to wait for.
    pub stragglers: Stragglers,
    /// Begins nothing new and takes back what can be taken back.
    pub abort: bool,
    /// Runs again so long after its last start, in seconds.
    pub every_seconds: Option<u64>,
}
