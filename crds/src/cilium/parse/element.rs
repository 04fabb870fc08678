//! Elements of `ingress`, `ingressDeny`, `egress` and `egressDeny`: four types, one meaning.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;
use warren_model::policy::{
    Action, AddressScope, CidrSet, CidrSource, Direction, Entity, LabelKey, LabelSource, Operator, Peer,
    Peers, Ports, Requirement, Selector, Statement, Unenforced, keys,
};

use super::{
    faults::{Faults, Path},
    l7, port, selector,
};
use crate::cilium::{
    l7::FqdnSelector,
    spec::{
        CidrRule, EgressDenyRule, EgressRule, IcmpRule, IngressDenyRule, IngressRule, LabelSelector,
        PortRule, Service,
    },
};

/// An element, whatever its type.
pub(super) struct Element<'a> {
    direction: Direction,
    action: Action,
    endpoints: Option<&'a Vec<LabelSelector>>,
    entities: Option<&'a Vec<String>>,
    cidr: Option<&'a Vec<String>>,
    cidr_set: Option<&'a Vec<CidrRule>>,
    nodes: Option<&'a Vec<LabelSelector>>,
    fqdns: Option<&'a Vec<FqdnSelector>>,
    services: Option<&'a Vec<Service>>,
    groups: Option<&'a Value>,
    authentication: Option<&'a Value>,
    to_ports: Option<&'a Vec<PortRule>>,
    icmps: Option<&'a Vec<IcmpRule>>,
}

impl<'a> From<&'a IngressRule> for Element<'a> {
    fn from(rule: &'a IngressRule) -> Self {
        Self {
            direction: Direction::Ingress,
            action: Action::Allow,
            endpoints: rule.from_endpoints.as_ref(),
            entities: rule.from_entities.as_ref(),
            cidr: rule.from_cidr.as_ref(),
            cidr_set: rule.from_cidr_set.as_ref(),
            nodes: rule.from_nodes.as_ref(),
            fqdns: None,
            services: None,
            groups: rule.from_groups.as_ref(),
            authentication: rule.authentication.as_ref(),
            to_ports: rule.to_ports.as_ref(),
            icmps: rule.icmps.as_ref(),
        }
    }
}

impl<'a> From<&'a IngressDenyRule> for Element<'a> {
    fn from(rule: &'a IngressDenyRule) -> Self {
        Self {
            direction: Direction::Ingress,
            action: Action::Deny,
            endpoints: rule.from_endpoints.as_ref(),
            entities: rule.from_entities.as_ref(),
            cidr: rule.from_cidr.as_ref(),
            cidr_set: rule.from_cidr_set.as_ref(),
            nodes: rule.from_nodes.as_ref(),
            fqdns: None,
            services: None,
            groups: rule.from_groups.as_ref(),
            authentication: None,
            to_ports: rule.to_ports.as_ref(),
            icmps: rule.icmps.as_ref(),
        }
    }
}

impl<'a> From<&'a EgressRule> for Element<'a> {
    fn from(rule: &'a EgressRule) -> Self {
        Self {
            direction: Direction::Egress,
            action: Action::Allow,
            endpoints: rule.to_endpoints.as_ref(),
            entities: rule.to_entities.as_ref(),
            cidr: rule.to_cidr.as_ref(),
            cidr_set: rule.to_cidr_set.as_ref(),
            nodes: rule.to_nodes.as_ref(),
            fqdns: rule.to_fqdns.as_ref(),
            services: rule.to_services.as_ref(),
            groups: rule.to_groups.as_ref(),
            authentication: rule.authentication.as_ref(),
            to_ports: rule.to_ports.as_ref(),
            icmps: rule.icmps.as_ref(),
        }
    }
}

impl<'a> From<&'a EgressDenyRule> for Element<'a> {
    fn from(rule: &'a EgressDenyRule) -> Self {
        Self {
            direction: Direction::Egress,
            action: Action::Deny,
            endpoints: rule.to_endpoints.as_ref(),
            entities: rule.to_entities.as_ref(),
            cidr: rule.to_cidr.as_ref(),
            cidr_set: rule.to_cidr_set.as_ref(),
            nodes: rule.to_nodes.as_ref(),
            fqdns: None,
            services: rule.to_services.as_ref(),
            groups: rule.to_groups.as_ref(),
            authentication: None,
            to_ports: rule.to_ports.as_ref(),
            icmps: rule.icmps.as_ref(),
        }
    }
}

/// Whose policy it is, which decides what selectors without a namespace mean.
pub(super) struct Scope<'a> {
    /// `None` for cluster-wide policies.
    pub(super) namespace: Option<&'a str>,
    /// Name of the cluster.
    pub(super) cluster: &'a str,
}

impl Scope<'_> {
    /// The selector of a peer: in the policy's namespace unless it names another, and never the world.
    fn peer_selector(&self, mut requirements: Vec<Requirement>) -> Selector {
        let reserved = requirements.iter().any(|r| r.key.source == LabelSource::Reserved);
        let named = requirements.iter().any(|r| r.key.names_namespace());
        let namespace = LabelKey::k8s(keys::NAMESPACE);
        match self.namespace {
            _ if reserved => {}
            Some(own) if !named => requirements.push(Requirement::is(namespace, own)),
            _ => requirements.push(Requirement::exists(namespace)),
        }
        Selector::new(requirements)
    }
}

impl Element<'_> {
    /// The statements of an element; none for an empty one, which covers nothing.
    pub(super) fn statements(&self, path: &Path, scope: &Scope<'_>, faults: &mut Faults) -> Vec<Statement> {
        let names = self.members();
        if names.len() > 1 {
            let problem = format!("has {}: write one of them per element", names.join(" and "));
            faults.add(path, problem);
        }
        let ports = self.to_ports.is_some_and(|list| !list.is_empty());
        let icmps = self.icmps.is_some_and(|list| !list.is_empty());
        if ports && icmps {
            faults.add(path, "has toPorts and icmps: write one of them per element");
        }
        let (peers, mut unenforced) = self.peers(path, scope, faults);
        if self.authentication.is_some() {
            unenforced.push(Unenforced::Authentication);
        }
        if names.is_empty() && !ports && !icmps {
            return Vec::new();
        }
        let statement = |place: &Path, ports: Ports, unenforced: Vec<Unenforced>| Statement {
            place: place.text(),
            direction: self.direction,
            action: self.action,
            peers: peers.clone(),
            ports,
            unenforced,
        };
        let mut out = Vec::new();
        for (i, rule) in self.to_ports.into_iter().flatten().enumerate() {
            let at = path.member("toPorts").item(i);
            let mut unenforced = unenforced.clone();
            let above = l7::check(&at, rule, self.direction, faults);
            if self.action == Action::Deny && rule.rules.is_some() {
                faults.add(&at.member("rules"), "deny sections take no layer-7 rules");
            }
            unenforced.extend(above);
            out.push(statement(&at, port_list(&at, rule, faults), unenforced));
        }
        for (i, rule) in self.icmps.into_iter().flatten().enumerate() {
            let at = path.member("icmps").item(i);
            out.push(statement(&at, icmp_list(&at, rule, faults), unenforced.clone()));
        }
        if out.is_empty() {
            out.push(statement(path, Ports::All, unenforced));
        }
        out
    }

    fn name(&self, what: &str) -> String {
        match self.direction {
            Direction::Ingress => format!("from{what}"),
            Direction::Egress => format!("to{what}"),
        }
    }

    /// The members that say who the peers are.
    fn members(&self) -> Vec<String> {
        let there = [
            ("Endpoints", self.endpoints.is_some()),
            ("Entities", self.entities.is_some()),
            ("CIDR", self.cidr.is_some()),
            ("CIDRSet", self.cidr_set.is_some()),
            ("Nodes", self.nodes.is_some()),
            ("FQDNs", self.fqdns.is_some()),
            ("Services", self.services.is_some()),
            ("Groups", self.groups.is_some()),
        ];
        there
            .into_iter()
            .filter(|(_, there)| *there)
            .map(|(what, _)| self.name(what))
            .collect()
    }

    fn peers(&self, path: &Path, scope: &Scope<'_>, faults: &mut Faults) -> (Peers, Vec<Unenforced>) {
        let mut peers = Vec::new();
        let mut unenforced = Vec::new();
        let mut any = self.members().is_empty();
        let deny = self.action == Action::Deny;
        for (i, selector) in self.endpoints.into_iter().flatten().enumerate() {
            let at = path.member(&self.name("Endpoints")).item(i);
            let requirements = selector::requirements(&at, selector, faults);
            match address_labels(&requirements) {
                Addresses::None => peers.push(Peer::Selector(scope.peer_selector(requirements))),
                Addresses::Prefix(text) => {
                    peers.extend(prefix(&at, text, faults).map(|p| Peer::Cidr(world(p, Vec::new()))));
                }
                Addresses::Name => unenforced.push(Unenforced::Fqdns),
                Addresses::Mixed => {
                    faults.add(
                        &at,
                        "mixes cidr: or fqdn: labels with others: such labels stand alone",
                    );
                }
            }
        }
        for (i, name) in self.entities.into_iter().flatten().enumerate() {
            let Some(entity) = Entity::parse(name) else {
                let known: Vec<_> = Entity::ALL.iter().map(|entity| entity.name()).collect();
                let at = path.member(&self.name("Entities")).item(i);
                faults.add(
                    &at,
                    format!("{name:?} is no entity: write one of {}", known.join(", ")),
                );
                continue;
            };
            match entity.selectors(scope.cluster) {
                None => any = true,
                Some(selectors) => peers.extend(selectors.into_iter().map(Peer::Selector)),
            }
        }
        for (i, text) in self.cidr.into_iter().flatten().enumerate() {
            let at = path.member(&self.name("CIDR")).item(i);
            peers.extend(prefix(&at, text, faults).map(|prefix| Peer::Cidr(world(prefix, Vec::new()))));
        }
        for (i, set) in self.cidr_set.into_iter().flatten().enumerate() {
            let at = path.member(&self.name("CIDRSet")).item(i);
            peers.extend(cidr_set(&at, set, faults).map(Peer::Cidr));
        }
        for (i, selector) in self.nodes.into_iter().flatten().enumerate() {
            selector::requirements(&path.member(&self.name("Nodes")).item(i), selector, faults);
        }
        for (i, name) in self.fqdns.into_iter().flatten().enumerate() {
            l7::check_dns(&path.member("toFQDNs").item(i), name, faults);
        }
        for (i, service) in self.services.into_iter().flatten().enumerate() {
            check_service(&path.member("toServices").item(i), service, faults);
        }
        if self.nodes.is_some() {
            unenforced.push(Unenforced::Nodes);
            if deny {
                let nodes = [Entity::Host, Entity::RemoteNode].into_iter();
                peers.extend(
                    nodes
                        .flat_map(|e| e.selectors(scope.cluster))
                        .flatten()
                        .map(Peer::Selector),
                );
            }
        }
        for (there, part) in [
            (self.fqdns.is_some(), Unenforced::Fqdns),
            (self.services.is_some(), Unenforced::Services),
            (self.groups.is_some(), Unenforced::Groups),
        ] {
            if there {
                unenforced.push(part);
                any |= deny;
            }
        }
        if deny && unenforced.contains(&Unenforced::Fqdns) {
            any = true;
        }
        (if any { Peers::Any } else { Peers::These(peers) }, unenforced)
    }
}

fn port_list(path: &Path, rule: &PortRule, faults: &mut Faults) -> Ports {
    let list = rule.ports.as_deref().unwrap_or_default();
    if list.len() > port::MOST {
        let problem = format!("has {} ports, at most {} are allowed", list.len(), port::MOST);
        faults.add(&path.member("ports"), problem);
    }
    let ports = list.iter().enumerate();
    Ports::These(
        ports
            .flat_map(|(i, p)| port::ports(&path.member("ports").item(i), p, faults))
            .collect(),
    )
}

fn icmp_list(path: &Path, rule: &IcmpRule, faults: &mut Faults) -> Ports {
    let list = rule.fields.as_deref().unwrap_or_default();
    if list.len() > port::MOST {
        let problem = format!("has {} messages, at most {} are allowed", list.len(), port::MOST);
        faults.add(&path.member("fields"), problem);
    }
    let fields = list.iter().enumerate();
    Ports::These(
        fields
            .filter_map(|(i, f)| port::icmp(&path.member("fields").item(i), f, faults))
            .collect(),
    )
}

/// What labels of addresses a selector of endpoints asks for.
enum Addresses<'a> {
    /// None: it selects workloads.
    None,
    /// Exactly `cidr:<prefix>`.
    Prefix(&'a str),
    /// Exactly `fqdn:<name>`.
    Name,
    /// Something that cannot be told apart from a mistake.
    Mixed,
}

fn address_labels(requirements: &[Requirement]) -> Addresses<'_> {
    let of_address = |r: &&Requirement| matches!(r.key.source, LabelSource::Cidr | LabelSource::Fqdn);
    if !requirements.iter().any(|r| of_address(&r)) {
        return Addresses::None;
    }
    let [one] = requirements else {
        return Addresses::Mixed;
    };
    let plain = match &one.operator {
        Operator::Exists => true,
        Operator::In(values) => values.iter().all(String::is_empty),
        Operator::NotIn(_) | Operator::DoesNotExist => false,
    };
    match one.key.source {
        LabelSource::Cidr if plain => Addresses::Prefix(&one.key.name),
        LabelSource::Fqdn if plain => Addresses::Name,
        _ => Addresses::Mixed,
    }
}

fn world(prefix: IpNet, except: Vec<IpNet>) -> CidrSet {
    CidrSet {
        source: CidrSource::Prefix(prefix),
        except,
        scope: AddressScope::World,
    }
}

/// Reads a prefix, or an address, which is a prefix of its own. Host bits are dropped.
pub(super) fn prefix(path: &Path, text: &str, faults: &mut Faults) -> Option<IpNet> {
    let net = text
        .parse::<IpNet>()
        .ok()
        .or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    if net.is_none() {
        faults.add(
            path,
            format!("{text:?} is no prefix: write one like 10.0.0.0/8 or fd00::/64"),
        );
    }
    net.map(|net| net.trunc())
}

/// Reads exceptions, which must lie inside their prefix.
pub(super) fn exceptions(
    path: &Path,
    inside: Option<IpNet>,
    texts: &[String],
    faults: &mut Faults,
) -> Vec<IpNet> {
    let mut out = Vec::new();
    for (i, text) in texts.iter().enumerate() {
        let at = path.member("except").item(i);
        let Some(except) = prefix(&at, text, faults) else {
            continue;
        };
        match inside {
            Some(net) if !net.contains(&except) => {
                faults.add(&at, format!("{except} does not lie inside {net}"));
            }
            _ => out.push(except),
        }
    }
    out
}

fn cidr_set(path: &Path, set: &CidrRule, faults: &mut Faults) -> Option<CidrSet> {
    let except = set.except.as_deref().unwrap_or_default();
    let text = |member: &'_ Option<String>| member.clone().filter(|text| !text.is_empty());
    match (text(&set.cidr), text(&set.cidr_group_ref)) {
        (Some(cidr), None) => {
            let net = prefix(&path.member("cidr"), &cidr, faults);
            let except = exceptions(path, net, except, faults);
            net.map(|net| world(net, except))
        }
        (None, Some(group)) => {
            let except = exceptions(path, None, except, faults);
            Some(CidrSet {
                source: CidrSource::Group(group),
                except,
                scope: AddressScope::World,
            })
        }
        _ => {
            faults.add(path, "write exactly one of cidr and cidrGroupRef");
            None
        }
    }
}

fn check_service(path: &Path, service: &Service, faults: &mut Faults) {
    match (&service.k8s_service, &service.k8s_service_selector) {
        (Some(named), None) => {
            if named.service_name.as_deref().unwrap_or_default().is_empty() {
                faults.add(
                    &path.member("k8sService").member("serviceName"),
                    "the Service has no name",
                );
            }
        }
        (None, Some(labelled)) => match &labelled.selector {
            Some(selector) => {
                let at = path.member("k8sServiceSelector").member("selector");
                selector::requirements(&at, selector, faults);
            }
            None => faults.add(
                &path.member("k8sServiceSelector").member("selector"),
                "the selector is missing",
            ),
        },
        _ => faults.add(path, "write exactly one of k8sService and k8sServiceSelector"),
    }
}
