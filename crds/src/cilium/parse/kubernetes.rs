//! Kubernetes NetworkPolicy.

use k8s_openapi::{
    api::networking::v1::{IPBlock, NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort},
    apimachinery::pkg::{apis::meta::v1, util::intstr::IntOrString},
};
use serde_json::Value;
use warren_model::policy::{
    Action, AddressScope, CidrSet, CidrSource, Direction, Directions, LabelKey, Peer, Peers, PolicyRef,
    PortSpec, Ports, Protocol, Requirement, Rule, Selector, Statement, Subject, keys,
};

use super::{
    element,
    faults::{Faults, Path},
    port::is_port_name,
    selector::{self, Expression},
    typed,
};

/// The rule of a NetworkPolicy.
pub(super) fn rules(object: &Value, policy: &PolicyRef, faults: &mut Faults) -> Vec<Rule> {
    let typed: NetworkPolicy = match typed(object) {
        Ok(typed) => typed,
        Err(fault) => {
            faults.push(fault);
            return Vec::new();
        }
    };
    unknown_members(object, &typed, faults);
    let path = Path::root().member("spec");
    let Some(spec) = typed.spec else {
        faults.add(&path, "the policy has no spec");
        return Vec::new();
    };
    let own = Requirement::is(LabelKey::k8s(keys::NAMESPACE), &policy.namespace);
    let mut requirements = pod_labels(&path.member("podSelector"), spec.pod_selector.as_ref(), faults);
    requirements.push(own.clone());
    let default_deny = directions(&path, spec.policy_types.as_deref(), &spec.egress, faults);
    let mut statements = Vec::new();
    for (i, rule) in spec.ingress.iter().flatten().enumerate() {
        let at = path.member("ingress").item(i);
        let (peers, ports) = (rule.from.as_deref(), rule.ports.as_deref());
        statements.push(statement(
            &at,
            Direction::Ingress,
            ("from", peers),
            ports,
            &own,
            faults,
        ));
    }
    for (i, rule) in spec.egress.iter().flatten().enumerate() {
        let at = path.member("egress").item(i);
        let (peers, ports) = (rule.to.as_deref(), rule.ports.as_deref());
        statements.push(statement(
            &at,
            Direction::Egress,
            ("to", peers),
            ports,
            &own,
            faults,
        ));
    }
    // A section of a direction that policyTypes leaves out has no effect.
    statements.retain(|statement| *default_deny.of(statement.direction));
    let subject = Subject::Pods(Selector::new(requirements));
    vec![Rule {
        policy: policy.clone(),
        subject,
        default_deny,
        statements,
    }]
}

/// `policyTypes`, or its default: ingress always, egress where the policy has egress rules.
fn directions<T>(
    path: &Path,
    types: Option<&[String]>,
    egress: &Option<Vec<T>>,
    faults: &mut Faults,
) -> Directions<bool> {
    let types = types.unwrap_or_default();
    for (i, name) in types.iter().enumerate() {
        if !matches!(name.as_str(), "Ingress" | "Egress") {
            let problem = format!("{name:?} is no policy type: write Ingress or Egress");
            faults.add(&path.member("policyTypes").item(i), problem);
        }
    }
    if types.is_empty() {
        return Directions {
            ingress: true,
            egress: egress.as_ref().is_some_and(|rules| !rules.is_empty()),
        };
    }
    let has = |wanted: &str| types.iter().any(|name| name == wanted);
    Directions {
        ingress: has("Ingress"),
        egress: has("Egress"),
    }
}

fn statement(
    path: &Path,
    direction: Direction,
    (name, peers): (&str, Option<&[NetworkPolicyPeer]>),
    ports: Option<&[NetworkPolicyPort]>,
    own: &Requirement,
    faults: &mut Faults,
) -> Statement {
    let peers = match peers.unwrap_or_default() {
        [] => Peers::Any,
        list => Peers::These(
            list.iter()
                .enumerate()
                .filter_map(|(i, one)| peer(&path.member(name).item(i), one, own, faults))
                .collect(),
        ),
    };
    let ports = match ports.unwrap_or_default() {
        [] => Ports::All,
        list => Ports::These(
            list.iter()
                .enumerate()
                .filter_map(|(i, one)| port(&path.member("ports").item(i), one, faults))
                .collect(),
        ),
    };
    Statement {
        place: path.text(),
        direction,
        action: Action::Allow,
        peers,
        ports,
        unenforced: Vec::new(),
    }
}

fn peer(path: &Path, peer: &NetworkPolicyPeer, own: &Requirement, faults: &mut Faults) -> Option<Peer> {
    let (namespaces, pods) = (peer.namespace_selector.as_ref(), peer.pod_selector.as_ref());
    if let Some(block) = &peer.ip_block {
        if namespaces.is_some() || pods.is_some() {
            faults.add(path, "has ipBlock beside a selector: write two peers");
        }
        return ip_block(&path.member("ipBlock"), block, faults).map(Peer::Cidr);
    }
    if namespaces.is_none() && pods.is_none() {
        faults.add(path, "is empty: write podSelector, namespaceSelector or ipBlock");
        return None;
    }
    let mut requirements = pod_labels(&path.member("podSelector"), pods, faults);
    match namespaces {
        None => requirements.push(own.clone()),
        Some(selector) => {
            requirements.push(Requirement::exists(LabelKey::k8s(keys::NAMESPACE)));
            let of_namespace = |key: &str| LabelKey::k8s(format!("{}{key}", keys::NAMESPACE_LABELS));
            requirements.extend(labels(
                &path.member("namespaceSelector"),
                selector,
                of_namespace,
                faults,
            ));
        }
    }
    Some(Peer::Selector(Selector::new(requirements)))
}

fn pod_labels(path: &Path, selector: Option<&v1::LabelSelector>, faults: &mut Faults) -> Vec<Requirement> {
    let none = v1::LabelSelector::default();
    labels(path, selector.unwrap_or(&none), |key| LabelKey::k8s(key), faults)
}

fn labels(
    path: &Path,
    selector: &v1::LabelSelector,
    key: impl Fn(&str) -> LabelKey,
    faults: &mut Faults,
) -> Vec<Requirement> {
    let expressions = selector.match_expressions.iter().flatten().map(|e| Expression {
        key: &e.key,
        operator: &e.operator,
        values: e.values.as_deref().unwrap_or_default(),
    });
    selector::read(path, selector.match_labels.as_ref(), expressions, key, faults)
}

fn ip_block(path: &Path, block: &IPBlock, faults: &mut Faults) -> Option<CidrSet> {
    let net = element::prefix(&path.member("cidr"), &block.cidr, faults);
    let except = block.except.as_deref().unwrap_or_default();
    let except = element::exceptions(path, net, except, faults);
    net.map(|net| CidrSet {
        source: CidrSource::Prefix(net),
        except,
        scope: AddressScope::Any,
    })
}

fn port(path: &Path, port: &NetworkPolicyPort, faults: &mut Faults) -> Option<PortSpec> {
    let protocol = match port.protocol.as_deref() {
        None | Some("TCP") => Protocol::Tcp,
        Some("UDP") => Protocol::Udp,
        Some("SCTP") => Protocol::Sctp,
        Some(other) => {
            let problem = format!("{other:?} is no protocol: write TCP, UDP or SCTP");
            faults.add(&path.member("protocol"), problem);
            return None;
        }
    };
    let number = |number: i32| u16::try_from(number).ok().filter(|number| *number != 0);
    match (&port.port, port.end_port) {
        (None, None) => Some(PortSpec::range(protocol, 0, u16::MAX)),
        (None, Some(_)) | (Some(IntOrString::String(_)), Some(_)) => {
            faults.add(
                &path.member("endPort"),
                "a range needs a number as its first port",
            );
            None
        }
        (Some(IntOrString::String(name)), None) => {
            if !is_port_name(name) {
                faults.add(&path.member("port"), format!("{name:?} is no port name"));
                return None;
            }
            Some(PortSpec::named(protocol, name))
        }
        (Some(IntOrString::Int(first)), end) => {
            let Some(first) = number(*first) else {
                faults.add(
                    &path.member("port"),
                    format!("{first} is no port: write 1 to 65535"),
                );
                return None;
            };
            match number(end.unwrap_or(first.into())) {
                Some(last) if last >= first => Some(PortSpec::range(protocol, first, last)),
                _ => {
                    let problem = format!("does not end a range that starts at port {first}");
                    faults.add(&path.member("endPort"), problem);
                    None
                }
            }
        }
    }
}

/// Members that Kubernetes' types do not know: what reading and writing again loses. A misspelt selector would
/// otherwise select everything.
fn unknown_members(object: &Value, typed: &NetworkPolicy, faults: &mut Faults) {
    let Ok(kept) = serde_json::to_value(typed) else {
        return;
    };
    if let Some(spec) = object.get("spec") {
        lost(&Path::root().member("spec"), spec, kept.get("spec"), faults);
    }
}

fn lost(path: &Path, written: &Value, kept: Option<&Value>, faults: &mut Faults) {
    match (written, kept) {
        (Value::Null, _) => {}
        (_, None) => faults.add(path, "is no member of a NetworkPolicy: correct its spelling"),
        (Value::Object(written), Some(kept)) => {
            for (name, value) in written {
                lost(&path.member(name), value, kept.get(name), faults);
            }
        }
        (Value::Array(written), Some(kept)) => {
            for (i, value) in written.iter().enumerate() {
                lost(&path.item(i), value, kept.get(i), faults);
            }
        }
        _ => {}
    }
}
