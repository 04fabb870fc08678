//! The engine step by step: every verdict after every single write is the old or the new one.

use std::net::IpAddr;

use warren_model::{
    IdentityId, Labels,
    policy::{
        Action, AddressScope, CidrSet, CidrSource, Direction, Directions, LabelKey, NamedPorts, NodeFacts,
        Peer, Peers, PolicyKind, PolicyRef, PortSpec, Ports, Protocol, Requirement, Rule, Selector,
        SelectorId, Statement, Subject, Unenforced,
    },
};

use super::*;

const OWN: IdentityId = IdentityId(300);
const WEB: IdentityId = IdentityId(301);
const API: IdentityId = IdentityId(302);
const EVERY_POD: SelectorId = SelectorId(1);
const SUBJECT: SelectorId = SelectorId(2);
const WEBS: SelectorId = SelectorId(3);
const APIS: SelectorId = SelectorId(4);
const HOSTS: SelectorId = SelectorId(5);
const APISERVERS: SelectorId = SelectorId(6);
const WORLD: SelectorId = SelectorId(7);

fn selector(id: SelectorId, key: LabelKey, members: &[IdentityId]) -> PolicyEvent {
    let selector = Selector::new([Requirement::exists(key)]);
    PolicyEvent::Selector {
        id,
        selector,
        members: members.iter().copied().collect(),
    }
}

fn start() -> Vec<PolicyEvent> {
    vec![
        selector(
            EVERY_POD,
            LabelKey::k8s("io.kubernetes.pod.namespace"),
            &[OWN, WEB, API],
        ),
        selector(SUBJECT, LabelKey::k8s("own"), &[OWN]),
        selector(WEBS, LabelKey::k8s("web"), &[WEB]),
        selector(APIS, LabelKey::k8s("api"), &[API]),
        selector(HOSTS, LabelKey::reserved("host"), &[IdentityId::HOST]),
        selector(
            APISERVERS,
            LabelKey::reserved("kube-apiserver"),
            &[IdentityId::KUBE_APISERVER],
        ),
        selector(WORLD, LabelKey::reserved("world"), &[IdentityId::WORLD]),
        endpoint(1, OWN, &[("http", Protocol::Tcp, 8080)]),
    ]
}

fn endpoint(index: u16, identity: IdentityId, ports: &[(&str, Protocol, u16)]) -> PolicyEvent {
    PolicyEvent::Endpoint {
        index,
        identity,
        ports: named(ports),
        audit: false,
    }
}

fn named(ports: &[(&str, Protocol, u16)]) -> NamedPorts {
    NamedPorts(
        ports
            .iter()
            .map(|(name, protocol, n)| ((*name).to_owned(), (*protocol, *n)))
            .collect(),
    )
}

fn policy(name: &str) -> PolicyRef {
    PolicyRef {
        kind: PolicyKind::CiliumNetworkPolicy,
        namespace: "shop".into(),
        name: name.into(),
    }
}

fn statement(action: Action, peers: Peers<SelectorId>, ports: Ports) -> Statement<SelectorId> {
    Statement {
        place: String::new(),
        direction: Direction::Ingress,
        action,
        peers,
        ports,
        unenforced: Vec::new(),
    }
}

fn allow(peers: Vec<Peer<SelectorId>>) -> Statement<SelectorId> {
    statement(Action::Allow, Peers::These(peers), Ports::All)
}

fn deny(peers: Vec<Peer<SelectorId>>) -> Statement<SelectorId> {
    statement(Action::Deny, Peers::These(peers), Ports::All)
}

fn on(mut statement: Statement<SelectorId>, ports: &[PortSpec]) -> Statement<SelectorId> {
    statement.ports = Ports::These(ports.to_vec());
    statement
}

fn outwards(mut statement: Statement<SelectorId>) -> Statement<SelectorId> {
    statement.direction = Direction::Egress;
    statement
}

fn who(id: SelectorId) -> Peer<SelectorId> {
    Peer::Selector(id)
}

fn cidr(prefix: &str, except: &[&str], scope: AddressScope) -> Peer<SelectorId> {
    Peer::Cidr(CidrSet {
        source: CidrSource::Prefix(prefix.parse().unwrap()),
        except: except.iter().map(|e| e.parse().unwrap()).collect(),
        scope,
    })
}

fn rules(name: &str, statements: Vec<Statement<SelectorId>>) -> PolicyEvent {
    rules_with(
        name,
        Directions {
            ingress: true,
            egress: true,
        },
        statements,
    )
}

fn rules_with(
    name: &str,
    default_deny: Directions<bool>,
    statements: Vec<Statement<SelectorId>>,
) -> PolicyEvent {
    let numbered = |(i, mut s): (usize, Statement<SelectorId>)| {
        s.place = format!("spec.{}[{i}]", s.direction);
        s
    };
    let statements = statements.into_iter().enumerate().map(numbered).collect();
    let rule = Rule {
        policy: policy(name),
        subject: Subject::Pods(SUBJECT),
        default_deny,
        statements,
    };
    PolicyEvent::Rules {
        policy: policy(name),
        rules: vec![rule],
    }
}

fn tcp(port: u16) -> PortSpec {
    PortSpec::range(Protocol::Tcp, port, port)
}

/// An engine with the maps that its writes make.
struct Node {
    engine: PolicyEngine,
    maps: Maps,
}

impl Node {
    fn new() -> Self {
        let mut node = Self {
            engine: PolicyEngine::new(FirstNumbers::default()),
            maps: Maps::default(),
        };
        node.apply(start());
        node
    }

    /// Applies events and checks every state in between.
    fn apply(&mut self, events: Vec<PolicyEvent>) -> Vec<MapWrite> {
        let writes = self.engine.apply(events);
        let old = self.verdicts();
        let mut end = Self {
            engine: self.engine.clone(),
            maps: self.maps.clone(),
        };
        writes.iter().for_each(|write| end.maps.apply(write));
        let new = end.verdicts();
        for (i, write) in writes.iter().enumerate() {
            self.maps.apply(write);
            for (n, verdict) in self.verdicts().into_iter().enumerate() {
                assert!(
                    [old[n].allows(), new[n].allows()].contains(&verdict.allows()),
                    "write {i} of {writes:#?}: {:?} got {verdict:?}, old {:?}, new {:?}",
                    probes()[n],
                    old[n],
                    new[n],
                );
            }
        }
        assert_eq!(
            self.maps,
            self.engine.contents(),
            "what is written is what should be there"
        );
        writes
    }

    /// Of every probe, in their order.
    fn verdicts(&self) -> Vec<Verdict> {
        probes().iter().map(|packet| lookup(&self.maps, packet)).collect()
    }

    fn passes(&self, direction: Direction, peer: IdentityId, address: &str, port: u16) -> bool {
        let address: IpAddr = address.parse().unwrap();
        lookup(
            &self.maps,
            &Packet {
                endpoint: 1,
                direction,
                peer,
                address,
                protocol: 6,
                port,
            },
        )
        .allows()
    }

    fn comes_in(&self, peer: IdentityId, port: u16) -> bool {
        self.passes(Direction::Ingress, peer, "10.244.0.9", port)
    }

    fn comes_from_world(&self, address: &str, port: u16) -> bool {
        self.passes(Direction::Ingress, IdentityId::WORLD, address, port)
    }
}

fn probes() -> Vec<Packet> {
    let mut out = Vec::new();
    let pods = [0, 1, 5, 6, 7, 301, 302, 303].map(|id| (IdentityId(id), "10.244.0.9"));
    let world = ["10.1.2.3", "10.1.3.3", "10.9.9.9", "192.0.2.1", "fd00::1"].map(|a| (IdentityId::WORLD, a));
    for (peer, address) in pods.into_iter().chain(world) {
        for (protocol, port) in [(6, 80), (6, 81), (6, 443), (6, 8080), (17, 53), (1, 8), (47, 0)] {
            for direction in Direction::ALL {
                for endpoint in [0, 1] {
                    let address = address.parse().unwrap();
                    out.push(Packet {
                        endpoint,
                        direction,
                        peer,
                        address,
                        protocol,
                        port,
                    });
                }
            }
        }
    }
    out
}

#[test]
fn without_rules_everything_passes_and_without_a_policy_nothing() {
    let mut node = Node::new();
    assert!(
        node.comes_in(WEB, 80)
            && node.comes_in(IdentityId::UNKNOWN, 80)
            && node.comes_from_world("10.1.2.3", 80)
    );
    node.apply(vec![PolicyEvent::EndpointGone(1)]);
    assert!(!node.comes_in(WEB, 80));
    // Labels that are not known yet: closed.
    node.apply(vec![endpoint(1, IdentityId::INIT, &[])]);
    assert!(!node.comes_in(WEB, 80) && !node.passes(Direction::Egress, WEB, "10.244.0.9", 80));
}

#[test]
fn default_deny_needs_a_rule_with_the_section() {
    let mut node = Node::new();
    let only = |ingress, egress| rules_with("p", Directions { ingress, egress }, vec![]);
    for (ingress, egress) in [(true, false), (false, true), (true, true), (false, false)] {
        node.apply(vec![only(ingress, egress)]);
        assert_eq!(node.comes_in(WEB, 80), !ingress);
        assert_eq!(node.passes(Direction::Egress, WEB, "10.244.0.9", 80), !egress);
    }
    node.apply(vec![only(true, true)]);
    node.apply(vec![PolicyEvent::RulesGone(policy("p"))]);
    assert!(node.comes_in(WEB, 80));
}

#[test]
fn the_node_reaches_its_own_pods_and_other_nodes_do_not() {
    let mut node = Node::new();
    node.apply(vec![rules("p", vec![])]);
    assert!(node.comes_in(IdentityId::HOST, 80));
    assert!(!node.comes_in(IdentityId::REMOTE_NODE, 80) && !node.comes_in(IdentityId::KUBE_APISERVER, 80));
    assert!(
        !node.passes(Direction::Egress, IdentityId::HOST, "172.30.0.1", 80),
        "the pod has no such right"
    );
    node.apply(vec![rules("p", vec![deny(vec![who(HOSTS)])])]);
    assert!(!node.comes_in(IdentityId::HOST, 80), "deny beats every allow");
    node.apply(vec![rules("p", vec![])]);
    let closed = NodeFacts {
        closed_to_host: true,
        ..NodeFacts::default()
    };
    node.apply(vec![PolicyEvent::Node(closed)]);
    assert!(!node.comes_in(IdentityId::HOST, 80));
}

#[test]
fn deny_beats_allow_of_every_kind() {
    let mut node = Node::new();
    let wide = deny(vec![cidr("10.0.0.0/8", &["10.9.0.0/16"], AddressScope::World)]);
    let narrow = allow(vec![
        cidr("10.1.2.0/24", &[], AddressScope::World),
        who(WORLD),
        who(WEBS),
    ]);
    node.apply(vec![rules("p", vec![narrow.clone(), wide])]);
    assert!(
        !node.comes_from_world("10.1.2.3", 80),
        "a deny on a wide prefix beats an allow on a narrow one"
    );
    assert!(node.comes_from_world("10.9.9.9", 80) && node.comes_from_world("192.0.2.1", 80));
    assert!(node.comes_in(WEB, 80), "a pod's address is not in the world");
    node.apply(vec![
        rules("p", vec![narrow]),
        rules("q", vec![on(deny(vec![who(EVERY_POD)]), &[tcp(80)])]),
    ]);
    assert!(!node.comes_in(WEB, 80) && node.comes_in(WEB, 81));
}

#[test]
fn prefixes_of_kubernetes_match_pods_and_those_of_cilium_only_the_world() {
    let mut node = Node::new();
    node.apply(vec![rules(
        "p",
        vec![allow(vec![cidr("10.0.0.0/8", &[], AddressScope::World)])],
    )]);
    assert!(node.comes_from_world("10.1.2.3", 80) && !node.comes_in(WEB, 80));
    node.apply(vec![rules(
        "p",
        vec![allow(vec![cidr(
            "10.0.0.0/8",
            &["10.1.0.0/16"],
            AddressScope::Any,
        )])],
    )]);
    assert!(
        node.comes_in(WEB, 80)
            && !node.comes_from_world("10.1.2.3", 80)
            && node.comes_from_world("10.9.9.9", 80)
    );
    assert!(node.comes_in(IdentityId::REMOTE_NODE, 80) && node.comes_in(IdentityId::UNKNOWN, 80));
}

#[test]
fn a_peer_that_is_not_known_passes_only_where_everybody_may() {
    let mut node = Node::new();
    let everybody = statement(Action::Allow, Peers::Any, Ports::All);
    node.apply(vec![rules("p", vec![everybody.clone()])]);
    assert!(node.comes_in(IdentityId::UNKNOWN, 80));
    node.apply(vec![rules(
        "p",
        vec![everybody.clone(), on(deny(vec![who(WEBS)]), &[tcp(80)])],
    )]);
    assert!(!node.comes_in(IdentityId::UNKNOWN, 80) && node.comes_in(IdentityId::UNKNOWN, 81));
    assert!(!node.comes_in(IdentityId::INIT, 80) && node.comes_in(IdentityId::INIT, 81));
    node.apply(vec![rules("p", vec![allow(vec![who(EVERY_POD)])])]);
    assert!(!node.comes_in(IdentityId::UNKNOWN, 80));
    // The same without default deny.
    let open = Directions {
        ingress: false,
        egress: false,
    };
    node.apply(vec![rules_with("p", open, vec![deny(vec![who(WEBS)])])]);
    assert!(!node.comes_in(IdentityId::UNKNOWN, 80) && node.comes_in(API, 80));
    // A port name of a peer that nobody knows may be any port.
    let by_name = outwards(on(
        deny(vec![who(WEBS)]),
        &[PortSpec::named(Protocol::Tcp, "http")],
    ));
    node.apply(vec![rules_with("p", open, vec![by_name])]);
    assert!(!node.passes(Direction::Egress, IdentityId::UNKNOWN, "10.244.0.9", 1234));
    assert!(node.passes(Direction::Egress, WEB, "10.244.0.9", 1234));
}

#[test]
fn named_ports_are_those_of_the_receiver() {
    let mut node = Node::new();
    let http = [PortSpec::named(Protocol::Tcp, "http")];
    node.apply(vec![rules(
        "p",
        vec![
            on(allow(vec![who(WEBS)]), &http),
            outwards(on(allow(vec![who(WEBS)]), &http)),
        ],
    )]);
    assert!(node.comes_in(WEB, 8080) && !node.comes_in(WEB, 80));
    let goes_out = |node: &Node, peer, port| node.passes(Direction::Egress, peer, "10.244.0.9", port);
    assert!(!goes_out(&node, WEB, 80));
    let ports = |identity, number| PolicyEvent::PeerPorts {
        identity,
        ports: vec![named(&[("http", Protocol::Tcp, number)])],
    };
    node.apply(vec![ports(WEB, 80), ports(API, 81)]);
    assert!(goes_out(&node, WEB, 80) && !goes_out(&node, WEB, 81) && !goes_out(&node, API, 81));
    node.apply(vec![PolicyEvent::Members {
        id: WEBS,
        added: vec![API],
        removed: vec![],
    }]);
    assert!(goes_out(&node, API, 81) && !goes_out(&node, API, 80));
    node.apply(vec![PolicyEvent::PeerPorts {
        identity: WEB,
        ports: vec![],
    }]);
    assert!(!goes_out(&node, WEB, 80));
}

#[test]
fn what_cannot_be_enforced_allows_nothing_and_l4_shadows_it() {
    let mut node = Node::new();
    let mut http = on(allow(vec![who(WEBS)]), &[tcp(80)]);
    http.unenforced = vec![Unenforced::Http];
    node.apply(vec![rules("p", vec![http.clone()])]);
    assert!(!node.comes_in(WEB, 80));
    node.apply(vec![rules(
        "p",
        vec![http.clone(), on(allow(vec![who(WEBS)]), &[tcp(80)])],
    )]);
    assert!(node.comes_in(WEB, 80));
    http.action = Action::Deny;
    node.apply(vec![rules(
        "p",
        vec![http, on(allow(vec![who(WEBS)]), &[tcp(80)])],
    )]);
    assert!(!node.comes_in(WEB, 80));
}

#[test]
fn the_hosts_own_policy_follows_its_labels_and_its_api_server() {
    let mut node = Node::new();
    let facts = |zone: &str, runs_apiserver| {
        let labels = Labels([("k8s:zone".to_owned(), zone.to_owned())].into());
        PolicyEvent::Node(NodeFacts {
            labels,
            runs_apiserver,
            ..NodeFacts::default()
        })
    };
    let rule = Rule {
        policy: policy("host"),
        subject: Subject::Nodes(Selector::new([Requirement::is(LabelKey::parse("zone"), "a")])),
        default_deny: Directions {
            ingress: true,
            egress: false,
        },
        statements: vec![on(allow(vec![who(WEBS)]), &[tcp(80)])],
    };
    node.apply(vec![
        PolicyEvent::Rules {
            policy: policy("host"),
            rules: vec![rule],
        },
        facts("b", false),
    ]);
    let to_host = |node: &Node, peer| {
        let address = "10.244.0.9".parse().unwrap();
        let packet = Packet {
            endpoint: 0,
            direction: Direction::Ingress,
            peer,
            address,
            protocol: 6,
            port: 80,
        };
        lookup(&node.maps, &packet).allows()
    };
    assert!(to_host(&node, API));
    node.apply(vec![facts("a", false)]);
    assert!(to_host(&node, WEB) && !to_host(&node, API) && !to_host(&node, IdentityId::REMOTE_NODE));
    assert!(node.comes_in(API, 80), "pods are not concerned");
    // An entity that means API servers means the own host where one runs.
    node.apply(vec![rules("p", vec![outwards(allow(vec![who(APISERVERS)]))])]);
    let out = |node: &Node| node.passes(Direction::Egress, IdentityId::HOST, "172.30.0.1", 6443);
    assert!(!out(&node));
    node.apply(vec![facts("a", true)]);
    assert!(out(&node));
}

#[test]
fn audit_reports_and_lets_pass() {
    let mut node = Node::new();
    node.apply(vec![rules("p", vec![on(deny(vec![who(WEBS)]), &[tcp(80)])])]);
    let address = "10.244.0.9".parse().unwrap();
    let packet = Packet {
        endpoint: 1,
        direction: Direction::Ingress,
        peer: WEB,
        address,
        protocol: 6,
        port: 80,
    };
    let Verdict::Drop(DropCause::Denied(number)) = lookup(&node.maps, &packet) else {
        panic!()
    };
    assert_eq!(node.engine.rule(number).unwrap().place, "spec.ingress[0]");
    let writes = node.apply(vec![PolicyEvent::Node(NodeFacts {
        audit: true,
        ..NodeFacts::default()
    })]);
    assert_eq!(writes.len(), 2, "one write per endpoint");
    assert_eq!(
        lookup(&node.maps, &packet),
        Verdict::Audit(DropCause::Denied(number))
    );
    assert!(matches!(
        lookup(&node.maps, &Packet { port: 81, ..packet }),
        Verdict::Audit(DropCause::Default)
    ));
}

#[test]
fn a_new_identity_is_one_write_where_a_rule_selects_it_and_none_elsewhere() {
    let mut node = Node::new();
    node.apply(vec![
        rules("p", vec![allow(vec![who(WEBS)])]),
        endpoint(2, API, &[]),
    ]);
    let (compiled, refreshed) = node.engine.work();
    let new = IdentityId(400);
    let writes = node.apply(vec![PolicyEvent::Members {
        id: WEBS,
        added: vec![new],
        removed: vec![],
    }]);
    assert_eq!(writes.len(), 1);
    assert_eq!(node.engine.work(), (compiled, refreshed + 1));
    let writes = node.apply(vec![PolicyEvent::Members {
        id: APIS,
        added: vec![new],
        removed: vec![],
    }]);
    assert!(writes.is_empty());
    assert!(node.comes_in(new, 80));
    let writes = node.apply(vec![PolicyEvent::Members {
        id: WEBS,
        added: vec![],
        removed: vec![new],
    }]);
    assert_eq!((writes.len(), node.comes_in(new, 80)), (1, false));
    assert!(node.apply(start()).is_empty(), "what is known changes nothing");
}

#[test]
fn endpoints_of_a_kind_share_a_policy_and_a_label_change_is_one_switch() {
    let mut node = Node::new();
    let ports = &[("http", Protocol::Tcp, 8080)];
    node.apply(vec![rules("p", vec![allow(vec![who(WEBS)])])]);
    let writes = node.apply(vec![endpoint(2, OWN, ports), endpoint(3, OWN, ports)]);
    assert_eq!(writes.len(), 2);
    let writes = node.apply(vec![endpoint(1, API, ports)]);
    let switches = writes
        .iter()
        .filter(|write| matches!(write, MapWrite::SetEndpoint(..)))
        .count();
    assert_eq!(switches, 1);
    assert!(node.comes_in(API, 80));
    // An endpoint comes into being only with everything that it needs.
    let before = node.maps.clone();
    let writes = node.engine.apply([endpoint(9, WEB, &[])]);
    assert!(matches!(writes.last(), Some(MapWrite::SetEndpoint(9, _))));
    node.maps = before;
}

#[test]
fn an_agent_that_starts_again_replaces_everything_without_a_gap() {
    let mut node = Node::new();
    let cidrs = allow(vec![
        cidr("10.0.0.0/8", &["10.1.0.0/16"], AddressScope::World),
        who(WEBS),
    ]);
    node.apply(vec![rules(
        "p",
        vec![cidrs.clone(), on(deny(vec![who(APIS)]), &[tcp(80)])],
    )]);
    let mut again = PolicyEngine::new(FirstNumbers::above(&node.maps));
    let changed = rules(
        "p",
        vec![
            on(cidrs, &[tcp(80), tcp(443)]),
            deny(vec![cidr("10.9.0.0/16", &[], AddressScope::World)]),
        ],
    );
    again.apply(start().into_iter().chain([changed]));
    let wanted = again.contents();
    let writes = node.maps.repair(&wanted);
    let mut end = node.maps.clone();
    writes.iter().for_each(|write| end.apply(write));
    assert_eq!(end, wanted);
    let probes = probes();
    let judge = |maps: &Maps| {
        probes
            .iter()
            .map(|p| lookup(maps, p).allows())
            .collect::<Vec<_>>()
    };
    let (old, new) = (judge(&node.maps), judge(&end));
    for write in &writes {
        node.maps.apply(write);
        for (i, now) in judge(&node.maps).into_iter().enumerate() {
            assert!([old[i], new[i]].contains(&now), "{write:?}: {:?}", probes[i]);
        }
    }
    assert!(node.maps.repair(&wanted).is_empty());
}

/// A generator that needs no crate: xorshift.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % sides
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.roll(from.len())].clone()
    }

    fn statement(&mut self) -> Statement<SelectorId> {
        let peers = [
            who(WEBS),
            who(APIS),
            who(HOSTS),
            who(EVERY_POD),
            who(WORLD),
            cidr("10.0.0.0/8", &[], AddressScope::World),
            cidr("10.1.0.0/16", &["10.1.3.0/24"], AddressScope::Any),
            cidr("10.1.2.0/24", &[], AddressScope::World),
            cidr("0.0.0.0/0", &["10.9.0.0/16"], AddressScope::Any),
            cidr("fd00::/8", &[], AddressScope::World),
        ];
        let ports = [
            tcp(80),
            PortSpec::range(Protocol::Tcp, 1, 1023),
            PortSpec::range(Protocol::Udp, 0, 65535),
            PortSpec::range(Protocol::Icmp, 8, 8),
            PortSpec::named(Protocol::Tcp, "http"),
        ];
        let action = self.pick(&[Action::Allow, Action::Allow, Action::Deny]);
        let peers = match self.roll(6) {
            0 => Peers::Any,
            n => Peers::These((0..n % 3).map(|_| self.pick(&peers)).collect()),
        };
        let ports = match self.roll(3) {
            0 => Ports::All,
            n => Ports::These((0..n).map(|_| self.pick(&ports)).collect()),
        };
        let statement = statement(action, peers, ports);
        if self.roll(2) == 0 {
            outwards(statement)
        } else {
            statement
        }
    }

    fn event(&mut self) -> PolicyEvent {
        let name = self.pick(&["p", "q", "r"]);
        let identity = self.pick(&[WEB, API, IdentityId(303)]);
        match self.roll(10) {
            0..4 => {
                let default_deny = Directions {
                    ingress: self.roll(3) > 0,
                    egress: self.roll(3) > 0,
                };
                let count = self.roll(4);
                let statements = (0..count).map(|_| self.statement()).collect();
                rules_with(name, default_deny, statements)
            }
            4 => PolicyEvent::RulesGone(policy(name)),
            5 => endpoint(1, self.pick(&[OWN, WEB]), &[("http", Protocol::Tcp, 8080)]),
            6 => PolicyEvent::PeerPorts {
                identity,
                ports: vec![named(&[("http", Protocol::Tcp, self.pick(&[80, 81, 8080]))])],
            },
            7 => PolicyEvent::Members {
                id: self.pick(&[WEBS, APIS]),
                added: vec![identity],
                removed: vec![],
            },
            8 => PolicyEvent::Members {
                id: self.pick(&[WEBS, APIS]),
                added: vec![],
                removed: vec![identity],
            },
            _ => PolicyEvent::Node(NodeFacts {
                closed_to_host: self.roll(2) == 0,
                runs_apiserver: self.roll(2) == 0,
                ..NodeFacts::default()
            }),
        }
    }
}

#[test]
fn no_moment_of_any_change_decides_otherwise_than_before_or_after() {
    for seed in 1..=15u64 {
        let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut node = Node::new();
        for _ in 0..12 {
            let count = 1 + dice.roll(3);
            let events = (0..count).map(|_| dice.event()).collect::<Vec<_>>();
            node.apply(events);
        }
        // What came step by step is what comes at once.
        let mut at_once = PolicyEngine::new(FirstNumbers::above(&node.maps));
        at_once.apply(node.engine.events());
        let fresh = Node {
            maps: at_once.contents(),
            engine: at_once,
        };
        let allows = |node: &Node| {
            node.verdicts()
                .into_iter()
                .map(Verdict::allows)
                .collect::<Vec<_>>()
        };
        assert_eq!(allows(&node), allows(&fresh), "seed {seed}");
    }
}

#[test]
fn the_order_of_the_writes_is_what_keeps_it_so() {
    let mut wrong = 0;
    for seed in 1..=4u64 {
        let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut node = Node::new();
        for _ in 0..6 {
            let writes = node.engine.apply([dice.event()]);
            let mut end = node.maps.clone();
            writes.iter().for_each(|write| end.apply(write));
            let judge = |maps: &Maps| {
                probes()
                    .iter()
                    .map(|p| lookup(maps, p).allows())
                    .collect::<Vec<_>>()
            };
            let (old, new) = (judge(&node.maps), judge(&end));
            for write in writes.iter().rev() {
                node.maps.apply(write);
                let now = judge(&node.maps);
                wrong += (0..now.len())
                    .filter(|i| now[*i] != old[*i] && now[*i] != new[*i])
                    .count();
            }
            node.maps = end;
        }
    }
    assert!(
        wrong > 0,
        "the check of every moment finds nothing even where there is something"
    );
}

#[test]
fn many_identities_and_policies_stay_local_work() {
    const IDENTITIES: u32 = 16_000;
    let mut engine = PolicyEngine::new(FirstNumbers::default());
    let everybody: Vec<_> = (0..IDENTITIES).map(|n| IdentityId(1_000 + n)).collect();
    let mut members = everybody.clone();
    members.extend([OWN, WEB, API]);
    engine.apply([
        selector(EVERY_POD, LabelKey::k8s("io.kubernetes.pod.namespace"), &members),
        selector(SUBJECT, LabelKey::k8s("own"), &[OWN]),
        selector(APIS, LabelKey::k8s("api"), &[API]),
    ]);
    engine.apply(everybody.iter().map(|identity| PolicyEvent::PeerPorts {
        identity: *identity,
        ports: vec![named(&[("http", Protocol::Tcp, 8080)])],
    }));
    engine.apply([endpoint(1, OWN, &[]), endpoint(2, API, &[])]);
    let many = (0..1_000).map(|n| {
        let peers = allow(vec![who(if n == 0 { EVERY_POD } else { APIS })]);
        rules(
            &format!("p{n}"),
            vec![on(peers, &[PortSpec::range(Protocol::Tcp, n, n)])],
        )
    });
    engine.apply(many);
    let contents = engine.contents();
    assert!(contents.verdicts.len() as u32 > IDENTITIES);
    let (compiled, refreshed) = engine.work();
    let new = IdentityId(100_000);
    let writes = engine.apply([PolicyEvent::Members {
        id: EVERY_POD,
        added: vec![new],
        removed: vec![],
    }]);
    assert_eq!(writes.len(), 1, "one identity in one class");
    assert_eq!(engine.work(), (compiled, refreshed + 1));
    // A policy more is compiled for the endpoint that it selects, and only what is new is written.
    let more = rules(
        "more",
        vec![on(
            allow(vec![who(APIS)]),
            &[PortSpec::range(Protocol::Udp, 7, 7)],
        )],
    );
    let writes = engine.apply([more]);
    assert_eq!(engine.work().0, compiled + 1);
    assert!(writes.len() < 20, "{}", writes.len());
}
