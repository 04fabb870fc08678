//! Protocols and ports.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

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
}
