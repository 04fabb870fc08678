//! `cargo xtask first-packet`: a thousand pods start while clients that were there before them send to the addresses
//! that they will get; nothing may reach a pod that its policy denies.
//!
//! A pod's own network namespace counts what arrives, from before it has an interface ([`crate::lab::seen`]). One pod
//! of each batch has no policy and shows that the clients hit from the start.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    app::ask::Protocol,
    lab::{Hammer, Lab, LabOptions, PORT, Pod, PodSpec, net::pod_cidrs, wait::wait_until},
};

/// Pods that start at once, on one node.
const BATCH: u32 = 10;
/// The nodes they start on, in turn.
const NODES: [u8; 2] = [2, 3];
/// Datagrams per second and address, from each client; nearly as many connections are tried.
const RATE: u32 = 50;

/// What `warren-first-packet` takes.
#[derive(Debug, clap::Args)]
pub struct FirstPacketArgs {
    /// How many pods to start.
    #[arg(long, default_value_t = 1000)]
    pub pods: u32,
    /// Write the figures to this file.
    #[arg(long)]
    pub json: Option<PathBuf>,
}

/// What came of it.
#[derive(Debug, Clone, Default, Serialize)]
pub struct FirstPackets {
    /// Pods with a policy that were started under fire.
    pub pods: u32,
    /// Datagrams and connections that the clients tried in all.
    pub tried: u64,
    /// Packets that reached such a pod although its policy denies them.
    pub delivered: u64,
    /// Packets that reached the pods without policy, from the same clients at the same time.
    pub control: u64,
    /// How long it took.
    pub seconds: f64,
}

/// Runs it in a lab of its own, prints and writes the figures, and fails where a packet got through.
pub fn run(args: &FirstPacketArgs) -> Result<()> {
    let mut found = FirstPackets::default();
    Lab::run(LabOptions::default(), |lab| {
        found = measure(lab, args.pods)?;
        Ok(())
    })?;
    let text = serde_json::to_string_pretty(&found)?;
    println!("{text}");
    if let Some(file) = &args.json {
        std::fs::write(file, text + "\n").with_context(|| format!("cannot write {}", file.display()))?;
    }
    ensure!(
        found.delivered == 0,
        "{} packets reached pods whose policy denies them",
        found.delivered
    );
    Ok(())
}

/// Starts `pods` pods (at least) in a lab with three nodes.
pub fn measure(lab: &Lab, pods: u32) -> Result<FirstPackets> {
    let start = Instant::now();
    let client = |name: &str, node, role: &str| {
        let labels = BTreeMap::from([("role".to_owned(), role.to_owned())]);
        lab.add_pod(PodSpec {
            labels,
            ..PodSpec::new(name, node)
        })
    };
    // One beside the new pods, or the other; one always behind the tunnel.
    let enemies = [
        client("near", 2, "enemy")?,
        client("far", 1, "enemy")?,
        client("third", 3, "enemy")?,
    ];
    let friend = client("friend", 1, "friend")?;
    lab.manifests().apply(&policy())?;
    let mut found = FirstPackets::default();
    let mut batch = 0;
    while found.pods < pods {
        let node = NODES[batch % NODES.len()];
        let attackers: Vec<&Pod> = enemies
            .iter()
            .filter(|pod| pod.node().number == 1 || pod.node().number == node)
            .collect();
        one_batch(lab, batch, node, &attackers, &friend, &mut found)
            .with_context(|| format!("batch {batch} on node{node}"))?;
        batch += 1;
        if batch % 10 == 0 {
            eprintln!("first-packet: {} pods, {} delivered", found.pods, found.delivered);
        }
    }
    found.seconds = start.elapsed().as_secs_f64();
    Ok(found)
}

fn one_batch(
    lab: &Lab,
    batch: usize,
    node: u8,
    attackers: &[&Pod],
    friend: &Pod,
    found: &mut FirstPackets,
) -> Result<()> {
    let expected = next_addresses(lab, node)?;
    let targets: Vec<SocketAddr> = expected.iter().map(|address| (*address, PORT).into()).collect();
    let hammers = attackers
        .iter()
        .map(|pod| Hammer::start_in(&pod.place(), &lab.dir().join("logs/hammer.log"), RATE, &targets))
        .collect::<Result<Vec<_>>>()?;
    let pods = thread::scope(|scope| {
        let threads: Vec<_> = (0..BATCH)
            .map(|n| scope.spawn(move || lab.add_pod(newcomer(batch, n, node))))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow!("a pod's thread panicked"))?)
            .collect::<Result<Vec<_>>>()
    })?;
    // Who may reaches them: their policy is there, and it is this one.
    for pod in pods.iter().skip(1) {
        let to = SocketAddr::new(pod.address(batch % 2 == 1)?, PORT);
        wait_until(std::time::Duration::from_secs(30), "a friend is let in", || {
            friend.ask_port(Protocol::Tcp, to, 64)
        })?;
    }
    for hammer in hammers {
        let tried = hammer.finish()?;
        found.tried += tried
            .iter()
            .map(|one| one.datagrams + one.connections)
            .sum::<u64>();
    }
    for (n, pod) in pods.iter().enumerate() {
        ensure!(
            pod.addresses().iter().all(|address| expected.contains(address)),
            "{} has {:?}, which nobody hammered",
            pod.name(),
            pod.addresses()
        );
        let arrivals = pod.arrivals()?;
        // Nobody else sends to it: any other source is an enemy, behind some translation maybe.
        let from_enemies = arrivals
            .iter()
            .filter(|((source, _, _), _)| !friend.addresses().contains(source));
        let packets: u64 = from_enemies.map(|(_, count)| count).sum();
        if n == 0 {
            ensure!(
                packets > 0,
                "{} is open and got nothing: the hammer misses",
                pod.name()
            );
            found.control += packets;
            continue;
        }
        if packets > 0 {
            eprintln!("first-packet: {} got {arrivals:?}", pod.name());
        }
        found.pods += 1;
        found.delivered += packets;
    }
    pods.into_iter().try_for_each(|pod| lab.delete_pod(pod))
}

/// The first of a batch has no policy. Every second batch has labels, and so an identity, that nobody had before.
fn newcomer(batch: usize, n: u32, node: u8) -> PodSpec {
    let app = if n == 0 { "open" } else { "shy" };
    let mut labels = BTreeMap::from([("app".to_owned(), app.to_owned())]);
    if batch % 2 == 1 {
        labels.insert("batch".into(), format!("{batch}-{n}"));
    }
    PodSpec {
        labels,
        watched: true,
        ..PodSpec::new(&format!("{app}-{batch}-{n}"), node)
    }
}

fn policy() -> Value {
    json!({
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "shy", "namespace": "default", "uid": "shy"},
        "spec": {
            "endpointSelector": {"matchLabels": {"app": "shy"}},
            "ingress": [{"fromEndpoints": [{"matchLabels": {"role": "friend"}}]}],
        },
    })
}

/// The addresses that the node's IPAM gives next: it goes through its range in order.
fn next_addresses(lab: &Lab, node: u8) -> Result<Vec<IpAddr>> {
    let place = lab.node(node).place();
    let last = |family: u8| -> Result<IpAddr> {
        let command = format!("cat /var/lib/cni/networks/*/last_reserved_ip.{family}");
        let text = place.run(["sh", "-c", &command])?;
        text.trim().parse().context("the IPAM's file holds no address")
    };
    let (IpAddr::V4(v4), IpAddr::V6(v6)) = (last(0)?, last(1)?) else {
        anyhow::bail!("the IPAM's files are of other families");
    };
    let [range, _] = pod_cidrs(node);
    let mut expected = Vec::new();
    // A little more: an address that is still taken is left out.
    for n in 1..=BATCH + 4 {
        let mut next = Ipv4Addr::from(u32::from(v4) + n);
        if !range.contains(&IpAddr::V4(next)) || next.octets()[3] == 255 {
            // Round again, behind the gateway.
            next = Ipv4Addr::from(u32::from(v4) + n - 253);
        }
        expected.push(next.into());
        expected.push(Ipv6Addr::from(u128::from(v6) + u128::from(n)).into());
    }
    Ok(expected)
}
