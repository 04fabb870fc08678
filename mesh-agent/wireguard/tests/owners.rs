//! Who may send from which address, and that changing this disturbs nobody else.

mod support;

use std::time::Duration;

use anyhow::{Result, ensure};
use support::{
    Engine, Lab, Node, peer_line, public,
    traffic::{Flow, ping, udp_echo},
    until,
};
use warren_wireguard::{DeviceChange, Userspace, WgDevice as _};

/// Sends 50 datagrams from `source`, an address that `from` gives itself. How many arrived.
fn spoof(from: &Node, source: &str, to: &Node) -> Result<u64> {
    let length = if source.contains(':') { 128 } else { 32 };
    // One address stays and is used again.
    let _ = from
        .namespace
        .ip(&format!("addr add {source}/{length} dev {} nodad", from.device));
    let address = if source.contains(':') {
        to.inner_v6()
    } else {
        to.inner_v4()
    };
    let flow = Flow::start_from(from, Some(source.parse()?), to, address, 500, 100)?;
    until("50 datagrams were sent", || Ok(flow.sent() >= 50))?;
    let figures = flow.finish()?;
    ensure!(
        figures.lost == 0 || figures.lost == figures.sent,
        "some arrived: {figures:?}"
    );
    Ok(figures.sent - figures.lost)
}

/// Node 1 hears node 2, which owns 10.0.0.0/8, and node 3, which owns 10.3.0.0/16.
#[test]
fn only_the_most_specific_owner_may_send_from_an_address() -> Result<()> {
    most_specific(Engine::warren(), Engine::warren())
}

#[test]
fn only_the_most_specific_owner_may_send_from_an_address_with_boringtun() -> Result<()> {
    most_specific(Engine::warren_boringtun(), Engine::warren_boringtun())
}

#[test]
fn only_the_most_specific_owner_may_send_from_an_address_with_wireguard_go() -> Result<()> {
    most_specific(Engine::warren(), Engine::WireguardGo)
}

fn most_specific(engine: Engine, senders: Engine) -> Result<()> {
    let lab = Lab::new([engine, senders.clone(), senders])?;
    lab.mesh(false)?;
    let [receiver, wide, narrow] = &lab.nodes[..] else {
        unreachable!()
    };
    receiver.must_set(&format!(
        "{}allowed_ip=10.0.0.0/8\nallowed_ip=fd00::/16\n",
        peer_line(&wide.key)
    ))?;
    for address in [receiver.inner_v4(), receiver.inner_v6()] {
        ping(wide, address, 56)?;
        ping(narrow, address, 56)?;
    }
    ensure!(receiver.drops("source-not-owned")? == 0);

    ensure!(
        spoof(wide, "10.77.0.1", receiver)? > 0,
        "inside its own wide prefix"
    );
    ensure!(
        spoof(wide, "fd00:77::1", receiver)? > 0,
        "inside its own wide prefix"
    );
    for (count, source) in [(1, "10.3.0.99"), (2, "fd00:3::99")] {
        ensure!(spoof(wide, source, receiver)? == 0, "{source} belongs to node 3");
        let drops = receiver.drops("source-not-owned")?;
        ensure!(drops >= count * 50, "{drops} drops were counted");
    }
    // Nobody owns this one.
    let before = receiver.drops("source-not-owned")?;
    ensure!(spoof(narrow, "10.3.0.98", receiver)? > 0);
    receiver.must_set(&format!(
        "{}update_only=true\nallowed_ip=-10.0.0.0/8\n",
        peer_line(&wide.key)
    ))?;
    ensure!(spoof(wide, "10.77.0.1", receiver)? == 0);
    ensure!(receiver.drops("source-not-owned")? >= before + 50);

    // The prefix moves: now it is the other way round.
    receiver.must_set(&format!("{}allowed_ip=10.3.0.0/16\n", peer_line(&wide.key)))?;
    ensure!(spoof(wide, "10.3.0.99", receiver)? > 0);
    ensure!(spoof(narrow, "10.3.0.98", receiver)? == 0);
    Ok(())
}

#[test]
fn a_prefix_that_moves_takes_its_traffic_along() -> Result<()> {
    let lab = Lab::new([Engine::warren(), Engine::warren(), Engine::warren()])?;
    lab.mesh(true)?;
    let [sender, first, second] = &lab.nodes[..] else {
        unreachable!()
    };
    for (prefix, address) in [("10.200.0.0/24", "10.200.0.1"), ("fd00:200::/64", "fd00:200::1")] {
        for node in [first, second] {
            let length = if address.contains(':') { 128 } else { 32 };
            node.namespace
                .ip(&format!("addr add {address}/{length} dev {} nodad", node.device))?;
        }
        for owner in [first, second, first] {
            sender.must_set(&format!(
                "{}update_only=true\nallowed_ip={prefix}\n",
                peer_line(&owner.key)
            ))?;
            udp_echo(sender, owner, address.parse()?, 500)?;
        }
        let owners = sender
            .get_all("allowed_ip")?
            .iter()
            .filter(|allowed| *allowed == prefix)
            .count();
        ensure!(owners == 1, "{prefix} has {owners} owners");
    }
    Ok(())
}

#[tokio::test]
async fn changes_under_traffic_lose_nothing() -> Result<()> {
    let lab = Lab::new([Engine::warren(), Engine::warren(), Engine::warren()])?;
    lab.mesh(true)?;
    let [a, b, c] = &lab.nodes[..] else { unreachable!() };
    ping(a, b.inner_v4(), 56)?;
    let mut flows = Vec::new();
    for (from, to) in [(a, b), (b, a)] {
        for address in [to.inner_v4(), to.inner_v6()] {
            flows.push(Flow::start(from, to, address, 1000, 300)?);
        }
    }
    let driver = Userspace::new(a.run_dir());
    let (b_key, c_key) = (public(&b.key), public(&c.key));
    for round in 0..100u32 {
        let other = format!("10.{}.0.0/16", 100 + round % 50).parse()?;
        let inside = format!("10.2.{}.0/24", 1 + round % 100).parse()?;
        driver
            .apply(
                &a.device,
                &[
                    DeviceChange::SetDevice {
                        private_key: a.key.clone(),
                        listen_port: support::PORT,
                    },
                    DeviceChange::SetPeer {
                        public_key: b_key,
                        pre_shared_key: None,
                        endpoint: None,
                        keepalive_seconds: (round % 3) as u16,
                    },
                    DeviceChange::AddAllowedIp {
                        public_key: b_key,
                        prefix: b.prefixes()[0],
                    },
                    DeviceChange::AddAllowedIp {
                        public_key: c_key,
                        prefix: other,
                    },
                    DeviceChange::AddAllowedIp {
                        public_key: c_key,
                        prefix: inside,
                    },
                    DeviceChange::RemoveAllowedIp {
                        public_key: b_key,
                        prefix: other,
                    },
                    DeviceChange::RemoveAllowedIp {
                        public_key: c_key,
                        prefix: inside,
                    },
                    DeviceChange::RemoveAllowedIp {
                        public_key: c_key,
                        prefix: b.prefixes()[0],
                    },
                ],
            )
            .await?;
        // wg's way: the whole list anew, and other peers come and go.
        let [v4, v6] = b.prefixes();
        a.must_set(&format!(
            "fwmark={round}\n{}replace_allowed_ips=true\nallowed_ip={v6}\nallowed_ip={v4}\n{}remove=true\n",
            peer_line(&b.key),
            peer_line(&c.key),
        ))?;
        a.peer(c, round % 2 == 0)?;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for flow in flows {
        let name = flow.name.clone();
        let figures = flow.finish()?;
        ensure!(
            figures.sent > 500 && figures.lost == 0 && figures.duplicated == 0,
            "{name}: {figures:?}"
        );
    }
    Ok(())
}

#[test]
fn new_keys_under_traffic_lose_nothing() -> Result<()> {
    new_keys(Engine::warren())
}

#[test]
fn new_keys_under_traffic_lose_nothing_with_boringtun() -> Result<()> {
    new_keys(Engine::warren_boringtun())
}

fn new_keys(engine: Engine) -> Result<()> {
    let lab = Lab::new([engine.clone(), engine])?;
    lab.mesh(false)?;
    let (a, b) = (&lab.nodes[0], &lab.nodes[1]);
    ping(a, b.inner_v4(), 56)?;
    let mut flows = Vec::new();
    for (from, to) in [(a, b), (b, a)] {
        for address in [to.inner_v4(), to.inner_v6()] {
            flows.push(Flow::start(from, to, address, 1000, 300)?);
        }
    }
    let start = a.handshakes()?;
    for round in 1..=40 {
        // By one end, the other, and both at once.
        for (node, turn) in [(a, 2), (b, 3)] {
            if round % turn == 0 || round % 5 == 0 {
                node.control(&format!("rekey {}", node.device))?;
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    for flow in flows {
        let name = flow.name.clone();
        let figures = flow.finish()?;
        ensure!(
            figures.sent > 500 && figures.lost == 0 && figures.duplicated == 0,
            "{name}: {figures:?}"
        );
    }
    let rekeys = a.handshakes()? - start;
    ensure!(rekeys >= 20, "only {rekeys} handshakes");
    Ok(())
}
