//! Policy objects, and what agents are told of them.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use warren_model::{
    IdentityId, Labels,
    policy::{
        CidrSet, CidrSource, Peer, Peers, PolicyError, PolicyRef, Rule, Selector, SelectorId, Statement,
        Validity,
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

/// All policy objects. Objects do not affect each other: what is wrong with one is kept with it.
#[derive(Debug, Clone, Default)]
pub struct PolicyRepository {
    objects: BTreeMap<PolicyRef, Object>,
    groups: BTreeMap<String, Vec<IpNet>>,
    selectors: SelectorCache,
}

impl PolicyRepository {
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

    /// Sets the prefixes of a CiliumCIDRGroup; `None` where it is gone. Touches only objects that name it.
    pub fn set_group(&mut self, name: &str, cidrs: Option<Vec<IpNet>>) -> Vec<PolicyChange> {
        let before = match cidrs {
            Some(cidrs) if self.groups.get(name) == Some(&cidrs) => return Vec::new(),
            Some(cidrs) => self.groups.insert(name.to_owned(), cidrs),
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
        for rule in outcome.iter().flatten() {
            let missing: BTreeSet<_> = groups(rule).filter(|g| !self.groups.contains_key(*g)).collect();
            notes.extend(
                missing
                    .into_iter()
                    .map(|g| format!("CiliumCIDRGroup {g} does not exist: it holds no address")),
            );
            let resolved = self.resolve(rule.clone());
            rules.push(resolved.map(|selector| self.acquire(&selector, &mut out)));
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

    /// Puts the prefixes of groups in their place.
    fn resolve(&self, mut rule: Rule) -> Rule {
        for statement in &mut rule.statements {
            let Peers::These(peers) = &mut statement.peers else {
                continue;
            };
            *peers = peers.drain(..).flat_map(|peer| self.resolve_peer(peer)).collect();
        }
        rule
    }

    fn resolve_peer(&self, peer: Peer) -> Vec<Peer> {
        let Peer::Cidr(CidrSet {
            source: CidrSource::Group(name),
            except,
            scope,
        }) = peer
        else {
            return vec![peer];
        };
        let prefixes = self.groups.get(&name).map(Vec::as_slice).unwrap_or_default();
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
mod tests {
    use warren_model::policy::{
        Action, AddressScope, Direction, Directions, LabelKey, PolicyKind, Ports, Requirement, Subject,
    };

    use super::*;

    fn policy(name: &str) -> PolicyRef {
        PolicyRef {
            kind: PolicyKind::CiliumNetworkPolicy,
            namespace: "shop".into(),
            name: name.into(),
        }
    }

    fn app(name: &str) -> Selector {
        Selector::new([Requirement::is(LabelKey::parse("app"), name)])
    }

    fn rule(name: &str, peers: Vec<Peer>) -> Rule {
        Rule {
            policy: policy(name),
            subject: Subject::Pods(app(name)),
            default_deny: Directions {
                ingress: true,
                egress: false,
            },
            statements: vec![Statement {
                place: "spec.ingress[0]".into(),
                direction: Direction::Ingress,
                action: Action::Allow,
                peers: Peers::These(peers),
                ports: Ports::All,
                unenforced: Vec::new(),
            }],
        }
    }

    fn kinds(changes: &[PolicyChange]) -> Vec<&'static str> {
        let kind = |change: &PolicyChange| match change {
            PolicyChange::Selector { .. } => "selector",
            PolicyChange::Members(_) => "members",
            PolicyChange::Rules { .. } => "rules",
            PolicyChange::Removed(_) => "removed",
            PolicyChange::SelectorGone(_) => "gone",
            PolicyChange::Validity { .. } => "validity",
        };
        changes.iter().map(kind).collect()
    }

    #[test]
    fn selectors_come_before_rules_and_go_after_them() {
        let mut repository = PolicyRepository::default();
        let web = rule("web", vec![Peer::Selector(app("api"))]);
        let changes = repository.upsert(&policy("web"), Ok(vec![web.clone()]));
        assert_eq!(kinds(&changes), ["selector", "selector", "rules", "validity"]);
        assert!(
            repository.upsert(&policy("web"), Ok(vec![web])).is_empty(),
            "telling twice changes nothing"
        );
        let other = rule("web", vec![Peer::Selector(app("db"))]);
        let changes = repository.upsert(&policy("web"), Ok(vec![other]));
        assert_eq!(kinds(&changes), ["selector", "rules", "gone"]);
        assert_eq!(kinds(&repository.snapshot()), ["selector", "selector", "rules"]);
        assert_eq!(
            kinds(&repository.remove(&policy("web"))),
            ["removed", "gone", "gone"]
        );
        assert!(repository.remove(&policy("web")).is_empty() && repository.selectors().is_empty());
    }

    #[test]
    fn a_bad_object_enforces_nothing_and_touches_no_other() {
        let mut repository = PolicyRepository::default();
        repository.upsert(&policy("web"), Ok(vec![rule("web", vec![])]));
        let before = repository.snapshot();
        let fault = PolicyError::new("spec.ingress[0]", "is wrong");
        let changes = repository.upsert(&policy("bad"), Err(fault.clone()));
        assert_eq!(kinds(&changes), ["validity"]);
        assert_eq!(repository.snapshot(), before);
        let validity = repository.validity(&policy("bad")).unwrap();
        assert!(
            !validity.valid && validity.message.starts_with("spec.ingress[0]: is wrong."),
            "{validity:?}"
        );
        // A good object that turns bad stops being enforced, and says why.
        let changes = repository.upsert(&policy("web"), Err(fault));
        assert_eq!(kinds(&changes), ["removed", "gone", "validity"]);
        let changes = repository.upsert(&policy("web"), Ok(vec![rule("web", vec![])]));
        assert_eq!(kinds(&changes), ["selector", "rules", "validity"]);
    }

    #[test]
    fn groups_are_resolved_and_followed() {
        let mut repository = PolicyRepository::default();
        let except: IpNet = "10.1.0.0/16".parse().unwrap();
        let office = Peer::Cidr(CidrSet {
            source: CidrSource::Group("office".into()),
            except: vec![except],
            scope: AddressScope::World,
        });
        repository.upsert(&policy("web"), Ok(vec![rule("web", vec![office])]));
        repository.upsert(&policy("api"), Ok(vec![rule("api", vec![])]));
        let validity = repository.validity(&policy("web")).unwrap();
        assert!(
            validity.valid && validity.message.contains("CiliumCIDRGroup office does not exist"),
            "{validity:?}"
        );
        let prefixes = vec!["10.0.0.0/8".parse().unwrap(), "192.168.0.0/24".parse().unwrap()];
        let changes = repository.set_group("office", Some(prefixes.clone()));
        assert_eq!(kinds(&changes), ["rules", "validity"]);
        let PolicyChange::Rules { rules, .. } = &changes[0] else {
            panic!()
        };
        let sets: Vec<_> = rules[0].statements[0].cidrs().collect();
        assert!(
            sets[0].contains("10.2.0.1".parse().unwrap()) && !sets[0].contains("10.1.0.1".parse().unwrap())
        );
        assert!(sets[1].contains("192.168.0.1".parse().unwrap()) && sets[1].except.is_empty());
        assert!(repository.set_group("office", Some(prefixes)).is_empty());
        assert!(repository.set_group("nobody", None).is_empty());
        assert_eq!(
            kinds(&repository.set_group("office", None)),
            ["rules", "validity"]
        );
    }

    #[test]
    fn identities_change_only_selectors_that_they_match() {
        let mut repository = PolicyRepository::default();
        repository.upsert(
            &policy("web"),
            Ok(vec![rule("web", vec![Peer::Selector(app("api"))])]),
        );
        let api = Labels([("k8s:app".to_owned(), "api".to_owned())].into());
        let changes = repository.upsert_identity(IdentityId(300), &api);
        assert_eq!(kinds(&changes), ["members"]);
        assert_eq!(kinds(&repository.remove_identity(IdentityId(300))), ["members"]);
    }
}
