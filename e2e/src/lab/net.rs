//! The addresses of a lab. Every lab has the same ones: each lives in namespaces of its own.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// The underlay's bridge.
pub const BRIDGE: &str = "br0";
/// The bridge's own address: the nodes' default gateway, the world outside.
pub const ROUTER_V4: Ipv4Addr = Ipv4Addr::new(172, 30, 0, 254);
/// The same, IPv6.
pub const ROUTER_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x30, 0, 0, 0, 0, 0, 0xfe);
/// The nodes' interface on the underlay.
pub const UPLINK: &str = "eth0";
/// The most nodes a lab may have.
pub const MAX_NODES: u8 = 100;

/// An IPv4 and an IPv6 address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DualStack {
    /// IPv4.
    pub v4: Ipv4Addr,
    /// IPv6.
    pub v6: Ipv6Addr,
}

impl DualStack {
    /// Both, IPv4 first.
    pub fn both(self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }
}

/// Address of node `n` on the underlay.
pub fn node_address(n: u8) -> DualStack {
    DualStack {
        v4: Ipv4Addr::new(172, 30, 0, n),
        v6: Ipv6Addr::new(0xfd00, 0x30, 0, 0, 0, 0, 0, decimal(n)),
    }
}

/// MAC address of node `n`: the same after a reboot, so that neighbours need not learn anew.
pub fn node_mac(n: u8) -> [u8; 6] {
    [0x02, 0x57, 0, 0, 0, n]
}

/// All node addresses.
pub fn node_pools() -> [IpNet; 2] {
    [v4(172, 30, 0, 24), v6([0xfd00, 0x30, 0, 0], 64)]
}

/// All pod addresses.
pub fn pod_pools() -> [IpNet; 2] {
    [v4(10, 244, 0, 16), v6([0xfd00, 0x10, 0x244, 0], 48)]
}

/// The podCIDRs of node `n`.
pub fn pod_cidrs(n: u8) -> [IpNet; 2] {
    [v4(10, 244, n, 24), v6([0xfd00, 0x10, 0x244, decimal(n)], 64)]
}

/// All addresses of Services.
pub fn service_pools() -> [IpNet; 2] {
    [v4(10, 96, 0, 16), v6([0xfd00, 0x96, 0, 0], 112)]
}

/// The ClusterIPs of service `n`.
pub fn service_address(n: u8) -> DualStack {
    DualStack {
        v4: Ipv4Addr::new(10, 96, 0, n),
        v6: Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, decimal(n)),
    }
}

/// Where all nodes take their pods' addresses from with `prefixSource: podIP`.
pub fn shared_ranges() -> [IpNet; 2] {
    [v4(10, 244, 0, 16), v6([0xfd00, 0x10, 0x244, 0], 64)]
}

/// Address `n` (from 2 on) of the shared ranges.
pub fn shared_address(n: u8) -> DualStack {
    DualStack {
        v4: Ipv4Addr::new(10, 244, 200, n),
        v6: Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0x200, decimal(n)),
    }
}

/// 12 becomes 0x12, so that addresses read alike in both families.
fn decimal(n: u8) -> u16 {
    let n = u16::from(n);
    (n / 100) << 8 | (n / 10 % 10) << 4 | (n % 10)
}

fn v4(a: u8, b: u8, c: u8, length: u8) -> IpNet {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, 0), length).into()
}

fn v6(words: [u16; 4], length: u8) -> IpNet {
    let [a, b, c, d] = words;
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0), length).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_alike_in_both_families_and_lie_in_their_pools() {
        for n in [1, 9, 10, 12, 99, 100] {
            let node = node_address(n);
            assert_eq!(node.v6.to_string(), format!("fd00:30::{n}"));
            assert!(
                node.both()
                    .iter()
                    .zip(node_pools())
                    .all(|(address, pool)| pool.contains(address))
            );
            assert!(
                pod_cidrs(n)
                    .iter()
                    .zip(pod_pools())
                    .all(|(cidr, pool)| pool.contains(cidr))
            );
            assert_eq!(pod_cidrs(n)[1].to_string(), format!("fd00:10:244:{n}::/64"));
        }
        assert!(
            service_address(7)
                .both()
                .iter()
                .zip(service_pools())
                .all(|(address, pool)| pool.contains(address))
        );
        assert!(
            shared_address(7)
                .both()
                .iter()
                .zip(shared_ranges())
                .all(|(a, range)| range.contains(a))
        );
    }
}
