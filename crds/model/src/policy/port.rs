//! Protocols and ports.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

use super::label::keys;
use crate::identity::Labels;

/// A protocol that policies can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
    /// ICMP of IPv4; the port is the message type.
    Icmp,
    /// ICMP of IPv6; the port is the message type.
    Icmpv6,
}

impl Protocol {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Tcp, Self::Udp, Self::Sctp, Self::Icmp, Self::Icmpv6];
    /// What `ANY` with a port means: the protocols that have ports.
    pub const WITH_PORTS: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// The number in the IP header.
    pub fn number(self) -> u8 {
        match self {
            Self::Icmp => 1,
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Icmpv6 => 58,
            Self::Sctp => 132,
        }
    }

    /// The highest port or message type.
    pub fn last_port(self) -> u16 {
        match self {
            Self::Tcp | Self::Udp | Self::Sctp => u16::MAX,
            Self::Icmp | Self::Icmpv6 => 255,
        }
    }

    /// The name that objects use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
            Self::Icmp => "ICMP",
            Self::Icmpv6 => "ICMPv6",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which ports of a protocol.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PortMatch {
    /// Destination ports (or ICMP message types) from the first to the last, both included.
    Range(u16, u16),
    /// The destination's port of this name: of the endpoint itself for ingress, of the peer for egress. An
    /// address outside the cluster has no port names, so nothing of a CIDR matches.
    Name(String),
}

/// Ports of one protocol.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortSpec {
    /// The protocol.
    pub protocol: Protocol,
    /// The ports.
    pub ports: PortMatch,
}

impl PortSpec {
    /// A range of ports.
    pub fn range(protocol: Protocol, first: u16, last: u16) -> Self {
        Self {
            protocol,
            ports: PortMatch::Range(first, last),
        }
    }

    /// A named port.
    pub fn named(protocol: Protocol, name: impl Into<String>) -> Self {
        Self {
            protocol,
            ports: PortMatch::Name(name.into()),
        }
    }
}

/// The named ports of a pod's containers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NamedPorts(pub BTreeMap<String, (Protocol, u16)>);

impl NamedPorts {
    /// The number behind a name; `None` also where the name belongs to another protocol.
    pub fn number(&self, protocol: Protocol, name: &str) -> Option<u16> {
        self.0
            .get(name)
            .filter(|(of, _)| *of == protocol)
            .map(|(_, number)| *number)
    }

    /// The labels that carry the ports in an identity: `port:http` = `TCP/8080`. No selector of a policy asks for
    /// them.
    pub fn labels(&self) -> impl Iterator<Item = (String, String)> + '_ {
        self.0.iter().map(|(name, (protocol, number))| {
            (
                format!("{}{name}", keys::PORT_SOURCE),
                format!("{protocol}/{number}"),
            )
        })
    }

    /// The ports that an identity's labels carry; what is no port is left out.
    pub fn of(labels: &Labels) -> Self {
        let port = |(key, value): (&String, &String)| {
            let name = key.strip_prefix(keys::PORT_SOURCE)?;
            let (protocol, number) = value.split_once('/')?;
            let protocol = Protocol::WITH_PORTS
                .into_iter()
                .find(|known| known.name() == protocol)?;
            Some((name.to_owned(), (protocol, number.parse().ok()?)))
        };
        // Sorted by key: all keys of the source are neighbours.
        let from = keys::PORT_SOURCE.to_owned();
        let range = labels.0.range(from..);
        let ports = range.take_while(|(key, _)| key.starts_with(keys::PORT_SOURCE));
        Self(ports.filter_map(port).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_belongs_to_its_protocol() {
        let ports = NamedPorts([("dns".to_owned(), (Protocol::Udp, 53))].into());
        assert_eq!(ports.number(Protocol::Udp, "dns"), Some(53));
        assert_eq!(ports.number(Protocol::Tcp, "dns"), None);
        assert_eq!(ports.number(Protocol::Udp, "web"), None);
    }

    #[test]
    fn ports_travel_as_labels() {
        let ports = NamedPorts(
            [
                ("dns".to_owned(), (Protocol::Udp, 53)),
                ("http".to_owned(), (Protocol::Tcp, 8080)),
                ("m3ua".to_owned(), (Protocol::Sctp, 2905)),
            ]
            .into(),
        );
        let mut labels = Labels(ports.labels().collect());
        assert_eq!(
            labels.to_string(),
            "port:dns=UDP/53,port:http=TCP/8080,port:m3ua=SCTP/2905"
        );
        labels.0.insert("k8s:app".into(), "web".into());
        labels.0.insert("reserved:init".into(), String::new());
        for (name, bad) in [
            ("a", "TCP/65536"),
            ("b", "ICMP/8"),
            ("c", "8080"),
            ("d", "tcp/80"),
        ] {
            labels.0.insert(format!("port:{name}"), bad.into());
        }
        assert_eq!(NamedPorts::of(&labels), ports);
    }
}
