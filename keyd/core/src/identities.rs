//! One number per distinct set of labels.
//!
//! ```text
//! free --acquire--> used --last release--> idle --quarantine over--> resting --quarantine over--> free
//!                    ^---------acquire-------'
//! ```
//! An idle number still belongs to its labels and stays stored. A resting one is deleted; it is reused only after
//! a second quarantine, and the lowest free numbers are not preferred, so that even a restart that forgets the
//! resting ones hardly ever reuses one early.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    fmt,
};

use warren_model::{IdentityId, Labels, policy::keys::NAMESPACE};

/// How many numbers there are.
const NUMBERS: usize = (IdentityId::LAST_ALLOCATED.0 - IdentityId::FIRST_ALLOCATED.0 + 1) as usize;

#[derive(Debug)]
struct Allocated {
    labels: Labels,
    users: usize,
    idle_since: Option<u64>,
}

/// Why labels get no number.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum NoNumber {
    /// All numbers are taken.
    Exhausted,
    /// Their namespace has as many as it may.
    Quota(String),
}

impl fmt::Display for NoNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exhausted => f.write_str(
                "all identity numbers are taken: pods with new label sets stay closed; use fewer distinct \
                 label sets, or name the labels that make them so many in ignoredLabels",
            ),
            Self::Quota(namespace) => write!(
                f,
                "namespace {namespace} has as many identities as it may: its pods with new label sets stay \
                 closed; use fewer distinct label sets, or raise identitiesPerNamespace"
            ),
        }
    }
}

/// What limits the allocator.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// How long an unused number keeps its labels, and again how long it then rests, milliseconds.
    pub(crate) quarantine_ms: u64,
    /// The most numbers that a namespace may have, idle ones included.
    pub(crate) per_namespace: usize,
}

/// The allocator.
#[derive(Debug)]
pub(crate) struct Identities {
    by_number: BTreeMap<IdentityId, Allocated>,
    by_labels: HashMap<Labels, IdentityId>,
    by_namespace: HashMap<String, usize>,
    /// Idle numbers, longest first.
    idle: BTreeSet<(u64, IdentityId)>,
    resting: HashSet<IdentityId>,
    /// Until when they rest; in the order in which they began.
    rest: VecDeque<(u64, IdentityId)>,
    cursor: u32,
    limits: Limits,
    /// Numbers whose existence changed since [`Self::take_changed`].
    changed: BTreeSet<IdentityId>,
    /// Labels that got none may get one now.
    freed: bool,
}

fn namespace(labels: &Labels) -> &str {
    // The source of Kubernetes' labels, and its colon.
    let key = format!("k8s:{NAMESPACE}");
    labels.0.get(&key).map_or("", String::as_str)
}

impl Identities {
    pub(crate) fn new(recovered: Vec<(IdentityId, Labels)>, limits: Limits, now: u64) -> Self {
        let mut out = Self {
            by_number: BTreeMap::new(),
            by_labels: HashMap::new(),
            by_namespace: HashMap::new(),
            idle: BTreeSet::new(),
            resting: HashSet::new(),
            rest: VecDeque::new(),
            cursor: IdentityId::FIRST_ALLOCATED.0,
            limits,
            changed: BTreeSet::new(),
            freed: false,
        };
        for (number, labels) in recovered {
            let in_range = (IdentityId::FIRST_ALLOCATED..=IdentityId::LAST_ALLOCATED).contains(&number);
            if !in_range || out.by_labels.contains_key(&labels) || out.by_number.contains_key(&number) {
                continue;
            }
            out.insert(number, labels, Some(now));
            out.cursor = out.cursor.max(number.0 + 1);
        }
        out
    }

    fn insert(&mut self, number: IdentityId, labels: Labels, idle_since: Option<u64>) {
        *self
            .by_namespace
            .entry(namespace(&labels).to_owned())
            .or_default() += 1;
        self.by_labels.insert(labels.clone(), number);
        self.idle.extend(idle_since.map(|since| (since, number)));
        let users = 0;
        self.by_number.insert(
            number,
            Allocated {
                labels,
                users,
                idle_since,
            },
        );
        self.changed.insert(number);
    }

    /// The number of these labels, for one more user.
    pub(crate) fn acquire(&mut self, labels: &Labels) -> Result<IdentityId, NoNumber> {
        let number = match self.by_labels.get(labels) {
            Some(number) => *number,
            None => self.allocate(labels.clone())?,
        };
        if let Some(allocated) = self.by_number.get_mut(&number) {
            allocated.users += 1;
            if let Some(since) = allocated.idle_since.take() {
                self.idle.remove(&(since, number));
            }
        }
        Ok(number)
    }

    fn allocate(&mut self, labels: Labels) -> Result<IdentityId, NoNumber> {
        let namespace = namespace(&labels);
        let had = self.by_namespace.get(namespace).copied().unwrap_or_default();
        if had >= self.limits.per_namespace {
            return Err(NoNumber::Quota(namespace.to_owned()));
        }
        // Before the search, which would try every number.
        if self.by_number.len() + self.resting.len() >= NUMBERS {
            return Err(NoNumber::Exhausted);
        }
        let (first, last) = (IdentityId::FIRST_ALLOCATED.0, IdentityId::LAST_ALLOCATED.0);
        let start = self.cursor.clamp(first, last);
        let number = (start..=last)
            .chain(first..start)
            .map(IdentityId)
            .find(|number| !self.by_number.contains_key(number) && !self.resting.contains(number))
            .ok_or(NoNumber::Exhausted)?;
        self.cursor = if number.0 == last { first } else { number.0 + 1 };
        self.insert(number, labels, None);
        Ok(number)
    }

    /// One user less. Reserved numbers are nobody's.
    pub(crate) fn release(&mut self, number: IdentityId, now: u64) {
        if let Some(allocated) = self.by_number.get_mut(&number) {
            allocated.users = allocated.users.saturating_sub(1);
            if allocated.users == 0 && allocated.idle_since.is_none() {
                allocated.idle_since = Some(now);
                self.idle.insert((now, number));
            }
        }
    }

    /// Moves what has waited long enough one step towards free.
    pub(crate) fn collect(&mut self, now: u64) {
        while let Some((_, number)) = self.rest.pop_front_if(|(until, _)| *until <= now) {
            self.resting.remove(&number);
            self.freed = true;
        }
        let quarantine = self.limits.quarantine_ms;
        while let Some((since, number)) = self.idle.first().copied()
            && now.saturating_sub(since) >= quarantine
        {
            self.idle.pop_first();
            if let Some(allocated) = self.by_number.remove(&number) {
                let namespace = namespace(&allocated.labels);
                if let Some(count) = self.by_namespace.get_mut(namespace) {
                    *count -= 1;
                    if *count == 0 {
                        self.by_namespace.remove(namespace);
                    }
                }
                self.by_labels.remove(&allocated.labels);
                self.resting.insert(number);
                self.rest.push_back((now + quarantine, number));
                self.changed.insert(number);
                self.freed = true;
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

    /// Whether labels that got no number may get one now, since the last time.
    pub(crate) fn take_freed(&mut self) -> bool {
        std::mem::take(&mut self.freed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        quarantine_ms: 1000,
        per_namespace: NUMBERS,
    };

    fn labels(n: u32) -> Labels {
        Labels([("k8s:app".to_owned(), n.to_string())].into())
    }

    #[test]
    fn equal_labels_share_a_number_from_256_on() {
        let mut ids = Identities::new(vec![], LIMITS, 0);
        assert_eq!(ids.acquire(&labels(1)), Ok(IdentityId(256)));
        assert_eq!(ids.acquire(&labels(2)), Ok(IdentityId(257)));
        assert_eq!(ids.acquire(&labels(1)), Ok(IdentityId(256)));
        assert_eq!(ids.len(), 2);
    }

    #[test]
    fn a_number_rests_before_it_serves_other_labels() {
        let mut ids = Identities::new(vec![], LIMITS, 0);
        let number = ids.acquire(&labels(1)).unwrap();
        ids.release(number, 10);
        ids.collect(1009);
        assert_eq!(
            ids.labels(number),
            Some(&labels(1)),
            "idle numbers keep their labels"
        );
        assert_eq!(ids.acquire(&labels(1)), Ok(number));
        ids.release(number, 2000);
        ids.collect(3000);
        assert_eq!(ids.labels(number), None);
        // All others are taken: only the resting one could serve.
        for n in 0..(IdentityId::LAST_ALLOCATED.0 - IdentityId::FIRST_ALLOCATED.0) {
            assert!(ids.acquire(&labels(1000 + n)).is_ok());
        }
        assert_eq!(ids.acquire(&labels(2)), Err(NoNumber::Exhausted));
        ids.collect(3999);
        assert_eq!(ids.acquire(&labels(2)), Err(NoNumber::Exhausted));
        ids.collect(4000);
        assert_eq!(ids.acquire(&labels(2)), Ok(number));
    }

    #[test]
    fn numbers_survive_a_restart() {
        let stored = vec![
            (IdentityId(300), labels(1)),
            (IdentityId(301), labels(1)),
            (IdentityId(5), labels(9)),
            (IdentityId(70_000), labels(8)),
        ];
        let mut ids = Identities::new(stored, LIMITS, 0);
        assert_eq!(ids.acquire(&labels(1)), Ok(IdentityId(300)));
        assert_eq!(ids.acquire(&labels(2)), Ok(IdentityId(301)));
        assert!(ids.acquire(&labels(9)).unwrap() >= IdentityId::FIRST_ALLOCATED);
        assert_eq!(ids.labels(IdentityId(5)), None);
    }

    #[test]
    fn a_namespace_has_its_share() {
        let limits = Limits {
            per_namespace: 2,
            ..LIMITS
        };
        let of = |namespace: &str, app: &str| {
            let namespace = (format!("k8s:{NAMESPACE}"), namespace.to_owned());
            Labels([namespace, ("k8s:app".to_owned(), app.to_owned())].into())
        };
        let mut ids = Identities::new(vec![(IdentityId(300), of("shop", "a"))], limits, 0);
        let number = ids.acquire(&of("shop", "b")).unwrap();
        assert_eq!(ids.acquire(&of("shop", "c")), Err(NoNumber::Quota("shop".into())));
        assert_eq!(
            ids.acquire(&of("shop", "b")),
            Ok(number),
            "known label sets are fine"
        );
        assert_eq!(
            ids.acquire(&of("shop", "a")),
            Ok(IdentityId(300)),
            "recovered ones too"
        );
        assert!(
            ids.acquire(&of("other", "c")).is_ok(),
            "other namespaces notice nothing"
        );
        ids.release(IdentityId(300), 0);
        ids.collect(999);
        assert!(!ids.take_freed());
        ids.collect(1000);
        assert!(ids.take_freed() && !ids.take_freed());
        assert!(ids.acquire(&of("shop", "c")).is_ok());
    }
}
