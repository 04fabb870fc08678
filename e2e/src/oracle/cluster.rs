//! A cluster as the oracle sees it: plain facts.

use std::{collections::BTreeMap, fmt, net::IpAddr};

use serde_json::Value;

/// A pod. All pods live on the first node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its own labels, as a user wrote them.
    pub labels: BTreeMap<String, String>,
    /// Its service account; empty means `default`.
    pub service_account: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its named ports: protocol and number.
    pub ports: BTreeMap<String, (String, u16)>,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Labels of the Node object.
    pub labels: BTreeMap<String, String>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// It runs an API server.
    pub apiserver: bool,
}

/// Everything that policy depends on.
#[derive(Debug, Clone, Default)]
pub struct Cluster {
    /// Its name.
    pub name: String,
    /// Labels of the namespaces.
    pub namespaces: BTreeMap<String, BTreeMap<String, String>>,
    /// Its pods.
    pub pods: Vec<Pod>,
    /// Its nodes; the first is the one that is looked at.
    pub nodes: Vec<Node>,
    /// The policy objects.
    pub objects: Vec<Value>,
    /// Objects that are invalid and must not matter.
    pub broken: Vec<Value>,
    /// CiliumCIDRGroups.
    pub groups: BTreeMap<String, Vec<String>>,
    /// The node may not reach its own pods by itself.
    pub closed_to_host: bool,
}

impl fmt::Display for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for object in self.objects.iter().chain(&self.broken) {
            writeln!(
                f,
                "{}",
                serde_json::to_string_pretty(object).map_err(|_| fmt::Error)?
            )?;
        }
        for (index, pod) in self.pods.iter().enumerate() {
            writeln!(f, "pod {index}: {pod:?}")?;
        }
        writeln!(f, "namespaces: {:?}", self.namespaces)?;
        writeln!(f, "nodes: {:?}", self.nodes)?;
        writeln!(f, "closed to the host: {}", self.closed_to_host)?;
        write!(f, "groups: {:?}", self.groups)
    }
}

/// One end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Party {
    /// A pod, by index.
    Pod(usize),
    /// A node, by index.
    Node(usize),
    /// An address outside.
    World(IpAddr),
    /// A pod's address whose owner nobody knows yet.
    Unknown(IpAddr),
    /// A pod whose labels nobody knows yet.
    Init(IpAddr),
    /// A pod that is not managed.
    Unmanaged(IpAddr),
    /// A health probe.
    Health(IpAddr),
    /// An ingress proxy.
    Ingress(IpAddr),
}

/// Which way a connection is opened, seen from the subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// To the subject.
    In,
    /// From the subject.
    Out,
}

/// The first packet of a connection, seen from one end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Whose policy is asked: a pod, or the first node.
    pub subject: Party,
    /// Which way.
    pub way: Way,
    /// The other end.
    pub peer: Party,
    /// Address of the other end.
    pub address: IpAddr,
    /// Protocol number.
    pub protocol: u8,
    /// Destination port, ICMP type, or 0.
    pub port: u16,
}
