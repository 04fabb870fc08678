//! What the engine has to be told: from differences between directories, and from the endpoints of this node.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use warren_model::{
    IdentityId, Labels, NodeName,
    policy::{NamedPorts, NodeFacts, PolicyRef, Protocol, Selector, SelectorId},
};

use super::event::PolicyEvent;
use crate::directory::{Change, Entry, EntryKey};

/// Source prefix of the labels that are a pod's named ports: `port:http` = `TCP/8080`.
const PORT_SOURCE: &str = "port:";

/// An endpoint of this node, as policy has to know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalEndpoint {
    /// UID of its pod, where known: an index that another pod has is another endpoint.
    pub pod: Option<String>,
    /// Its identity, also one that the directory has not told of yet.
    pub identity: IdentityId,
    /// Audit mode for this endpoint.
    pub audit: bool,
}

/// Someone who is no longer in the directory, but whom maps may still name.
#[derive(Debug, Clone)]
struct Departed {
    labels: Arc<Labels>,
    /// The version without it.
    since: (u64, u64),
    /// Selectors whose members the engine still counts it among.
    selectors: BTreeSet<SelectorId>,
}

/// Members that came to and went from selectors.
type MemberChanges = BTreeMap<SelectorId, (Vec<IdentityId>, Vec<IdentityId>)>;

/// Turns changes of the directory and of this node's endpoints into events for the engine.
///
/// An identity that leaves the directory stays a member of its selectors until [`Self::settled`] says that no map names
/// it any more, and until no endpoint of this node has it: a pod that is labelled anew loses nothing in between, and
/// one that the API has forgotten does not become free of its policies. An endpoint is told of when the directory has
/// its identity's labels, not before: until then it stays closed, or as it was.
#[derive(Debug, Clone)]
pub struct PolicySource {
    node: NodeName,
    defaults: NodeFacts,
    position: Option<(u64, u64)>,
    identities: BTreeMap<IdentityId, Arc<Labels>>,
    departed: BTreeMap<IdentityId, Departed>,
    selectors: BTreeMap<SelectorId, Selector>,
    members: BTreeMap<(SelectorId, u32), BTreeSet<IdentityId>>,
    rules: BTreeSet<PolicyRef>,
    facts: Option<NodeFacts>,
    told_facts: Option<NodeFacts>,
    endpoints: BTreeMap<u16, LocalEndpoint>,
    told: BTreeMap<u16, LocalEndpoint>,
}

impl PolicySource {
    /// A source that knows nothing. `defaults`: what holds for the node whatever the directory says of it (its labels
    /// aside).
    pub fn new(node: NodeName, defaults: NodeFacts) -> Self {
        Self {
            node,
            defaults,
            position: None,
            identities: BTreeMap::new(),
            departed: BTreeMap::new(),
            selectors: BTreeMap::new(),
            members: BTreeMap::new(),
            rules: BTreeSet::new(),
            facts: None,
            told_facts: None,
            endpoints: BTreeMap::new(),
            told: BTreeMap::new(),
        }
    }

    /// Epoch and version of the directory taken last; `None` before the first.
    pub fn position(&self) -> Option<(u64, u64)> {
        self.position
    }

    /// Labels of an identity, also of one that has just left.
    pub fn labels(&self, identity: IdentityId) -> Option<&Labels> {
        let departed = || self.departed.get(&identity).map(|departed| &departed.labels);
        self.identities
            .get(&identity)
            .or_else(departed)
            .map(AsRef::as_ref)
    }

    /// What a selector asks for.
    pub fn selector(&self, id: SelectorId) -> Option<&Selector> {
        self.selectors.get(&id)
    }

    /// The endpoints of this node.
    pub fn endpoints(&self) -> &BTreeMap<u16, LocalEndpoint> {
        &self.endpoints
    }

    /// Whether the engine was told of an endpoint as it is now.
    pub fn is_told(&self, index: u16) -> bool {
        let now = self.endpoints.get(&index);
        now.is_some() && now == self.told.get(&index)
    }

    /// Takes a change of the directory. The first one has to be a whole directory.
    pub fn take(&mut self, change: &Change) -> Vec<PolicyEvent> {
        self.position = Some((change.epoch, change.version));
        let gone = self.gone(change);
        let mut events = Vec::new();
        let back = self.take_identities(change, &gone, &mut events);
        let mut members = self.take_members(change, &gone);
        for (identity, departed) in back {
            for id in departed.selectors {
                if !self.is_member(id, identity) {
                    members.entry(id).or_default().1.push(identity);
                }
            }
        }
        self.withhold(&mut members);
        self.take_selectors(change, &gone, &mut members, &mut events);
        for (id, (added, removed)) in members {
            if self.selectors.contains_key(&id) && !(added.is_empty() && removed.is_empty()) {
                events.push(PolicyEvent::Members { id, added, removed });
            }
        }
        self.take_rules(change, &gone, &mut events);
        self.take_facts(change, &gone, &mut events);
        for key in &gone {
            if let EntryKey::Selector(id) = key
                && self.selectors.remove(id).is_some()
            {
                self.departed.values_mut().for_each(|departed| {
                    departed.selectors.remove(id);
                });
                events.push(PolicyEvent::SelectorGone(*id));
            }
        }
        self.tell_endpoints(&mut events);
        events
    }

    /// The endpoints of this node are these.
    pub fn set_endpoints(&mut self, endpoints: BTreeMap<u16, LocalEndpoint>) -> Vec<PolicyEvent> {
        self.endpoints = endpoints;
        let mut events = Vec::new();
        self.tell_endpoints(&mut events);
        events
    }

    /// No map names an identity any more that was not in the directory of this position.
    pub fn settled(&mut self, position: (u64, u64)) -> Vec<PolicyEvent> {
        let local: BTreeSet<IdentityId> = self
            .endpoints
            .values()
            .map(|endpoint| endpoint.identity)
            .collect();
        let done: Vec<IdentityId> = self
            .departed
            .iter()
            .filter(|(identity, departed)| departed.since <= position && !local.contains(identity))
            .map(|(identity, _)| *identity)
            .collect();
        let mut events = Vec::new();
        let mut removed: BTreeMap<SelectorId, Vec<IdentityId>> = BTreeMap::new();
        for identity in done {
            let Some(departed) = self.departed.remove(&identity) else {
                continue;
            };
            for id in departed.selectors {
                removed.entry(id).or_default().push(identity);
            }
            if !named_ports(&departed.labels).0.is_empty() {
                let ports = Vec::new();
                events.push(PolicyEvent::PeerPorts { identity, ports });
            }
        }
        events.extend(removed.into_iter().map(|(id, removed)| PolicyEvent::Members {
            id,
            added: Vec::new(),
            removed,
        }));
        events
    }

    /// Whether identities that left the directory are still members of something.
    pub fn has_departed(&self) -> bool {
        !self.departed.is_empty()
    }

    /// The keys of everything that a change removes.
    fn gone(&self, change: &Change) -> BTreeSet<EntryKey> {
        let mut gone: BTreeSet<EntryKey> = change.removes.iter().cloned().collect();
        if change.whole {
            gone.extend(self.identities.keys().map(|id| EntryKey::Identity(*id)));
            gone.extend(self.selectors.keys().map(|id| EntryKey::Selector(*id)));
            gone.extend(
                self.members
                    .keys()
                    .map(|(id, block)| EntryKey::Members(*id, *block)),
            );
            gone.extend(self.rules.iter().cloned().map(EntryKey::Rules));
            gone.insert(EntryKey::Facts(self.node.clone()));
        }
        for key in change
            .upserts
            .iter()
            .map(Entry::key)
            .chain(change.keeps.iter().cloned())
        {
            gone.remove(&key);
        }
        gone
    }

    /// Returns those who had left and are back.
    fn take_identities(
        &mut self,
        change: &Change,
        gone: &BTreeSet<EntryKey>,
        events: &mut Vec<PolicyEvent>,
    ) -> BTreeMap<IdentityId, Departed> {
        let since = (change.epoch, change.version);
        for key in gone {
            if let EntryKey::Identity(identity) = key
                && let Some(labels) = self.identities.remove(identity)
            {
                let selectors = BTreeSet::new();
                self.departed.insert(
                    *identity,
                    Departed {
                        labels,
                        since,
                        selectors,
                    },
                );
            }
        }
        let mut back = BTreeMap::new();
        for entry in &change.upserts {
            let Entry::Identity(identity, labels) = entry else {
                continue;
            };
            let before = self.identities.insert(*identity, labels.clone());
            let departed = self.departed.remove(identity);
            let before = before.or_else(|| departed.as_ref().map(|departed| departed.labels.clone()));
            let ports = named_ports(labels);
            if before.map(|labels| named_ports(&labels)).unwrap_or_default() != ports {
                let ports = if ports.0.is_empty() { vec![] } else { vec![ports] };
                let identity = *identity;
                events.push(PolicyEvent::PeerPorts { identity, ports });
            }
            back.extend(departed.map(|departed| (*identity, departed)));
        }
        back
    }

    fn take_members(&mut self, change: &Change, gone: &BTreeSet<EntryKey>) -> MemberChanges {
        let mut changes = MemberChanges::new();
        let mut note = |id: SelectorId, was: &BTreeSet<IdentityId>, is: &BTreeSet<IdentityId>| {
            let (added, removed) = changes.entry(id).or_default();
            added.extend(is.difference(was));
            removed.extend(was.difference(is));
        };
        let nobody = BTreeSet::new();
        for key in gone {
            if let EntryKey::Members(id, block) = key
                && let Some(was) = self.members.remove(&(*id, *block))
            {
                note(*id, &was, &nobody);
            }
        }
        for entry in &change.upserts {
            if let Entry::Members(id, block, is) = entry {
                let was = self.members.insert((*id, *block), is.clone());
                note(*id, was.as_ref().unwrap_or(&nobody), is);
            }
        }
        changes
    }

    /// Keeps those who left the directory among the members for now.
    fn withhold(&mut self, changes: &mut MemberChanges) {
        for (id, (_, removed)) in changes {
            removed.retain(|identity| match self.departed.get_mut(identity) {
                Some(departed) => {
                    departed.selectors.insert(*id);
                    false
                }
                None => true,
            });
        }
    }

    fn take_selectors(
        &mut self,
        change: &Change,
        gone: &BTreeSet<EntryKey>,
        members: &mut MemberChanges,
        events: &mut Vec<PolicyEvent>,
    ) {
        for entry in &change.upserts {
            let Entry::Selector(id, selector) = entry else {
                continue;
            };
            if self.selectors.get(id) == Some(selector) || gone.contains(&EntryKey::Selector(*id)) {
                continue;
            }
            self.selectors.insert(*id, selector.clone());
            members.remove(id);
            let blocks = self.members.range((*id, 0)..=(*id, u32::MAX));
            let mut all: BTreeSet<IdentityId> = blocks.flat_map(|(_, members)| members).copied().collect();
            for (identity, departed) in &mut self.departed {
                if selector.matches(&departed.labels) {
                    departed.selectors.insert(*id);
                    all.insert(*identity);
                } else {
                    departed.selectors.remove(id);
                }
            }
            events.push(PolicyEvent::Selector {
                id: *id,
                selector: selector.clone(),
                members: all,
            });
        }
    }

    fn take_rules(&mut self, change: &Change, gone: &BTreeSet<EntryKey>, events: &mut Vec<PolicyEvent>) {
        for key in gone {
            if let EntryKey::Rules(policy) = key
                && self.rules.remove(policy)
            {
                events.push(PolicyEvent::RulesGone(policy.clone()));
            }
        }
        for entry in &change.upserts {
            if let Entry::Rules(policy, rules) = entry {
                self.rules.insert(policy.clone());
                events.push(PolicyEvent::Rules {
                    policy: policy.clone(),
                    rules: rules.clone(),
                });
            }
        }
    }

    fn take_facts(&mut self, change: &Change, gone: &BTreeSet<EntryKey>, events: &mut Vec<PolicyEvent>) {
        if gone.contains(&EntryKey::Facts(self.node.clone())) {
            self.facts = None;
        }
        for entry in &change.upserts {
            if let Entry::Facts(node, facts) = entry
                && *node == self.node
            {
                self.facts = Some(facts.clone());
            }
        }
        let mut facts = self.facts.clone().unwrap_or_default();
        facts.closed_to_host |= self.defaults.closed_to_host;
        facts.audit |= self.defaults.audit;
        if self.told_facts.as_ref() != Some(&facts) {
            self.told_facts = Some(facts.clone());
            events.push(PolicyEvent::Node(facts));
        }
    }

    fn tell_endpoints(&mut self, events: &mut Vec<PolicyEvent>) {
        let other_pod = |was: &LocalEndpoint, is: &LocalEndpoint| {
            was.pod.is_some() && is.pod.is_some() && was.pod != is.pod
        };
        let gone: Vec<u16> = self
            .told
            .iter()
            .filter(|(index, was)| self.endpoints.get(index).is_none_or(|is| other_pod(was, is)))
            .map(|(index, _)| *index)
            .collect();
        for index in gone {
            self.told.remove(&index);
            events.push(PolicyEvent::EndpointGone(index));
        }
        for (&index, endpoint) in &self.endpoints {
            if self.told.get(&index) == Some(endpoint) {
                continue;
            }
            let Some(labels) = self.identities.get(&endpoint.identity) else {
                continue;
            };
            if labels.0.is_empty() || endpoint.identity < IdentityId::FIRST_ALLOCATED {
                continue;
            }
            events.push(PolicyEvent::Endpoint {
                index,
                identity: endpoint.identity,
                ports: named_ports(labels),
                audit: endpoint.audit,
            });
            self.told.insert(index, endpoint.clone());
        }
    }

    fn is_member(&self, id: SelectorId, identity: IdentityId) -> bool {
        let mut blocks = self.members.range((id, 0)..=(id, u32::MAX));
        blocks.any(|(_, members)| members.contains(&identity))
    }
}

/// The named ports among an identity's labels. One that cannot be read is none.
pub fn named_ports(labels: &Labels) -> NamedPorts {
    let port = |(key, value): (&String, &String)| {
        let name = key.strip_prefix(PORT_SOURCE)?;
        let (protocol, number) = value.split_once('/')?;
        let protocol = Protocol::ALL.into_iter().find(|p| p.name() == protocol)?;
        let number = number.parse().ok().filter(|number| *number != 0)?;
        Some((name.to_owned(), (protocol, number)))
    };
    NamedPorts(labels.0.iter().filter_map(port).collect())
}
