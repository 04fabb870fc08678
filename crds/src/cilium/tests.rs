//! What objects mean, and what is said of wrong ones.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::Resource;
use serde_json::{Value, json};
use warren_model::{
    IdentityId, Labels,
    policy::{
        Action, Direction, Directions, Peer, Peers, Ports, Rule, Subject, Unenforced, Validity,
        reserved_labels,
    },
};

use super::*;

fn cnp(spec: Value) -> Value {
    json!({"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "p", "namespace": "shop"}, "spec": spec})
}

fn ccnp(spec: Value) -> Value {
    json!({"apiVersion": "cilium.io/v2", "kind": "CiliumClusterwideNetworkPolicy",
        "metadata": {"name": "p"}, "spec": spec})
}

fn knp(spec: Value) -> Value {
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "p", "namespace": "shop"}, "spec": spec})
}

fn rule(object: &Value) -> Rule {
    let mut rules = parse(object, "east").unwrap_or_else(|fault| panic!("{fault}"));
    assert_eq!(rules.len(), 1);
    rules.remove(0)
}

fn faults(object: &Value) -> Vec<String> {
    check(object, "east")
        .err()
        .unwrap_or_default()
        .iter()
        .map(ToString::to_string)
        .collect()
}

fn pod(namespace: &str, labels: &[(&str, &str)]) -> Labels {
    let own = labels.iter().map(|(k, v)| (format!("k8s:{k}"), (*v).to_owned()));
    let system = [
        ("k8s:io.kubernetes.pod.namespace".to_owned(), namespace.to_owned()),
        (
            format!("k8s:io.cilium.k8s.namespace.labels.team-{namespace}"),
            "yes".to_owned(),
        ),
        ("k8s:io.cilium.k8s.policy.cluster".to_owned(), "east".to_owned()),
    ];
    Labels(own.chain(system).collect())
}

fn peer_matches(rule: &Rule, labels: &Labels) -> bool {
    match &rule.statements[0].peers {
        Peers::Any => true,
        Peers::These(peers) => peers.iter().any(|peer| match peer {
            Peer::Selector(selector) => selector.matches(labels),
            Peer::Cidr(_) => false,
        }),
    }
}

fn from_endpoints(selector: Value) -> Rule {
    rule(&cnp(
        json!({"endpointSelector": {}, "ingress": [{"fromEndpoints": [selector]}]}),
    ))
}

#[test]
fn default_deny_follows_the_sections_that_are_present() {
    let both = |ingress, egress| Directions { ingress, egress };
    for (spec, expected) in [
        (json!({"ingress": []}), both(true, false)),
        (json!({"egress": []}), both(false, true)),
        (
            json!({"ingressDeny": [{"fromEntities": ["world"]}]}),
            both(true, false),
        ),
        (json!({"egressDeny": []}), both(false, true)),
        (json!({"ingress": [{}], "egress": [{}]}), both(true, true)),
        (
            json!({"ingress": [], "enableDefaultDeny": {"ingress": false}}),
            both(false, false),
        ),
        (
            json!({"ingress": [], "enableDefaultDeny": {"egress": true}}),
            both(true, true),
        ),
        (json!({"ingress": [], "egress": null}), both(true, false)),
    ] {
        let mut spec = spec;
        spec["endpointSelector"] = json!({});
        assert_eq!(rule(&cnp(spec.clone())).default_deny, expected, "{spec}");
    }
}

#[test]
fn an_empty_element_covers_nothing_in_cilium_and_everything_in_kubernetes() {
    assert!(
        rule(&cnp(json!({"endpointSelector": {}, "ingress": [{}]})))
            .statements
            .is_empty()
    );
    assert!(
        rule(&cnp(
            json!({"endpointSelector": {}, "ingress": [{"toPorts": []}]})
        ))
        .statements
        .is_empty()
    );
    let open = rule(&knp(json!({"podSelector": {}, "ingress": [{}]})));
    assert_eq!(open.statements[0].peers, Peers::Any);
    assert_eq!(open.statements[0].ports, Ports::All);
    let open = rule(&knp(
        json!({"podSelector": {}, "ingress": [{"from": [], "ports": []}]}),
    ));
    assert_eq!(
        (&open.statements[0].peers, &open.statements[0].ports),
        (&Peers::Any, &Ports::All)
    );
}

#[test]
fn an_empty_list_of_peers_selects_nobody_and_no_list_everybody() {
    for member in ["fromEndpoints", "fromEntities", "fromCIDR", "fromCIDRSet"] {
        let rule = rule(&cnp(json!({"endpointSelector": {}, "ingress": [{member: []}]})));
        assert_eq!(rule.statements[0].peers, Peers::These(Vec::new()), "{member}");
    }
    let ports = json!({"endpointSelector": {}, "ingress": [{"toPorts": [{"ports": [{"port": "80"}]}]}]});
    assert_eq!(rule(&cnp(ports)).statements[0].peers, Peers::Any);
}

#[test]
fn the_namespace_of_the_policy_is_added_unless_another_is_named() {
    let (own, other) = (pod("shop", &[("app", "web")]), pod("bank", &[("app", "web")]));
    let all = from_endpoints(json!({}));
    assert!(peer_matches(&all, &own) && !peer_matches(&all, &other));
    let named = from_endpoints(json!({"matchLabels": {"k8s:io.kubernetes.pod.namespace": "bank"}}));
    assert!(!peer_matches(&named, &own) && peer_matches(&named, &other));
    let bare = from_endpoints(json!({"matchLabels": {"io.kubernetes.pod.namespace": "bank"}}));
    assert!(!peer_matches(&bare, &own) && peer_matches(&bare, &other));
    let any = from_endpoints(json!({"matchExpressions":
        [{"key": "k8s:io.kubernetes.pod.namespace", "operator": "Exists"}]}));
    assert!(peer_matches(&any, &own) && peer_matches(&any, &other));
    let labelled =
        from_endpoints(json!({"matchLabels": {"k8s:io.cilium.k8s.namespace.labels.team-bank": "yes"}}));
    assert!(!peer_matches(&labelled, &own) && peer_matches(&labelled, &other));
    // The subject never leaves the namespace.
    let away = json!({"endpointSelector": {"matchLabels": {"k8s:io.kubernetes.pod.namespace": "bank"}}, "ingress": []});
    let Subject::Pods(subject) = rule(&cnp(away)).subject else {
        panic!()
    };
    assert!(!subject.matches(&other) && !subject.matches(&own));
}

#[test]
fn a_clusterwide_policy_spans_namespaces_and_never_means_the_world() {
    let rule = rule(&ccnp(
        json!({"endpointSelector": {}, "ingress": [{"fromEndpoints": [{}]}]}),
    ));
    let Subject::Pods(subject) = &rule.subject else {
        panic!()
    };
    for namespace in ["shop", "bank"] {
        assert!(peer_matches(&rule, &pod(namespace, &[])) && subject.matches(&pod(namespace, &[])));
    }
    for reserved in [
        IdentityId::WORLD,
        IdentityId::HOST,
        IdentityId::REMOTE_NODE,
        IdentityId::UNKNOWN,
    ] {
        assert!(
            !peer_matches(&rule, &reserved_labels(reserved, false)),
            "{reserved}"
        );
        assert!(!subject.matches(&reserved_labels(reserved, false)));
    }
}

#[test]
fn label_sources_entities_and_address_labels() {
    let world = reserved_labels(IdentityId::WORLD, false);
    assert!(peer_matches(
        &from_endpoints(json!({"matchLabels": {"reserved:world": ""}})),
        &world
    ));
    let cidr = from_endpoints(json!({"matchLabels": {"cidr:10.0.0.0/8": ""}}));
    assert!(matches!(&cidr.statements[0].peers, Peers::These(peers) if matches!(&peers[0], Peer::Cidr(_))));
    let fqdn = from_endpoints(json!({"matchLabels": {"fqdn:example.com": ""}}));
    assert_eq!(fqdn.statements[0].unenforced, [Unenforced::Fqdns]);
    let mixed = cnp(json!({"endpointSelector": {}, "ingress":
        [{"fromEndpoints": [{"matchLabels": {"cidr:10.0.0.0/8": "", "app": "web"}}]}]}));
    assert_eq!(faults(&mixed).len(), 1);

    let entity = |name: &str| {
        rule(&cnp(
            json!({"endpointSelector": {}, "ingress": [{"fromEntities": [name]}]}),
        ))
    };
    use IdentityId as Id;
    for (name, reserved, pods) in [
        ("world", &[Id::WORLD, Id::WORLD_IPV4, Id::WORLD_IPV6][..], false),
        ("host", &[Id::HOST], false),
        ("remote-node", &[Id::REMOTE_NODE, Id::KUBE_APISERVER], false),
        ("kube-apiserver", &[Id::KUBE_APISERVER], false),
        ("init", &[Id::INIT], false),
        ("ingress", &[Id::INGRESS], false),
        ("health", &[Id::HEALTH], false),
        ("unmanaged", &[Id::UNMANAGED], false),
        ("none", &[], false),
        (
            "cluster",
            &[
                Id::HOST,
                Id::REMOTE_NODE,
                Id::INIT,
                Id::HEALTH,
                Id::UNMANAGED,
                Id::KUBE_APISERVER,
            ],
            true,
        ),
    ] {
        let rule = entity(name);
        for number in 0..=10 {
            let id = IdentityId(number);
            assert_eq!(
                peer_matches(&rule, &reserved_labels(id, false)),
                reserved.contains(&id),
                "{name} {id}"
            );
        }
        assert_eq!(peer_matches(&rule, &pod("shop", &[])), pods, "{name}");
    }
    assert_eq!(entity("all").statements[0].peers, Peers::Any);
    let foreign = Labels([("k8s:io.cilium.k8s.policy.cluster".to_owned(), "west".to_owned())].into());
    assert!(!peer_matches(&entity("cluster"), &foreign));
}

#[test]
fn ports_of_every_kind() {
    let ports = |port: Value| {
        let rule = rule(&cnp(
            json!({"endpointSelector": {}, "ingress": [{"toPorts": [{"ports": [port]}]}]}),
        ));
        let Ports::These(list) = rule.statements[0].ports.clone() else {
            panic!()
        };
        list.iter()
            .map(|p| format!("{} {:?}", p.protocol, p.ports))
            .collect::<Vec<_>>()
            .join(", ")
    };
    for (port, expected) in [
        (json!({"port": "80", "protocol": "TCP"}), "TCP Range(80, 80)"),
        (
            json!({"port": "80"}),
            "TCP Range(80, 80), UDP Range(80, 80), SCTP Range(80, 80)",
        ),
        (
            json!({"port": "8000", "endPort": 8100, "protocol": "UDP"}),
            "UDP Range(8000, 8100)",
        ),
        (json!({"port": "0", "protocol": "SCTP"}), "SCTP Range(0, 65535)"),
        (json!({"port": "web", "protocol": "TCP"}), "TCP Name(\"web\")"),
        (json!({"port": "8", "protocol": "ICMP"}), "ICMP Range(8, 8)"),
    ] {
        assert_eq!(ports(port), expected);
    }
    let icmp = json!({"endpointSelector": {}, "ingress": [{"icmps": [{"fields":
        [{"type": 8}, {"family": "IPv6", "type": "EchoRequest"}]}]}]});
    let Ports::These(list) = rule(&cnp(icmp)).statements[0].ports.clone() else {
        panic!()
    };
    let list: Vec<_> = list
        .iter()
        .map(|p| format!("{} {:?}", p.protocol, p.ports))
        .collect();
    assert_eq!(list, ["ICMP Range(8, 8)", "ICMPv6 Range(128, 128)"]);
}

#[test]
fn kubernetes_policies_with_their_defaults() {
    let both = |ingress, egress| Directions { ingress, egress };
    let egress = json!([{"to": [{"podSelector": {}}]}]);
    for (spec, expected, statements) in [
        (json!({"podSelector": {}}), both(true, false), 0),
        (json!({"podSelector": {}, "egress": egress}), both(true, true), 1),
        (json!({"podSelector": {}, "egress": []}), both(true, false), 0),
        (
            json!({"podSelector": {}, "policyTypes": ["Egress"], "ingress": [{}]}),
            both(false, true),
            0,
        ),
        (
            json!({"podSelector": {}, "policyTypes": ["Ingress"], "egress": egress}),
            both(true, false),
            0,
        ),
    ] {
        let rule = rule(&knp(spec.clone()));
        assert_eq!(
            (rule.default_deny, rule.statements.len()),
            (expected, statements),
            "{spec}"
        );
    }
    let peers = |from: Value| rule(&knp(json!({"podSelector": {}, "ingress": [{"from": [from]}]})));
    let web = json!({"matchLabels": {"app": "web"}});
    let bank = json!({"matchLabels": {"team-bank": "yes"}});
    for (from, own, other) in [
        (json!({"podSelector": web}), true, false),
        (json!({"namespaceSelector": bank}), false, true),
        (json!({"namespaceSelector": {}, "podSelector": web}), true, true),
        (
            json!({"namespaceSelector": bank, "podSelector": {"matchLabels": {"app": "db"}}}),
            false,
            false,
        ),
    ] {
        let rule = peers(from.clone());
        assert_eq!(
            peer_matches(&rule, &pod("shop", &[("app", "web")])),
            own,
            "{from}"
        );
        assert_eq!(
            peer_matches(&rule, &pod("bank", &[("app", "web")])),
            other,
            "{from}"
        );
        assert!(!peer_matches(&rule, &reserved_labels(IdentityId::HOST, false)));
    }
    let block = peers(json!({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}));
    let set = block.statements[0].cidrs().next().unwrap().clone();
    assert!(set.contains("10.2.0.1".parse().unwrap()) && !set.contains("10.1.0.1".parse().unwrap()));
    let ports = rule(&knp(json!({"podSelector": {}, "ingress": [{"ports":
        [{"port": 80}, {"protocol": "UDP"}, {"port": "web"}, {"protocol": "SCTP", "port": 7, "endPort": 9}]}]})));
    let Ports::These(list) = &ports.statements[0].ports else {
        panic!()
    };
    let list: Vec<_> = list
        .iter()
        .map(|p| format!("{} {:?}", p.protocol, p.ports))
        .collect();
    assert_eq!(
        list,
        [
            "TCP Range(80, 80)",
            "UDP Range(0, 65535)",
            "TCP Name(\"web\")",
            "SCTP Range(7, 9)"
        ]
    );
}

#[test]
fn what_cannot_be_enforced_is_kept_and_said() {
    let http = cnp(json!({"endpointSelector": {}, "ingress": [{"toPorts":
        [{"ports": [{"port": "80", "protocol": "TCP"}], "rules": {"http": [{"method": "GET", "path": "/get"}]}}]}]}));
    let outcome = parse(&http, "east");
    let Validity { valid, message } = Validity::of(&outcome, &[]);
    assert!(valid);
    assert_eq!(
        message,
        "The policy is enforced, except: spec.ingress[0].toPorts[0]: HTTP rules cannot be enforced yet: denied."
    );
    let services = rule(&cnp(json!({"endpointSelector": {}, "egressDeny":
        [{"toServices": [{"k8sService": {"serviceName": "db"}}]}]})));
    assert_eq!(services.statements[0].action, Action::Deny);
    assert_eq!(
        services.statements[0].peers,
        Peers::Any,
        "a deny that cannot be enforced denies all it could mean"
    );
    let fqdns = rule(&cnp(
        json!({"endpointSelector": {}, "egress": [{"toFQDNs": [{"matchName": "example.com"}]}]}),
    ));
    assert_eq!(fqdns.statements[0].direction, Direction::Egress);
    assert_eq!(fqdns.statements[0].peers, Peers::These(Vec::new()));
    let nodes = rule(&ccnp(
        json!({"endpointSelector": {}, "ingressDeny": [{"fromNodes": [{}]}]}),
    ));
    assert!(peer_matches(
        &nodes,
        &reserved_labels(IdentityId::REMOTE_NODE, false)
    ));
    assert!(!peer_matches(&nodes, &pod("shop", &[])));
}

#[test]
fn faults_name_the_member() {
    let ingress = |element: Value| cnp(json!({"endpointSelector": {}, "ingress": [element]}));
    let port = |port: Value| ingress(json!({"toPorts": [{}, {"ports": [port]}]}));
    let rules = |rules: Value, protocol: &str| {
        ingress(json!({"toPorts": [{"ports": [{"port": "80", "protocol": protocol}], "rules": rules}]}))
    };
    let many: Vec<_> = (1..=41).map(|n| json!({"port": n.to_string()})).collect();
    for (object, start) in [
        (
            cnp(json!({"ingress": []})),
            "spec: write exactly one of endpointSelector and nodeSelector",
        ),
        (
            cnp(json!({"nodeSelector": {}, "ingress": []})),
            "spec.nodeSelector: only",
        ),
        (
            ccnp(json!({"nodeSelector": {}, "endpointSelector": {}, "ingress": []})),
            "spec: write exactly one",
        ),
        (cnp(json!({"endpointSelector": {}})), "spec: has no section"),
        (
            ingress(json!({"fromCIDR": ["10.0.0.0/8"], "fromEntities": ["world"]})),
            "spec.ingress[0]: has fromEntities and fromCIDR",
        ),
        (
            ingress(json!({"fromEntities": ["planet"]})),
            "spec.ingress[0].fromEntities[0]: \"planet\" is no entity",
        ),
        (
            ingress(json!({"fromCIDR": ["10.0.0.0/33"]})),
            "spec.ingress[0].fromCIDR[0]: \"10.0.0.0/33\" is no prefix",
        ),
        (
            ingress(json!({"fromCIDRSet": [{"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}]})),
            "spec.ingress[0].fromCIDRSet[0].except[0]: 11.0.0.0/16 does not lie inside",
        ),
        (
            ingress(json!({"fromCIDRSet": [{}]})),
            "spec.ingress[0].fromCIDRSet[0]: write exactly one",
        ),
        (
            ingress(json!({"toPorts": [{}], "icmps": [{}]})),
            "spec.ingress[0]: has toPorts and icmps",
        ),
        (
            ingress(json!({"toPort": []})),
            "spec.ingress[0].toPort: unknown field `toPort`",
        ),
        (
            port(json!({})),
            "spec.ingress[0].toPorts[1].ports[0].port: the port is missing",
        ),
        (
            port(json!({"port": 80})),
            "spec.ingress[0].toPorts[1].ports[0].port: invalid type",
        ),
        (
            port(json!({"port": "70000"})),
            "spec.ingress[0].toPorts[1].ports[0].port: 70000 is larger",
        ),
        (
            port(json!({"port": "80", "endPort": 79})),
            "spec.ingress[0].toPorts[1].ports[0].endPort: 79 does not end",
        ),
        (
            port(json!({"port": "web", "endPort": 90})),
            "spec.ingress[0].toPorts[1].ports[0].endPort: a range needs",
        ),
        (
            port(json!({"port": "Web!"})),
            "spec.ingress[0].toPorts[1].ports[0].port: \"Web!\" is neither",
        ),
        (
            port(json!({"port": "80", "protocol": "GRE"})),
            "spec.ingress[0].toPorts[1].ports[0].protocol: \"GRE\"",
        ),
        (
            ingress(json!({"toPorts": [{"ports": many}]})),
            "spec.ingress[0].toPorts[0].ports: has 41 ports, at most 40",
        ),
        (
            rules(json!({"http": [{}]}), "UDP"),
            "spec.ingress[0].toPorts[0].ports[0].protocol: HTTP rules need",
        ),
        (
            rules(json!({"http": [{"path": "("}]}), "TCP"),
            "spec.ingress[0].toPorts[0].rules.http[0].path: is no regular",
        ),
        (
            rules(json!({"dns": [{"matchName": "a.b"}]}), "UDP"),
            "spec.ingress[0].toPorts[0].rules.dns: DNS rules are for egress",
        ),
        (
            rules(json!({"http": [{}], "kafka": [{}]}), "TCP"),
            "spec.ingress[0].toPorts[0].rules: has more than one",
        ),
        (
            rules(json!({"kafka": [{"role": "produce", "apiKey": "fetch"}]}), "TCP"),
            "spec.ingress[0].toPorts[0].rules.kafka[0]: has both",
        ),
        (
            ingress(json!({"icmps": [{"fields": [{"type": "Pong"}]}]})),
            "spec.ingress[0].icmps[0].fields[0].type: \"Pong\"",
        ),
        (
            cnp(json!({"endpointSelector": {}, "ingressDeny": [{"toPorts": [{"rules": {"http": []}}]}]})),
            "spec.ingressDeny[0].toPorts[0].rules: deny sections",
        ),
        (
            cnp(
                json!({"endpointSelector": {"matchExpressions": [{"key": "a", "operator": "Is"}]}, "ingress": []}),
            ),
            "spec.endpointSelector.matchExpressions[0].operator: \"Is\"",
        ),
        (
            cnp(
                json!({"endpointSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}, "ingress": []}),
            ),
            "spec.endpointSelector.matchExpressions[0].values: In needs",
        ),
        (
            cnp(json!({"endpointSelector": {"matchLabels": {"a b": "c"}}, "ingress": []})),
            "spec.endpointSelector.matchLabels: \"a b\" is no label key",
        ),
        (
            knp(json!({"podSelector": {}, "ingress": [{"from": [{}]}]})),
            "spec.ingress[0].from[0]: is empty",
        ),
        (knp(json!({"podselector": {}})), "spec.podselector: is no member"),
        (
            knp(json!({"podSelector": {}, "policyTypes": ["Both"]})),
            "spec.policyTypes[0]: \"Both\"",
        ),
        (
            knp(json!({"podSelector": {}, "ingress": [{"ports": [{"port": 0}]}]})),
            "spec.ingress[0].ports[0].port: 0 is no port",
        ),
        (json!({"kind": "Pod"}), "kind: "),
        (json!("text"), "kind: "),
    ] {
        let faults = faults(&object);
        assert!(
            faults.first().is_some_and(|f| f.starts_with(start)),
            "{start:?} wanted, got {faults:?}"
        );
    }
    let two = ingress(json!({"fromEntities": ["planet", "moon"]}));
    assert_eq!(faults(&two).len(), 2);
}

#[test]
fn specs_are_rules_of_their_own() {
    let object = json!({"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "p", "namespace": "shop"}, "specs": [
            {"endpointSelector": {}, "ingress": [{"fromEntities": ["host"]}]},
            {"endpointSelector": {}, "egress": []}], "status": {"conditions": [{"nonsense": 1}]}});
    let rules = parse(&object, "east").unwrap();
    assert_eq!(rules.len(), 2);
    assert_eq!(rules[0].statements[0].place, "specs[0].ingress[0]");
}

#[test]
fn groups_of_prefixes() {
    let group = |cidrs: Value| {
        json!({"apiVersion": "cilium.io/v2", "kind": "CiliumCIDRGroup",
        "metadata": {"name": "office"}, "spec": {"externalCIDRs": cidrs}})
    };
    let (name, cidrs) = parse_group(&group(json!(["10.1.2.3/8", "fd00::/64"]))).unwrap();
    assert_eq!((name.as_str(), cidrs.len()), ("office", 2));
    assert_eq!(cidrs[0].to_string(), "10.0.0.0/8");
    let fault = parse_group(&group(json!(["10.0.0.0/8", "x"]))).unwrap_err();
    assert_eq!(fault.path, "spec.externalCIDRs[1]");
}

#[test]
fn definitions_have_names_columns_and_structural_schemas() {
    let all = all();
    assert_eq!(all.len(), 3);
    for definition in &all {
        let value = serde_json::to_value(definition).unwrap();
        let text = value["spec"]["versions"][0]["schema"].to_string();
        assert!(
            !text.contains("\"additionalProperties\":false") && !text.contains("$ref"),
            "{text}"
        );
        assert!(!text.contains("oneOf"));
    }
    let names = &all[0].spec.names;
    assert_eq!(names.plural, CiliumNetworkPolicy::plural(&()));
    assert_eq!(names.short_names.as_deref().unwrap(), ["cnp", "ciliumnp"]);
    assert_eq!(
        all[1].spec.names.plural,
        CiliumClusterwideNetworkPolicy::plural(&())
    );
    assert_eq!(all[1].spec.scope, "Cluster");
    assert_eq!(all[2].spec.names.plural, CiliumCIDRGroup::plural(&()));
    let columns = all[0].spec.versions[0]
        .additional_printer_columns
        .as_ref()
        .unwrap();
    let columns: Vec<_> = columns
        .iter()
        .map(|c| (c.name.as_str(), c.json_path.as_str()))
        .collect();
    assert_eq!(columns[0], ("Age", ".metadata.creationTimestamp"));
    assert_eq!(
        columns[1],
        ("Valid", ".status.conditions[?(@.type=='Valid')].status")
    );
    let schema = serde_json::to_value(&all[0].spec.versions[0].schema).unwrap();
    let rule = &schema["openAPIV3Schema"]["properties"]["spec"]["properties"];
    for member in [
        "endpointSelector",
        "nodeSelector",
        "ingress",
        "ingressDeny",
        "egress",
        "egressDeny",
        "log",
        "enableDefaultDeny",
    ] {
        assert!(rule.get(member).is_some(), "{member}");
    }
    let egress = &rule["egress"]["items"]["properties"];
    for member in ["toFQDNs", "toServices", "toNodes", "toCIDRSet", "icmps"] {
        assert!(egress.get(member).is_some(), "{member}");
    }
    let l7 = &egress["toPorts"]["items"]["properties"]["rules"]["properties"];
    assert!(l7.get("http").is_some() && l7.get("kafka").is_some() && l7.get("dns").is_some());
}

#[test]
fn typed_objects_survive_a_round_trip_and_conditions_keep_their_time() {
    let object = cnp(json!({"endpointSelector": {}, "ingress": [{"fromCIDRSet": [{"cidr": "10.0.0.0/8"}]}]}));
    let typed: CiliumNetworkPolicy = serde_json::from_value(object.clone()).unwrap();
    assert_eq!(serde_json::to_value(&typed).unwrap(), object);
    let at = |text: &str| serde_json::from_value::<Time>(json!(text)).unwrap();
    let validity = |valid, message: &str| Validity {
        valid,
        message: message.into(),
    };
    let first = condition(validity(true, "a"), Some(1), at("2026-01-01T00:00:00Z"), None);
    let second = condition(
        validity(true, "b"),
        Some(2),
        at("2026-01-02T00:00:00Z"),
        Some(&first),
    );
    let third = condition(
        validity(false, "c"),
        Some(3),
        at("2026-01-03T00:00:00Z"),
        Some(&second),
    );
    assert_eq!(second.last_transition_time, first.last_transition_time);
    assert_eq!(
        (third.status.as_str(), third.last_transition_time),
        ("False", at("2026-01-03T00:00:00Z"))
    );
}
