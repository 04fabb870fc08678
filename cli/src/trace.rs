//! `warren policy trace`: what decides about a packet, asked where it would be decided.

use std::{fmt, net::IpAddr, str::FromStr};

use anyhow::{anyhow, bail};
use clap::Args;
use serde::Serialize;
use warren_agent_api::{Request, Response, TraceAnswer, TraceRequest, TraceVerdict};
use warren_model::{
    IdentityId, NodeName,
    policy::{Direction, Protocol},
};

use crate::{
    args::{Format, OutputOptions, Target},
    keyd::{Directory, Keyd},
    output,
    source::Source,
};

#[derive(Debug, Clone, Args)]
pub(crate) struct TraceOptions {
    /// Who opens the connection: NAMESPACE/POD, host:NODE or world:ADDRESS.
    #[arg(long, value_name = "END")]
    pub(crate) from: End,
    /// Who is to accept it, on the final address (behind a Service: one of its pods).
    #[arg(long, value_name = "END")]
    pub(crate) to: End,
    /// Destination port and protocol (TCP unless named): 8080, 53/UDP; for ICMP and ICMPv6 the message type, as in 8/ICMP.
    #[arg(long, value_name = "PORT[/PROTOCOL]")]
    pub(crate) port: Port,
    #[command(flatten)]
    pub(crate) output: OutputOptions,
}

/// One end of a connection, as typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    Pod { namespace: String, name: String },
    Host(String),
    World(IpAddr),
}

impl FromStr for End {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(node) = text.strip_prefix("host:") {
            return match node {
                "" => Err("host: needs the name of a node".into()),
                node => Ok(Self::Host(node.into())),
            };
        }
        if let Some(address) = text.strip_prefix("world:") {
            return address
                .parse()
                .map(Self::World)
                .map_err(|_| format!("{address:?} is no IP address"));
        }
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => Ok(Self::Pod {
                namespace: namespace.into(),
                name: name.into(),
            }),
            _ => Err("write NAMESPACE/POD, host:NODE or world:ADDRESS".into()),
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod { namespace, name } => write!(f, "{namespace}/{name}"),
            Self::Host(node) => write!(f, "host:{node}"),
            Self::World(address) => write!(f, "world:{address}"),
        }
    }
}

/// Destination port and protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Port {
    number: u16,
    protocol: Protocol,
}

impl FromStr for Port {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, protocol) = text.split_once('/').unwrap_or((text, "TCP"));
        let known = Protocol::ALL
            .into_iter()
            .find(|p| p.name().eq_ignore_ascii_case(protocol));
        let protocol =
            known.ok_or_else(|| format!("{protocol:?} is no protocol: TCP, UDP, SCTP, ICMP or ICMPv6"))?;
        match number.parse() {
            Ok(number) if number <= protocol.last_port() => Ok(Self { number, protocol }),
            _ => Err(format!("{number:?} is no port: 0 to {}", protocol.last_port())),
        }
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.protocol, self.number)
    }
}

impl Port {
    /// ICMP is of one family.
    fn fits(self, address: IpAddr) -> bool {
        match self.protocol {
            Protocol::Icmp => address.is_ipv4(),
            Protocol::Icmpv6 => address.is_ipv6(),
            Protocol::Tcp | Protocol::Udp | Protocol::Sctp => true,
        }
    }
}

/// An end as the directory knows it, at one address.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    /// Where its policy is enforced; the world has no such place.
    node: Option<NodeName>,
    address: IpAddr,
    /// Of a pod or the world; a host's depends on who looks.
    identity: Option<IdentityId>,
    host: bool,
}

impl Place {
    /// The identity that the node `viewer` sees here.
    fn seen_from(&self, viewer: &NodeName, directory: &Directory) -> IdentityId {
        match (&self.identity, &self.node) {
            (Some(identity), _) => *identity,
            (None, Some(node)) if node == viewer => IdentityId::HOST,
            (None, Some(node))
                if directory
                    .facts
                    .get(node)
                    .is_some_and(|facts| facts.runs_apiserver) =>
            {
                IdentityId::KUBE_APISERVER
            }
            (None, _) => IdentityId::REMOTE_NODE,
        }
    }
}

/// Every address of an end.
fn places(end: &End, directory: &Directory) -> anyhow::Result<Vec<Place>> {
    match end {
        End::Pod { namespace, name } => {
            let records = directory.pod(namespace, name);
            if records.is_empty() {
                bail!(
                    "keyd knows no address of a pod {end}: is it running? A pod on the host network is traced as host:NODE"
                );
            }
            Ok(records
                .into_iter()
                .map(|record| Place {
                    node: Some(record.node.clone()),
                    address: record.ip,
                    identity: Some(record.identity),
                    host: false,
                })
                .collect())
        }
        End::Host(name) => {
            let node = directory.nodes.get(&NodeName::from(name.as_str()));
            let node = node.ok_or_else(|| anyhow!("keyd knows no node {name}"))?;
            Ok(node
                .addresses
                .iter()
                .map(|address| Place {
                    node: Some(node.name.clone()),
                    address: *address,
                    identity: None,
                    host: true,
                })
                .collect())
        }
        End::World(address) => {
            if let Some(workload) = directory.workloads.get(address) {
                bail!("{address} is the address of the pod {0}: write {0}", workload.pod);
            }
            if let Some(node) = directory
                .nodes
                .values()
                .find(|node| node.addresses.contains(address))
            {
                bail!(
                    "{address} is an address of the node {0}: write host:{0}",
                    node.name
                );
            }
            Ok(vec![Place {
                node: None,
                address: *address,
                identity: Some(IdentityId::WORLD),
                host: false,
            }])
        }
    }
}

/// What one end says.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
struct Judged {
    node: String,
    endpoint: u16,
    /// Identity of the other end, as this one sees it.
    peer: u32,
    maps: TraceVerdict,
    model: TraceVerdict,
    /// Maps and model agree.
    agree: bool,
    statements: Vec<Statement>,
}

/// A statement of a policy that covers the packet.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
struct Statement {
    rule: String,
    allow: bool,
}

impl Judged {
    fn passes(&self) -> bool {
        self.maps.allowed || self.maps.audit
    }
}

/// The packet between two addresses.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
struct Way {
    source: IpAddr,
    destination: IpAddr,
    /// At the source; `None` where it is the world.
    egress: Option<Judged>,
    /// At the destination; `None` where it is the world.
    ingress: Option<Judged>,
    verdict: Verdict,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
enum Verdict {
    Allowed,
    /// Policy denies it, audit mode lets it pass.
    Audited,
    Denied,
    /// The maps say something else than the model: a fault of Warren.
    Disagreement,
}

impl Verdict {
    fn of(judged: &[&Judged]) -> Self {
        if judged.iter().any(|end| !end.agree) {
            Self::Disagreement
        } else if judged.iter().any(|end| !end.passes()) {
            Self::Denied
        } else if judged.iter().any(|end| end.maps.audit) {
            Self::Audited
        } else {
            Self::Allowed
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Allowed => "ALLOWED",
            Self::Audited => "DENIED by policy, passes in audit mode",
            Self::Denied => "DENIED",
            Self::Disagreement => "DISAGREEMENT between the eBPF maps and the model: please report it",
        }
    }

    fn passes(self) -> bool {
        matches!(self, Self::Allowed | Self::Audited)
    }
}

/// The whole answer.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
struct Trace {
    from: String,
    to: String,
    protocol: &'static str,
    port: u16,
    verdict: Verdict,
    /// One per address family that both ends have.
    ways: Vec<Way>,
}

/// Prints what decides; `false` where the packet is dropped or the answers disagree.
pub(crate) async fn run(target: &Target, options: &TraceOptions) -> anyhow::Result<bool> {
    let mut keyd = Source::open(target).await?.keyd().await?;
    let directory = keyd.directory().await?;
    let trace = trace(&mut keyd, &directory, options).await?;
    match options.output.output {
        Format::Json => output::json(&trace)?,
        Format::Text => output::print(&text(&trace))?,
    }
    Ok(trace.verdict.passes())
}

async fn trace(keyd: &mut Keyd, directory: &Directory, options: &TraceOptions) -> anyhow::Result<Trace> {
    let (sources, destinations) = (places(&options.from, directory)?, places(&options.to, directory)?);
    let mut ways = Vec::new();
    for source in &sources {
        for destination in &destinations {
            let same_family = source.address.is_ipv4() == destination.address.is_ipv4();
            if same_family && options.port.fits(source.address) {
                ways.push(way(keyd, directory, source, destination, options.port).await?);
            }
        }
    }
    let verdict = ways.iter().map(|way| way.verdict).max();
    let verdict = verdict.ok_or_else(|| {
        anyhow!(
            "{} and {} have no address family in common that carries {}",
            options.from,
            options.to,
            options.port
        )
    })?;
    Ok(Trace {
        from: options.from.to_string(),
        to: options.to.to_string(),
        protocol: options.port.protocol.name(),
        port: options.port.number,
        verdict,
        ways,
    })
}

async fn way(
    keyd: &mut Keyd,
    directory: &Directory,
    source: &Place,
    destination: &Place,
    port: Port,
) -> anyhow::Result<Way> {
    let egress = judge(keyd, directory, Direction::Egress, source, destination, port).await?;
    let ingress = judge(keyd, directory, Direction::Ingress, destination, source, port).await?;
    let judged: Vec<_> = egress.iter().chain(&ingress).collect();
    let verdict = Verdict::of(&judged);
    Ok(Way {
        source: source.address,
        destination: destination.address,
        egress,
        ingress,
        verdict,
    })
}

/// Asks the agent of one end.
async fn judge(
    keyd: &mut Keyd,
    directory: &Directory,
    direction: Direction,
    end: &Place,
    other: &Place,
    port: Port,
) -> anyhow::Result<Option<Judged>> {
    let Some(node) = &end.node else {
        return Ok(None);
    };
    let peer = other.seen_from(node, directory);
    let request = TraceRequest {
        pod: (!end.host).then_some(end.address),
        direction,
        peer,
        address: other.address,
        protocol: port.protocol.number(),
        port: port.number,
    };
    let answer = match keyd.ask(node, &Request::PolicyTrace(Box::new(request))).await? {
        Response::Trace(answer) => *answer,
        _ => bail!("the agent on {node} answered another question"),
    };
    Ok(Some(judged(node, peer, answer)))
}

fn judged(node: &NodeName, peer: IdentityId, answer: TraceAnswer) -> Judged {
    let TraceAnswer {
        endpoint,
        maps,
        model,
        statements,
    } = answer;
    Judged {
        node: node.to_string(),
        endpoint,
        peer: peer.0,
        agree: (maps.allowed, maps.audit) == (model.allowed, model.audit),
        maps,
        model,
        statements: statements
            .into_iter()
            .map(|(rule, allow)| Statement { rule, allow })
            .collect(),
    }
}

fn text(trace: &Trace) -> String {
    let mut text = String::new();
    for way in &trace.ways {
        text += &format!(
            "{} ({}) -> {} ({}), {}/{}: {}\n",
            trace.from,
            way.source,
            trace.to,
            way.destination,
            trace.protocol,
            trace.port,
            way.verdict.name()
        );
        for (title, end, who) in [
            ("Egress", &way.egress, &trace.from),
            ("Ingress", &way.ingress, &trace.to),
        ] {
            text += &match end {
                Some(judged) => describe(title, who, judged),
                None => format!("  {title:<8} {who}: outside the cluster, nothing is enforced there\n"),
            };
        }
        text.push('\n');
    }
    text + &format!("Verdict: {}\n", trace.verdict.name())
}

fn describe(title: &str, who: &str, judged: &Judged) -> String {
    let said = |verdict: &TraceVerdict| {
        let word = match (verdict.allowed, verdict.audit) {
            (true, _) => "allowed",
            (false, true) => "denied, passes in audit mode",
            (false, false) => "denied",
        };
        match &verdict.rule {
            Some(rule) => format!("{word} by {rule}"),
            None => format!("{word} ({})", verdict.reason),
        }
    };
    let mut text = format!(
        "  {title:<8} {who} on {} (endpoint {}), which sees the other end as identity {}\n    maps:  {}\n    model: {}{}\n",
        judged.node,
        judged.endpoint,
        judged.peer,
        said(&judged.maps),
        said(&judged.model),
        if judged.agree { "" } else { "   <- they disagree" }
    );
    for statement in &judged.statements {
        let word = if statement.allow { "allow" } else { "deny" };
        text += &format!("    {word:<5}  {}\n", statement.rule);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_read_as_they_are_written() {
        for text in ["demo/api", "host:node1", "world:10.0.0.1", "world:fd00::1"] {
            assert_eq!(text.parse::<End>().unwrap().to_string(), text);
        }
        for bad in ["api", "demo/", "/api", "host:", "world:here", ""] {
            assert!(bad.parse::<End>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ports_name_their_protocol() {
        for (text, shown) in [
            ("8080", "TCP/8080"),
            ("53/udp", "UDP/53"),
            ("8/ICMP", "ICMP/8"),
            ("128/icmpv6", "ICMPv6/128"),
        ] {
            assert_eq!(text.parse::<Port>().unwrap().to_string(), shown);
        }
        for bad in ["", "http", "70000", "256/ICMP", "80/IGMP", "-1"] {
            assert!(bad.parse::<Port>().is_err(), "{bad}");
        }
        let icmp: Port = "8/ICMP".parse().unwrap();
        assert!(icmp.fits([10, 0, 0, 1].into()) && !icmp.fits("::1".parse().unwrap()));
    }

    #[test]
    fn a_disagreement_is_worse_than_a_denial() {
        let verdict = |allowed, audit| TraceVerdict {
            allowed,
            audit,
            reason: "x".into(),
            rule: None,
        };
        let end = |maps, model| {
            judged(
                &NodeName::from("n"),
                IdentityId(300),
                TraceAnswer {
                    endpoint: 1,
                    maps,
                    model,
                    statements: Vec::new(),
                },
            )
        };
        let allowed = end(verdict(true, false), verdict(true, false));
        let denied = end(verdict(false, false), verdict(false, false));
        let audited = end(verdict(false, true), verdict(false, true));
        let torn = end(verdict(true, false), verdict(false, false));
        for (ends, expected) in [
            (vec![&allowed], Verdict::Allowed),
            (vec![&allowed, &audited], Verdict::Audited),
            (vec![&audited, &denied], Verdict::Denied),
            (vec![&torn, &denied], Verdict::Disagreement),
        ] {
            let verdict = Verdict::of(&ends);
            assert_eq!(verdict, expected);
            assert_eq!(verdict.passes(), expected <= Verdict::Audited);
        }
    }

    #[test]
    fn a_node_is_its_own_host_and_a_remote_node_to_others() {
        let node = |name: &str| NodeName::from(name);
        let place = Place {
            node: Some(node("a")),
            address: [10, 0, 0, 1].into(),
            identity: None,
            host: true,
        };
        let mut directory = Directory::default();
        assert_eq!(place.seen_from(&node("a"), &directory), IdentityId::HOST);
        assert_eq!(place.seen_from(&node("b"), &directory), IdentityId::REMOTE_NODE);
        let facts = warren_model::policy::NodeFacts {
            runs_apiserver: true,
            ..Default::default()
        };
        directory.facts.insert(node("a"), facts);
        assert_eq!(
            place.seen_from(&node("b"), &directory),
            IdentityId::KUBE_APISERVER
        );
        assert_eq!(place.seen_from(&node("a"), &directory), IdentityId::HOST);
    }
}
