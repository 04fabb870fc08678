//! One number per distinct set of labels.
//!
//! ```text
//! free --acquire--> used --last release--> idle --quarantine over--> resting --quarantine over--> free
//!                    ^---------acquire-------'
//! ```
//! An idle number still belongs to its labels and stays stored. A resting one is deleted; it is reused only after
//! a second quarantine, and the lowest free numbers are not preferred, so that even a restart that forgets the
//! resting ones hardly ever reuses one early.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use warren_model::{IdentityId, Labels};

#[derive(Debug)]
struct Allocated {
    labels: Labels,
    users: usize,
    idle_since: Option<u64>,
}

/// The allocator.
#[derive(Debug)]
pub(crate) struct Identities {
    by_number: BTreeMap<IdentityId, Allocated>,
    by_labels: HashMap<Labels, IdentityId>,
    resting: BTreeMap<IdentityId, u64>,
    cursor: u32,
    quarantine_ms: u64,
    /// Numbers whose existence changed since [`Self::take_changed`].
    changed: BTreeSet<IdentityId>,
}

impl Identities {
    pub(crate) fn new(recovered: Vec<(IdentityId, Labels)>, quarantine_ms: u64, now: u64) -> Self {
        let mut out = Self {
            by_number: BTreeMap::new(),
            by_labels: HashMap::new(),
            resting: BTreeMap::new(),
            cursor: IdentityId::FIRST_ALLOCATED.0,
            quarantine_ms,
            changed: BTreeSet::new(),
        };
        for (number, labels) in recovered {
            let in_range = (IdentityId::FIRST_ALLOCATED..=IdentityId::LAST_ALLOCATED).contains(&number);
            if !in_range || out.by_labels.contains_key(&labels) || out.by_number.contains_key(&number) {
                continue;
            }
            out.by_labels.insert(labels.clone(), number);
            out.by_number.insert(
                number,
                Allocated {
                    labels,
                    users: 0,
                    idle_since: Some(now),
                },
            );
            out.cursor = out.cursor.max(number.0 + 1);
            out.changed.insert(number);
        }
        out
    }

    /// The number of these labels, for one more user. `None` when all numbers are taken.
    pub(crate) fn acquire(&mut self, labels: &Labels) -> Option<IdentityId> {
        let number = match self.by_labels.get(labels) {
            Some(number) => *number,
            None => self.allocate(labels.clone())?,
        };
        if let Some(allocated) = self.by_number.get_mut(&number) {
            allocated.users += 1;
            allocated.idle_since = None;
        }
        Some(number)
    }

    fn allocate(&mut self, labels: Labels) -> Option<IdentityId> {
        let (first, last) = (IdentityId::FIRST_ALLOCATED.0, IdentityId::LAST_ALLOCATED.0);
        let start = self.cursor.clamp(first, last);
        let number = (start..=last)
            .chain(first..start)
            .map(IdentityId)
            .find(|number| !self.by_number.contains_key(number) && !self.resting.contains_key(number))?;
        self.cursor = if number.0 == last { first } else { number.0 + 1 };
        self.by_labels.insert(labels.clone(), number);
        self.by_number.insert(
            number,
            Allocated {
                labels,
                users: 0,
                idle_since: None,
            },
        );
        self.changed.insert(number);
        Some(number)
    }

    /// One user less. Reserved numbers are nobody's.
    pub(crate) fn release(&mut self, number: IdentityId, now: u64) {
        if let Some(allocated) = self.by_number.get_mut(&number) {
            allocated.users = allocated.users.saturating_sub(1);
            if allocated.users == 0 {
                allocated.idle_since = Some(now);
            }
        }
    }

    /// Moves what has waited long enough one step towards free.
    pub(crate) fn collect(&mut self, now: u64) {
        self.resting.retain(|_, until| *until > now);
        let over = |allocated: &Allocated| {
            allocated
                .idle_since
                .is_some_and(|since| now.saturating_sub(since) >= self.quarantine_ms)
        };
        let idle: Vec<_> = self
            .by_number
            .iter()
            .filter(|(_, a)| over(a))
            .map(|(number, _)| *number)
            .collect();
        for number in idle {
            if let Some(allocated) = self.by_number.remove(&number) {
                self.by_labels.remove(&allocated.labels);
                self.resting.insert(number, now + self.quarantine_ms);
                self.changed.insert(number);
            }
        }
    }

    pub(crate) fn labels(&self, number: IdentityId) -> Option<&Labels> {
        self.by_number.get(&number).map(|allocated| &allocated.labels)
    }

    pub(crate) fn len(&self) -> usize {
        self.by_number.len()
    }

    pub(crate) fn take_changed(&mut self) -> BTreeSet<IdentityId> {
        std::mem::take(&mut self.changed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(n: u32) -> Labels {
        Labels([("k8s:app".to_owned(), n.to_string())].into())
    }

    #[test]
    fn equal_labels_share_a_number_from_256_on() {
        let mut ids = Identities::new(vec![], 1000, 0);
        assert_eq!(ids.acquire(&labels(1)), Some(IdentityId(256)));
        assert_eq!(ids.acquire(&labels(2)), Some(IdentityId(257)));
        assert_eq!(ids.acquire(&labels(1)), Some(IdentityId(256)));
        assert_eq!(ids.len(), 2);
    }

    #[test]
    fn a_number_rests_before_it_serves_other_labels() {
        let mut ids = Identities::new(vec![], 1000, 0);
        let number = ids.acquire(&labels(1)).unwrap();
        ids.release(number, 10);
        ids.collect(1009);
        assert_eq!(
            ids.labels(number),
            Some(&labels(1)),
            "idle numbers keep their labels"
        );
        assert_eq!(ids.acquire(&labels(1)), Some(number));
        ids.release(number, 2000);
        ids.collect(3000);
        assert_eq!(ids.labels(number), None);
        // All others are taken: only the resting one could serve.
        for n in 0..(IdentityId::LAST_ALLOCATED.0 - IdentityId::FIRST_ALLOCATED.0) {
            assert!(ids.acquire(&labels(1000 + n)).is_some());
        }
        assert_eq!(ids.acquire(&labels(2)), None);
        ids.collect(3999);
        assert_eq!(ids.acquire(&labels(2)), None);
        ids.collect(4000);
        assert_eq!(ids.acquire(&labels(2)), Some(number));
    }

    #[test]
    fn numbers_survive_a_restart() {
        let stored = vec![
            (IdentityId(300), labels(1)),
            (IdentityId(301), labels(1)),
            (IdentityId(5), labels(9)),
            (IdentityId(70_000), labels(8)),
        ];
        let mut ids = Identities::new(stored, 1000, 0);
        assert_eq!(ids.acquire(&labels(1)), Some(IdentityId(300)));
        assert_eq!(ids.acquire(&labels(2)), Some(IdentityId(301)));
        assert!(ids.acquire(&labels(9)).unwrap() >= IdentityId::FIRST_ALLOCATED);
        assert_eq!(ids.labels(IdentityId(5)), None);
    }
}
