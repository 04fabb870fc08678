//! Policy on real nodes: namespaces, the loaded programs, a `keyd` that says what the test wants.

mod support;

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use support::{
    Mesh, Pod, eventually,
    net::{connect, echo, inside, open},
};
use warren_agent_api::{EndpointPolicyStatus, Request, Response, TraceRequest, call};
use warren_model::{
    IdentityId, Labels,
    policy::{
        Action, Direction, Directions, LabelKey, NodeFacts, Operator, Peer, Peers, PolicyKind, PolicyRef,
        PortSpec, Ports, Protocol, Requirement, Rule, Selector, Statement, Subject,
    },
};

const PORT: u16 = 8080;

fn label(key: &str, value: &str) -> Selector {
    Selector::new([Requirement {
        key: LabelKey::k8s(key),
        operator: Operator::In([value.to_owned()].into()),
    }])
}

fn named(pod: u8) -> Selector {
    label("name", &format!("pod{pod}"))
}

fn object(name: &str) -> PolicyRef {
    PolicyRef {
        kind: PolicyKind::CiliumNetworkPolicy,
        namespace: "demo".into(),
        name: name.into(),
    }
}

/// Default deny at ingress for `subject`, with these allowed on one port.
fn ingress(name: &str, subject: Subject, peers: &[Selector]) -> Vec<Rule> {
    let statement = Statement {
        place: "spec.ingress[0]".into(),
        direction: Direction::Ingress,
        action: Action::Allow,
        peers: Peers::These(peers.iter().cloned().map(Peer::Selector).collect()),
        ports: Ports::These(vec![PortSpec::range(Protocol::Tcp, PORT, PORT)]),
        unenforced: vec![],
    };
    vec![Rule {
        policy: object(name),
        subject,
        default_deny: Directions {
            ingress: true,
            egress: false,
        },
        statements: vec![statement],
    }]
}

fn at(address: &str) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), PORT)
}

fn passes(from: &Pod, address: &str) -> bool {
    connect(&from.netns, at(address)).is_some_and(|mut connection| connection.answers())
}

fn endpoints(mesh: &Mesh, node: usize) -> Vec<EndpointPolicyStatus> {
    match mesh.nodes[node].ask(&Request::Endpoints) {
        Response::Policies(endpoints) => endpoints,
        other => panic!("{other:?}"),
    }
}

fn endpoint(mesh: &Mesh, node: usize, pod: &Pod) -> EndpointPolicyStatus {
    let all = endpoints(mesh, node);
    let mut all = all.into_iter();
    all.find(|one| one.pod.as_ref() == Some(&pod.attachment.pod))
        .unwrap()
}

/// A server with a client on each node.
struct Scene {
    mesh: Mesh,
    near: Pod,
    far: Pod,
    server: Pod,
}

impl Scene {
    fn new() -> Self {
        let mut mesh = Mesh::new(2);
        mesh.start();
        let near = mesh.nodes[0].add_pod(10);
        let server = mesh.nodes[0].add_pod(11);
        let far = mesh.nodes[1].add_pod(12);
        for address in [&server.v4, &server.v6] {
            echo(&server.netns, at(address), None);
        }
        let scene = Self {
            mesh,
            near,
            far,
            server,
        };
        for address in [&scene.server.v4, &scene.server.v6] {
            eventually("the tunnel stands", || passes(&scene.far, address));
            eventually("it passes", || passes(&scene.near, address));
        }
        scene
    }

    fn allow(&self, peers: &[Selector]) {
        let rules = ingress("api", Subject::Pods(named(11)), peers);
        self.mesh.keyd.set_rules(&object("api"), rules);
    }

    /// Waits until a policy holds that denies the near client. Silence alone could be a slow machine's.
    fn wait_denied(&self) {
        eventually("a policy", || {
            endpoint(&self.mesh, 0, &self.server).ingress_enforced
        });
        eventually("denied", || !passes(&self.near, &self.server.v4));
    }
}

#[test]
fn default_deny_and_what_is_allowed_from_near_and_far() {
    let scene = Scene::new();
    scene.allow(&[]);
    for address in [&scene.server.v4, &scene.server.v6] {
        eventually("denied from near", || !passes(&scene.near, address));
        assert!(!passes(&scene.far, address) && !scene.far.ping(address));
    }
    assert!(endpoint(&scene.mesh, 0, &scene.server).ingress_enforced);
    scene.allow(&[named(12)]);
    for address in [&scene.server.v4, &scene.server.v6] {
        eventually("allowed from far", || passes(&scene.far, address));
        assert!(!passes(&scene.near, address));
        assert!(!scene.far.ping(address), "another protocol");
    }
    scene.allow(&[named(10), named(12)]);
    eventually("allowed from near", || passes(&scene.near, &scene.server.v4));
    scene.mesh.keyd.set_rules(&object("api"), vec![]);
    eventually("no policy, no limits", || scene.far.ping(&scene.server.v6));
    assert!(!endpoint(&scene.mesh, 0, &scene.server).ingress_enforced);
}

#[test]
fn an_established_flow_is_judged_again() {
    let scene = Scene::new();
    scene.allow(&[named(10), named(12)]);
    for client in [&scene.near, &scene.far] {
        eventually("allowed", || passes(client, &scene.server.v4));
        let mut flow = open(&client.netns, at(&scene.server.v4));
        assert!(flow.lives());
        scene.allow(&[]);
        eventually("cut off", || !flow.answers());
        scene.allow(&[named(10), named(12)]);
        eventually("goes on where it was", || flow.answers());
    }
}

#[test]
fn a_pod_that_is_labelled_anew_loses_nothing_that_both_allow() {
    let mut scene = Scene::new();
    let client = [("role", "client")];
    scene.mesh.keyd.set_labels("pod12", &client);
    scene.allow(&[label("role", "client")]);
    eventually("allowed", || passes(&scene.far, &scene.server.v4));
    let before = endpoint(&scene.mesh, 1, &scene.far).identity;
    let mut flow = open(&scene.far.netns, at(&scene.server.v4));
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let flowing = std::thread::spawn(move || {
        let mut count = 0;
        while !stopped.load(Ordering::SeqCst) {
            assert!(flow.lives(), "after {count} answers");
            count += 1;
        }
        count
    });
    for round in 0..5 {
        let other = format!("{round}");
        scene
            .mesh
            .keyd
            .set_labels("pod12", &[("role", "client"), ("round", &other)]);
        for node in 0..2 {
            let pod = endpoint(&scene.mesh, 1, &scene.far);
            eventually("the new identity is known", || {
                endpoint(&scene.mesh, 1, &scene.far).identity != before
                    && endpoint(&scene.mesh, 1, &scene.far)
                        .labels
                        .iter()
                        .any(|l| l.ends_with(&format!("round={other}")))
            });
            assert!(!pod.closed, "on node {node}");
        }
        eventually("it passes", || passes(&scene.far, &scene.server.v4));
    }
    stop.store(true, Ordering::SeqCst);
    assert!(flowing.join().unwrap() > 0);
    // And one that the policy does not know is cut off.
    scene.mesh.keyd.set_labels("pod12", &[("role", "stranger")]);
    eventually("a stranger", || !passes(&scene.far, &scene.server.v4));
    scene.mesh.nodes[1].kill_agent();
}

#[test]
fn enforcement_outlives_the_agent() {
    let mut scene = Scene::new();
    let served = echo(
        &scene.server.netns,
        SocketAddr::new(scene.server.v4.parse().unwrap(), 9),
        None,
    );
    scene.allow(&[named(12)]);
    scene.wait_denied();
    eventually("allowed", || passes(&scene.far, &scene.server.v4));
    let mut flow = open(&scene.far.netns, at(&scene.server.v4));
    assert!(flow.lives());
    scene.mesh.keyd.stop();
    scene.mesh.nodes[0].kill_agent();
    assert!(!passes(&scene.near, &scene.server.v4));
    eventually("it passes", || passes(&scene.far, &scene.server.v4));
    // Somebody knocks all the time at a port that nobody may reach.
    let stop = Arc::new(AtomicBool::new(false));
    let (netns, knock) = (
        scene.near.netns.clone(),
        SocketAddr::new(at(&scene.server.v4).ip(), 9),
    );
    let stopped = stop.clone();
    let knocking = std::thread::spawn(move || {
        inside(&netns, move || {
            while !stopped.load(Ordering::SeqCst) {
                let _ = std::net::TcpStream::connect_timeout(&knock, Duration::from_millis(20));
            }
        });
    });
    for _ in 0..3 {
        scene.mesh.nodes[0].start();
        scene.mesh.nodes[0].wait_ready();
        assert!(flow.lives(), "an established flow goes on");
        assert!(!passes(&scene.near, &scene.server.v4));
        eventually("it passes", || passes(&scene.far, &scene.server.v4));
        let status = endpoint(&scene.mesh, 0, &scene.server);
        assert!(status.ingress_enforced && !status.closed);
        scene.mesh.nodes[0].kill_agent();
    }
    stop.store(true, Ordering::SeqCst);
    knocking.join().unwrap();
    assert_eq!(served.accepted(), 0);
    scene.mesh.nodes[0].start();
    scene.mesh.nodes[0].wait_ready();
}

#[test]
fn a_new_pod_is_closed_until_its_policy_is_written() {
    let mut scene = Scene::new();
    scene.allow(&[named(12)]);
    scene.mesh.keyd.hold_back(true);
    let fresh = scene.mesh.nodes[0].wire_pod(13);
    let reached = echo(&fresh.netns, at(&fresh.v4), None);
    let (socket, request) = (
        scene.mesh.nodes[0].socket(),
        Request::CniAdd(fresh.attachment.clone()),
    );
    let adding = std::thread::spawn(move || call(&socket, &request, Duration::from_secs(30)).unwrap());
    eventually("the pod is known", || {
        endpoints(&scene.mesh, 0)
            .iter()
            .any(|one| one.pod.as_ref() == Some(&fresh.attachment.pod))
    });
    assert!(endpoint(&scene.mesh, 0, &fresh).closed);
    assert!(!passes(&scene.near, &fresh.v4) && !scene.near.ping(&fresh.v6));
    assert_eq!(reached.accepted(), 0);
    assert!(!adding.is_finished(), "ADD waits for the policy");
    let rules = ingress("fresh", Subject::Pods(named(13)), &[named(12)]);
    scene.mesh.keyd.set_rules(&object("fresh"), rules);
    scene.mesh.keyd.hold_back(false);
    assert_eq!(adding.join().unwrap(), Response::Done);
    eventually("allowed", || passes(&scene.far, &fresh.v4));
    assert!(!passes(&scene.near, &fresh.v4));
    assert_eq!(reached.accepted(), 1);
}

#[test]
fn audit_mode_reports_and_lets_pass() {
    let scene = Scene::new();
    scene.mesh.keyd.set_audit("pod11");
    scene.allow(&[]);
    eventually("audit mode", || {
        let status = endpoint(&scene.mesh, 0, &scene.server);
        status.audit && status.ingress_enforced
    });
    eventually("it passes", || passes(&scene.near, &scene.server.v4));
    eventually("an event tells", || {
        match scene.mesh.nodes[0].ask(&Request::PolicyEvents { limit: 100 }) {
            Response::Events { events, .. } => events.iter().any(|event| event.outcome == "audited"),
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn a_trace_says_what_maps_and_model_answer_also_from_afar() {
    let scene = Scene::new();
    scene.allow(&[named(12)]);
    scene.wait_denied();
    eventually("allowed", || passes(&scene.far, &scene.server.v4));
    let peers = [&scene.near, &scene.far];
    let identities = [
        endpoint(&scene.mesh, 0, &scene.near).identity,
        endpoint(&scene.mesh, 1, &scene.far).identity,
    ];
    for (peer, identity) in peers.into_iter().zip(identities) {
        let request = Request::PolicyTrace(Box::new(TraceRequest {
            pod: Some(scene.server.v4.parse().unwrap()),
            direction: Direction::Ingress,
            peer: identity,
            address: peer.v4.parse::<IpAddr>().unwrap(),
            protocol: 6,
            port: PORT,
        }));
        let answer = match scene.mesh.nodes[0].ask(&request) {
            Response::Trace(answer) => *answer,
            other => panic!("{other:?}"),
        };
        assert_eq!(answer.maps, answer.model);
        let allowed = peer.netns == scene.far.netns;
        assert_eq!(answer.maps.allowed, allowed);
        let rule = "CiliumNetworkPolicy demo/api spec.ingress[0]".to_owned();
        match allowed {
            true => assert_eq!(answer.statements, [(rule, true)]),
            false => assert_eq!(
                (answer.maps.reason.as_str(), answer.statements.len()),
                ("default-deny", 0)
            ),
        }
    }
    // Flows carry the rule that allowed them; an operator asks by way of keyd.
    let mut flow = open(&scene.far.netns, at(&scene.server.v4));
    assert!(flow.lives());
    let request = serde_json::to_string(&Request::Conntrack {
        endpoint: None,
        limit: 1000,
    });
    scene.mesh.keyd.ask(1, request.unwrap());
    let add = serde_json::to_string(&Request::CniGc { valid: vec![] }).unwrap();
    scene.mesh.keyd.ask(2, add);
    eventually("an answer", || {
        scene.mesh.keyd.answer(1).is_some() && scene.mesh.keyd.answer(2).is_some()
    });
    let answer = scene.mesh.keyd.answer(2).unwrap();
    assert!(answer.response_json.is_empty() && answer.error.contains("nothing is changed"));
    let Response::Flows(flows) = scene.mesh.nodes[0].ask(&Request::Conntrack {
        endpoint: None,
        limit: 1000,
    }) else {
        panic!("no flows");
    };
    let (local, remote) = (at(&scene.server.v4), flow.local_address());
    let found = flows.iter().find(|flow| {
        (flow.local, flow.remote, flow.direction) == (local, remote, Direction::Ingress)
            && flow.state == "established"
    });
    assert_eq!(
        found.and_then(|flow| flow.rule.clone()).as_deref(),
        Some("CiliumNetworkPolicy demo/api spec.ingress[0]"),
        "{flows:?}"
    );
}

#[test]
fn the_host_has_a_policy_of_its_own() {
    let scene = Scene::new();
    let node = &scene.mesh.nodes[0];
    let own: SocketAddr = "172.30.0.1:8080".parse().unwrap();
    echo(&node.netns, own, Some(&node.cgroup));
    eventually("it passes", || passes(&scene.near, "172.30.0.1"));
    eventually("from another node's pod", || passes(&scene.far, "172.30.0.1"));
    let facts = NodeFacts {
        labels: Labels([("k8s:role".to_owned(), "gateway".to_owned())].into()),
        ..NodeFacts::default()
    };
    scene.mesh.keyd.set_facts("node1", facts);
    let subject = Subject::Nodes(label("role", "gateway"));
    scene
        .mesh
        .keyd
        .set_rules(&object("host"), ingress("host", subject, &[named(10)]));
    eventually("denied from far", || !passes(&scene.far, "172.30.0.1"));
    eventually("it passes", || passes(&scene.near, "172.30.0.1"));
    let host = endpoints(&scene.mesh, 0)
        .into_iter()
        .find(|one| one.endpoint == 0)
        .unwrap();
    assert!(host.ingress_enforced && host.identity == IdentityId::HOST);
    let other = endpoints(&scene.mesh, 1)
        .into_iter()
        .find(|one| one.endpoint == 0)
        .unwrap();
    assert!(!other.ingress_enforced, "another node");
}

#[test]
fn a_full_map_refuses_what_finds_no_room_and_nothing_else() {
    /// Together they need more verdicts than the map holds (1,048,576).
    const IDENTITIES: u32 = 30_000;
    const STATEMENTS: u16 = 20;
    let mut scene = Scene::new();
    scene.allow(&[named(12)]);
    scene.wait_denied();
    let mut flow = open(&scene.far.netns, at(&scene.server.v4));
    assert!(flow.lives());
    scene.mesh.keyd.add_identities(IDENTITIES, ("crowd", "yes"));
    let mut greedy = ingress("greedy", Subject::Pods(label("greedy", "yes")), &[]);
    greedy[0].statements = (0..STATEMENTS)
        .map(|n| Statement {
            place: format!("spec.ingress[{n}]"),
            direction: Direction::Ingress,
            action: Action::Allow,
            peers: Peers::These(vec![Peer::Selector(label("crowd", "yes"))]),
            ports: Ports::These(vec![PortSpec::range(Protocol::Tcp, n, n)]),
            unenforced: vec![],
        })
        .collect();
    for pod in ["pod13", "pod14"] {
        scene
            .mesh
            .keyd
            .set_labels(pod, &[("greedy", "yes"), ("own", pod)]);
    }
    scene.mesh.keyd.set_rules(&object("greedy"), greedy);
    let node = &mut scene.mesh.nodes[0];
    let fits = node.wire_pod(13);
    eventually("the first fits", || {
        node.ask(&Request::CniAdd(fits.attachment.clone())) == Response::Done
    });
    let too_much = node.wire_pod(14);
    let answer = node.ask(&Request::CniAdd(too_much.attachment.clone()));
    let Response::Error { message, retry } = answer else {
        panic!("{answer:?}")
    };
    assert!(retry, "{message}");
    eventually("status says what is wrong", || match node.ask(&Request::Status) {
        Response::Status(status) => status.failing.iter().any(|line| line.contains("is full")),
        other => panic!("{other:?}"),
    });
    // Closed, and nobody else notices: flows go on, policies change, pods start.
    assert!(!passes(&scene.near, &too_much.v4) && endpoint(&scene.mesh, 0, &too_much).closed);
    assert!(flow.lives());
    scene.allow(&[named(10), named(12)]);
    eventually("a policy changes", || passes(&scene.near, &scene.server.v4));
    let other = scene.mesh.nodes[0].wire_pod(15);
    eventually("another pod starts", || {
        scene.mesh.nodes[0].ask(&Request::CniAdd(other.attachment.clone())) == Response::Done
    });
    // With room again, all is well.
    scene.mesh.keyd.set_rules(&object("greedy"), vec![]);
    eventually("the pod starts", || {
        scene.mesh.nodes[0].ask(&Request::CniAdd(too_much.attachment.clone())) == Response::Done
    });
    eventually("nothing fails", || {
        match scene.mesh.nodes[0].ask(&Request::Status) {
            Response::Status(status) => status.failing.is_empty(),
            other => panic!("{other:?}"),
        }
    });
    assert!(flow.lives());
}
