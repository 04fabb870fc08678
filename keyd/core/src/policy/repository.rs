//! Policy objects, and what agents are told of them.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use warren_model::{
    ClusterConfig, IdentityId, Labels,
    policy::{
        Action, CidrSet, CidrSource, LabelSource, Peer, Peers, PolicyError, PolicyRef, Ports, Rule, Selector,
        SelectorId, Statement, Subject, Validity,
    },
};

use super::selectors::{Members, SelectorCache};

/// What changed. In the order in which agents must take it: no rule names a selector that was not told before, and
/// none is forgotten that a rule still names. Changes that one call returned take effect together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PolicyChange {
    /// A selector is in use now.
    Selector {
        /// Its number.
        id: SelectorId,
        /// What it asks for: agents evaluate it for their own host, whose labels differ per node.
        selector: Selector,
        /// All its members.
        members: BTreeSet<IdentityId>,
    },
    /// The members of a selector changed.
    Members(Members),
    /// All rules of an object; they replace what was there.
    Rules {
        /// The object.
        policy: PolicyRef,
        /// Its rules.
        rules: Vec<Rule<SelectorId>>,
    },
    /// The object enforces nothing any more.
    Removed(PolicyRef),
    /// No rule names the selector any more.
    SelectorGone(SelectorId),
    /// What the `Valid` condition of an object has to say. Not for agents.
    Validity {
        /// The object.
        policy: PolicyRef,
        /// What it says.
        validity: Validity,
    },
}

#[derive(Debug, Clone)]
struct Object {
    outcome: Result<Vec<Rule>, PolicyError>,
    rules: Vec<Rule<SelectorId>>,
    validity: Validity,
}

/// The most peers and ports that the rules of an object may name, groups resolved: an object travels as one message,
/// which has a limit (4 MiB), and an agent must not be stopped by one object.
const MOST_PARTS: usize = 20_000;

/// A CiliumCIDRGroup: its prefixes, or what is wrong with it.
type Group = Result<Vec<IpNet>, PolicyError>;

/// All policy objects. Objects do not affect each other: what is wrong with one is kept with it.
#[derive(Debug, Clone)]
pub struct PolicyRepository {
    config: ClusterConfig,
    objects: BTreeMap<PolicyRef, Object>,
    groups: BTreeMap<String, Group>,
    selectors: SelectorCache,
}

impl PolicyRepository {
    /// Without objects.
    pub fn new(config: ClusterConfig) -> Self {
        Self {
            config,
            objects: BTreeMap::new(),
            groups: BTreeMap::new(),
            selectors: SelectorCache::default(),
        }
    }

    /// A new object, or a changed one, as the parser saw it. Telling twice changes nothing.
    pub fn upsert(
        &mut self,
        policy: &PolicyRef,
        outcome: Result<Vec<Rule>, PolicyError>,
    ) -> Vec<PolicyChange> {
        if self
            .objects
            .get(policy)
            .is_some_and(|object| object.outcome == outcome)
        {
            return Vec::new();
        }
        self.put(policy, outcome)
    }

    /// An object is gone.
    pub fn remove(&mut self, policy: &PolicyRef) -> Vec<PolicyChange> {
        let Some(object) = self.objects.remove(policy) else {
            return Vec::new();
        };
        let mut out = Vec::new();
        if !object.rules.is_empty() {
            out.push(PolicyChange::Removed(policy.clone()));
        }
        self.release(&object.rules, &mut out);
        out
    }

    /// Sets the prefixes of a CiliumCIDRGroup, or what is wrong with it; `None` where it is gone. Touches only objects
    /// that name it.
    pub fn set_group(&mut self, name: &str, group: Option<Group>) -> Vec<PolicyChange> {
        let before = match group {
            Some(group) if self.groups.get(name) == Some(&group) => return Vec::new(),
            Some(group) => self.groups.insert(name.to_owned(), group),
            None => self.groups.remove(name),
        };
        if before.is_none() && !self.groups.contains_key(name) {
            return Vec::new();
        }
        let users: Vec<_> = self
            .objects
            .iter()
            .filter(|(_, object)| {
                object
                    .outcome
                    .iter()
                    .flatten()
                    .any(|rule| groups(rule).any(|g| g == name))
            })
            .map(|(policy, object)| (policy.clone(), object.outcome.clone()))
            .collect();
        users
            .into_iter()
            .flat_map(|(policy, outcome)| self.put(&policy, outcome))
            .collect()
    }

    /// A new identity, or new labels of one.
    pub fn upsert_identity(&mut self, identity: IdentityId, labels: &Labels) -> Vec<PolicyChange> {
        self.selectors
            .upsert_identity(identity, labels)
            .into_iter()
            .map(PolicyChange::Members)
            .collect()
    }

    /// An identity is gone.
    pub fn remove_identity(&mut self, identity: IdentityId) -> Vec<PolicyChange> {
        self.selectors
            .remove_identity(identity)
            .into_iter()
            .map(PolicyChange::Members)
            .collect()
    }

    /// What the `Valid` condition of an object has to say.
    pub fn validity(&self, policy: &PolicyRef) -> Option<&Validity> {
        self.objects.get(policy).map(|object| &object.validity)
    }

    /// The rules of an object with their selectors, for people.
    pub fn rules(&self, policy: &PolicyRef) -> &[Rule] {
        self.objects
            .get(policy)
            .and_then(|object| object.outcome.as_deref().ok())
            .unwrap_or_default()
    }

    /// The rules of an object as agents get them.
    pub fn numbered_rules(&self, policy: &PolicyRef) -> &[Rule<SelectorId>] {
        self.objects
            .get(policy)
            .map_or(&[], |object| object.rules.as_slice())
    }

    /// All CiliumCIDRGroups with something wrong.
    pub fn malformed_groups(&self) -> impl Iterator<Item = (&str, &PolicyError)> {
        self.groups
            .iter()
            .filter_map(|(name, group)| Some((name.as_str(), group.as_ref().err()?)))
    }

    /// All objects.
    pub fn iter(&self) -> impl Iterator<Item = (&PolicyRef, &Validity)> {
        self.objects
            .iter()
            .map(|(policy, object)| (policy, &object.validity))
    }

    /// The selectors in use.
    pub fn selectors(&self) -> &SelectorCache {
        &self.selectors
    }

    /// Everything an agent needs that knows nothing yet.
    pub fn snapshot(&self) -> Vec<PolicyChange> {
        let selectors = self
            .selectors
            .iter()
            .map(|(id, selector, members)| PolicyChange::Selector {
                id,
                selector: selector.clone(),
                members: members.clone(),
            });
        let rules = self.objects.iter().filter(|(_, object)| !object.rules.is_empty());
        let rules = rules.map(|(policy, object)| PolicyChange::Rules {
            policy: policy.clone(),
            rules: object.rules.clone(),
        });
        selectors.chain(rules).collect()
    }

    fn put(&mut self, policy: &PolicyRef, outcome: Result<Vec<Rule>, PolicyError>) -> Vec<PolicyChange> {
        let mut out = Vec::new();
        let mut notes = Vec::new();
        let mut rules = Vec::new();
        let mut resolved = Vec::new();
        for rule in outcome.iter().flatten() {
            notes.extend(self.group_notes(rule));
            notes.extend(self.ignored_labels(rule));
            resolved.push(self.resolve(rule.clone()));
        }
        let parts = resolved.iter().map(parts).sum::<usize>();
        if parts > MOST_PARTS {
            notes.push(format!(
                "it is too large ({parts} peers and ports, {MOST_PARTS} at most): it allows nothing, and what it \
                 denies it denies to everybody; write several policies"
            ));
            resolved.iter_mut().for_each(close);
        }
        for rule in resolved {
            rules.push(rule.map(|selector| self.acquire(&selector, &mut out)));
        }
        let validity = Validity::of(&outcome, &notes);
        let object = Object {
            outcome,
            rules: rules.clone(),
            validity: validity.clone(),
        };
        let before = self.objects.insert(policy.clone(), object);
        let old = before
            .as_ref()
            .map(|object| object.rules.as_slice())
            .unwrap_or_default();
        if rules != old {
            out.push(match rules.is_empty() {
                true => PolicyChange::Removed(policy.clone()),
                false => PolicyChange::Rules {
                    policy: policy.clone(),
                    rules,
                },
            });
        }
        self.release(old, &mut out);
        if before.is_none_or(|object| object.validity != validity) {
            out.push(PolicyChange::Validity {
                policy: policy.clone(),
                validity,
            });
        }
        out
    }

    fn acquire(&mut self, selector: &Selector, out: &mut Vec<PolicyChange>) -> SelectorId {
        let (id, new) = self.selectors.acquire(selector);
        if new {
            let members = self.selectors.members(id).collect();
            out.push(PolicyChange::Selector {
                id,
                selector: selector.clone(),
                members,
            });
        }
        id
    }

    fn release(&mut self, rules: &[Rule<SelectorId>], out: &mut Vec<PolicyChange>) {
        for id in rules.iter().flat_map(Rule::selectors) {
            if self.selectors.release(*id) {
                out.push(PolicyChange::SelectorGone(*id));
            }
        }
    }

    /// A sentence per group that is not what the rule takes it for.
    fn group_notes(&self, rule: &Rule) -> Vec<String> {
        let names: BTreeSet<_> = groups(rule).collect();
        let note = |name| match self.groups.get(name) {
            Some(Ok(_)) => None,
            Some(Err(error)) => Some(format!(
                "CiliumCIDRGroup {name} is malformed ({error}): allowing it allows nothing, denying it denies every \
                 address"
            )),
            None => Some(format!(
                "CiliumCIDRGroup {name} does not exist: it holds no address"
            )),
        };
        names.into_iter().filter_map(note).collect()
    }

    /// A sentence per label that the rule asks for and that no identity has.
    fn ignored_labels(&self, rule: &Rule) -> Vec<String> {
        let subject = match &rule.subject {
            Subject::Pods(selector) => Some(selector),
            // Nodes have all their labels.
            Subject::Nodes(_) => None,
        };
        let peers = rule.statements.iter().flat_map(Statement::selectors);
        let keys: BTreeSet<_> = subject
            .into_iter()
            .chain(peers)
            .flat_map(Selector::requirements)
            .map(|requirement| &requirement.key)
            .filter(|key| matches!(key.source, LabelSource::Any | LabelSource::K8s))
            .filter(|key| self.config.ignores_label(&key.name))
            .collect();
        let note = |key| format!("label {key} is ignored (ignoredLabels of the cluster): no pod has it");
        keys.into_iter().map(note).collect()
    }

    /// Puts the prefixes of groups in their place.
    fn resolve(&self, mut rule: Rule) -> Rule {
        for statement in &mut rule.statements {
            let Peers::These(peers) = &mut statement.peers else {
                continue;
            };
            let action = statement.action;
            *peers = peers
                .drain(..)
                .flat_map(|peer| self.resolve_peer(peer, action))
                .collect();
        }
        rule
    }

    fn resolve_peer(&self, peer: Peer, action: Action) -> Vec<Peer> {
        let Peer::Cidr(CidrSet {
            source: CidrSource::Group(name),
            except,
            scope,
        }) = peer
        else {
            return vec![peer];
        };
        let everything = [Ipv4Net::default().into(), Ipv6Net::default().into()];
        let (prefixes, except) = match (self.groups.get(&name), action) {
            (Some(Ok(prefixes)), _) => (prefixes.as_slice(), except),
            // Nobody knows what it should hold: fail closed, in both actions.
            (Some(Err(_)), Action::Deny) => (everything.as_slice(), vec![]),
            (Some(Err(_)), Action::Allow) | (None, _) => (&[][..], except),
        };
        let set = |prefix: &IpNet| CidrSet {
            source: CidrSource::Prefix(*prefix),
            except: except
                .iter()
                .filter(|e| prefix.contains(*e) || e.contains(prefix))
                .copied()
                .collect(),
            scope,
        };
        prefixes.iter().map(|prefix| Peer::Cidr(set(prefix))).collect()
    }
}

/// How many peers and ports a rule names, each statement's own.
fn parts(rule: &Rule) -> usize {
    let ports = |statement: &Statement| match &statement.ports {
        Ports::All => 0,
        Ports::These(ports) => ports.len(),
    };
    let of = |statement: &Statement| {
        let cidrs: usize = statement.cidrs().map(|set| 1 + set.except.len()).sum();
        1 + statement.selectors().count() + cidrs + ports(statement)
    };
    rule.statements.iter().map(of).sum()
}

/// Keeps whom a rule selects and isolates, and nothing of what it allows.
fn close(rule: &mut Rule) {
    for statement in &mut rule.statements {
        statement.ports = Ports::All;
        statement.peers = match statement.action {
            Action::Allow => Peers::These(Vec::new()),
            Action::Deny => Peers::Any,
        };
    }
    // The same for all of them now: one of a kind is enough.
    let mut seen = BTreeSet::new();
    rule.statements
        .retain(|statement| seen.insert((statement.direction, statement.action)));
}

/// The names of groups that a rule refers to.
fn groups(rule: &Rule) -> impl Iterator<Item = &str> {
    rule.statements
        .iter()
        .flat_map(Statement::cidrs)
        .filter_map(|set| match &set.source {
            CidrSource::Group(name) => Some(name.as_str()),
            CidrSource::Prefix(_) => None,
        })
}

#[cfg(test)]
mod tests;
