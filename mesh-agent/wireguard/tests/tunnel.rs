//! Traffic between two engines, each in a namespace of its own.

mod support;

use anyhow::{Result, ensure};
use support::{
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
