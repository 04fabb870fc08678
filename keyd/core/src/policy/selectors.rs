//! Selectors and their members.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use warren_model::{
    IdentityId, Labels,
    policy::{LabelKey, Operator, Requirement, Selector, SelectorId, keys, reserved_labels},
};

/// A change of a selector's members.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Members {
    /// Which selector.
    pub selector: SelectorId,
    /// Identities that match now.
    pub added: Vec<IdentityId>,
    /// Identities that match no longer, or are gone.
    pub removed: Vec<IdentityId>,
}

/// What an identity must have for a selector to be looked at: a label's name, with a value or any.
type Anchor = (String, Option<String>);

#[derive(Debug, Clone)]
struct Entry {
    selector: Selector,
    users: usize,
    members: BTreeSet<IdentityId>,
}

/// The members of every selector in use. Reserved identities are always known; 0 never is.
#[derive(Debug, Clone)]
pub struct SelectorCache {
    identities: BTreeMap<IdentityId, (Labels, BTreeSet<SelectorId>)>,
    /// Identities by label: those that a new selector can match at all.
    labelled: HashMap<Anchor, BTreeSet<IdentityId>>,
    entries: BTreeMap<SelectorId, Entry>,
    numbers: HashMap<Selector, SelectorId>,
    anchored: HashMap<Anchor, BTreeSet<SelectorId>>,
    /// Selectors without an anchor: every identity is tried.
    loose: BTreeSet<SelectorId>,
    next: u32,
}

impl Default for SelectorCache {
    fn default() -> Self {
        let reserved = (1..IdentityId::FIRST_ALLOCATED.0)
            .map(|number| (IdentityId(number), reserved_labels(IdentityId(number), false)))
            .filter(|(_, labels)| !labels.0.is_empty());
        let mut cache = Self {
            identities: BTreeMap::new(),
            labelled: HashMap::new(),
            entries: BTreeMap::new(),
            numbers: HashMap::new(),
            anchored: HashMap::new(),
            loose: BTreeSet::new(),
            next: 1,
        };
        for (identity, labels) in reserved {
            cache.upsert_identity(identity, &labels);
        }
        cache
    }
}

impl SelectorCache {
    /// The number of a selector, which counts one more user; `true` where it is new.
    pub fn acquire(&mut self, selector: &Selector) -> (SelectorId, bool) {
        if let Some(id) = self.numbers.get(selector).copied() {
            if let Some(entry) = self.entries.get_mut(&id) {
                entry.users += 1;
            }
            return (id, false);
        }
        let id = SelectorId(self.next);
        self.next += 1;
        let members = self.matching(selector);
        for identity in &members {
            if let Some((_, matched)) = self.identities.get_mut(identity) {
                matched.insert(id);
            }
        }
        match anchors(selector) {
            Some(anchors) => {
                for anchor in anchors {
                    self.anchored.entry(anchor).or_default().insert(id);
                }
            }
            None => {
                self.loose.insert(id);
            }
        }
        self.numbers.insert(selector.clone(), id);
        self.entries.insert(
            id,
            Entry {
                selector: selector.clone(),
                users: 1,
                members,
            },
        );
        (id, true)
    }

    /// Counts one user less; `true` where that was the last, and the selector is forgotten.
    pub fn release(&mut self, id: SelectorId) -> bool {
        let Some(entry) = self.entries.get_mut(&id) else {
            return false;
        };
        entry.users -= 1;
        if entry.users > 0 {
            return false;
        }
        let Some(entry) = self.entries.remove(&id) else {
            return false;
        };
        self.numbers.remove(&entry.selector);
        self.loose.remove(&id);
        for anchor in anchors(&entry.selector).into_iter().flatten() {
            if let Some(ids) = self.anchored.get_mut(&anchor) {
                ids.remove(&id);
                if ids.is_empty() {
                    self.anchored.remove(&anchor);
                }
            }
        }
        for identity in entry.members {
            if let Some((_, matched)) = self.identities.get_mut(&identity) {
                matched.remove(&id);
            }
        }
        true
    }

    /// A new identity, or new labels of a known one.
    pub fn upsert_identity(&mut self, identity: IdentityId, labels: &Labels) -> Vec<Members> {
        if identity == IdentityId::UNKNOWN {
            return Vec::new();
        }
        let now: BTreeSet<_> = self
            .candidates(labels)
            .into_iter()
            .filter(|id| {
                self.entries
                    .get(id)
                    .is_some_and(|entry| entry.selector.matches(labels))
            })
            .collect();
        let slot = self.identities.entry(identity).or_default();
        let (old, before) = std::mem::replace(slot, (labels.clone(), now.clone()));
        if old != *labels {
            self.unfile(identity, &old);
            for anchor in anchors_of(labels) {
                self.labelled.entry(anchor).or_default().insert(identity);
            }
        }
        self.changes(identity, &before, &now)
    }

    /// An identity is gone; reserved ones never are.
    pub fn remove_identity(&mut self, identity: IdentityId) -> Vec<Members> {
        if identity < IdentityId::FIRST_ALLOCATED {
            return Vec::new();
        }
        let Some((labels, before)) = self.identities.remove(&identity) else {
            return Vec::new();
        };
        self.unfile(identity, &labels);
        self.changes(identity, &before, &BTreeSet::new())
    }

    /// A selector by number.
    pub fn selector(&self, id: SelectorId) -> Option<&Selector> {
        self.entries.get(&id).map(|entry| &entry.selector)
    }

    /// The members of a selector; none where it is not known.
    pub fn members(&self, id: SelectorId) -> impl Iterator<Item = IdentityId> + '_ {
        self.entries
            .get(&id)
            .into_iter()
            .flat_map(|entry| entry.members.iter().copied())
    }

    /// The members of a selector within a range of numbers.
    pub fn members_in(
        &self,
        id: SelectorId,
        range: std::ops::RangeInclusive<IdentityId>,
    ) -> impl Iterator<Item = IdentityId> + '_ {
        self.entries
            .get(&id)
            .into_iter()
            .flat_map(move |entry| entry.members.range(range.clone()).copied())
    }

    /// All selectors in use.
    pub fn iter(&self) -> impl Iterator<Item = (SelectorId, &Selector, &BTreeSet<IdentityId>)> {
        self.entries
            .iter()
            .map(|(id, entry)| (*id, &entry.selector, &entry.members))
    }

    /// How many selectors there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Selectors that could match: those with an anchor among the labels, and the loose ones.
    fn candidates(&self, labels: &Labels) -> BTreeSet<SelectorId> {
        let mut out = self.loose.clone();
        for anchor in anchors_of(labels) {
            out.extend(self.anchored.get(&anchor).into_iter().flatten());
        }
        out
    }

    /// The identities that a selector matches; tries only those that have a label it asks for.
    fn matching(&self, selector: &Selector) -> BTreeSet<IdentityId> {
        let matches = |identity: &IdentityId| {
            self.identities
                .get(identity)
                .is_some_and(|(labels, _)| selector.matches(labels))
        };
        let filed = |anchors: &Vec<Anchor>| -> usize {
            let sets = anchors.iter().filter_map(|anchor| self.labelled.get(anchor));
            sets.map(BTreeSet::len).sum()
        };
        // Any requirement that asks for a label will do: the one that fewest identities have.
        let all = selector.requirements().iter().filter_map(requirement_anchors);
        match all.min_by_key(filed) {
            Some(anchors) => {
                let sets = anchors.iter().filter_map(|anchor| self.labelled.get(anchor));
                sets.flatten().copied().filter(matches).collect()
            }
            None => self.identities.keys().copied().filter(matches).collect(),
        }
    }

    fn unfile(&mut self, identity: IdentityId, labels: &Labels) {
        for anchor in anchors_of(labels) {
            if let Some(identities) = self.labelled.get_mut(&anchor) {
                identities.remove(&identity);
                if identities.is_empty() {
                    self.labelled.remove(&anchor);
                }
            }
        }
    }

    fn changes(
        &mut self,
        identity: IdentityId,
        before: &BTreeSet<SelectorId>,
        now: &BTreeSet<SelectorId>,
    ) -> Vec<Members> {
        let mut out = Vec::new();
        for &selector in now.difference(before) {
            if let Some(entry) = self.entries.get_mut(&selector) {
                entry.members.insert(identity);
                out.push(Members {
                    selector,
                    added: vec![identity],
                    removed: Vec::new(),
                });
            }
        }
        for &selector in before.difference(now) {
            if let Some(entry) = self.entries.get_mut(&selector) {
                entry.members.remove(&identity);
                out.push(Members {
                    selector,
                    added: Vec::new(),
                    removed: vec![identity],
                });
            }
        }
        out
    }
}

/// Where a selector is filed: under the requirement that fewest identities fulfil. A namespace or a cluster has
/// many, so any other label is preferred. `None` where no requirement asks for a label to be there.
fn anchors(selector: &Selector) -> Option<Vec<Anchor>> {
    let common = |key: &LabelKey| key.name == keys::CLUSTER;
    let rank = |requirement: &&Requirement| match &requirement.operator {
        Operator::In(_) if common(&requirement.key) => Some(3),
        Operator::In(_) if requirement.key.names_namespace() => Some(1),
        Operator::In(_) => Some(0),
        Operator::Exists if requirement.key.names_namespace() || common(&requirement.key) => Some(4),
        Operator::Exists => Some(2),
        Operator::NotIn(_) | Operator::DoesNotExist => None,
    };
    let best = selector
        .requirements()
        .iter()
        .filter(|r| rank(r).is_some())
        .min_by_key(rank)?;
    requirement_anchors(best)
}

/// What a requirement asks for, any of which is enough; `None` where it does not ask for a label to be there.
fn requirement_anchors(requirement: &Requirement) -> Option<Vec<Anchor>> {
    let name = &requirement.key.name;
    match &requirement.operator {
        Operator::In(values) => {
            let anchor = |value: &String| (name.clone(), Some(value.clone()));
            Some(values.iter().map(anchor).collect())
        }
        Operator::Exists => Some(vec![(name.clone(), None)]),
        Operator::NotIn(_) | Operator::DoesNotExist => None,
    }
}

/// What labels offer, whatever their sources.
fn anchors_of(labels: &Labels) -> impl Iterator<Item = Anchor> + '_ {
    labels.0.iter().flat_map(|(key, value)| {
        let name = key.split_once(':').map_or(key.as_str(), |(_, name)| name);
        [(name.to_owned(), Some(value.clone())), (name.to_owned(), None)]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        Labels(
            pairs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
        )
    }

    fn is(key: &str, value: &str) -> Selector {
        Selector::new([
            Requirement::is(LabelKey::parse(key), value),
            Requirement::is(LabelKey::k8s(keys::NAMESPACE), "shop"),
        ])
    }

    fn web(n: u32) -> (IdentityId, Labels) {
        let labels = labels(&[
            ("k8s:app", &format!("web{n}")),
            ("k8s:io.kubernetes.pod.namespace", "shop"),
        ]);
        (IdentityId(256 + n), labels)
    }

    #[test]
    fn members_follow_identities() {
        let mut cache = SelectorCache::default();
        let (id, new) = cache.acquire(&is("app", "web1"));
        assert!(new && cache.members(id).next().is_none());
        let (identity, of) = web(1);
        let added = Members {
            selector: id,
            added: vec![identity],
            removed: vec![],
        };
        assert_eq!(cache.upsert_identity(identity, &of), [added]);
        assert_eq!(
            cache.upsert_identity(identity, &of),
            [],
            "telling twice changes nothing"
        );
        let (_, other) = web(2);
        let removed = Members {
            selector: id,
            added: vec![],
            removed: vec![identity],
        };
        assert_eq!(cache.upsert_identity(identity, &other), [removed]);
        cache.upsert_identity(identity, &of);
        assert_eq!(cache.remove_identity(identity).len(), 1);
        assert_eq!(cache.remove_identity(identity), []);
        // A selector that comes later knows identities that came before.
        cache.upsert_identity(web(5).0, &web(5).1);
        let (later, _) = cache.acquire(&is("k8s:app", "web5"));
        assert_eq!(cache.members(later).collect::<Vec<_>>(), [web(5).0]);
    }

    #[test]
    fn reserved_identities_are_always_there_and_zero_never() {
        let mut cache = SelectorCache::default();
        let (id, _) = cache.acquire(&Selector::new([Requirement::exists(LabelKey::reserved("world"))]));
        assert_eq!(cache.members(id).collect::<Vec<_>>(), [2, 9, 10].map(IdentityId));
        assert_eq!(cache.remove_identity(IdentityId::WORLD), []);
        let (all, _) = cache.acquire(&Selector::new([]));
        cache.upsert_identity(IdentityId::UNKNOWN, &labels(&[("k8s:app", "web")]));
        assert!(cache.members(all).all(|id| id != IdentityId::UNKNOWN));
    }

    #[test]
    fn a_selector_lives_as_long_as_it_has_users() {
        let mut cache = SelectorCache::default();
        let (id, _) = cache.acquire(&is("app", "web1"));
        assert_eq!(cache.acquire(&is("app", "web1")), (id, false));
        assert!(!cache.release(id) && cache.release(id) && cache.is_empty());
        assert!(cache.upsert_identity(web(1).0, &web(1).1).is_empty());
        assert!(cache.anchored.is_empty() && cache.loose.is_empty());
        cache.remove_identity(web(1).0);
        assert_eq!(cache.labelled, SelectorCache::default().labelled);
        assert_ne!(
            cache.acquire(&is("app", "web1")).0,
            id,
            "numbers are not used again"
        );
    }

    #[test]
    fn a_new_identity_touches_only_what_it_can_match() {
        let mut cache = SelectorCache::default();
        for n in 0..5_000 {
            cache.acquire(&is("app", &format!("web{n}")));
        }
        cache.acquire(&Selector::new([Requirement {
            key: LabelKey::parse("app"),
            operator: Operator::DoesNotExist,
        }]));
        let (identity, of) = web(7);
        assert_eq!(cache.candidates(&of).len(), 2);
        assert_eq!(cache.upsert_identity(identity, &of).len(), 1);
    }

    #[test]
    fn filing_never_hides_a_match() {
        let mut cache = SelectorCache::default();
        let selectors: Vec<_> = ["app", "k8s:app", "any:app", "tier", "reserved:host"]
            .into_iter()
            .flat_map(|key| {
                let key = LabelKey::parse(key);
                let set: BTreeSet<_> = ["a".to_owned(), "b".to_owned()].into();
                [
                    Operator::In(set.clone()),
                    Operator::NotIn(set),
                    Operator::Exists,
                    Operator::DoesNotExist,
                ]
                .map(|operator| {
                    Selector::new([Requirement {
                        key: key.clone(),
                        operator,
                    }])
                })
            })
            .chain([Selector::new([])])
            .collect();
        let ids: Vec<_> = selectors
            .iter()
            .map(|selector| cache.acquire(selector).0)
            .collect();
        let workloads = [
            labels(&[("k8s:app", "a")]),
            labels(&[("k8s:app", "c"), ("k8s:tier", "b")]),
            labels(&[("k8s:x", "")]),
        ];
        for (n, of) in workloads.iter().enumerate() {
            let identity = IdentityId(256 + n as u32);
            cache.upsert_identity(identity, of);
            for (selector, id) in selectors.iter().zip(&ids) {
                assert_eq!(
                    cache.members(*id).any(|m| m == identity),
                    selector.matches(of),
                    "{selector} {of}"
                );
            }
        }
        // Selectors that come after the identities find the same members.
        let late: Vec<_> = ids
            .iter()
            .map(|id| cache.members(*id).collect::<BTreeSet<_>>())
            .collect();
        for id in ids {
            cache.release(id);
        }
        for (selector, members) in selectors.iter().zip(late) {
            let (id, _) = cache.acquire(selector);
            assert_eq!(cache.members(id).collect::<BTreeSet<_>>(), members, "{selector}");
        }
    }
}
