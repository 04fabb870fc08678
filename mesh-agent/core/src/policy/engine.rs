//! The policies of a node, kept up to date by events.

mod rebuild;

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use warren_model::{
    IdentityId,
    policy::{
        Direction, NamedPorts, NodeFacts, PolicyRef, PortMatch, Ports, Rule, Selector, SelectorId, Subject,
        reserved_labels,
    },
};

use super::{
    cidr::CidrTable,
    compile::EndpointPolicy,
    event::{FirstNumbers, PolicyEvent, RuleName},
    flat::{NamedIndex, PortName},
    map::{CidrKey, EndpointValue, MapWrite, Maps},
};

/// Endpoints with the same one of these share a policy.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    /// [`IdentityId::HOST`] for the host itself.
    identity: IdentityId,
    ports: NamedPorts,
}

#[derive(Debug, Clone)]
struct Endpoint {
    kind: Kind,
    audit: bool,
    written: Option<EndpointValue>,
}

#[derive(Debug, Clone)]
struct SelectorEntry {
    selector: Selector,
    told: BTreeSet<IdentityId>,
}

/// What has to be done again.
#[derive(Debug, Default)]
struct Dirty {
    everything: bool,
    kinds: BTreeSet<Kind>,
    /// Selectors whose members changed, with these.
    members: BTreeMap<SelectorId, BTreeSet<IdentityId>>,
    /// Names of ports that some peers gained or lost.
    names: BTreeSet<PortName>,
}

/// All policies of this node. The host is endpoint 0 and always there.
#[derive(Debug, Clone)]
pub struct PolicyEngine {
    node: NodeFacts,
    selectors: BTreeMap<SelectorId, SelectorEntry>,
    /// Members as compiled: what was told, and the own host by its own labels.
    members: BTreeMap<SelectorId, BTreeSet<IdentityId>>,
    rules: BTreeMap<PolicyRef, Vec<Rule<SelectorId>>>,
    names: BTreeMap<RuleName, u32>,
    by_number: BTreeMap<u32, RuleName>,
    peer_ports: BTreeMap<IdentityId, Vec<NamedPorts>>,
    named: NamedIndex,
    endpoints: BTreeMap<u16, Endpoint>,
    policies: BTreeMap<Kind, EndpointPolicy>,
    cidrs: CidrTable,
    next_policy: u32,
    next_class: u32,
    next_rule: u32,
    /// How many policies were compiled, and how many only refreshed: shows that work stays local.
    compiled: u64,
    refreshed: u64,
}

impl PolicyEngine {
    /// A node without rules or pods.
    pub fn new(first: FirstNumbers) -> Self {
        let kind = Kind {
            identity: IdentityId::HOST,
            ports: NamedPorts::default(),
        };
        Self {
            node: NodeFacts::default(),
            selectors: BTreeMap::new(),
            members: BTreeMap::new(),
            rules: BTreeMap::new(),
            names: BTreeMap::new(),
            by_number: BTreeMap::new(),
            peer_ports: BTreeMap::new(),
            named: NamedIndex::new(),
            endpoints: BTreeMap::from([(
                0,
                Endpoint {
                    kind,
                    audit: false,
                    written: None,
                },
            )]),
            policies: BTreeMap::new(),
            cidrs: CidrTable::new(first.cidr_table, first.cidr),
            next_policy: first.policy,
            next_class: first.class,
            next_rule: first.rule,
            compiled: 0,
            refreshed: 0,
        }
    }

    /// Takes events, which take effect together, and returns what to write. Idempotent: what was told before yields
    /// nothing.
    pub fn apply(&mut self, events: impl IntoIterator<Item = PolicyEvent>) -> Vec<MapWrite> {
        let mut dirty = Dirty::default();
        for event in events {
            self.take(event, &mut dirty);
        }
        self.rebuild(dirty)
    }

    /// The policy of an endpoint, and whether it is written.
    pub fn policy(&self, endpoint: u16) -> Option<&EndpointPolicy> {
        self.policies.get(&self.endpoints.get(&endpoint)?.kind)
    }

    /// What a rule number means.
    pub fn rule(&self, number: u32) -> Option<&RuleName> {
        self.by_number.get(&number)
    }

    /// How many policies were compiled, and how many only had identities refreshed, so far.
    pub fn work(&self) -> (u64, u64) {
        (self.compiled, self.refreshed)
    }

    /// Events that lead another engine to the same policies: what is known now.
    pub fn events(&self) -> Vec<PolicyEvent> {
        let selectors = self.selectors.iter().map(|(id, entry)| PolicyEvent::Selector {
            id: *id,
            selector: entry.selector.clone(),
            members: entry.told.clone(),
        });
        let rules = self.rules.iter();
        let rules = rules.map(|(policy, rules)| PolicyEvent::Rules {
            policy: policy.clone(),
            rules: rules.clone(),
        });
        let ports = self.peer_ports.iter();
        let ports = ports.map(|(identity, ports)| PolicyEvent::PeerPorts {
            identity: *identity,
            ports: ports.clone(),
        });
        let endpoints = self.endpoints.iter().filter(|(index, _)| **index != 0);
        let endpoints = endpoints.map(|(index, endpoint)| PolicyEvent::Endpoint {
            index: *index,
            identity: endpoint.kind.identity,
            ports: endpoint.kind.ports.clone(),
            audit: endpoint.audit,
        });
        let node = [PolicyEvent::Node(self.node.clone())];
        node.into_iter()
            .chain(selectors)
            .chain(rules)
            .chain(ports)
            .chain(endpoints)
            .collect()
    }

    /// What the maps should hold.
    pub fn contents(&self) -> Maps {
        let mut maps = Maps::default();
        for policy in self.policies.values() {
            self.add_policy(policy, &mut maps);
        }
        self.add_prefixes_to(&mut maps);
        maps.endpoints
            .extend(self.endpoints.iter().filter_map(|(i, e)| Some((*i, e.written?))));
        maps
    }

    pub(super) fn add_policy(&self, policy: &EndpointPolicy, maps: &mut Maps) {
        for direction in Direction::ALL {
            maps.ports.extend(policy.port_entries(direction));
            for (class, table) in &policy.directions.of(direction).classes {
                table.sets(*class).for_each(|write| maps.apply(&write));
            }
        }
    }

    pub(super) fn add_prefixes_to(&self, maps: &mut Maps) {
        let table = self.cidrs.number;
        maps.cidrs.extend(
            self.prefixes()
                .map(|(prefix, number)| (CidrKey { table, prefix }, number)),
        );
    }

    pub(super) fn prefixes(&self) -> impl Iterator<Item = (IpNet, u32)> + '_ {
        self.cidrs
            .prefixes
            .iter()
            .map(|(prefix, number)| (*prefix, *number))
    }

    /// What an endpoint's entry holds, where it has one.
    pub fn written(&self, endpoint: u16) -> Option<EndpointValue> {
        self.endpoints.get(&endpoint)?.written
    }

    pub(super) fn has_member(&self, id: SelectorId, identity: IdentityId) -> bool {
        self.members
            .get(&id)
            .is_some_and(|members| members.contains(&identity))
    }

    pub(super) fn names_from(&self, first: RuleName) -> impl Iterator<Item = (u32, &RuleName)> {
        self.names.range(first..).map(|(name, number)| (*number, name))
    }

    /// All rule numbers with their names.
    pub fn rule_numbers(&self) -> impl Iterator<Item = (u32, &RuleName)> {
        self.by_number.iter().map(|(number, name)| (*number, name))
    }

    fn take(&mut self, event: PolicyEvent, dirty: &mut Dirty) {
        match event {
            PolicyEvent::Selector {
                id,
                selector,
                members,
            } => {
                let entry = SelectorEntry {
                    selector,
                    told: members,
                };
                self.selectors.insert(id, entry);
                self.settle(id, dirty);
            }
            PolicyEvent::Members { id, added, removed } => self.take_members(id, &added, &removed, dirty),
            PolicyEvent::SelectorGone(id) => {
                self.selectors.remove(&id);
                self.settle(id, dirty);
            }
            PolicyEvent::Rules { policy, rules } => {
                if self.rules.get(&policy) != Some(&rules) {
                    self.number(&policy, &rules);
                    self.touch(&rules, dirty);
                    if let Some(old) = self.rules.insert(policy, rules) {
                        self.touch(&old, dirty);
                    }
                }
            }
            PolicyEvent::RulesGone(policy) => {
                if let Some(old) = self.rules.remove(&policy) {
                    self.number(&policy, &[]);
                    self.touch(&old, dirty);
                }
            }
            PolicyEvent::PeerPorts { identity, ports } => self.take_ports(identity, ports, dirty),
            PolicyEvent::Endpoint {
                index,
                identity,
                ports,
                audit,
            } => {
                // Whose labels are not known has no policy yet: it stays closed.
                let identity = if identity == IdentityId::INIT {
                    IdentityId::UNKNOWN
                } else {
                    identity
                };
                let kind = Kind { identity, ports };
                let written = self.endpoints.get(&index).and_then(|endpoint| endpoint.written);
                self.endpoints.insert(index, Endpoint { kind, audit, written });
            }
            PolicyEvent::EndpointGone(index) if index != 0 => {
                // The entry goes with the next rebuild, which sees that nobody has it.
                if let Some(endpoint) = self.endpoints.get_mut(&index) {
                    endpoint.kind.identity = IdentityId::UNKNOWN;
                }
            }
            PolicyEvent::EndpointGone(_) => {}
            PolicyEvent::Node(node) => {
                if self.node != node {
                    let only_audit = NodeFacts {
                        audit: node.audit,
                        ..self.node.clone()
                    } == node;
                    self.node = node;
                    if !only_audit {
                        dirty.everything = true;
                        let ids: Vec<_> = self.selectors.keys().copied().collect();
                        ids.into_iter().for_each(|id| self.settle(id, dirty));
                    }
                }
            }
        }
    }

    /// Brings the members of a selector as compiled up to date: the own host's labels are the node's affair.
    fn settle(&mut self, id: SelectorId, dirty: &mut Dirty) {
        let now = self.selectors.get(&id).map(|entry| {
            let mut members = entry.told.clone();
            members.remove(&IdentityId::UNKNOWN);
            let host = reserved_labels(IdentityId::HOST, self.node.runs_apiserver);
            match entry.selector.matches(&host) {
                true => members.insert(IdentityId::HOST),
                false => members.remove(&IdentityId::HOST),
            };
            members
        });
        let was = match now.clone() {
            Some(now) => self.members.insert(id, now),
            None => self.members.remove(&id),
        };
        let (was, now) = (was.unwrap_or_default(), now.unwrap_or_default());
        let changed = was.symmetric_difference(&now).copied();
        dirty.members.entry(id).or_default().extend(changed);
    }

    /// A selector's members came and went; costs as much as came and went, however many there are.
    fn take_members(
        &mut self,
        id: SelectorId,
        added: &[IdentityId],
        removed: &[IdentityId],
        dirty: &mut Dirty,
    ) {
        let Some(entry) = self.selectors.get_mut(&id) else {
            return;
        };
        let members = self.members.entry(id).or_default();
        let changed = dirty.members.entry(id).or_default();
        // The own host belongs to it by its labels, whatever is told.
        let settled = |identity: &IdentityId| !matches!(*identity, IdentityId::UNKNOWN | IdentityId::HOST);
        for identity in added.iter().filter(|identity| settled(identity)) {
            entry.told.insert(*identity);
            if members.insert(*identity) {
                changed.insert(*identity);
            }
        }
        for identity in removed.iter().filter(|identity| settled(identity)) {
            entry.told.remove(identity);
            if members.remove(identity) {
                changed.insert(*identity);
            }
        }
    }

    fn take_ports(&mut self, identity: IdentityId, ports: Vec<NamedPorts>, dirty: &mut Dirty) {
        let flat = |ports: &[NamedPorts]| -> BTreeSet<(PortName, u16)> {
            let all = ports.iter().flat_map(|ports| &ports.0);
            all.map(|(name, (protocol, number))| ((name.clone(), *protocol), *number))
                .collect()
        };
        let now = flat(&ports);
        let was = match ports.is_empty() {
            true => self.peer_ports.remove(&identity),
            false => self.peer_ports.insert(identity, ports),
        };
        let was = flat(&was.unwrap_or_default());
        for (name, number) in was.difference(&now) {
            let Some(numbers) = self.named.get_mut(name) else {
                continue;
            };
            if let Some(having) = numbers.get_mut(number) {
                having.remove(&identity);
            }
            numbers.retain(|_, having| !having.is_empty());
            if numbers.is_empty() {
                self.named.remove(name);
            }
            dirty.names.insert(name.clone());
        }
        for (name, number) in now.difference(&was) {
            let numbers = self.named.entry(name.clone()).or_default();
            numbers.entry(*number).or_default().insert(identity);
            dirty.names.insert(name.clone());
        }
    }

    /// The names of peers' ports that rules of such endpoints mention.
    fn peer_port_names(&self, kind: &Kind) -> BTreeSet<PortName> {
        let statements = self.rules_of(kind).flat_map(|rule| &rule.statements);
        let specs = statements
            .filter(|statement| statement.direction == Direction::Egress)
            .flat_map(|statement| match &statement.ports {
                Ports::All => &[][..],
                Ports::These(specs) => specs,
            });
        specs
            .filter_map(|spec| match &spec.ports {
                PortMatch::Name(name) => Some((name.clone(), spec.protocol)),
                PortMatch::Range(..) => None,
            })
            .collect()
    }

    /// Numbers the statements of an object, and forgets those that it had and has no more.
    fn number(&mut self, policy: &PolicyRef, rules: &[Rule<SelectorId>]) {
        let statements = rules.iter().flat_map(|rule| &rule.statements);
        let now: BTreeSet<RuleName> = statements
            .map(|statement| RuleName {
                policy: policy.clone(),
                place: statement.place.clone(),
            })
            .collect();
        self.by_number
            .retain(|_, name| name.policy != *policy || now.contains(name));
        self.names
            .retain(|name, _| name.policy != *policy || now.contains(name));
        for name in now {
            if !self.names.contains_key(&name) {
                self.by_number.insert(self.next_rule, name.clone());
                self.names.insert(name, self.next_rule);
                self.next_rule += 1;
            }
        }
    }

    /// Marks endpoints that rules select.
    fn touch(&self, rules: &[Rule<SelectorId>], dirty: &mut Dirty) {
        let kinds = self.endpoints.values().map(|endpoint| &endpoint.kind);
        let selected = kinds.filter(|kind| rules.iter().any(|rule| self.selects(rule, kind)));
        dirty.kinds.extend(selected.cloned());
    }

    fn selects(&self, rule: &Rule<SelectorId>, kind: &Kind) -> bool {
        match &rule.subject {
            Subject::Pods(id) => {
                kind.identity != IdentityId::HOST
                    && self
                        .members
                        .get(id)
                        .is_some_and(|members| members.contains(&kind.identity))
            }
            Subject::Nodes(selector) => {
                kind.identity == IdentityId::HOST && selector.matches_bare(&self.node.labels)
            }
        }
    }

    fn rules_of<'a>(&'a self, kind: &'a Kind) -> impl Iterator<Item = &'a Rule<SelectorId>> {
        self.rules
            .values()
            .flatten()
            .filter(|rule| self.selects(rule, kind))
    }
}
