//! A new pod is closed from its first moment: clients that were there before it send to the addresses that it will get.

use std::net::{IpAddr, Ipv6Addr};

use anyhow::{Context as _, Result, ensure};
use warren_e2e::{
    cluster::{
        Cluster, Workload,
        pod::{AppPod, PORT},
    },
    lab::{Hammer, net::pod_cidrs},
};

use super::town::Town;
use crate::scene::Scene;

/// Pods that start at once, on one node.
const WAVE: u8 = 10;
/// Addresses beyond those that are hammered as well: an ADD that failed and came again has used one up.
const SPARE: u8 = 6;
/// How often, half of them on each node.
const WAVES: u8 = 5;

const POLICY: &str = r"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: shy, namespace: first}
spec:
  endpointSelector: {matchLabels: {app: shy}}
  ingress:
  - fromEndpoints: [{matchLabels: {role: friend}}]
";

pub(crate) fn first_packets(scene: &mut Scene) -> Result<()> {
    let cluster = &scene.cluster;
    let clients = vec![
        Workload::new("first", "near", "node2").label("role", "enemy"),
        Workload::new("first", "far", "node1").label("role", "enemy"),
        Workload::new("first", "friend", "node1").label("role", "friend"),
    ];
    let mut town = Town::build(cluster, clients, &[])?;
    town.apply(POLICY)?;
    for wave in 0..WAVES {
        let node = if wave % 2 == 0 { 2 } else { 3 };
        let expected = next_addresses(cluster, node)?;
        let hammers = [
            hammer(&town, "near", &expected)?,
            hammer(&town, "far", &expected)?,
        ];
        let new: Vec<_> = (0..WAVE).map(|n| newcomer(wave, n, node)).collect();
        town.add(new)?;
        for hammer in hammers {
            hammer.finish()?;
        }
        for n in 0..WAVE {
            let name = newcomer(wave, n, node).name;
            let pod = town.pods.get(&name).context("a pod is missing")?;
            ensure!(
                pod.addresses.iter().all(|address| expected.contains(address)),
                "{name} has {:?}, which nobody hammered",
                pod.addresses
            );
            let delivered = delivered(pod)?;
            if n == 0 {
                // Without policy: shows that the hammer hits from the start.
                ensure!(delivered > 0, "{name} is open and got nothing: the hammer misses");
            } else {
                ensure!(
                    delivered == 0,
                    "{name} got {delivered} packets that its policy denies"
                );
            }
        }
    }
    let all: Vec<_> = town
        .pods
        .keys()
        .filter(|name| name.starts_with("shy"))
        .map(|name| format!("{name}:8080"))
        .collect();
    town.check(
        "who is allowed gets through",
        &format!(
            "friend -> {} yes\nnear -> {} no",
            all.join(" "),
            all[..5].join(" ")
        ),
    )?;
    town.raze()
}

/// The first of each wave has no policy.
fn newcomer(wave: u8, n: u8, node: u8) -> Workload {
    let app = if n == 0 { "open" } else { "shy" };
    Workload::new("first", &format!("{app}-{wave}-{n}"), &format!("node{node}"))
        .label("app", app)
        .unprobed()
}

/// The addresses that the node's IPAM gives next.
fn next_addresses(cluster: &Cluster, node: u8) -> Result<Vec<IpAddr>> {
    let place = &cluster.nodes()[usize::from(node) - 1].place;
    let last = |family: u8| -> Result<IpAddr> {
        let file = format!("/var/lib/cni/networks/lab/last_reserved_ip.{family}");
        place
            .run(["cat", &file])?
            .trim()
            .parse()
            .context("not an address")
    };
    let [v4, _] = pod_cidrs(node);
    let (IpAddr::V4(first), IpAddr::V6(second)) = (last(0)?, last(1)?) else {
        anyhow::bail!("the IPAM's files are of other families");
    };
    let mut expected = Vec::new();
    for n in 1..=u32::from(WAVE + SPARE) {
        let v4_next = IpAddr::V4((u32::from(first) + n).into());
        ensure!(v4.contains(&v4_next), "node{node} has used up its addresses");
        expected.push(v4_next);
        expected.push(IpAddr::V6(Ipv6Addr::from(u128::from(second) + u128::from(n))));
    }
    Ok(expected)
}

fn hammer(town: &Town<'_>, pod: &str, to: &[IpAddr]) -> Result<Hammer> {
    let pod = town.pods.get(pod).context("no such client")?;
    let targets: Vec<_> = to.iter().map(|address| (*address, PORT).into()).collect();
    let log = town.cluster.folder().join("logs/hammer.log");
    Hammer::start_in(&pod.place, &log, 50, &targets)
}

/// Datagrams and TCP segments that reached the pod's stack, whether somebody listened or not, since its namespace was
/// made; the pod itself has sent nothing that could be answered.
fn delivered(pod: &AppPod) -> Result<u64> {
    let (v4, v6) = (
        pod.place.run(["cat", "/proc/net/snmp"])?,
        pod.place.run(["cat", "/proc/net/snmp6"])?,
    );
    let mut total = 0;
    let lines: Vec<Vec<&str>> = v4.lines().map(|line| line.split_whitespace().collect()).collect();
    for pair in lines.chunks_exact(2) {
        let [names, values] = pair else { continue };
        for (name, value) in names.iter().zip(values) {
            let counts = matches!(
                (names[0], *name),
                ("Udp:", "InDatagrams" | "NoPorts" | "InErrors") | ("Tcp:", "InSegs")
            );
            if counts {
                total += value.parse::<u64>()?;
            }
        }
    }
    for line in v6.lines() {
        let mut words = line.split_whitespace();
        if let (Some("Udp6InDatagrams" | "Udp6NoPorts" | "Udp6InErrors"), Some(value)) =
            (words.next(), words.next())
        {
            total += value.parse::<u64>()?;
        }
    }
    Ok(total)
}
