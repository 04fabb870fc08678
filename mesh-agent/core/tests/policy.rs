//! From directories to map entries: what changes arrive in parts ends where it would have ended at once, a pod is never
//! without its policy, and what cannot be written leaves the rest alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use warren_agent_core::{
    Change, Entry, EntryKey,
    policy::{
        FirstNumbers, LocalEndpoint, MapWrite, Maps, Packet, PolicyEngine, PolicyEvent, PolicySource,
        Verdict, lookup, named_ports, repair,
    },
};
use warren_model::{
    IdentityId, Labels,
    policy::{
        Action, AddressScope, CidrSet, CidrSource, Direction, Directions, LabelKey, NodeFacts, Operator,
        Peer, Peers, PolicyKind, PolicyRef, PortSpec, Ports, Protocol, Requirement, Rule, Selector,
        SelectorId, Statement, Subject, reserved_labels,
    },
};

/// A directory as `keyd` would keep it: members follow from labels.
#[derive(Debug, Clone, Default, PartialEq)]
struct Model {
    identities: BTreeMap<IdentityId, Labels>,
    rules: BTreeMap<PolicyRef, Vec<Rule<SelectorId>>>,
    selectors: BTreeMap<SelectorId, Selector>,
    facts: NodeFacts,
}

impl Model {
    fn entries(&self) -> BTreeMap<EntryKey, Entry> {
        let mut out = Vec::new();
        for (id, labels) in &self.identities {
            out.push(Entry::Identity(*id, Arc::new(labels.clone())));
        }
        let reserved = (1..11).map(|n| (IdentityId(n), reserved_labels(IdentityId(n), false)));
        let everybody: Vec<_> = reserved
            .chain(self.identities.iter().map(|(id, labels)| (*id, labels.clone())))
            .collect();
        for (id, selector) in &self.selectors {
            out.push(Entry::Selector(*id, selector.clone()));
            let mut blocks: BTreeMap<u32, BTreeSet<IdentityId>> = BTreeMap::new();
            for (identity, _) in everybody.iter().filter(|(_, labels)| selector.matches(labels)) {
                blocks.entry(identity.0 / 256).or_default().insert(*identity);
            }
            out.extend(
                blocks
                    .into_iter()
                    .map(|(block, members)| Entry::Members(*id, block, members)),
            );
        }
        let rules = self.rules.iter();
        out.extend(rules.map(|(policy, rules)| Entry::Rules(policy.clone(), rules.clone())));
        out.push(Entry::Facts("node1".into(), self.facts.clone()));
        out.into_iter().map(|entry| (entry.key(), entry)).collect()
    }

    /// What changed since `before`; all of it where there is none.
    fn change(&self, before: Option<&Self>, version: u64) -> Change {
        let now = self.entries();
        let was = before.map(Self::entries).unwrap_or_default();
        Change {
            epoch: 1,
            version,
            whole: before.is_none(),
            upserts: now
                .iter()
                .filter(|(key, entry)| was.get(key) != Some(entry))
                .map(|(_, entry)| entry.clone())
                .collect(),
            removes: was.keys().filter(|key| !now.contains_key(key)).cloned().collect(),
            keeps: Vec::new(),
        }
    }
}

/// Source, engine and maps.
struct Node {
    source: PolicySource,
    engine: PolicyEngine,
    maps: Maps,
}

impl Node {
    fn new() -> Self {
        Self {
            source: PolicySource::new("node1".into(), NodeFacts::default()),
            engine: PolicyEngine::new(FirstNumbers::default()),
            maps: Maps::default(),
        }
    }

    fn apply(&mut self, events: Vec<PolicyEvent>) -> Vec<MapWrite> {
        let writes = self.engine.apply(events);
        writes.iter().for_each(|write| self.maps.apply(write));
        assert_eq!(self.maps, self.engine.contents());
        writes
    }

    fn take(&mut self, change: &Change) -> Vec<MapWrite> {
        let events = self.source.take(change);
        self.apply(events)
    }

    fn endpoints(&mut self, endpoints: &[(u16, &str, u32)]) -> Vec<MapWrite> {
        let local = |(index, pod, identity): &(u16, &str, u32)| {
            let endpoint = LocalEndpoint {
                pod: (!pod.is_empty()).then(|| (*pod).to_owned()),
                identity: IdentityId(*identity),
                audit: false,
            };
            (*index, endpoint)
        };
        let events = self.source.set_endpoints(endpoints.iter().map(local).collect());
        self.apply(events)
    }

    fn settle(&mut self) {
        let position = self.source.position().unwrap();
        let events = self.source.settled(position);
        self.apply(events);
    }

    fn verdict(&self, endpoint: u16, direction: Direction, peer: u32, port: u16) -> Verdict {
        let packet = Packet {
            endpoint,
            direction,
            peer: IdentityId(peer),
            address: "10.244.9.9".parse().unwrap(),
            protocol: 6,
            port,
        };
        lookup(&self.maps, &packet)
    }

    fn comes_in(&self, endpoint: u16, peer: u32) -> bool {
        self.verdict(endpoint, Direction::Ingress, peer, 80).allows()
    }
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    Labels(
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect(),
    )
}

fn app(value: &str) -> Selector {
    Selector::new([Requirement {
        key: LabelKey::k8s("app"),
        operator: Operator::In([value.to_owned()].into()),
    }])
}

fn policy(name: &str) -> PolicyRef {
    PolicyRef {
        kind: PolicyKind::CiliumNetworkPolicy,
        namespace: "shop".into(),
        name: name.into(),
    }
}

/// Pods of `subject` are reached by those of `peer` alone, on any port.
fn only_from(name: &str, subject: SelectorId, peer: SelectorId) -> (PolicyRef, Vec<Rule<SelectorId>>) {
    let statement = Statement {
        place: "spec.ingress[0]".into(),
        direction: Direction::Ingress,
        action: Action::Allow,
        peers: Peers::These(vec![Peer::Selector(peer)]),
        ports: Ports::All,
        unenforced: vec![],
    };
    let rule = Rule {
        policy: policy(name),
        subject: Subject::Pods(subject),
        default_deny: Directions {
            ingress: true,
            egress: false,
        },
        statements: vec![statement],
    };
    (policy(name), vec![rule])
}

const WEB: SelectorId = SelectorId(1);
const API: SelectorId = SelectorId(2);

fn shop() -> Model {
    Model {
        identities: [
            (IdentityId(300), labels(&[("k8s:app", "web")])),
            (IdentityId(301), labels(&[("k8s:app", "api")])),
            (IdentityId(302), labels(&[("k8s:app", "other")])),
        ]
        .into(),
        rules: [only_from("api", API, WEB)].into(),
        selectors: [(WEB, app("web")), (API, app("api"))].into(),
        facts: NodeFacts::default(),
    }
}

#[test]
fn an_endpoint_is_closed_until_the_directory_has_its_labels() {
    let mut node = Node::new();
    node.endpoints(&[(1, "a", 301), (2, "b", 310)]);
    node.take(&Model::default().change(None, 1));
    assert!(!node.maps.endpoints.contains_key(&1));
    assert_eq!(node.maps.endpoints.len(), 1, "the host alone");
    let writes = node.take(&shop().change(Some(&Model::default()), 2));
    let last = writes
        .iter()
        .rposition(|write| matches!(write, MapWrite::SetVerdict(..)));
    let switch = writes
        .iter()
        .position(|write| matches!(write, MapWrite::SetEndpoint(1, _)));
    assert!(last < switch, "the policy is whole before anybody is led to it");
    assert!(node.comes_in(1, 300) && !node.comes_in(1, 302));
    assert!(node.source.is_told(1) && !node.source.is_told(2));
    assert!(!node.comes_in(2, 300), "an identity that nobody has told of");
}

#[test]
fn an_identity_that_leaves_is_one_until_nobody_has_it() {
    let mut node = Node::new();
    let before = shop();
    node.take(&before.change(None, 1));
    node.endpoints(&[(1, "a", 301)]);
    // A web pod is labelled anew: its old identity goes with the version that brings the new one.
    let mut after = before.clone();
    after.identities.remove(&IdentityId(300));
    after
        .identities
        .insert(IdentityId(303), labels(&[("k8s:app", "web"), ("k8s:new", "")]));
    node.take(&after.change(Some(&before), 2));
    assert!(
        node.comes_in(1, 300) && node.comes_in(1, 303),
        "nothing that both allow is lost"
    );
    node.settle();
    assert!(!node.comes_in(1, 300) && node.comes_in(1, 303));

    // The API forgets a pod that still runs: its policy stays what it was, also under new numbers.
    let mut gone = after.clone();
    gone.identities.remove(&IdentityId(301));
    node.take(&gone.change(Some(&after), 3));
    node.settle();
    assert!(node.comes_in(1, 303) && !node.comes_in(1, 302));
    let mut renumbered = gone.clone();
    renumbered.selectors = [(WEB, app("api")), (API, app("web"))].into();
    renumbered.rules = [only_from("api", WEB, API)].into();
    node.take(&renumbered.change(None, 4));
    node.settle();
    assert!(node.comes_in(1, 303) && !node.comes_in(1, 302));
    node.endpoints(&[]);
    node.settle();
    assert!(!node.source.has_departed());
}

#[test]
fn an_index_of_another_pod_is_another_endpoint() {
    let mut node = Node::new();
    let model = shop();
    node.take(&model.change(None, 1));
    node.endpoints(&[(1, "", 302)]);
    node.endpoints(&[(1, "a", 302)]);
    assert!(node.comes_in(1, 302), "a pod that becomes known is the same");
    let writes = node.endpoints(&[(1, "b", 999)]);
    assert!(writes.contains(&MapWrite::DeleteEndpoint(1)));
    assert!(!node.comes_in(1, 302));
    // The same pod with an identity that is not known yet keeps what it has.
    node.endpoints(&[(1, "b", 302)]);
    assert!(node.endpoints(&[(1, "b", 999)]).is_empty());
    assert!(node.comes_in(1, 302));
}

#[test]
fn named_ports_are_labels_of_their_own_source() {
    let named = labels(&[
        ("port:http", "TCP/8080"),
        ("port:dns", "UDP/53"),
        ("port:bad", "TCP/0"),
        ("port:worse", "8080"),
        ("k8s:http", "TCP/1"),
    ]);
    let ports = named_ports(&named);
    assert_eq!(ports.number(Protocol::Tcp, "http"), Some(8080));
    assert_eq!(ports.number(Protocol::Udp, "dns"), Some(53));
    assert_eq!(ports.0.len(), 2);

    let mut node = Node::new();
    let mut model = shop();
    model.identities.insert(
        IdentityId(301),
        labels(&[("k8s:app", "api"), ("port:http", "TCP/80")]),
    );
    let (name, mut rules) = only_from("api", API, WEB);
    rules[0].statements[0].ports = Ports::These(vec![PortSpec::named(Protocol::Tcp, "http")]);
    model.rules = [(name, rules)].into();
    node.take(&model.change(None, 1));
    node.endpoints(&[(1, "a", 301)]);
    assert!(node.comes_in(1, 300));
    assert!(!node.verdict(1, Direction::Ingress, 300, 81).allows());
    assert!(
        !Selector::new([Requirement::exists(LabelKey::parse("http"))]).matches(&labels(&[("port:http", "")]))
    );
}

#[test]
fn what_cannot_be_read_stays() {
    let mut node = Node::new();
    let model = shop();
    node.take(&model.change(None, 1));
    node.endpoints(&[(1, "a", 301)]);
    let mut change = model.change(None, 2);
    change.upserts.retain(|entry| !matches!(entry, Entry::Rules(..)));
    change.keeps.push(EntryKey::Rules(policy("api")));
    node.take(&change);
    assert!(!node.comes_in(1, 302));
    change.keeps.clear();
    change.version = 3;
    node.take(&change);
    assert!(node.comes_in(1, 302));
}

#[test]
fn settings_hold_whatever_the_directory_says() {
    let defaults = NodeFacts {
        closed_to_host: true,
        audit: true,
        ..NodeFacts::default()
    };
    let mut source = PolicySource::new("node1".into(), defaults);
    let mut facts = shop();
    facts.facts.labels = labels(&[("k8s:role", "db")]);
    let events = source.take(&facts.change(None, 1));
    let told = events.iter().find_map(|event| match event {
        PolicyEvent::Node(facts) => Some(facts.clone()),
        _ => None,
    });
    let told = told.unwrap();
    assert!(told.audit && told.closed_to_host && told.labels == facts.facts.labels);
}

/// A generator that needs no crate: xorshift.
struct Dice(u64);

impl Dice {
    fn of(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % sides
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.roll(from.len())].clone()
    }

    /// Changes a directory somehow, without leaving a rule without its selectors.
    fn change(&mut self, model: &mut Model) {
        let identity = IdentityId(300 + self.roll(6) as u32);
        let name = self.pick(&["p", "q", "r"]);
        match self.roll(6) {
            0 => drop(model.identities.remove(&identity)),
            1 => drop(model.rules.remove(&policy(name))),
            2 => model.facts.closed_to_host = self.roll(2) == 0,
            3 | 4 => {
                let (subject, peer) = (self.selector(model), self.selector(model));
                let (name, mut rules) = only_from(name, subject, peer);
                if self.roll(3) == 0 {
                    rules[0].statements[0].action = Action::Deny;
                }
                if self.roll(2) == 0 {
                    rules[0].statements.push(self.prefixes());
                }
                rules[0].default_deny.ingress = self.roll(3) > 0;
                model.rules.insert(name, rules);
            }
            _ => {
                // The labels of a number never change: an identity comes back as it was.
                let all = [("k8s:app", "web"), ("k8s:app", "api"), ("k8s:app", "other")];
                let pair = all[identity.0 as usize % 3];
                model
                    .identities
                    .insert(identity, labels(&[pair, ("port:http", "TCP/80")]));
            }
        }
        let named: BTreeSet<SelectorId> = model
            .rules
            .values()
            .flatten()
            .flat_map(|rule| rule.selectors().copied().collect::<Vec<_>>())
            .collect();
        model.selectors.retain(|id, _| named.contains(id));
    }

    /// A statement about prefixes that lie inside each other.
    fn prefixes(&mut self) -> Statement<SelectorId> {
        let all = ["10.0.0.0/8", "10.9.0.0/16", "10.9.9.0/24", "0.0.0.0/0"];
        let set = CidrSet {
            source: CidrSource::Prefix(self.pick(&all).parse().unwrap()),
            except: match self.roll(2) {
                0 => vec![],
                _ => vec!["10.9.9.8/32".parse().unwrap()],
            },
            scope: self.pick(&[AddressScope::World, AddressScope::Any]),
        };
        Statement {
            place: "spec.ingress[1]".into(),
            direction: Direction::Ingress,
            action: self.pick(&[Action::Allow, Action::Deny]),
            peers: Peers::These(vec![Peer::Cidr(set)]),
            ports: Ports::All,
            unenforced: vec![],
        }
    }

    fn selector(&mut self, model: &mut Model) -> SelectorId {
        let selector = app(self.pick(&["web", "api", "other"]));
        let known = model.selectors.iter().find(|(_, known)| **known == selector);
        if let Some((id, _)) = known {
            return *id;
        }
        let next = model.selectors.keys().last().map_or(1, |id| id.0 + 1);
        model.selectors.insert(SelectorId(next), selector);
        SelectorId(next)
    }
}

#[test]
fn step_by_step_ends_where_all_at_once_ends() {
    for seed in 1..=60 {
        let mut dice = Dice::of(seed);
        let (mut node, mut model) = (Node::new(), shop());
        node.take(&model.change(None, 1));
        let mut told: Vec<(u16, &str, u32)> = Vec::new();
        for version in 2..40 {
            let before = model.clone();
            for _ in 0..=dice.roll(3) {
                dice.change(&mut model);
            }
            // Now and then all of it comes again, as from a new leader.
            let change = match dice.roll(8) {
                0 => model.change(None, version),
                _ => model.change(Some(&before), version),
            };
            node.take(&change);
            if dice.roll(3) == 0 {
                told = (1..5)
                    .map(|index| (index, "x", 300 + dice.roll(6) as u32))
                    .collect();
                node.endpoints(&told);
            }
            if dice.roll(2) == 0 {
                node.settle();
            }
        }
        // Nobody lives under an identity that is gone.
        told.retain(|(_, _, identity)| model.identities.contains_key(&IdentityId(*identity)));
        node.endpoints(&told);
        node.settle();
        let mut fresh = Node::new();
        fresh.take(&model.change(None, 1));
        fresh.endpoints(&told);
        for endpoint in 0..5 {
            for direction in Direction::ALL {
                for peer in [0, 1, 2, 5, 6, 300, 301, 302, 303, 304, 305] {
                    assert_eq!(
                        node.verdict(endpoint, direction, peer, 80).allows(),
                        fresh.verdict(endpoint, direction, peer, 80).allows(),
                        "seed {seed}: endpoint {endpoint}, {direction}, peer {peer}"
                    );
                }
            }
        }
    }
}

/// Identities with addresses: of the world and of pods.
const PEERS: [(u32, &str); 12] = [
    (1, "172.30.0.1"),
    (2, "10.1.0.1"),
    (2, "10.9.0.1"),
    (2, "10.9.9.8"),
    (2, "10.9.9.9"),
    (2, "192.0.2.1"),
    (300, "10.9.9.8"),
    (301, "10.9.9.9"),
    (302, "10.244.1.1"),
    (303, "10.244.1.2"),
    (304, "10.9.1.1"),
    (305, "10.244.1.3"),
];

#[test]
fn what_finds_no_room_stays_as_it_was_and_leaves_the_others_alone() {
    let judge = |maps: &Maps, endpoint: u16| -> Vec<bool> {
        let judge = |&(peer, address): &(u32, &str)| {
            let packet = Packet {
                endpoint,
                direction: Direction::Ingress,
                peer: IdentityId(peer),
                address: address.parse().unwrap(),
                protocol: 6,
                port: 80,
            };
            lookup(maps, &packet).allows()
        };
        PEERS.iter().map(judge).collect()
    };
    let mut failures = 0;
    for seed in 1..=300 {
        let mut dice = Dice::of(seed);
        let (mut node, mut model) = (Node::new(), shop());
        (0..3).for_each(|_| dice.change(&mut model));
        node.take(&model.change(None, 1));
        node.endpoints(&[(1, "a", 300), (2, "b", 301), (3, "c", 302)]);
        let held_before = node.maps.clone();
        let before = model.clone();
        (0..4).for_each(|_| dice.change(&mut model));
        let events = node.source.take(&model.change(Some(&before), 2));
        node.engine.apply(events);
        let wanted = node.engine.contents();
        // The map takes so many verdicts more, and no more.
        let mut room = dice.roll(12);
        let mut held = held_before.clone();
        let keep = BTreeSet::new();
        let check = |maps: &Maps, step: &MapWrite| {
            for endpoint in 0..4 {
                let (old, new) = (judge(&held_before, endpoint), judge(&wanted, endpoint));
                for (i, now) in judge(maps, endpoint).into_iter().enumerate() {
                    assert!(now == old[i] || now == new[i], "seed {seed}: {step:?}");
                }
            }
        };
        let mut shadow = held_before.clone();
        let outcome = repair(&mut held, &wanted, &keep, |_, step| {
            let more = match step {
                MapWrite::SetVerdict(key, _) => !shadow.verdicts.contains_key(key),
                MapWrite::SetCidr(key, _) => !shadow.cidrs.contains_key(key),
                _ => false,
            };
            if more {
                if room == 0 {
                    return Err("full");
                }
                room -= 1;
            }
            shadow.apply(step);
            check(&shadow, step);
            Ok(())
        });
        assert_eq!(shadow, held);
        failures += usize::from(!outcome.is_complete());
        let touched: BTreeSet<u32> = outcome.failed.keys().copied().collect();
        for (endpoint, value) in &wanted.endpoints {
            if !touched.contains(&value.policy) && outcome.other.is_none() {
                assert_eq!(judge(&held, *endpoint), judge(&wanted, *endpoint), "seed {seed}");
            }
        }
        // With room again, all of it comes.
        let outcome = repair(&mut held, &wanted, &keep, |_, _| Ok::<_, &str>(()));
        assert!(outcome.is_complete());
        assert_eq!(held, wanted, "seed {seed}");
        let outcome = repair(&mut held, &wanted, &keep, |_, _| Ok::<_, &str>(()));
        assert_eq!(outcome.differences, 0);
    }
    assert!(failures > 50, "{failures}: the map was hardly ever full");
}

#[test]
fn a_new_agent_keeps_what_it_does_not_know_yet_and_clears_up_the_rest() {
    let mut old = Node::new();
    let model = shop();
    old.take(&model.change(None, 1));
    old.endpoints(&[(1, "a", 301), (2, "b", 301), (3, "c", 302)]);
    let mut held = old.maps.clone();
    let mut new = PolicyEngine::new(FirstNumbers::above(&held));
    let mut source = PolicySource::new("node1".into(), NodeFacts::default());
    // A snapshot on disk that is older than pod 2, and pod 3 has gone meanwhile.
    let mut events = source.take(&model.change(None, 1));
    let local = |identity| LocalEndpoint {
        pod: None,
        identity: IdentityId(identity),
        audit: false,
    };
    events.extend(source.set_endpoints([(1, local(301)), (2, local(400))].into()));
    new.apply(events);
    let wanted = new.contents();
    let keep = BTreeSet::from([2]);
    let outcome = repair(&mut held, &wanted, &keep, |_, _| Ok::<_, &str>(()));
    assert!(outcome.is_complete());
    let maps = |maps: &Maps| Node {
        source: source.clone(),
        engine: new.clone(),
        maps: maps.clone(),
    };
    let node = maps(&held);
    for endpoint in [1, 2] {
        assert!(
            node.comes_in(endpoint, 300) && !node.comes_in(endpoint, 302),
            "{endpoint}"
        );
    }
    assert!(!held.endpoints.contains_key(&3));
    repair(&mut held, &wanted, &BTreeSet::new(), |_, _| Ok::<_, &str>(()));
    assert_eq!(held, wanted);
}
