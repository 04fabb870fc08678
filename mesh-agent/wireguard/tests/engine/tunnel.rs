//! Traffic between two engines, each in a namespace of its own.

use anyhow::{Result, ensure};
use warren_wireguard::{EngineStats, Offloads};

use crate::support::{
    Engine, Lab,
    traffic::{ping, tcp_echo, udp_echo},
};

fn pair(outer_v6: bool) -> Result<Lab> {
    let lab = Lab::new([Engine::warren(), Engine::warren()])?;
    lab.mesh(outer_v6)?;
    Ok(lab)
}

fn all_protocols(lab: &Lab) -> Result<()> {
    let (a, b) = (&lab.nodes[0], &lab.nodes[1]);
    for (from, to) in [(a, b), (b, a)] {
        for address in [to.inner_v4(), to.inner_v6()] {
            ping(from, address, 56)?;
            ping(from, address, 1_360)?;
            // Fragments inside the tunnel.
            ping(from, address, 20_000)?;
            for bytes in [1, 1_400, 65_000] {
                udp_echo(from, to, address, bytes)?;
            }
            tcp_echo(from, to, address, 3_000_000)?;
        }
    }
    for node in [a, b] {
        for reason in [
            "source-not-owned",
            "not-authentic",
            "replayed",
            "queue-full",
            "internal",
        ] {
            let count = node.drops(reason)?;
            ensure!(
                count == 0,
                "node {}: {count} packets dropped: {reason}",
                node.number
            );
        }
    }
    Ok(())
}

#[test]
fn every_protocol_over_ipv4() -> Result<()> {
    all_protocols(&pair(false)?)
}

#[test]
fn every_protocol_over_ipv6() -> Result<()> {
    all_protocols(&pair(true)?)
}

/// The kernel does not cut buffers into datagrams that do not fit the route (`EINVAL`, or `EMSGSIZE`): they go one by one, in fragments.
#[test]
fn an_underlay_that_is_smaller_than_the_datagrams() -> Result<()> {
    for outer_v6 in [false, true] {
        let lab = pair(outer_v6)?;
        for node in &lab.nodes {
            node.namespace.ip("link set eth0 mtu 1300")?;
        }
        all_protocols(&lab)?;
        for node in &lab.nodes {
            ensure!(node.drops("send-failed")? == 0, "node {}", node.number);
        }
    }
    Ok(())
}

/// Offloads are there where the kernel has them, as every kernel that runs these tests does.
#[test]
fn offloads_are_in_use() -> Result<()> {
    let lab = pair(false)?;
    let stats = lab.nodes[0].control("stats warren0")?;
    let stats: EngineStats = serde_json::from_value(stats)?;
    let Offloads {
        engine,
        cipher_lanes,
        tun,
        sockets,
    } = &stats.offloads;
    ensure!(engine == "warren" && *cipher_lanes >= 1, "{stats:?}");
    ensure!(tun.checksum && tun.tso, "{stats:?}");
    let families: Vec<&str> = sockets.iter().map(|socket| socket.family.as_str()).collect();
    ensure!(families == ["ipv4", "ipv6"], "{stats:?}");
    ensure!(sockets.iter().all(|socket| socket.gso && socket.gro), "{stats:?}");
    let told = stats.offloads.to_string();
    ensure!(
        told.contains("TSO on") && told.contains("UDP ipv6 GSO on, GRO on"),
        "{told}"
    );
    Ok(())
}
