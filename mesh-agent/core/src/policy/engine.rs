//! The policies of a node, kept up to date by events.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use warren_model::{
    IdentityId, Labels,
    policy::{
        Direction, Directions, NamedPorts, PolicyRef, Rule, Selector, SelectorId, Subject, reserved_labels,
    },
};

use super::{
    cidr::CidrTable,
    compile::{EndpointPolicy, Facts, compile},
    diff::{diff, removal},
    flat::{Flat, NamedIndex, flatten},
    map::{CidrKey, EndpointValue, MapWrite, Maps},
};

/// Where numbers start: above everything that the pinned maps hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FirstNumbers {
    /// First number of a policy.
    pub policy: u32,
    /// First number of a class.
    pub class: u32,
    /// First number of a prefix.
    pub cidr: u32,
    /// Number of the table of prefixes.
    pub cidr_table: u32,
}

impl Default for FirstNumbers {
    fn default() -> Self {
        Self {
            policy: 1,
            class: 1,
            cidr: 1,
            cidr_table: 1,
        }
    }
}

impl FirstNumbers {
    /// Above everything that maps hold, the entries of an earlier agent. Once every endpoint has its new policy, whatever
    /// has a lower number can be removed.
    pub fn above(maps: &Maps) -> Self {
        let policies = maps
            .ports
            .keys()
            .map(|key| key.policy)
            .chain(maps.endpoints.values().map(|v| v.policy));
        let classes = maps
            .verdicts
            .keys()
            .map(|key| key.class)
            .chain(maps.ports.values().map(|v| v.class));
        Self {
            policy: policies.max().unwrap_or(0) + 1,
            class: classes.max().unwrap_or(0) + 1,
            cidr: maps.cidrs.values().copied().max().unwrap_or(0) + 1,
            cidr_table: maps.cidrs.keys().map(|key| key.table).max().unwrap_or(0) + 1,
        }
    }
}

/// What policy has to know of the node itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// Labels of the Node object, keys with their source (`k8s:`): host policies select by them.
    pub labels: Labels,
    /// The node runs an API server.
    pub runs_apiserver: bool,
    /// The host does not reach its own pods by itself: probes need a rule.
    pub closed_to_host: bool,
    /// Audit mode for the whole node.
    pub audit: bool,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PolicyEvent {
    /// A selector with all its members; replaces what was known.
    Selector {
        /// Its number.
        id: SelectorId,
        /// What it asks for.
        selector: Selector,
        /// Who fulfils it.
        members: BTreeSet<IdentityId>,
    },
    /// Members of a selector changed.
    Members {
        /// The selector.
        id: SelectorId,
        /// Who came.
        added: Vec<IdentityId>,
        /// Who went.
        removed: Vec<IdentityId>,
    },
    /// No rule names the selector any more.
    SelectorGone(SelectorId),
    /// All rules of an object; replaces what was known.
    Rules {
        /// The object.
        policy: PolicyRef,
        /// Its rules.
        rules: Vec<Rule<SelectorId>>,
    },
    /// An object is gone.
    RulesGone(PolicyRef),
    /// The named ports of the pods of an identity, anywhere; replaces what was known.
    PeerPorts {
        /// The identity.
        identity: IdentityId,
        /// The ports of its pods; those of several pods where they differ.
        ports: Vec<NamedPorts>,
    },
    /// A local endpoint, new or changed.
    Endpoint {
        /// Its index in the mark, 1 and up.
        index: u16,
        /// Its identity.
        identity: IdentityId,
        /// Its named ports.
        ports: NamedPorts,
        /// Audit mode for this endpoint.
        audit: bool,
    },
    /// A local endpoint is gone.
    EndpointGone(u16),
    /// Facts of the node; replaces what was known.
    Node(NodeFacts),
}

/// Where a statement stands: what a rule number means.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleName {
    /// The object.
    pub policy: PolicyRef,
    /// Where in it, as in `spec.ingress[0].toPorts[1]`.
    pub place: String,
}

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
            next_rule: 1,
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
            for direction in Direction::ALL {
                maps.ports.extend(policy.port_entries(direction));
                for (class, table) in &policy.directions.of(direction).classes {
                    table.sets(*class).for_each(|write| maps.apply(&write));
                }
            }
        }
        let table = self.cidrs.number;
        maps.cidrs.extend(
            self.cidrs
                .prefixes
                .iter()
                .map(|(p, n)| (CidrKey { table, prefix: *p }, *n)),
        );
        maps.endpoints
            .extend(self.endpoints.iter().filter_map(|(i, e)| Some((*i, e.written?))));
        maps
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
            PolicyEvent::Members { id, added, removed } => {
                if let Some(entry) = self.selectors.get_mut(&id) {
                    entry.told.extend(added);
                    entry.told.retain(|identity| !removed.contains(identity));
                    self.settle(id, dirty);
                }
            }
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

    fn take_ports(&mut self, identity: IdentityId, ports: Vec<NamedPorts>, dirty: &mut Dirty) {
        let old = match ports.is_empty() {
            true => self.peer_ports.remove(&identity),
            false => self.peer_ports.insert(identity, ports.clone()),
        };
        if old.unwrap_or_default() == ports {
            return;
        }
        self.named.clear();
        for (identity, ports) in &self.peer_ports {
            for (name, (protocol, number)) in ports.iter().flat_map(|ports| &ports.0) {
                let numbers = self.named.entry((name.clone(), *protocol)).or_default();
                numbers.entry(*number).or_default().insert(*identity);
            }
        }
        let kinds = self.policies.keys().filter(|kind| self.names_peer_ports(kind));
        dirty.kinds.extend(kinds.cloned());
    }

    /// Whether a rule of such endpoints names ports of peers.
    fn names_peer_ports(&self, kind: &Kind) -> bool {
        use warren_model::policy::{PortMatch, Ports};
        self.rules_of(kind)
            .flat_map(|rule| &rule.statements)
            .any(|statement| {
                statement.direction == Direction::Egress
                    && match &statement.ports {
                        Ports::All => false,
                        Ports::These(specs) => {
                            specs.iter().any(|spec| matches!(spec.ports, PortMatch::Name(_)))
                        }
                    }
            })
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

    fn rebuild(&mut self, dirty: Dirty) -> Vec<MapWrite> {
        let (wanted, refresh) = self.sort_out(&dirty);
        let structural = !wanted.is_empty()
            || self
                .endpoints
                .values()
                .any(|e| e.kind.identity == IdentityId::UNKNOWN);
        let mut out = Vec::new();
        // Statements first: they say which prefixes have to be told apart.
        let mut pending = Vec::new();
        for kind in wanted {
            let (default_deny, flats) = self.statements(&kind);
            pending.push((kind, default_deny, flats));
        }
        let new_borders: BTreeSet<IpNet> = pending
            .iter()
            .flat_map(|(_, _, flats)| Direction::ALL.map(|d| flats.of(d)))
            .flatten()
            .flat_map(|flat| flat.cidrs.iter().flat_map(|set| set.borders()))
            .collect();
        self.add_prefixes(&new_borders, &mut out);
        for (kind, identities) in refresh {
            self.refresh(&kind, &identities, &mut out);
        }
        for (kind, default_deny, flats) in pending {
            self.recompile(&kind, default_deny, flats, &mut out);
        }
        self.write_endpoints(&mut out);
        if structural {
            self.collect_garbage(&mut out);
        }
        out
    }

    /// Which kinds of endpoints have to be compiled, and for which only some identities change.
    fn sort_out(&self, dirty: &Dirty) -> (BTreeSet<Kind>, BTreeMap<Kind, BTreeSet<IdentityId>>) {
        let mut wanted = BTreeSet::new();
        let mut refresh: BTreeMap<Kind, BTreeSet<IdentityId>> = BTreeMap::new();
        let changed: BTreeSet<IdentityId> = dirty.members.values().flatten().copied().collect();
        let kinds: BTreeSet<&Kind> = self.endpoints.values().map(|endpoint| &endpoint.kind).collect();
        for kind in kinds
            .into_iter()
            .filter(|kind| kind.identity != IdentityId::UNKNOWN)
        {
            let Some(policy) = self.policies.get(kind) else {
                wanted.insert(kind.clone());
                continue;
            };
            if dirty.everything || dirty.kinds.contains(kind) || changed.contains(&kind.identity) {
                wanted.insert(kind.clone());
                continue;
            }
            let selectors = Direction::ALL
                .into_iter()
                .flat_map(|d| policy.directions.of(d).selectors());
            let identities: BTreeSet<_> = selectors
                .filter_map(|id| dirty.members.get(&id))
                .flatten()
                .copied()
                .collect();
            if !identities.is_empty() {
                refresh.entry(kind.clone()).or_default().extend(identities);
            }
        }
        (wanted, refresh)
    }

    fn statements(&self, kind: &Kind) -> (Directions<bool>, Directions<Vec<Flat>>) {
        let mut default_deny = Directions::<bool>::default();
        let mut flats = Directions::<Vec<Flat>>::default();
        for rule in self.rules_of(kind) {
            default_deny.ingress |= rule.default_deny.ingress;
            default_deny.egress |= rule.default_deny.egress;
            for statement in &rule.statements {
                let name = RuleName {
                    policy: rule.policy.clone(),
                    place: statement.place.clone(),
                };
                let number = self.names.get(&name).copied().unwrap_or(0);
                let parts = flatten(number, statement, &kind.ports, &self.named);
                flats.of_mut(statement.direction).extend(parts);
            }
        }
        (default_deny, flats)
    }

    fn refresh(&mut self, kind: &Kind, identities: &BTreeSet<IdentityId>, out: &mut Vec<MapWrite>) {
        let Some(policy) = self.policies.get_mut(kind) else {
            return;
        };
        self.refreshed += 1;
        let facts = Facts {
            members: &self.members,
            prefixes: &self.cidrs.prefixes,
            host_reaches: kind.identity != IdentityId::HOST && !self.node.closed_to_host,
        };
        for direction in Direction::ALL {
            out.extend(
                policy
                    .directions
                    .of_mut(direction)
                    .refresh(direction, identities, &facts),
            );
        }
    }

    fn recompile(
        &mut self,
        kind: &Kind,
        default_deny: Directions<bool>,
        mut flats: Directions<Vec<Flat>>,
        out: &mut Vec<MapWrite>,
    ) {
        self.compiled += 1;
        let facts = Facts {
            members: &self.members,
            prefixes: &self.cidrs.prefixes,
            host_reaches: kind.identity != IdentityId::HOST && !self.node.closed_to_host,
        };
        let next = &mut self.next_class;
        let mut number = || {
            *next += 1;
            *next - 1
        };
        let mut one = |direction: Direction| {
            let flats = std::mem::take(flats.of_mut(direction));
            compile(direction, *default_deny.of(direction), flats, &facts, &mut number)
        };
        let directions = Directions {
            ingress: one(Direction::Ingress),
            egress: one(Direction::Egress),
        };
        let old = self.policies.get(kind);
        let mut new = EndpointPolicy {
            number: old.map_or(self.next_policy, |old| old.number),
            directions,
        };
        if old.is_none() {
            self.next_policy += 1;
        }
        out.extend(diff(old, &mut new));
        self.policies.insert(kind.clone(), new);
    }

    /// Tells new prefixes apart. Every class first gets entries for them, which say what held before.
    fn add_prefixes(&mut self, wanted: &BTreeSet<IpNet>, out: &mut Vec<MapWrite>) {
        let new = self.cidrs.add(wanted);
        if new.is_empty() {
            return;
        }
        let facts = Facts {
            members: &self.members,
            prefixes: &new,
            host_reaches: false,
        };
        for policy in self.policies.values_mut() {
            for direction in Direction::ALL {
                out.extend(
                    policy
                        .directions
                        .of_mut(direction)
                        .add_prefixes(direction, &new, &facts),
                );
            }
        }
        let table = self.cidrs.number;
        out.extend(
            new.into_iter()
                .map(|(prefix, n)| MapWrite::SetCidr(CidrKey { table, prefix }, n)),
        );
    }

    /// Leads endpoints to their policies, one write each; takes away those that are gone.
    fn write_endpoints(&mut self, out: &mut Vec<MapWrite>) {
        let gone: Vec<u16> = self
            .endpoints
            .iter()
            .filter(|(_, endpoint)| endpoint.kind.identity == IdentityId::UNKNOWN)
            .map(|(index, _)| *index)
            .collect();
        for index in gone {
            if self
                .endpoints
                .remove(&index)
                .is_some_and(|endpoint| endpoint.written.is_some())
            {
                out.push(MapWrite::DeleteEndpoint(index));
            }
        }
        for (index, endpoint) in &mut self.endpoints {
            let Some(policy) = self.policies.get(&endpoint.kind) else {
                continue;
            };
            let value = EndpointValue {
                policy: policy.number,
                cidr_table: self.cidrs.number,
                audit: endpoint.audit || self.node.audit,
            };
            if endpoint.written != Some(value) {
                endpoint.written = Some(value);
                out.push(MapWrite::SetEndpoint(*index, value));
            }
        }
    }

    /// Takes away policies that no endpoint has, and prefixes that no statement names.
    fn collect_garbage(&mut self, out: &mut Vec<MapWrite>) {
        let used: BTreeSet<&Kind> = self.endpoints.values().map(|endpoint| &endpoint.kind).collect();
        let unused: Vec<Kind> = self
            .policies
            .keys()
            .filter(|kind| !used.contains(kind))
            .cloned()
            .collect();
        let mut after: Vec<MapWrite> = unused
            .iter()
            .filter_map(|kind| self.policies.remove(kind))
            .flat_map(|p| removal(&p))
            .collect();
        let policies = self.policies.values();
        let directions = policies.flat_map(|policy| Direction::ALL.map(|d| policy.directions.of(d)));
        let borders: BTreeSet<IpNet> = directions.flat_map(|direction| direction.borders()).collect();
        let gone = self.cidrs.retain(&borders);
        let numbers: BTreeSet<u32> = gone.values().copied().collect();
        let table = self.cidrs.number;
        out.extend(
            gone.into_keys()
                .map(|prefix| MapWrite::DeleteCidr(CidrKey { table, prefix })),
        );
        if !numbers.is_empty() {
            for policy in self.policies.values_mut() {
                for direction in Direction::ALL {
                    after.extend(policy.directions.of_mut(direction).remove_prefixes(&numbers));
                }
            }
        }
        if !after.is_empty() {
            out.push(MapWrite::Grace);
            out.append(&mut after);
        }
    }
}
