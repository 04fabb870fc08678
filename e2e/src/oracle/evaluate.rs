//! May this packet pass? Written from the documented semantics, for reading rather than for speed.

use std::net::IpAddr;

use serde_json::{Map, Value};

use super::cluster::{Cluster, Packet, Party, Way};

/// Whether the policies of a cluster let a packet pass at its subject.
pub fn allowed(cluster: &Cluster, packet: &Packet) -> bool {
    let mut default_deny = false;
    let mut allowed = false;
    for object in &cluster.objects {
        let verdict = match text(&object["kind"]) {
            "NetworkPolicy" => kubernetes(cluster, object, packet),
            kind => {
                let own = (kind == "CiliumNetworkPolicy").then(|| namespace(object));
                cilium(cluster, object, own.as_deref(), packet)
            }
        };
        if verdict.denied {
            return false;
        }
        default_deny |= verdict.default_deny;
        allowed |= verdict.allowed;
    }
    let kubelet = packet.peer == Party::Node(0)
        && matches!(packet.subject, Party::Pod(_))
        && packet.way == Way::In
        && !cluster.closed_to_host;
    allowed || kubelet || !default_deny
}

/// What one object says.
#[derive(Debug, Default)]
struct Said {
    default_deny: bool,
    allowed: bool,
    denied: bool,
}

// Kubernetes NetworkPolicy.

fn kubernetes(cluster: &Cluster, object: &Value, packet: &Packet) -> Said {
    let spec = &object["spec"];
    let own = namespace(object);
    let Party::Pod(subject) = packet.subject else {
        return Said::default();
    };
    if cluster.pods[subject].namespace != own || !pod_labels_match(cluster, subject, &spec["podSelector"]) {
        return Said::default();
    }
    let (section, peers, kind) = match packet.way {
        Way::In => ("ingress", "from", "Ingress"),
        Way::Out => ("egress", "to", "Egress"),
    };
    let types = list(&spec["policyTypes"]);
    let applies = if types.is_empty() {
        packet.way == Way::In || !list(&spec["egress"]).is_empty()
    } else {
        types.iter().any(|name| text(name) == kind)
    };
    if !applies {
        return Said::default();
    }
    let allowed = list(&spec[section]).iter().any(|rule| {
        let who = list(&rule[peers]);
        let what = list(&rule["ports"]);
        (who.is_empty()
            || who
                .iter()
                .any(|peer| kubernetes_peer(cluster, &own, peer, packet)))
            && (what.is_empty()
                || what
                    .iter()
                    .any(|port| kubernetes_port(cluster, rule, peers, &own, port, packet)))
    });
    Said {
        default_deny: true,
        allowed,
        denied: false,
    }
}

fn kubernetes_peer(cluster: &Cluster, own: &str, peer: &Value, packet: &Packet) -> bool {
    if !peer["ipBlock"].is_null() {
        return block_holds(&peer["ipBlock"], packet.address);
    }
    let Party::Pod(pod) = packet.peer else {
        return false;
    };
    let namespace = &cluster.pods[pod].namespace;
    let in_namespace = match &peer["namespaceSelector"] {
        Value::Null => namespace == own,
        selector => {
            let labels = namespace_labels(cluster, namespace);
            selector_holds(selector, |key| {
                labels
                    .iter()
                    .filter(|(k, _)| k == key)
                    .map(|(_, v)| v.clone())
                    .collect()
            })
        }
    };
    in_namespace && pod_labels_match(cluster, pod, &peer["podSelector"])
}

fn kubernetes_port(
    cluster: &Cluster,
    rule: &Value,
    peers: &str,
    own: &str,
    port: &Value,
    packet: &Packet,
) -> bool {
    let protocol = match text(&port["protocol"]) {
        "" => "TCP",
        name => name,
    };
    if protocol != protocol_name(packet.protocol) {
        return false;
    }
    match &port["port"] {
        Value::Null => true,
        Value::Number(first) => {
            let first = first.as_u64().unwrap_or_default();
            let last = port["endPort"].as_u64().unwrap_or(first);
            (first..=last).contains(&u64::from(packet.port))
        }
        name => {
            // A name is the receiver's. Of an address nobody knows names: where a peer is let in by its address only,
            // the name matches nothing.
            let by_labels = packet.way == Way::In
                || list(&rule[peers]).is_empty()
                || list(&rule[peers])
                    .iter()
                    .any(|peer| peer["ipBlock"].is_null() && kubernetes_peer(cluster, own, peer, packet));
            by_labels && receiver_port(cluster, packet, text(name), protocol) == Some(packet.port)
        }
    }
}

fn block_holds(block: &Value, address: IpAddr) -> bool {
    holds(text(&block["cidr"]), address) && !list(&block["except"]).iter().any(|e| holds(text(e), address))
}

fn pod_labels_match(cluster: &Cluster, pod: usize, selector: &Value) -> bool {
    selector_holds(selector, |key| pod_values(cluster, pod, key))
}

// CiliumNetworkPolicy and CiliumClusterwideNetworkPolicy.

fn cilium(cluster: &Cluster, object: &Value, own: Option<&str>, packet: &Packet) -> Said {
    let mut said = Said::default();
    let one = std::iter::once(&object["spec"]).filter(|spec| !spec.is_null());
    for rule in one.chain(list(&object["specs"])) {
        if !selects(cluster, rule, own, packet.subject) {
            continue;
        }
        let (allow, deny, flag) = match packet.way {
            Way::In => ("ingress", "ingressDeny", "ingress"),
            Way::Out => ("egress", "egressDeny", "egress"),
        };
        let present = !rule[allow].is_null() || !rule[deny].is_null();
        said.default_deny |= rule["enableDefaultDeny"][flag].as_bool().unwrap_or(present);
        said.allowed |= list(&rule[allow])
            .iter()
            .any(|e| element_covers(cluster, e, own, packet, false));
        said.denied |= list(&rule[deny])
            .iter()
            .any(|e| element_covers(cluster, e, own, packet, true));
    }
    said
}

fn selects(cluster: &Cluster, rule: &Value, own: Option<&str>, subject: Party) -> bool {
    match subject {
        Party::Pod(pod) => {
            !rule["endpointSelector"].is_null()
                && own.is_none_or(|own| cluster.pods[pod].namespace == own)
                && selector_holds(&rule["endpointSelector"], |key| values(cluster, subject, key))
        }
        Party::Node(0) => {
            let labels = &cluster.nodes[0].labels;
            !rule["nodeSelector"].is_null()
                && selector_holds(&rule["nodeSelector"], |key| {
                    labels.get(bare(key)).cloned().into_iter().collect()
                })
        }
        _ => false,
    }
}

/// Whether an element of a section covers a packet.
fn element_covers(
    cluster: &Cluster,
    element: &Value,
    own: Option<&str>,
    packet: &Packet,
    deny: bool,
) -> bool {
    let prefix = match packet.way {
        Way::In => "from",
        Way::Out => "to",
    };
    let member = |what: &str| &element[format!("{prefix}{what}").as_str()];
    let ports = list(&element["toPorts"]);
    let icmps = list(&element["icmps"]);
    let kinds = [
        "Endpoints",
        "Entities",
        "CIDR",
        "CIDRSet",
        "Nodes",
        "FQDNs",
        "Services",
        "Groups",
    ];
    let restricted = kinds.iter().any(|kind| !member(kind).is_null());
    // An empty element covers nothing.
    if !restricted && ports.is_empty() && icmps.is_empty() {
        return false;
    }
    // A part that cannot be enforced: allows nothing, denies whomever it could mean.
    if !deny && !element["authentication"].is_null() {
        return false;
    }
    let later = ["FQDNs", "Services", "Groups"]
        .iter()
        .any(|kind| !member(kind).is_null());
    let peer = if !restricted {
        true
    } else if later {
        deny
    } else if !member("Nodes").is_null() {
        deny && matches!(packet.peer, Party::Node(_))
    } else {
        list(member("Endpoints"))
            .iter()
            .any(|s| endpoint_matches(cluster, s, own, packet.peer))
            || list(member("Entities"))
                .iter()
                .any(|e| entity_matches(cluster, text(e), packet.peer))
            || list(member("CIDR"))
                .iter()
                .any(|cidr| world_holds(text(cidr), packet))
            || list(member("CIDRSet"))
                .iter()
                .any(|set| cidr_set_holds(cluster, set, packet))
    };
    // Who is not known yet may turn out to be whom a deny means.
    let unsettled = matches!(packet.peer, Party::Unknown(_) | Party::Init(_));
    let meant = peer || (deny && unsettled);
    if !meant {
        return false;
    }
    if ports.is_empty() && icmps.is_empty() {
        return true;
    }
    let in_ports = ports.iter().any(|rule| {
        let above = !deny && !rule["rules"].is_null();
        !above
            && list(&rule["ports"])
                .iter()
                .any(|port| port_covers(cluster, element, port, packet, deny && unsettled))
    });
    let in_icmps = icmps.iter().flat_map(|rule| list(&rule["fields"])).any(|field| {
        let protocol = if text(&field["family"]) == "IPv6" { 58 } else { 1 };
        protocol == packet.protocol && icmp_number(&field["type"], protocol) == Some(packet.port)
    });
    in_ports || in_icmps
}

fn port_covers(
    cluster: &Cluster,
    element: &Value,
    port: &Value,
    packet: &Packet,
    unsettled_deny: bool,
) -> bool {
    let name = protocol_name(packet.protocol);
    let protocol = match text(&port["protocol"]) {
        "" | "ANY" => match name {
            "TCP" | "UDP" | "SCTP" => name,
            _ => return false,
        },
        protocol if protocol == name => protocol,
        _ => return false,
    };
    let first = text(&port["port"]);
    match first.parse::<u16>() {
        Ok(0) if protocol != "ICMP" && protocol != "ICMPv6" => true,
        Ok(first) => {
            let last = match port["endPort"].as_u64() {
                None | Some(0) => u64::from(first),
                Some(last) => last,
            };
            (u64::from(first)..=last).contains(&u64::from(packet.port))
        }
        Err(_) if packet.way == Way::Out && unsettled_deny => true,
        // A prefix of the world has no port names.
        Err(_)
            if packet.way == Way::Out
                && (!element["toCIDR"].is_null() || !element["toCIDRSet"].is_null()) =>
        {
            false
        }
        Err(_) => receiver_port(cluster, packet, first, protocol) == Some(packet.port),
    }
}

/// A selector of peers: in the policy's namespace unless it names another; never the world.
fn endpoint_matches(cluster: &Cluster, selector: &Value, own: Option<&str>, peer: Party) -> bool {
    let keys = keys(selector);
    if let [only] = keys.as_slice()
        && let Some(cidr) = only.strip_prefix("cidr:")
    {
        return matches!(peer, Party::World(address) if holds(cidr, address));
    }
    let reserved = keys.iter().any(|key| key.starts_with("reserved:"));
    if !reserved {
        let Party::Pod(pod) = peer else { return false };
        let names = |key: &&str| {
            let bare = match key.split_once(':') {
                None => *key,
                Some(("k8s" | "any", rest)) => rest,
                Some(_) => return false,
            };
            bare == "io.kubernetes.pod.namespace" || bare.starts_with("io.cilium.k8s.namespace.labels.")
        };
        let elsewhere = keys.iter().any(|key| names(&key.as_str()));
        if own.is_some_and(|own| !elsewhere && cluster.pods[pod].namespace != own) {
            return false;
        }
    }
    if matches!(peer, Party::Unknown(_)) {
        return false;
    }
    selector_holds(selector, |key| values(cluster, peer, key))
}

fn entity_matches(cluster: &Cluster, entity: &str, peer: Party) -> bool {
    let is = |name: &str| reserved_names(cluster, peer).contains(&name);
    match entity {
        "all" => true,
        "none" => false,
        "cluster" => {
            [
                "host",
                "remote-node",
                "init",
                "health",
                "unmanaged",
                "kube-apiserver",
            ]
            .iter()
            .any(|name| is(name))
                || matches!(peer, Party::Pod(_))
        }
        name => is(name),
    }
}

/// What a party is by its nature.
fn reserved_names(cluster: &Cluster, peer: Party) -> Vec<&'static str> {
    match peer {
        Party::Pod(_) | Party::Unknown(_) => vec![],
        Party::Node(index) => {
            let mut names = vec![if index == 0 { "host" } else { "remote-node" }];
            if cluster.nodes[index].apiserver {
                names.push("kube-apiserver");
            }
            names
        }
        Party::World(_) => vec!["world"],
        Party::Init(_) => vec!["init"],
        Party::Unmanaged(_) => vec!["unmanaged"],
        Party::Health(_) => vec!["health"],
        Party::Ingress(_) => vec!["ingress"],
    }
}

/// CIDRs of Cilium's objects match only addresses that are no workload's and no node's.
fn world_holds(cidr: &str, packet: &Packet) -> bool {
    matches!(packet.peer, Party::World(_)) && holds(cidr, packet.address)
}

fn cidr_set_holds(cluster: &Cluster, set: &Value, packet: &Packet) -> bool {
    let inside = match &set["cidrGroupRef"] {
        Value::Null => world_holds(text(&set["cidr"]), packet),
        name => cluster
            .groups
            .get(text(name))
            .into_iter()
            .flatten()
            .any(|cidr| world_holds(cidr, packet)),
    };
    inside
        && !list(&set["except"])
            .iter()
            .any(|except| holds(text(except), packet.address))
}

// Labels.

/// The values that a party has under a key of Cilium's selectors.
fn values(cluster: &Cluster, party: Party, key: &str) -> Vec<String> {
    let (source, name) = key.split_once(':').unwrap_or(("any", key));
    let mut out = Vec::new();
    if matches!(source, "any" | "k8s")
        && let Party::Pod(pod) = party
    {
        out.extend(pod_values(cluster, pod, name));
    }
    if matches!(source, "any" | "reserved") && reserved_names(cluster, party).contains(&name) {
        out.push(String::new());
    }
    out
}

/// The values that a pod has under a key: the system's own names are never the user's.
fn pod_values(cluster: &Cluster, pod: usize, key: &str) -> Vec<String> {
    let of = &cluster.pods[pod];
    let one = |value: &str| vec![value.to_owned()];
    if key == "io.kubernetes.pod.namespace" {
        return one(&of.namespace);
    }
    if key == "io.cilium.k8s.policy.serviceaccount" {
        return one(if of.service_account.is_empty() {
            "default"
        } else {
            &of.service_account
        });
    }
    if key == "io.cilium.k8s.policy.cluster" {
        return one(&cluster.name);
    }
    if let Some(label) = key.strip_prefix("io.cilium.k8s.namespace.labels.") {
        let labels = namespace_labels(cluster, &of.namespace);
        return labels
            .into_iter()
            .filter(|(k, _)| k == label)
            .map(|(_, v)| v)
            .collect();
    }
    of.labels.get(key).cloned().into_iter().collect()
}

fn namespace_labels(cluster: &Cluster, name: &str) -> Vec<(String, String)> {
    let own = cluster
        .namespaces
        .get(name)
        .into_iter()
        .flatten()
        .map(|(k, v)| (k.clone(), v.clone()));
    own.chain([("kubernetes.io/metadata.name".to_owned(), name.to_owned())])
        .collect()
}

/// All keys that a selector names.
fn keys(selector: &Value) -> Vec<String> {
    let none = Map::new();
    let labels = selector["matchLabels"]
        .as_object()
        .unwrap_or(&none)
        .keys()
        .cloned();
    labels
        .chain(
            list(&selector["matchExpressions"])
                .iter()
                .map(|e| text(&e["key"]).to_owned()),
        )
        .collect()
}

/// Kubernetes' meaning of a selector; `values` are those of a key, none where the label is not there.
fn selector_holds(selector: &Value, values: impl Fn(&str) -> Vec<String>) -> bool {
    let none = Map::new();
    let labels = selector["matchLabels"].as_object().unwrap_or(&none);
    labels
        .iter()
        .all(|(key, value)| values(key).iter().any(|v| v == text(value)))
        && list(&selector["matchExpressions"]).iter().all(|expression| {
            let there = values(text(&expression["key"]));
            let listed = list(&expression["values"]);
            let one_of = there.iter().any(|v| listed.iter().any(|l| text(l) == v));
            match text(&expression["operator"]) {
                "In" => one_of,
                "NotIn" => !one_of,
                "Exists" => !there.is_empty(),
                "DoesNotExist" => there.is_empty(),
                other => unreachable!("the generator made operator {other:?}"),
            }
        })
}

// Ports and addresses.

/// The number behind a port's name at whoever receives.
fn receiver_port(cluster: &Cluster, packet: &Packet, name: &str, protocol: &str) -> Option<u16> {
    let receiver = match packet.way {
        Way::In => packet.subject,
        Way::Out => packet.peer,
    };
    let Party::Pod(pod) = receiver else { return None };
    cluster.pods[pod]
        .ports
        .get(name)
        .filter(|(of, _)| of == protocol)
        .map(|(_, number)| *number)
}

fn icmp_number(kind: &Value, protocol: u8) -> Option<u16> {
    if let Some(number) = kind.as_u64() {
        return u16::try_from(number).ok();
    }
    match (text(kind), protocol) {
        ("EchoRequest", 1) => Some(8),
        ("EchoReply", 1) => Some(0),
        ("EchoRequest", _) => Some(128),
        ("EchoReply", _) => Some(129),
        ("DestinationUnreachable", 1) => Some(3),
        ("PacketTooBig", 58) => Some(2),
        (number, _) => number.parse().ok(),
    }
}

fn protocol_name(number: u8) -> &'static str {
    match number {
        1 => "ICMP",
        6 => "TCP",
        17 => "UDP",
        58 => "ICMPv6",
        132 => "SCTP",
        _ => "other",
    }
}

/// Whether a prefix such as `10.0.0.0/8` holds an address, bit by bit.
fn holds(cidr: &str, address: IpAddr) -> bool {
    let (net, length) = match cidr.split_once('/') {
        Some((net, length)) => (net, length.parse::<usize>().ok()),
        None => (cidr, None),
    };
    let Ok(net) = net.parse::<IpAddr>() else {
        return false;
    };
    let (net, address) = (bits(net), bits(address));
    let length = length.unwrap_or(net.len());
    net.len() == address.len() && net[..length] == address[..length]
}

fn bits(address: IpAddr) -> Vec<bool> {
    let bytes = match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    bytes
        .iter()
        .flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1 == 1))
        .collect()
}

// Reading JSON.

fn namespace(object: &Value) -> String {
    match text(&object["metadata"]["namespace"]) {
        "" => "default".to_owned(),
        name => name.to_owned(),
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn bare(key: &str) -> &str {
    key.split_once(':').map_or(key, |(_, name)| name)
}
