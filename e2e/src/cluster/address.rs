//! Addresses of a cluster, beside those that every lab has.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::lab::net::DualStack;

/// Which family comes first.
#[derive(Debug, Clone, Copy)]
pub(super) struct Families {
    pub(super) ipv6_first: bool,
}

impl Families {
    /// Puts a pair of IPv4 and IPv6 in order.
    pub(super) fn order<T>(self, [v4, v6]: [T; 2]) -> [T; 2] {
        if self.ipv6_first { [v6, v4] } else { [v4, v6] }
    }
}

/// Service addresses, as the API server wants them.
pub(super) const SERVICE_CIDRS: [&str; 2] = ["10.96.0.0/16", "fd00:10:96::/112"];
/// The first of them belongs to the API server.
pub(super) const API_SERVICE: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 1)),
];
/// The cluster's DNS.
pub(super) const CLUSTER_DNS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0xa)),
];
/// The API server's port.
pub(super) const API_PORT: u16 = 6443;

/// The control plane's address. It has no agent, so it lies outside the nodes' pools: pods talk to it in clear, as they
/// do with the API server of a managed cluster.
pub(super) const CONTROL: DualStack = DualStack {
    v4: Ipv4Addr::new(172, 30, 1, 1),
    v6: Ipv6Addr::new(0xfd00, 0x31, 0, 0, 0, 0, 0, 1),
};
/// The network it is in; on the same wire.
pub(super) const CONTROL_NETS: [&str; 2] = ["172.30.1.0/24", "fd00:31::/64"];

/// Where the API server is.
pub(super) fn api_server() -> String {
    format!("https://{}:{API_PORT}", CONTROL.v4)
}
