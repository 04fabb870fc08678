//! What agents have been told: records, versions, and how to get from one version to the next.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::IpAddr,
};

use crate::event::{Change, Record, RecordKey};

/// How many versions can be resumed from.
const HISTORY_VERSIONS: usize = 1024;
/// How many touched keys the history may hold in all.
const HISTORY_KEYS: usize = 200_000;

/// The published directory of one epoch.
#[derive(Debug, Default)]
pub(crate) struct Published {
    version: u64,
    records: BTreeMap<RecordKey, Record>,
    history: VecDeque<(u64, Vec<RecordKey>)>,
    history_keys: usize,
    /// The version in which an address lost its former owner.
    retired: BTreeMap<IpAddr, u64>,
}

impl Published {
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    pub(crate) fn records(&self) -> &BTreeMap<RecordKey, Record> {
        &self.records
    }

    /// Compares the touched keys with `current` and makes a new version of the differences. `None` where there
    /// are none and `always` is false.
    pub(crate) fn advance(
        &mut self,
        touched: BTreeSet<RecordKey>,
        current: impl Fn(&RecordKey) -> Option<Record>,
        always: bool,
    ) -> Option<Change> {
        let version = self.version + 1;
        let mut change = Change::default();
        let mut keys = vec![];
        for key in touched {
            let new = current(&key);
            let old = self.records.get(&key);
            if old == new.as_ref() {
                continue;
            }
            if let (RecordKey::Workload(address), Some(Record::Workload(old))) = (&key, old) {
                let same = |new: &Record| matches!(new, Record::Workload(new) if new.pod == old.pod && new.node == old.node);
                if !new.as_ref().is_some_and(same) {
                    self.retired.insert(*address, version);
                }
            }
            keys.push(key.clone());
            match new {
                Some(record) => {
                    self.records.insert(key, record.clone());
                    change.upserts.push(record);
                }
                None => {
                    self.records.remove(&key);
                    change.removes.push(key);
                }
            }
        }
        if keys.is_empty() && !always {
            return None;
        }
        self.version = version;
        self.history_keys += keys.len();
        self.history.push_back((version, keys));
        while self.history.len() > HISTORY_VERSIONS || self.history_keys > HISTORY_KEYS {
            let Some((_, keys)) = self.history.pop_front() else {
                break;
            };
            self.history_keys -= keys.len();
        }
        Some(change)
    }

    /// What an agent at `version` lacks; `None` where only a snapshot helps.
    pub(crate) fn since(&self, version: u64) -> Option<Change> {
        let known = self.history.front().map_or(self.version, |(first, _)| first - 1);
        if version > self.version || version < known {
            return None;
        }
        let later = self.history.iter().filter(|(at, _)| *at > version);
        let keys: BTreeSet<_> = later.flat_map(|(_, keys)| keys).collect();
        let mut change = Change::default();
        for key in keys {
            match self.records.get(key) {
                Some(record) => change.upserts.push(record.clone()),
                None => change.removes.push(key.clone()),
            }
        }
        Some(change)
    }

    /// The version that must be acknowledged before any of these addresses may serve a new owner.
    pub(crate) fn retired_at(&self, addresses: &[IpAddr]) -> Option<u64> {
        addresses
            .iter()
            .filter_map(|address| self.retired.get(address))
            .max()
            .copied()
    }

    /// Everybody has acknowledged up to here.
    pub(crate) fn forget_retired(&mut self, acknowledged: u64) {
        self.retired.retain(|_, version| *version > acknowledged);
    }
}
