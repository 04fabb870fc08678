//! Who may send from which address, and that changing this disturbs nobody else.

use std::time::Duration;

use crate::support::{
    self, Engine, Lab, peer_line, public,
    traffic::{Flow, ping, udp_echo},
};
use anyhow::{Result, ensure};
use warren_wireguard::{DeviceChange, Userspace, WgDevice as _};

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
