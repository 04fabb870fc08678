//! One test per documented rule, asked of the oracle and of the pipeline alike.

use std::{collections::BTreeMap, net::IpAddr};

use serde_json::{Value, json};

use super::{
    cluster::{Cluster, Node, Packet, Party, Pod, Way},
    differential::Subject,
    evaluate::allowed,
};

const WEB: usize = 0;
const API: usize = 1;
const DB: usize = 2;
const BANK: usize = 3;
const OWN_NODE: Party = Party::Node(0);
const OTHER_NODE: Party = Party::Node(1);
const APISERVER: Party = Party::Node(2);

fn pod(namespace: &str, app: &str, account: &str, last: u8) -> Pod {
    Pod {
        namespace: namespace.into(),
        name: app.into(),
        labels: [("app".to_owned(), app.to_owned())].into(),
        service_account: account.into(),
        addresses: vec![IpAddr::from([10, 244, 0, last])],
        ports: [
            ("http".to_owned(), ("TCP".to_owned(), 8080)),
            ("dns".to_owned(), ("UDP".to_owned(), 53)),
        ]
        .into(),
    }
}

fn cluster(objects: &[Value]) -> Cluster {
    let team = |name: &str| BTreeMap::from([("team".to_owned(), name.to_owned())]);
    let mut liar = pod("bank", "web", "", 13);
    liar.labels
        .insert("io.kubernetes.pod.namespace".into(), "shop".into());
    liar.labels
        .insert("io.cilium.k8s.policy.serviceaccount".into(), "robot".into());
    Cluster {
        name: "east".into(),
        namespaces: [("shop".to_owned(), team("a")), ("bank".to_owned(), team("b"))].into(),
        pods: vec![
            pod("shop", "web", "robot", 10),
            pod("shop", "api", "", 11),
            pod("shop", "db", "", 12),
            liar,
        ],
        nodes: (0..3)
            .map(|n| Node {
                labels: [("zone".to_owned(), format!("z{n}"))].into(),
                addresses: vec![IpAddr::from([172, 30, 0, n + 1])],
                apiserver: n == 2,
            })
            .collect(),
        objects: objects.to_vec(),
        groups: [("office".to_owned(), vec!["192.0.2.0/24".to_owned()])].into(),
        ..Cluster::default()
    }
}

/// Packets to and from the pods of a cluster.
struct Ask {
    cluster: Cluster,
    subject: Subject,
}

impl Ask {
    fn new(objects: &[Value]) -> Self {
        Self::of(cluster(objects))
    }

    fn of(cluster: Cluster) -> Self {
        let subject = Subject::new(&cluster, None).unwrap();
        Self { cluster, subject }
    }

    fn packet(&self, way: Way, subject: Party, peer: Party, protocol: u8, port: u16) -> bool {
        let address = match peer {
            Party::Pod(index) => self.cluster.pods[index].addresses[0],
            Party::Node(index) => self.cluster.nodes[index].addresses[0],
            Party::World(address)
            | Party::Unknown(address)
            | Party::Init(address)
            | Party::Unmanaged(address)
            | Party::Health(address)
            | Party::Ingress(address) => address,
        };
        let packet = Packet {
            subject,
            way,
            peer,
            address,
            protocol,
            port,
        };
        let (oracle, engine) = (allowed(&self.cluster, &packet), self.subject.allows(&packet));
        assert_eq!(
            oracle, engine,
            "oracle and engine differ on {packet:?} of {:#?}",
            self.cluster.objects
        );
        oracle
    }

    /// TCP to a pod.
    fn to(&self, pod: usize, peer: Party, port: u16) -> bool {
        self.packet(Way::In, Party::Pod(pod), peer, 6, port)
    }

    /// TCP from a pod.
    fn from(&self, pod: usize, peer: Party, port: u16) -> bool {
        self.packet(Way::Out, Party::Pod(pod), peer, 6, port)
    }
}

fn cnp(spec: Value) -> Value {
    json!({"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "cnp", "namespace": "shop"}, "spec": spec})
}

fn ccnp(spec: Value) -> Value {
    json!({"apiVersion": "cilium.io/v2", "kind": "CiliumClusterwideNetworkPolicy",
        "metadata": {"name": "ccnp"}, "spec": spec})
}

fn knp(spec: Value) -> Value {
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "knp", "namespace": "shop"}, "spec": spec})
}

/// A rule for the database.
fn db(section: &str, elements: Value) -> Value {
    cnp(json!({"endpointSelector": {"matchLabels": {"app": "db"}}, section: elements}))
}

fn app(name: &str) -> Value {
    json!({"matchLabels": {"app": name}})
}

fn world(address: &str) -> Party {
    Party::World(address.parse().unwrap())
}

#[test]
fn default_deny_is_per_direction_and_deny_only_rules_count() {
    let none = Ask::new(&[]);
    assert!(none.to(DB, Party::Pod(WEB), 5432) && none.from(DB, Party::Pod(WEB), 80));
    let deny_only = Ask::new(&[db("ingressDeny", json!([{"fromEndpoints": [app("web")]}]))]);
    assert!(!deny_only.to(DB, Party::Pod(WEB), 5432) && !deny_only.to(DB, Party::Pod(API), 5432));
    assert!(
        deny_only.from(DB, Party::Pod(API), 80),
        "the other direction stays open"
    );
    let exempt = json!({"endpointSelector": {}, "ingressDeny": [{"fromEndpoints": [app("web")]}],
        "enableDefaultDeny": {"ingress": false}});
    let exempt = Ask::new(&[cnp(exempt)]);
    assert!(!exempt.to(DB, Party::Pod(WEB), 5432) && exempt.to(DB, Party::Pod(API), 5432));
    let empty = Ask::new(&[db("egress", json!([]))]);
    assert!(!empty.from(DB, Party::Pod(API), 80) && !empty.from(DB, world("192.0.2.1"), 443));
    assert!(empty.to(DB, Party::Pod(API), 5432));
}

#[test]
fn empty_elements_and_empty_lists() {
    assert!(!Ask::new(&[db("ingress", json!([{}]))]).to(DB, Party::Pod(API), 80));
    assert!(Ask::new(&[knp(json!({"podSelector": {}, "ingress": [{}]}))]).to(DB, world("192.0.2.1"), 80));
    let namespace = Ask::new(&[db("ingress", json!([{"fromEndpoints": [{}]}]))]);
    assert!(namespace.to(DB, Party::Pod(API), 80) && !namespace.to(DB, Party::Pod(BANK), 80));
    assert!(!namespace.to(DB, world("192.0.2.1"), 80));
    assert!(!Ask::new(&[db("ingress", json!([{"fromEndpoints": []}]))]).to(DB, Party::Pod(API), 80));
    let ports = Ask::new(&[db("ingress", json!([{"toPorts": [{"ports": [{"port": "80"}]}]}]))]);
    for peer in [Party::Pod(BANK), world("192.0.2.1"), OTHER_NODE] {
        assert!(ports.to(DB, peer, 80) && !ports.to(DB, peer, 81));
    }
}

#[test]
fn deny_beats_every_allow_also_a_narrower_prefix_and_another_kind_of_policy() {
    let allow = json!([{"fromCIDR": ["10.1.2.0/24"]}, {"fromEntities": ["world"]}]);
    let deny = db("ingressDeny", json!([{"fromCIDR": ["10.0.0.0/8"]}]));
    let both = Ask::new(&[
        db("ingress", allow),
        knp(json!({"podSelector": {}, "ingress": [{}]})),
        deny,
    ]);
    assert!(!both.to(DB, world("10.1.2.3"), 80) && both.to(DB, world("192.0.2.1"), 80));
    assert!(
        both.to(DB, Party::Pod(API), 80),
        "a pod's address is not in the world"
    );
}

#[test]
fn namespaces() {
    let named = json!({"matchLabels": {"k8s:io.kubernetes.pod.namespace": "bank"}});
    let named = Ask::new(&[db("ingress", json!([{"fromEndpoints": [named]}]))]);
    assert!(named.to(DB, Party::Pod(BANK), 80) && !named.to(DB, Party::Pod(API), 80));
    let team = json!({"matchLabels": {"io.cilium.k8s.namespace.labels.team": "b"}});
    let team = Ask::new(&[db("ingress", json!([{"fromEndpoints": [team]}]))]);
    assert!(team.to(DB, Party::Pod(BANK), 80) && !team.to(DB, Party::Pod(API), 80));
    let elsewhere =
        json!({"endpointSelector": {"matchLabels": {"io.kubernetes.pod.namespace": "bank"}}, "ingress": []});
    assert!(
        Ask::new(&[cnp(elsewhere)]).to(BANK, Party::Pod(API), 80),
        "a policy stays in its namespace"
    );
    let wide = Ask::new(&[ccnp(
        json!({"endpointSelector": {}, "ingress": [{"fromEndpoints": [{}]}]}),
    )]);
    assert!(wide.to(BANK, Party::Pod(API), 80) && !wide.to(BANK, world("192.0.2.1"), 80));
}

#[test]
fn labels_and_their_sources() {
    let account = json!({"matchLabels": {"io.cilium.k8s.policy.serviceaccount": "robot"}});
    let ask = Ask::new(&[db("ingress", json!([{"fromEndpoints": [account]}]))]);
    assert!(ask.to(DB, Party::Pod(WEB), 80) && !ask.to(DB, Party::Pod(API), 80));
    // The pod in bank pretends to be of shop and to be the robot.
    assert!(!ask.to(DB, Party::Pod(BANK), 80));
    let liar = Ask::new(&[db("ingress", json!([{"fromEndpoints": [app("web")]}]))]);
    assert!(liar.to(DB, Party::Pod(WEB), 80) && !liar.to(DB, Party::Pod(BANK), 80));
    for (key, matches) in [
        ("app", true),
        ("any:app", true),
        ("k8s:app", true),
        ("reserved:app", false),
    ] {
        let ask = Ask::new(&[db(
            "ingress",
            json!([{"fromEndpoints": [{"matchLabels": {key: "web"}}]}]),
        )]);
        assert_eq!(ask.to(DB, Party::Pod(WEB), 80), matches, "{key}");
    }
    let cluster = json!({"matchLabels": {"k8s:io.cilium.k8s.policy.cluster": "east"}});
    assert!(Ask::new(&[db("ingress", json!([{"fromEndpoints": [cluster]}]))]).to(DB, Party::Pod(API), 80));
    for (operator, values, web, api) in [
        ("In", json!(["web", "x"]), true, false),
        ("NotIn", json!(["web"]), false, true),
        ("Exists", json!(null), true, true),
        ("DoesNotExist", json!(null), false, false),
    ] {
        let selector = json!({"matchExpressions": [{"key": "app", "operator": operator, "values": values}]});
        let ask = Ask::new(&[db("ingress", json!([{"fromEndpoints": [selector]}]))]);
        assert_eq!(
            (ask.to(DB, Party::Pod(WEB), 80), ask.to(DB, Party::Pod(API), 80)),
            (web, api),
            "{operator}"
        );
    }
}

#[test]
fn entities() {
    let stranger = IpAddr::from([10, 244, 7, 7]);
    let everybody = [
        ("pod", Party::Pod(API)),
        ("world", world("192.0.2.1")),
        ("host", OWN_NODE),
        ("remote-node", OTHER_NODE),
        ("kube-apiserver", APISERVER),
        ("init", Party::Init(stranger)),
        ("health", Party::Health(stranger)),
        ("ingress", Party::Ingress(stranger)),
        ("unmanaged", Party::Unmanaged(stranger)),
    ];
    for (entity, members) in [
        ("all", &everybody.map(|(name, _)| name)[..]),
        ("none", &[]),
        ("world", &["world"]),
        ("host", &["host"]),
        ("remote-node", &["remote-node", "kube-apiserver"]),
        ("kube-apiserver", &["kube-apiserver"]),
        ("init", &["init"]),
        ("health", &["health"]),
        ("ingress", &["ingress"]),
        ("unmanaged", &["unmanaged"]),
        (
            "cluster",
            &[
                "pod",
                "host",
                "remote-node",
                "kube-apiserver",
                "init",
                "health",
                "unmanaged",
            ],
        ),
    ] {
        let ask = Ask::new(&[db("egress", json!([{"toEntities": [entity]}]))]);
        for (name, party) in everybody {
            assert_eq!(
                ask.from(DB, party, 80),
                members.contains(&name),
                "{name} of {entity}"
            );
        }
    }
    // The own node is an API server's, too, where one runs on it.
    let mut here = cluster(&[db("egress", json!([{"toEntities": ["kube-apiserver"]}]))]);
    here.nodes[0].apiserver = true;
    assert!(Ask::of(here).from(DB, OWN_NODE, 6443));
}

#[test]
fn the_node_may_reach_its_own_pods_and_only_that() {
    for object in [db("ingress", json!([])), knp(json!({"podSelector": {}}))] {
        let ask = Ask::new(std::slice::from_ref(&object));
        assert!(ask.to(DB, OWN_NODE, 80));
        assert!(
            !ask.to(DB, OTHER_NODE, 80) && !ask.to(DB, APISERVER, 80),
            "other nodes never implicitly"
        );
        let mut closed = cluster(&[object]);
        closed.closed_to_host = true;
        assert!(!Ask::of(closed).to(DB, OWN_NODE, 80));
    }
    assert!(!Ask::new(&[db("egress", json!([]))]).from(DB, OWN_NODE, 80));
}

#[test]
fn prefixes() {
    let ask = Ask::new(&[db(
        "ingress",
        json!([{"fromCIDRSet": [{"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}]}]),
    )]);
    assert!(ask.to(DB, world("10.9.9.9"), 80) && !ask.to(DB, world("10.1.2.3"), 80));
    assert!(!ask.to(DB, Party::Pod(API), 80), "never a pod");
    let nodes = Ask::new(&[db(
        "ingress",
        json!([{"fromCIDR": ["172.30.0.0/24", "0.0.0.0/0"]}]),
    )]);
    assert!(!nodes.to(DB, OTHER_NODE, 80), "never a node");
    let block = json!({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.244.0.10/32"]}});
    let block = Ask::new(&[knp(
        json!({"podSelector": app("db"), "ingress": [{"from": [block]}]}),
    )]);
    assert!(block.to(DB, Party::Pod(API), 80) && !block.to(DB, Party::Pod(WEB), 80));
    assert!(block.to(DB, world("10.9.9.9"), 80) && !block.to(DB, world("192.0.2.1"), 80));
    let group = Ask::new(&[db(
        "ingress",
        json!([{"fromCIDRSet": [{"cidrGroupRef": "office"}]}]),
    )]);
    assert!(group.to(DB, world("192.0.2.1"), 80) && !group.to(DB, world("198.51.100.7"), 80));
}

#[test]
fn layer_7_fails_closed_and_layer_4_shadows_it() {
    let http = json!({"ports": [{"port": "80", "protocol": "TCP"}], "rules": {"http": [{"method": "GET"}]}});
    let closed = Ask::new(&[db(
        "ingress",
        json!([{"fromEndpoints": [app("web")], "toPorts": [http]}]),
    )]);
    assert!(!closed.to(DB, Party::Pod(WEB), 80));
    let plain = json!({"ports": [{"port": "80", "protocol": "TCP"}]});
    let shadowed = json!([{"toPorts": [http]}, {"toPorts": [plain]}]);
    assert!(Ask::new(&[db("ingress", shadowed)]).to(DB, Party::Pod(WEB), 80));
    for later in [
        json!({"toFQDNs": [{"matchPattern": "*"}]}),
        json!({"toServices": [{"k8sService": {"serviceName": "api"}}]}),
        json!({"toNodes": [{}]}),
    ] {
        let ask = Ask::new(&[db("egress", json!([later]))]);
        assert!(!ask.from(DB, Party::Pod(API), 80) && !ask.from(DB, world("192.0.2.1"), 80));
        assert!(!ask.from(DB, OTHER_NODE, 80));
    }
    let services = json!([{"toServices": [{"k8sService": {"serviceName": "api"}}]}]);
    let open =
        json!({"endpointSelector": {}, "egressDeny": services, "enableDefaultDeny": {"egress": false}});
    assert!(!Ask::new(&[cnp(open)]).from(DB, Party::Pod(API), 80));
}

#[test]
fn ports_protocols_and_icmp() {
    let ports = json!([{"toPorts": [{"ports": [
        {"port": "80", "protocol": "TCP"}, {"port": "8000", "endPort": 8010, "protocol": "UDP"},
        {"port": "9"}, {"port": "http", "protocol": "TCP"}, {"port": "0", "protocol": "SCTP"}]}]}]);
    let ask = Ask::new(&[db("ingress", ports)]);
    let comes = |protocol, port| ask.packet(Way::In, Party::Pod(DB), Party::Pod(API), protocol, port);
    for (protocol, port, expected) in [
        (6, 80, true),
        (17, 80, false),
        (17, 7999, false),
        (17, 8000, true),
        (17, 8010, true),
        (17, 8011, false),
        (6, 9, true),
        (17, 9, true),
        (132, 9, true),
        (6, 8080, true),
        (17, 8080, false),
        (132, 65535, true),
        (1, 8, false),
        (47, 0, false),
    ] {
        assert_eq!(comes(protocol, port), expected, "{protocol} {port}");
    }
    let icmp = json!([{"icmps": [{"fields": [{"type": "EchoRequest"}, {"family": "IPv6", "type": 128}]}]}]);
    let ask = Ask::new(&[db("ingress", icmp)]);
    let comes = |protocol, kind| ask.packet(Way::In, Party::Pod(DB), Party::Pod(API), protocol, kind);
    assert!(comes(1, 8) && comes(58, 128) && !comes(1, 0) && !comes(58, 8) && !comes(6, 8));
    // A name is the receiver's, and a prefix has none.
    let name = json!([{"toPorts": [{"ports": [{"port": "http", "protocol": "TCP"}]}]}]);
    let ask = Ask::new(&[db("egress", name)]);
    assert!(ask.from(DB, Party::Pod(API), 8080) && !ask.from(DB, Party::Pod(API), 80));
    assert!(!ask.from(DB, world("192.0.2.1"), 8080));
    let everything = Ask::new(&[db("ingress", json!([{"fromEndpoints": [app("api")]}]))]);
    for protocol in [1, 6, 17, 47, 58, 132] {
        assert!(everything.packet(Way::In, Party::Pod(DB), Party::Pod(API), protocol, 0));
    }
}

#[test]
fn kubernetes_policies() {
    let both = json!({"namespaceSelector": {"matchLabels": {"team": "b"}}, "podSelector": app("web")});
    let ask = Ask::new(&[knp(json!({"podSelector": {}, "ingress": [{"from": [both]}]}))]);
    assert!(ask.to(DB, Party::Pod(BANK), 80) && !ask.to(DB, Party::Pod(WEB), 80));
    let name = json!({"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "bank"}}});
    let ask = Ask::new(&[knp(json!({"podSelector": {}, "ingress": [{"from": [name]}]}))]);
    assert!(ask.to(DB, Party::Pod(BANK), 80) && !ask.to(DB, Party::Pod(API), 80));
    let ports = json!([{"port": "http"}, {"port": 100, "endPort": 200}, {"protocol": "SCTP", "port": 7}]);
    let ask = Ask::new(&[knp(json!({"podSelector": {}, "ingress": [{"ports": ports}]}))]);
    assert!(
        ask.to(DB, Party::Pod(API), 8080)
            && ask.to(DB, Party::Pod(API), 150)
            && !ask.to(DB, Party::Pod(API), 201)
    );
    assert!(ask.packet(Way::In, Party::Pod(DB), Party::Pod(API), 132, 7));
    // policyTypes: ingress by default; egress only with rules, or when named.
    let default = Ask::new(&[knp(json!({"podSelector": {}}))]);
    assert!(!default.to(DB, Party::Pod(API), 80) && default.from(DB, Party::Pod(API), 80));
    let empty = Ask::new(&[knp(json!({"podSelector": {}, "egress": []}))]);
    assert!(empty.from(DB, Party::Pod(API), 80));
    let egress = Ask::new(&[knp(json!({"podSelector": {}, "policyTypes": ["Egress"]}))]);
    assert!(egress.to(DB, Party::Pod(API), 80) && !egress.from(DB, Party::Pod(API), 80));
    // Beside CiliumNetworkPolicy: allows add up, either's default deny holds.
    let combined = Ask::new(&[
        knp(json!({"podSelector": {}, "ingress": [{"from": [{"podSelector": app("web")}]}]})),
        db("ingress", json!([{"fromEndpoints": [app("api")]}])),
    ]);
    assert!(combined.to(DB, Party::Pod(WEB), 80) && combined.to(DB, Party::Pod(API), 80));
    assert!(!combined.to(DB, Party::Pod(BANK), 80) && !combined.to(API, Party::Pod(DB), 80));
}

#[test]
fn host_policy() {
    let rule = json!({"nodeSelector": {"matchLabels": {"zone": "z0"}}, "ingress":
        [{"fromEndpoints": [app("api")], "toPorts": [{"ports": [{"port": "22", "protocol": "TCP"}]}]}]});
    let ask = Ask::new(&[ccnp(rule)]);
    let to_host = |ask: &Ask, peer, port| ask.packet(Way::In, OWN_NODE, peer, 6, port);
    assert!(to_host(&ask, Party::Pod(API), 22) && !to_host(&ask, Party::Pod(API), 23));
    assert!(!to_host(&ask, Party::Pod(WEB), 22) && !to_host(&ask, OTHER_NODE, 22));
    assert!(ask.to(DB, Party::Pod(WEB), 22), "pods are not selected by it");
    let other = Ask::new(&[ccnp(
        json!({"nodeSelector": {"matchLabels": {"zone": "z1"}}, "ingress": []}),
    )]);
    assert!(to_host(&other, Party::Pod(WEB), 22));
    let pods = Ask::new(&[ccnp(json!({"endpointSelector": {}, "ingress": []}))]);
    assert!(
        to_host(&pods, Party::Pod(WEB), 22),
        "a rule for pods is none for the host"
    );
}

#[test]
fn who_is_not_known_passes_only_where_it_cannot_matter() {
    let unknown = Party::Unknown(IpAddr::from([10, 244, 7, 7]));
    let everybody = json!([{"fromEntities": ["all"]}]);
    assert!(Ask::new(&[db("ingress", everybody.clone())]).to(DB, unknown, 80));
    let rule = json!({"endpointSelector": {}, "ingress": everybody, "ingressDeny":
        [{"fromEndpoints": [app("web")], "toPorts": [{"ports": [{"port": "80", "protocol": "TCP"}]}]}]});
    let ask = Ask::new(&[cnp(rule)]);
    assert!(!ask.to(DB, unknown, 80) && ask.to(DB, unknown, 81));
    assert!(!Ask::new(&[db("ingress", json!([{"fromEndpoints": [{}]}]))]).to(DB, unknown, 80));
}

#[test]
fn an_invalid_object_enforces_nothing_and_disturbs_no_other() {
    let mut cluster = cluster(&[db("ingress", json!([{"fromEndpoints": [app("api")]}]))]);
    cluster.broken = vec![cnp(
        json!({"endpointSelector": {}, "ingress": [{"fromEntities": ["planet"]}]}),
    )];
    cluster.broken[0]["metadata"]["name"] = json!("broken");
    let ask = Ask::of(cluster);
    assert!(ask.to(DB, Party::Pod(API), 80) && !ask.to(DB, Party::Pod(WEB), 80));
    assert!(ask.to(WEB, Party::Pod(DB), 80));
}
