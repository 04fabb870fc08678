//! Services as kube-proxy makes them, by nft rules on every node: ClusterIPs and NodePorts translated before
//! routing, a mark for what has to be masqueraded, and the rule that drops what the kernel's own connection tracking
//! calls invalid (it finds any flow of which only one direction passes the stack).

use std::{fmt::Write as _, net::IpAddr, process::Stdio};

use anyhow::{Context as _, Result, ensure};
use ipnet::IpNet;

use super::{
    Lab,
    net::{self, DualStack},
    process::Place,
};

/// The mark of packets to masquerade, as kube-proxy's `--masquerade-all` bit.
const MASQUERADE: u32 = 0x4000;

/// A Service, for TCP and UDP alike.
#[derive(Debug, Clone)]
pub struct ServiceSpec {
    /// Its name; letters and digits.
    pub name: String,
    /// Its ClusterIPs.
    pub cluster: DualStack,
    /// Its port.
    pub port: u16,
    /// Its port on every node.
    pub node_port: Option<u16>,
    /// The backends' port.
    pub target_port: u16,
    /// The backends: a list of addresses each.
    pub backends: Vec<Vec<IpAddr>>,
}

impl ServiceSpec {
    /// Service `number` of the lab (1 to 99) in front of backends.
    pub fn new(number: u8, name: &str, port: u16, target_port: u16, backends: &[&[IpAddr]]) -> Self {
        Self {
            name: name.into(),
            cluster: net::service_address(number),
            port,
            node_port: None,
            target_port,
            backends: backends.iter().map(|addresses| addresses.to_vec()).collect(),
        }
    }

    /// Its ClusterIP of a family.
    pub fn address(&self, v6: bool) -> IpAddr {
        self.cluster.both()[usize::from(v6)]
    }
}

impl Lab {
    /// Puts exactly these Services on every node.
    pub fn serve(&self, services: &[ServiceSpec]) -> Result<()> {
        for node in self.nodes() {
            let addresses = net::node_address(node.number);
            nft(&node.place(), &ruleset(services, addresses))?;
        }
        Ok(())
    }
}

/// Loads a ruleset.
pub(super) fn nft(place: &Place, rules: &str) -> Result<()> {
    run_with_input(place, &["nft", "-f", "-"], rules)
}

/// Runs a command with text on its stdin; it must succeed.
pub(super) fn run_with_input(place: &Place, command: &[&str], input: &str) -> Result<()> {
    use std::io::Write as _;
    let mut child = place
        .command(command)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", command[0]))?;
    let mut stdin = child.stdin.take().context("no pipe")?;
    // A command that ends at once says why on its stderr.
    let written = stdin.write_all(input.as_bytes());
    drop(stdin);
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "{}: {}: {}",
        place.name,
        command.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    written.context("cannot write to a command")
}

/// The ruleset of a node.
fn ruleset(services: &[ServiceSpec], node: DualStack) -> String {
    let mut services_chain = String::new();
    let mut chains = String::new();
    for service in services {
        for v6 in [false, true] {
            let (ip, family) = if v6 { ("ip6", "v6") } else { ("ip", "v4") };
            let name = format!("{}-{family}", service.name);
            let cluster = service.address(v6);
            let pods = pod_pool(v6);
            let _ = writeln!(
                services_chain,
                "    {ip} daddr {cluster} meta l4proto {{ tcp, udp }} th dport {} goto svc-{name}",
                service.port
            );
            if let Some(port) = service.node_port {
                let own = node.both()[usize::from(v6)];
                let _ = writeln!(
                    services_chain,
                    "    {ip} daddr {own} meta l4proto {{ tcp, udp }} th dport {port} goto ext-{name}"
                );
                let _ = writeln!(
                    chains,
                    "  chain ext-{name} {{ meta mark set meta mark or {MASQUERADE:#x}; goto svc-{name}; }}"
                );
            }
            let backends: Vec<_> = service
                .backends
                .iter()
                .filter_map(|addresses| super::of_family(addresses, v6))
                .collect();
            let mut endpoints = String::new();
            for (index, backend) in backends.iter().enumerate() {
                let _ = write!(
                    endpoints,
                    "{}{index} : goto ep-{name}-{index}",
                    if index > 0 { ", " } else { "" }
                );
                let to = std::net::SocketAddr::new(*backend, service.target_port);
                // What a backend sends to itself would be answered past the translation.
                let _ = writeln!(
                    chains,
                    "  chain ep-{name}-{index} {{\n    \
                     {ip} saddr {backend} meta mark set meta mark or {MASQUERADE:#x}\n    \
                     meta l4proto tcp dnat {ip} to {to}\n    meta l4proto udp dnat {ip} to {to}\n  }}"
                );
            }
            let pick = match backends.len() {
                0 => "drop".to_owned(),
                count => format!("numgen random mod {count} vmap {{ {endpoints} }}"),
            };
            let _ = writeln!(
                chains,
                "  chain svc-{name} {{\n    \
                 {ip} daddr {cluster} {ip} saddr != {pods} meta mark set meta mark or {MASQUERADE:#x}\n    {pick}\n  }}"
            );
        }
    }
    format!(
        "table inet lab-proxy\ndelete table inet lab-proxy\ntable inet lab-proxy {{\n{chains}  \
         chain services {{\n{services_chain}  }}\n  \
         chain prerouting {{ type nat hook prerouting priority dstnat; jump services; }}\n  \
         chain output {{ type nat hook output priority -100; jump services; }}\n  \
         chain forward {{ type filter hook forward priority filter; ct state invalid drop; }}\n  \
         chain postrouting {{\n    type nat hook postrouting priority srcnat;\n    \
         meta mark and {MASQUERADE:#x} != {MASQUERADE:#x} return\n    \
         meta mark set meta mark xor {MASQUERADE:#x}\n    masquerade fully-random\n  }}\n}}\n"
    )
}

fn pod_pool(v6: bool) -> IpNet {
    net::pod_pools()[usize::from(v6)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_has_a_chain_per_family_and_backend() {
        let backends: [&[IpAddr]; 2] = [
            &["10.244.1.2".parse().unwrap(), "fd00:10:244:1::2".parse().unwrap()],
            &["10.244.2.2".parse().unwrap()],
        ];
        let service = ServiceSpec {
            node_port: Some(30_080),
            ..ServiceSpec::new(3, "api", 80, 5000, &backends)
        };
        let rules = ruleset(&[service], net::node_address(1));
        for line in [
            "ip daddr 10.96.0.3 meta l4proto { tcp, udp } th dport 80 goto svc-api-v4",
            "ip6 daddr fd00:30::1 meta l4proto { tcp, udp } th dport 30080 goto ext-api-v6",
            "numgen random mod 2 vmap { 0 : goto ep-api-v4-0, 1 : goto ep-api-v4-1 }",
            "numgen random mod 1 vmap { 0 : goto ep-api-v6-0 }",
            "meta l4proto udp dnat ip6 to [fd00:10:244:1::2]:5000",
        ] {
            assert!(rules.contains(line), "{line}\n{rules}");
        }
    }
}
