//! Random clusters, policies and packets, made so that they meet: few names, few numbers, every border.

use std::{collections::BTreeMap, net::IpAddr};

use serde_json::{Value, json};

use super::{
    cluster::{Cluster, Node, Packet, Party, Pod, Way},
    dice::Dice,
};

const NAMESPACES: [&str; 3] = ["a", "b", "c"];
const APPS: [&str; 3] = ["web", "api", "db"];
const PORTS: [u16; 8] = [53, 79, 80, 81, 443, 1024, 8080, 65535];
const CIDRS: [&str; 12] = [
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.1.0.0/16",
    "10.1.2.0/24",
    "10.1.2.3/32",
    "10.244.0.0/16",
    "10.244.0.12/32",
    "172.30.0.0/24",
    "192.0.2.0/24",
    "::/0",
    "2001:db8::/32",
    "fd00::/8",
];
const WORLD: [&str; 8] = [
    "10.1.2.3",
    "10.1.2.4",
    "10.1.3.4",
    "10.9.9.9",
    "192.0.2.1",
    "198.51.100.7",
    "2001:db8::1",
    "fd00:9::1",
];

/// Pods of other nodes.
const STRANGERS: [&str; 2] = ["10.244.7.7", "fd00:10:244::707"];

/// A cluster with policies.
pub(super) fn cluster(dice: &mut Dice) -> Cluster {
    let mut namespaces = BTreeMap::new();
    for name in NAMESPACES {
        let mut labels = BTreeMap::new();
        if dice.once_in(2) {
            labels.insert("team".to_owned(), dice.pick(&["x", "y"]).to_owned());
        }
        namespaces.insert(name.to_owned(), labels);
    }
    let count = 4 + dice.roll(5);
    let pods = (0..count).map(|index| pod(dice, index)).collect();
    let nodes = (0..3)
        .map(|index| Node {
            labels: BTreeMap::from([("zone".to_owned(), dice.pick(&["east", "west"]).to_owned())]),
            addresses: vec![
                IpAddr::from([172, 30, 0, index + 1]),
                IpAddr::from([0xfd00, 0x172, 0x30, 0, 0, 0, 0, u16::from(index) + 1]),
            ],
            apiserver: dice.once_in(3),
        })
        .collect();
    let count = 1 + dice.roll(5);
    let objects = (0..count).map(|index| object(dice, index)).collect();
    let broken = if dice.once_in(4) {
        vec![broken(dice)]
    } else {
        Vec::new()
    };
    let mut groups = BTreeMap::new();
    if dice.once_in(2) {
        let cidrs = (0..dice.roll(3)).map(|_| dice.pick(&CIDRS).to_owned()).collect();
        groups.insert("office".to_owned(), cidrs);
    }
    Cluster {
        name: "east".into(),
        namespaces,
        pods,
        nodes,
        objects,
        broken,
        groups,
        closed_to_host: dice.once_in(5),
    }
}

fn pod(dice: &mut Dice, index: usize) -> Pod {
    let mut labels = BTreeMap::new();
    let mut ports = BTreeMap::new();
    if !dice.once_in(6) {
        let app = dice.pick(&APPS);
        labels.insert("app".to_owned(), app.to_owned());
        // Pods of one identity have the same ports.
        match app {
            "web" => {
                ports.insert("http".to_owned(), ("TCP".to_owned(), 80));
                ports.insert("dns".to_owned(), ("UDP".to_owned(), 53));
            }
            "api" => {
                ports.insert("http".to_owned(), ("TCP".to_owned(), 8080));
            }
            _ => {}
        }
    }
    if dice.once_in(3) {
        labels.insert("tier".to_owned(), dice.pick(&["front", "back"]).to_owned());
    }
    if dice.once_in(8) {
        let imitated = [
            ("io.kubernetes.pod.namespace", "a"),
            ("io.cilium.k8s.policy.serviceaccount", "robot"),
            ("io.cilium.k8s.namespace.labels.team", "x"),
        ];
        let (key, value) = dice.pick(&imitated);
        labels.insert(key.to_owned(), value.to_owned());
    }
    let last = u8::try_from(index + 10).expect("few pods");
    Pod {
        namespace: dice.pick(&NAMESPACES).to_owned(),
        name: format!("pod{index}"),
        labels,
        service_account: dice.pick(&["", "robot"]).to_owned(),
        addresses: vec![
            IpAddr::from([10, 244, 0, last]),
            IpAddr::from([0xfd00, 0x10, 0x244, 0, 0, 0, 0, u16::from(last)]),
        ],
        ports,
    }
}

fn object(dice: &mut Dice, index: usize) -> Value {
    let name = format!("policy{index}");
    match dice.roll(5) {
        0 | 1 => {
            let metadata = json!({"name": name, "namespace": dice.pick(&NAMESPACES)});
            let api = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"});
            with(api, [("metadata", metadata), ("spec", kubernetes(dice))])
        }
        2 | 3 => {
            let metadata = json!({"name": name, "namespace": dice.pick(&NAMESPACES)});
            let api = json!({"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy"});
            with_rules(dice, with(api, [("metadata", metadata)]), false)
        }
        _ => {
            let api = json!({"apiVersion": "cilium.io/v2", "kind": "CiliumClusterwideNetworkPolicy"});
            with_rules(dice, with(api, [("metadata", json!({"name": name}))]), true)
        }
    }
}

fn with<const N: usize>(mut object: Value, members: [(&str, Value); N]) -> Value {
    for (name, value) in members {
        object[name] = value;
    }
    object
}

fn with_rules(dice: &mut Dice, mut object: Value, clusterwide: bool) -> Value {
    if dice.once_in(4) {
        object["specs"] = (0..1 + dice.roll(2)).map(|_| cilium(dice, clusterwide)).collect();
    } else {
        object["spec"] = cilium(dice, clusterwide);
    }
    object
}

// Kubernetes.

fn kubernetes(dice: &mut Dice) -> Value {
    let mut spec = json!({"podSelector": kubernetes_selector(dice, false)});
    if dice.once_in(2) {
        let types = [
            json!(["Ingress"]),
            json!(["Egress"]),
            json!(["Ingress", "Egress"]),
            json!([]),
        ];
        spec["policyTypes"] = dice.pick(&types);
    }
    for (section, peers) in [("ingress", "from"), ("egress", "to")] {
        if !dice.once_in(3) {
            let count = dice.roll(3);
            spec[section] = (0..count).map(|_| kubernetes_rule(dice, peers)).collect();
        }
    }
    spec
}

fn kubernetes_rule(dice: &mut Dice, peers: &str) -> Value {
    let mut rule = json!({});
    if !dice.once_in(4) {
        rule[peers] = (0..dice.roll(3)).map(|_| kubernetes_peer(dice)).collect();
    }
    if dice.once_in(2) {
        rule["ports"] = (0..dice.roll(3)).map(|_| kubernetes_port(dice)).collect();
    }
    rule
}

fn kubernetes_peer(dice: &mut Dice) -> Value {
    match dice.roll(4) {
        0 => json!({"ipBlock": cidr_with_exceptions(dice)}),
        1 => json!({"podSelector": kubernetes_selector(dice, false)}),
        2 => json!({"namespaceSelector": kubernetes_selector(dice, true)}),
        _ => json!({
            "podSelector": kubernetes_selector(dice, false),
            "namespaceSelector": kubernetes_selector(dice, true),
        }),
    }
}

fn kubernetes_selector(dice: &mut Dice, of_namespaces: bool) -> Value {
    let labels: &[(&str, &str)] = match of_namespaces {
        true => &[("team", "x"), ("team", "y"), ("kubernetes.io/metadata.name", "b")],
        false => &[("app", "web"), ("app", "api"), ("tier", "front")],
    };
    selector(dice, labels, "")
}

fn kubernetes_port(dice: &mut Dice) -> Value {
    let mut port = json!({});
    if dice.once_in(2) {
        port["protocol"] = json!(dice.pick(&["TCP", "UDP", "SCTP"]));
    }
    match dice.roll(5) {
        0 => {}
        1 => port["port"] = json!(dice.pick(&["http", "dns", "nothing"])),
        n => {
            let first = dice.pick(&PORTS);
            port["port"] = json!(first);
            if n == 2 {
                port["endPort"] = json!(dice.pick(&PORTS).max(first));
            }
        }
    }
    port
}

// Cilium.

fn cilium(dice: &mut Dice, clusterwide: bool) -> Value {
    let mut rule = json!({});
    if clusterwide && dice.once_in(4) {
        rule["nodeSelector"] = selector(dice, &[("zone", "east"), ("k8s:zone", "west")], "");
    } else {
        rule["endpointSelector"] = cilium_selector(dice, false);
    }
    for (section, inward, deny) in [
        ("ingress", true, false),
        ("ingressDeny", true, true),
        ("egress", false, false),
        ("egressDeny", false, true),
    ] {
        if dice.once_in(if deny { 3 } else { 2 }) {
            let count = dice.roll(3);
            rule[section] = (0..count).map(|_| element(dice, inward, deny)).collect();
        }
    }
    if rule.as_object().is_some_and(|members| members.len() == 1) {
        rule["ingress"] = json!([]);
    }
    if dice.once_in(4) {
        let mut flags = json!({});
        for name in ["ingress", "egress"] {
            if dice.once_in(2) {
                flags[name] = json!(dice.once_in(2));
            }
        }
        rule["enableDefaultDeny"] = flags;
    }
    rule
}

fn element(dice: &mut Dice, inward: bool, deny: bool) -> Value {
    let name = |what: &str| format!("{}{what}", if inward { "from" } else { "to" });
    let mut element = json!({});
    let count = dice.roll(3);
    match dice.roll(12) {
        0..4 => {
            element[name("Endpoints")] = (0..count).map(|_| cilium_selector(dice, true)).collect();
        }
        4 | 5 => {
            let entities = [
                "all",
                "world",
                "cluster",
                "host",
                "init",
                "ingress",
                "unmanaged",
                "remote-node",
                "health",
                "none",
                "kube-apiserver",
            ];
            element[name("Entities")] = (0..count).map(|_| json!(dice.pick(&entities))).collect();
        }
        6 => {
            let more = ["192.0.2.1", "10.1.2.9/24"];
            element[name("CIDR")] = (0..count)
                .map(|_| {
                    json!(if dice.once_in(4) {
                        dice.pick(&more)
                    } else {
                        dice.pick(&CIDRS)
                    })
                })
                .collect();
        }
        7 | 8 => {
            element[name("CIDRSet")] = (0..count)
                .map(|_| match dice.once_in(4) {
                    true => {
                        json!({"cidrGroupRef": dice.pick(&["office", "nobody"]), "except": ["10.1.2.0/24"]})
                    }
                    false => cidr_with_exceptions(dice),
                })
                .collect();
        }
        9 => match (inward, deny, dice.roll(3)) {
            (false, false, 0) => element["toFQDNs"] = json!([{"matchName": "example.com"}]),
            (false, _, 1) => {
                element["toServices"] = json!([{"k8sService": {"serviceName": "db", "namespace": "a"}}])
            }
            _ => element[name("Nodes")] = json!([{"matchLabels": {"zone": "east"}}]),
        },
        _ => {}
    }
    match dice.roll(5) {
        0 | 1 => element["toPorts"] = (0..dice.roll(3)).map(|_| port_rule(dice, deny)).collect(),
        2 => {
            let field = |dice: &mut Dice| {
                let kinds = [
                    json!(8),
                    json!("EchoRequest"),
                    json!(0),
                    json!("EchoReply"),
                    json!("3"),
                ];
                let mut field = json!({"type": dice.pick(&kinds)});
                if dice.once_in(2) {
                    field["family"] = json!(dice.pick(&["IPv4", "IPv6"]));
                }
                field
            };
            let fields: Vec<_> = (0..dice.roll(3)).map(|_| field(dice)).collect();
            element["icmps"] = json!([{"fields": fields}]);
        }
        _ => {}
    }
    if !deny && dice.once_in(20) {
        element["authentication"] = json!({"mode": "required"});
    }
    element
}

fn port_rule(dice: &mut Dice, deny: bool) -> Value {
    let above = !deny && dice.once_in(6);
    let mut rule = json!({"ports": (0..dice.roll(3)).map(|_| port(dice, above)).collect::<Vec<_>>()});
    if above {
        rule["rules"] = json!({"http": [{"method": "GET"}]});
    }
    rule
}

fn port(dice: &mut Dice, above: bool) -> Value {
    let mut port = json!({});
    if above {
        port["protocol"] = json!("TCP");
    } else if !dice.once_in(3) {
        port["protocol"] = json!(dice.pick(&["TCP", "TCP", "UDP", "SCTP", "ANY", "ICMP", "ICMPv6"]));
    }
    if matches!(port["protocol"].as_str(), Some("ICMP" | "ICMPv6")) {
        port["port"] = json!(dice.pick(&["0", "8", "128"]));
        return port;
    }
    match dice.roll(6) {
        0 => port["port"] = json!(dice.pick(&["http", "dns", "nothing"])),
        1 if !above => port["port"] = json!("0"),
        n => {
            let first = dice.pick(&PORTS);
            port["port"] = json!(first.to_string());
            if n == 2 {
                port["endPort"] = json!(dice.pick(&PORTS).max(first));
            }
        }
    }
    port
}

fn cilium_selector(dice: &mut Dice, of_peers: bool) -> Value {
    let mut labels = vec![
        ("app", "web"),
        ("k8s:app", "api"),
        ("any:tier", "front"),
        ("io.cilium.k8s.policy.serviceaccount", "robot"),
        ("k8s:io.cilium.k8s.policy.serviceaccount", "default"),
        ("k8s:io.cilium.k8s.policy.cluster", "east"),
        ("k8s:io.kubernetes.pod.namespace", "b"),
        ("io.kubernetes.pod.namespace", "a"),
        ("io.cilium.k8s.namespace.labels.team", "x"),
        (
            "k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name",
            "c",
        ),
    ];
    if of_peers {
        labels.extend([
            ("reserved:host", ""),
            ("reserved:world", ""),
            ("reserved:remote-node", ""),
        ]);
        if dice.once_in(15) {
            return json!({"matchLabels": {format!("cidr:{}", dice.pick(&CIDRS[..9])): ""}});
        }
    }
    selector(dice, &labels, "")
}

/// A selector over some labels; empty once in four times.
fn selector(dice: &mut Dice, labels: &[(&str, &str)], other: &str) -> Value {
    let mut selector = json!({});
    if dice.once_in(4) {
        return selector;
    }
    if !dice.once_in(3) {
        let (key, value) = dice.pick(labels);
        selector["matchLabels"] = json!({key: value});
    }
    if dice.once_in(3) {
        let (key, value) = dice.pick(labels);
        let expression = match dice.roll(4) {
            0 => {
                json!({"key": key, "operator": "In", "values": [value, if other.is_empty() { "db" } else { other }]})
            }
            1 => json!({"key": key, "operator": "NotIn", "values": [value]}),
            2 => json!({"key": key, "operator": "Exists"}),
            _ => json!({"key": key, "operator": "DoesNotExist"}),
        };
        selector["matchExpressions"] = json!([expression]);
    }
    selector
}

fn cidr_with_exceptions(dice: &mut Dice) -> Value {
    let inside = [
        ("0.0.0.0/0", "10.0.0.0/8"),
        ("0.0.0.0/0", "192.0.2.0/24"),
        ("10.0.0.0/8", "10.1.0.0/16"),
        ("10.0.0.0/8", "10.244.0.12/32"),
        ("10.1.0.0/16", "10.1.2.0/24"),
        ("10.1.2.0/24", "10.1.2.3/32"),
        ("10.244.0.0/16", "10.244.0.12/32"),
        ("::/0", "2001:db8::/32"),
        ("fd00::/8", "fd00:10:244::/48"),
    ];
    let (cidr, except) = dice.pick(&inside);
    if dice.once_in(2) {
        json!({"cidr": cidr, "except": [except]})
    } else {
        json!({"cidr": cidr})
    }
}

/// An object that the parser must refuse.
fn broken(dice: &mut Dice) -> Value {
    let spec = dice.pick(&[
        json!({"endpointSelector": {}, "ingress": [{"fromEntities": ["planet"]}]}),
        json!({"endpointSelector": {}}),
        json!({"endpointSelector": {}, "ingress": [{"fromCIDR": ["10.0.0.0/40"]}]}),
        json!({"ingress": []}),
        json!({"endpointSelector": {}, "egress": [], "unheard": true}),
        json!({"endpointSelector": {}, "ingress": "all"}),
        json!(7),
    ]);
    json!({"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "broken", "namespace": dice.pick(&NAMESPACES)}, "spec": spec})
}

// Packets.

/// A packet that one of the cluster's pods, or its first node, sends or receives.
pub(super) fn packet(dice: &mut Dice, cluster: &Cluster) -> Packet {
    let host = dice.once_in(12);
    let subject = if host {
        Party::Node(0)
    } else {
        Party::Pod(dice.roll(cluster.pods.len()))
    };
    let (peer, address) = peer(dice, cluster, subject);
    let (protocol, port) = match dice.roll(10) {
        0 => (1, dice.pick(&[0, 3, 8, 11])),
        1 => (58, dice.pick(&[0, 2, 128, 129])),
        2 => (47, 0),
        3 | 4 => (17, dice.pick(&PORTS)),
        5 => (132, dice.pick(&PORTS)),
        _ => (6, dice.pick(&PORTS)),
    };
    let way = if dice.once_in(2) { Way::In } else { Way::Out };
    Packet {
        subject,
        way,
        peer,
        address,
        protocol,
        port,
    }
}

fn peer(dice: &mut Dice, cluster: &Cluster, subject: Party) -> (Party, IpAddr) {
    loop {
        let (peer, address) = match dice.roll(16) {
            0..7 => {
                let index = dice.roll(cluster.pods.len());
                (Party::Pod(index), dice.pick(&cluster.pods[index].addresses))
            }
            7..11 => {
                let address = dice.pick(&WORLD).parse().expect("an address");
                (Party::World(address), address)
            }
            11 | 12 => {
                let index = dice.roll(cluster.nodes.len());
                (Party::Node(index), dice.pick(&cluster.nodes[index].addresses))
            }
            n => {
                let address = dice.pick(&STRANGERS).parse().expect("an address");
                let strangers = [
                    Party::Unmanaged(address),
                    Party::Health(address),
                    Party::Ingress(address),
                    Party::Init(address),
                ];
                let stranger = if n == 13 {
                    Party::Unknown(address)
                } else {
                    dice.pick(&strangers)
                };
                (stranger, address)
            }
        };
        if peer != subject {
            return (peer, address);
        }
    }
}
