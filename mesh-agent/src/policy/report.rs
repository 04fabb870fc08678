//! What is known of policy on this node, for status and metrics.

use std::collections::{BTreeMap, BTreeSet};

use prometheus_client::metrics::{counter::Counter, histogram::Histogram};
use warren_bpf::{FlowReport, Usage};

/// Seconds from a directory that is there to policy in force.
const BUCKETS: [f64; 12] = [
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 30.0,
];

/// State of policy.
#[derive(Debug, Clone)]
pub(crate) struct Report {
    /// Endpoints whose policy is in the maps as it should be.
    pub(crate) written: BTreeSet<u16>,
    /// Endpoints that the maps may hold something of.
    pub(crate) occupied: BTreeSet<u16>,
    /// What could not be written and is tried again: a sentence each.
    pub(crate) failing: Vec<String>,
    /// Policy revision.
    pub(crate) revision: u32,
    /// How many policies there are.
    pub(crate) policies: usize,
    /// How many rules there are.
    pub(crate) rules: usize,
    /// Epoch and version of the directory that is in force.
    pub(crate) position: Option<(u64, u64)>,
    /// From a directory that is there to policy in force.
    pub(crate) latency: Histogram,
    /// Entries that were found other than they should be.
    pub(crate) drift: Counter,
    /// Writes that failed.
    pub(crate) failures: Counter,
    /// How full the maps are, as of the last look.
    pub(crate) usage: Vec<Usage>,
    /// Flows, as of the last collection.
    pub(crate) flows: FlowReport,
    /// Why flows could not be collected.
    pub(crate) flows_fault: Option<String>,
    /// Flows that were over and were removed.
    pub(crate) flows_removed: Counter,
    /// Why events cannot be read.
    pub(crate) events_fault: Option<String>,
    /// Packets that events told of, by outcome, direction and reason.
    pub(crate) verdicts: BTreeMap<(String, String, String), u64>,
    /// Events that found no room.
    pub(crate) events_lost: u64,
}

impl Default for Report {
    fn default() -> Self {
        Self {
            written: BTreeSet::new(),
            occupied: BTreeSet::new(),
            failing: Vec::new(),
            revision: 0,
            policies: 0,
            rules: 0,
            position: None,
            latency: Histogram::new(BUCKETS),
            drift: Counter::default(),
            failures: Counter::default(),
            usage: Vec::new(),
            flows: FlowReport::default(),
            flows_fault: None,
            flows_removed: Counter::default(),
            events_fault: None,
            verdicts: BTreeMap::new(),
            events_lost: 0,
        }
    }
}

impl Report {
    /// Everything that failed and is tried again.
    pub(crate) fn faults(&self) -> Vec<String> {
        let others = self.flows_fault.iter().chain(&self.events_fault);
        self.failing.iter().chain(others).cloned().collect()
    }
}
