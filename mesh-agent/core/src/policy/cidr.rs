//! The node's table of prefixes. It holds every prefix at which some statement's answer changes, so that the most
//! specific one of an address decides about all of them: a deny on a wide prefix beats an allow on a narrow one.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

/// Prefixes with their numbers.
#[derive(Debug, Clone, Default)]
pub(super) struct CidrTable {
    pub(super) number: u32,
    pub(super) prefixes: BTreeMap<IpNet, u32>,
    next: u32,
}

impl CidrTable {
    pub(super) fn new(number: u32, first: u32) -> Self {
        Self {
            number,
            prefixes: BTreeMap::new(),
            next: first,
        }
    }

    /// Gives numbers to prefixes that have none, and returns these.
    pub(super) fn add(&mut self, wanted: &BTreeSet<IpNet>) -> BTreeMap<IpNet, u32> {
        let mut out = BTreeMap::new();
        for prefix in wanted {
            if !self.prefixes.contains_key(prefix) {
                out.insert(*prefix, self.next);
                self.next += 1;
            }
        }
        self.prefixes.extend(&out);
        out
    }

    /// Forgets prefixes that are not wanted, and returns them.
    pub(super) fn retain(&mut self, wanted: &BTreeSet<IpNet>) -> BTreeMap<IpNet, u32> {
        let (keep, gone) = std::mem::take(&mut self.prefixes)
            .into_iter()
            .partition(|(p, _)| wanted.contains(p));
        self.prefixes = keep;
        gone
    }
}
