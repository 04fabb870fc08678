//! With the WireGuard implementations of others. A missing one is a failure: `cargo xtask setup` installs them.

use crate::support::{
    self, Engine, Lab, peer_line,
    traffic::{Flow, ping, tcp_echo, udp_echo},
    until,
};
use anyhow::{Result, ensure};

/// With a pre-shared key. Over IPv4 the first packet, and with it the handshake, comes from our end, else from theirs.
fn interoperates(ours: Engine, other: Engine, outer_v6: bool) -> Result<()> {
    let lab = Lab::new([ours, other])?;
    let (ours, theirs) = (&lab.nodes[0], &lab.nodes[1]);
    let preshared = hex::encode(support::key().expose());
    for (node, peer) in [(ours, theirs), (theirs, ours)] {
        node.set_device()?;
        let [v4, v6] = peer.prefixes();
        node.must_set(&format!(
            "{}preshared_key={preshared}\nendpoint={}\nallowed_ip={v4}\nallowed_ip={v6}\n",
            peer_line(&peer.key),
            peer.outer(outer_v6)
        ))?;
    }
    match outer_v6 {
        false => ping(ours, theirs.inner_v4(), 56)?,
        true => ping(theirs, ours.inner_v6(), 56)?,
    }
    for (from, to) in [(ours, theirs), (theirs, ours)] {
        for address in [to.inner_v4(), to.inner_v6()] {
            ping(from, address, 1_361)?;
            ping(from, address, 20_000)?;
            for bytes in [1, 17, 1_400, 60_000] {
                udp_echo(from, to, address, bytes)?;
            }
            tcp_echo(from, to, address, 2_000_000)?;
        }
    }
    for node in [ours, theirs] {
        let seconds: u64 = node.get("last_handshake_time_sec")?.unwrap_or_default().parse()?;
        // boringtun-cli prints how long ago it was.
        let least = if node.number == 1 { 1_600_000_000 } else { 1 };
        ensure!(
            seconds >= least,
            "node {}: last handshake at {seconds}",
            node.number
        );
    }
    ensure!(ours.drops("not-authentic")? == 0 && ours.drops("source-not-owned")? == 0);
    rekeys(&lab)
}

/// New keys in the middle of a flow, asked for by our end.
fn rekeys(lab: &Lab) -> Result<()> {
    let (ours, theirs) = (&lab.nodes[0], &lab.nodes[1]);
    let there = Flow::start(ours, theirs, theirs.inner_v4(), 500, 200)?;
    let back = Flow::start(theirs, ours, ours.inner_v6(), 500, 200)?;
    let mut handshakes = ours.handshakes()?;
    for _ in 0..5 {
        ours.control(&format!("rekey {}", ours.device))?;
        until("another handshake", || Ok(ours.handshakes()? > handshakes))?;
        handshakes = ours.handshakes()?;
        let arrived = (there.received(), back.received());
        until("traffic under the new key", || {
            Ok(there.received() > arrived.0 + 50 && back.received() > arrived.1 + 50)
        })?;
    }
    for flow in [there, back] {
        let name = flow.name.clone();
        let figures = flow.finish()?;
        ensure!(
            figures.lost == 0 && figures.duplicated == 0,
            "{name}: {figures:?}"
        );
    }
    Ok(())
}

/// A pre-shared key changes nothing until the next handshake, and that needs both ends to have it.
fn preshared_key_changes(ours: Engine, other: Engine) -> Result<()> {
    let lab = Lab::new([ours, other])?;
    lab.mesh(true)?;
    let (ours, theirs) = (&lab.nodes[0], &lab.nodes[1]);
    ping(theirs, ours.inner_v4(), 56)?;
    let there = Flow::start(ours, theirs, theirs.inner_v4(), 500, 200)?;
    let back = Flow::start(theirs, ours, ours.inner_v6(), 500, 200)?;
    for preshared in [hex::encode(support::key().expose()), "0".repeat(64)] {
        let handshakes = ours.handshakes()?;
        for (node, peer) in [(ours, theirs), (theirs, ours)] {
            node.must_set(&format!("{}preshared_key={preshared}\n", peer_line(&peer.key)))?;
            ping(ours, theirs.inner_v4(), 56)?;
        }
        ours.control(&format!("rekey {}", ours.device))?;
        until("a handshake with the new key", || {
            Ok(ours.handshakes()? > handshakes)
        })?;
        ping(ours, theirs.inner_v4(), 56)?;
    }
    for flow in [there, back] {
        let name = flow.name.clone();
        let figures = flow.finish()?;
        ensure!(
            figures.lost == 0 && figures.duplicated == 0,
            "{name}: {figures:?}"
        );
    }
    Ok(())
}

#[test]
fn preshared_keys_change_without_loss() -> Result<()> {
    preshared_key_changes(Engine::warren(), Engine::warren())
}

#[test]
fn preshared_keys_change_without_loss_with_boringtun() -> Result<()> {
    preshared_key_changes(Engine::warren_boringtun(), Engine::warren_boringtun())
}

#[test]
fn preshared_keys_change_without_loss_with_wireguard_go() -> Result<()> {
    preshared_key_changes(Engine::warren(), Engine::WireguardGo)
}

#[test]
fn wireguard_go_over_ipv4() -> Result<()> {
    interoperates(Engine::warren(), Engine::WireguardGo, false)
}

#[test]
fn wireguard_go_over_ipv6() -> Result<()> {
    interoperates(Engine::warren(), Engine::WireguardGo, true)
}

#[test]
fn wireguard_go_and_boringtun() -> Result<()> {
    interoperates(Engine::warren_boringtun(), Engine::WireguardGo, true)
}

#[test]
fn boringtun_cli_over_ipv4() -> Result<()> {
    interoperates(Engine::warren(), Engine::BoringtunCli, false)
}

#[test]
fn boringtun_cli_over_ipv6() -> Result<()> {
    interoperates(Engine::warren(), Engine::BoringtunCli, true)
}

#[test]
fn our_two_engines() -> Result<()> {
    interoperates(Engine::warren(), Engine::warren_boringtun(), false)
}
