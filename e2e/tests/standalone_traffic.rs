//! Traffic between pods and nodes in the stand-alone lab: every pair of plugins, both families, all protocols.
//! None of it is in clear between nodes, and each check of that is shown to have power by a lab without encryption.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use warren_e2e::{
    app::ask::Protocol,
    lab::{Lab, LabOptions, Pod, PodSpec, Process, ask_from, net::node_address, ping_from},
    scenario::{answers_as, at, nothing_in_clear, two_nodes},
};

/// TCP carries the whole 64 KiB, a datagram as much as fits into one.
const SIZES: [usize; 3] = [64, 1400, 64 << 10];
/// Where a server of the nodes themselves listens.
const HOST_PORT: u16 = 9000;

#[test]
fn pods_reach_pods_over_every_pair_of_plugins() -> Result<()> {
    Lab::run(LabOptions::default(), |lab| {
        let capture = lab.capture()?;
        // node1 and node3 use ptp, node2 a bridge: same node, ptp to bridge, bridge to ptp, ptp to ptp.
        let pods = [("a1", 1), ("b1", 1), ("a2", 2), ("b2", 2), ("a3", 3)]
            .into_iter()
            .map(|(name, node)| lab.add_pod(PodSpec::new(name, node)))
            .collect::<Result<Vec<_>>>()?;
        for from in &pods {
            for to in pods.iter().filter(|to| to.name() != from.name()) {
                all_messages(from, to)?;
            }
        }
        let counts = capture.finish()?;
        nothing_in_clear(&counts)?;
        ensure!(counts.encrypted > 1000, "{counts:?}");
        let status = lab.node(1).encrypt_status()?;
        ensure!(
            status
                .peers
                .iter()
                .all(|peer| peer.last_handshake_seconds.is_some()),
            "{:?}",
            status.peers
        );
        Ok(())
    })
}

fn all_messages(from: &Pod, to: &Pod) -> Result<()> {
    for address in to.addresses() {
        for size in SIZES {
            answers_as(from, Protocol::Tcp, *address, size, to.name())?;
            answers_as(from, Protocol::Udp, *address, size, to.name())?;
            let report = from.ping(*address, 2, size.min(60_000))?;
            // The first echo above the path's MTU may be lost to path MTU discovery.
            ensure!(
                report.received >= 1,
                "{} -> {}: {size} bytes: {report:?}",
                from.name(),
                to.name()
            );
        }
    }
    Ok(())
}

#[test]
fn a_large_transfer_arrives_as_it_was_sent() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let capture = lab.capture()?;
        let near = lab.add_pod(PodSpec::new("near", 1))?;
        let far = lab.add_pod(PodSpec::new("far", 2))?;
        for (from, to) in [(&near, &far), (&far, &near)] {
            for address in to.addresses() {
                let report = from.transfer(*address, 16 << 20)?;
                ensure!(
                    report.corrupt_at.is_none() && report.receiver == to.name(),
                    "{report:?}"
                );
            }
        }
        nothing_in_clear(&capture.finish()?)
    })
}

/// A server on the host network of each node.
fn host_servers(lab: &Lab) -> Result<Vec<Process>> {
    lab.nodes()
        .iter()
        .map(|node| {
            let [v4, v6] = node_address(node.number)
                .both()
                .map(|address| at(address, HOST_PORT).to_string());
            let command = [
                "warren-lab-app",
                "serve",
                "--name",
                &node.name,
                "--listen",
                &v4,
                "--listen",
                &v6,
            ];
            node.place().spawn(
                command,
                &lab.dir().join("logs").join(format!("{}-server.log", node.name)),
            )
        })
        .collect()
}

/// Host to remote pod, pod to remote node, pod to its own node; every answer by the right name.
fn between_hosts_and_pods(lab: &Lab) -> Result<()> {
    let near = lab.add_pod(PodSpec::new("near", 1))?;
    let far = lab.add_pod(PodSpec::new("far", 2))?;
    let _servers = host_servers(lab)?;
    let (host, remote, own) = (lab.node(1).place(), node_address(2), node_address(1));
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        for to in far.addresses() {
            let answer = ask_from(&host, protocol, at(*to, 8080), 1400, 5000)?;
            ensure!(answer.name == "far", "{answer:?}");
        }
        for (address, name) in both(remote.both(), "node2").chain(both(own.both(), "node1")) {
            let answer = near.ask_port(protocol, at(address, HOST_PORT), 1400)?;
            ensure!(answer.name == name, "{address}: {answer:?}");
        }
    }
    for to in far.addresses() {
        ensure!(ping_from(&host, *to, 3, 1400)?.received > 0, "no echo from {to}");
    }
    for to in remote.both() {
        ensure!(near.ping(to, 3, 1400)?.received > 0, "no echo from {to}");
    }
    Ok(())
}

fn both(addresses: [IpAddr; 2], name: &str) -> impl Iterator<Item = (IpAddr, &str)> {
    addresses.into_iter().map(move |address| (address, name))
}

#[test]
fn hosts_and_pods_reach_each_other_and_no_reply_is_in_clear() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let capture = lab.capture()?;
        between_hosts_and_pods(lab)?;
        nothing_in_clear(&capture.finish()?)
    })?;
    Lab::run(two_nodes(false), |lab| {
        let capture = lab.capture()?;
        between_hosts_and_pods(lab)?;
        let counts = capture.finish()?;
        ensure!(
            counts.plaintext > 0 && counts.encrypted == 0,
            "the power check saw {counts:?}"
        );
        Ok(())
    })
}
