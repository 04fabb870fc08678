//! Rules and their statements.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{cidr::CidrSet, label::Selector, port::PortSpec};

/// The kind of a policy object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum PolicyKind {
    /// `cilium.io/v2`, namespaced.
    CiliumNetworkPolicy,
    /// `cilium.io/v2`, cluster-scoped.
    CiliumClusterwideNetworkPolicy,
    /// `networking.k8s.io/v1`.
    NetworkPolicy,
}

impl PolicyKind {
    /// The `kind` of the object.
    pub fn name(self) -> &'static str {
        match self {
            Self::CiliumNetworkPolicy => "CiliumNetworkPolicy",
            Self::CiliumClusterwideNetworkPolicy => "CiliumClusterwideNetworkPolicy",
            Self::NetworkPolicy => "NetworkPolicy",
        }
    }
}

/// Which policy object.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyRef {
    /// Its kind.
    pub kind: PolicyKind,
    /// Its namespace; empty for a cluster-scoped object.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl fmt::Display for PolicyRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.kind.name())?;
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        f.write_str(&self.name)
    }
}

/// Which way a connection is opened, seen from the endpoint that the rule selects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Direction {
    /// To the endpoint.
    Ingress,
    /// From the endpoint.
    Egress,
}

impl Direction {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        })
    }
}

/// A value per direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Directions<T> {
    /// For ingress.
    pub ingress: T,
    /// For egress.
    pub egress: T,
}

impl<T> Directions<T> {
    /// The value of a direction.
    pub fn of(&self, direction: Direction) -> &T {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }

    /// The value of a direction.
    pub fn of_mut(&mut self, direction: Direction) -> &mut T {
        match direction {
            Direction::Ingress => &mut self.ingress,
            Direction::Egress => &mut self.egress,
        }
    }
}

/// What a statement does with what it covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Action {
    /// Beats every allow of every kind.
    Deny,
    /// Allows what no statement denies.
    Allow,
}

/// Whom a rule applies to.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Subject<S = Selector> {
    /// Pods whose identity matches.
    Pods(S),
    /// The host of nodes whose labels match (host policy).
    Nodes(Selector),
}

/// One kind of peer.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Peer<S = Selector> {
    /// Identities that match.
    Selector(S),
    /// Addresses.
    Cidr(CidrSet),
}

/// The peers of a statement.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Peers<S = Selector> {
    /// Everybody.
    Any,
    /// Any of these; nobody where it is empty.
    These(Vec<Peer<S>>),
}

/// The protocols and ports of a statement.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Ports {
    /// Every packet of every protocol.
    All,
    /// Any of these; nothing where it is empty.
    These(Vec<PortSpec>),
}

/// A part of a statement that Warren keeps but cannot enforce. An allow statement with such a part allows
/// nothing; a deny statement denies every peer that it could mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Unenforced {
    /// `rules.http`.
    Http,
    /// `rules.kafka`.
    Kafka,
    /// `rules.dns`.
    Dns,
    /// `toFQDNs`.
    Fqdns,
    /// `toServices`.
    Services,
    /// `fromNodes`, `toNodes`.
    Nodes,
    /// `authentication`.
    Authentication,
    /// `serverNames`, `originatingTLS`, `terminatingTLS`, `listener`.
    Proxy,
    /// `fromGroups`, `toGroups`.
    Groups,
}

impl Unenforced {
    /// What users call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Http => "HTTP rules",
            Self::Kafka => "Kafka rules",
            Self::Dns => "DNS rules",
            Self::Fqdns => "toFQDNs",
            Self::Services => "toServices",
            Self::Nodes => "node selectors of peers",
            Self::Authentication => "authentication",
            Self::Proxy => "TLS and proxy settings",
            Self::Groups => "cloud groups",
        }
    }
}

/// One statement: peers and ports, allowed or denied.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Statement<S = Selector> {
    /// Where it stands in the object, as in `spec.ingress[0].toPorts[1]`.
    pub place: String,
    /// Its direction.
    pub direction: Direction,
    /// What it does.
    pub action: Action,
    /// Whom it covers.
    pub peers: Peers<S>,
    /// What it covers.
    pub ports: Ports,
    /// What of it cannot be enforced.
    pub unenforced: Vec<Unenforced>,
}

/// One rule of a policy object.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rule<S = Selector> {
    /// The object it stands in.
    pub policy: PolicyRef,
    /// Whom it applies to.
    pub subject: Subject<S>,
    /// Whether it puts its subjects in default deny.
    pub default_deny: Directions<bool>,
    /// Its statements, in the order of the object.
    pub statements: Vec<Statement<S>>,
}

impl<S> Rule<S> {
    /// One sentence per statement that cannot be enforced as written.
    pub fn notes(&self) -> Vec<String> {
        let note = |statement: &Statement<S>| {
            let names: Vec<_> = statement.unenforced.iter().map(|part| part.name()).collect();
            let effect = match statement.action {
                Action::Allow => "denied",
                Action::Deny => "every peer that it could mean is denied",
            };
            format!(
                "{}: {} cannot be enforced yet: {effect}",
                statement.place,
                names.join(", ")
            )
        };
        self.statements
            .iter()
            .filter(|s| !s.unenforced.is_empty())
            .map(note)
            .collect()
    }

    /// All selectors of the rule, with repetitions.
    pub fn selectors(&self) -> impl Iterator<Item = &S> {
        let subject = match &self.subject {
            Subject::Pods(selector) => Some(selector),
            Subject::Nodes(_) => None,
        };
        subject
            .into_iter()
            .chain(self.statements.iter().flat_map(Statement::selectors))
    }

    /// The same rule with its selectors replaced, as when they are numbered.
    pub fn map<T>(self, mut f: impl FnMut(S) -> T) -> Rule<T> {
        Rule {
            policy: self.policy,
            subject: match self.subject {
                Subject::Pods(selector) => Subject::Pods(f(selector)),
                Subject::Nodes(selector) => Subject::Nodes(selector),
            },
            default_deny: self.default_deny,
            statements: self.statements.into_iter().map(|s| s.map(&mut f)).collect(),
        }
    }
}

impl<S> Statement<S> {
    /// All selectors of its peers.
    pub fn selectors(&self) -> impl Iterator<Item = &S> {
        let peers = match &self.peers {
            Peers::Any => &[][..],
            Peers::These(peers) => peers,
        };
        peers.iter().filter_map(|peer| match peer {
            Peer::Selector(selector) => Some(selector),
            Peer::Cidr(_) => None,
        })
    }

    /// All address sets of its peers.
    pub fn cidrs(&self) -> impl Iterator<Item = &CidrSet> {
        let peers = match &self.peers {
            Peers::Any => &[][..],
            Peers::These(peers) => peers,
        };
        peers.iter().filter_map(|peer| match peer {
            Peer::Selector(_) => None,
            Peer::Cidr(set) => Some(set),
        })
    }

    fn map<T>(self, f: &mut impl FnMut(S) -> T) -> Statement<T> {
        Statement {
            place: self.place,
            direction: self.direction,
            action: self.action,
            peers: match self.peers {
                Peers::Any => Peers::Any,
                Peers::These(peers) => Peers::These(
                    peers
                        .into_iter()
                        .map(|peer| match peer {
                            Peer::Selector(selector) => Peer::Selector(f(selector)),
                            Peer::Cidr(set) => Peer::Cidr(set),
                        })
                        .collect(),
                ),
            },
            ports: self.ports,
            unenforced: self.unenforced,
        }
    }
}
