//! Networks that delay, lose, double and reorder what passes.

use std::{sync::atomic::Ordering, time::Duration};

use crate::support::{
    Engine, Lab,
    relay::{Impairment, Relay},
    traffic::{Flow, ping, tcp_echo},
    until,
};
use anyhow::{Result, ensure};

/// Bad in every way, and quick.
const BAD: Impairment = Impairment {
    seed: 0x5eed,
    delay: Duration::from_millis(2),
    lost: 10_000,
    doubled: 30_000,
    reordered: 50_000,
    held: Duration::from_millis(3),
};

fn through(engines: [Engine; 2]) -> Result<()> {
    let lab = Lab::new(engines)?;
    let [a, b] = &lab.nodes[..] else { unreachable!() };
    let relay = Relay::start(&lab, BAD)?;
    Relay::mesh(&lab)?;
    ping(a, b.inner_v4(), 56)?;
    tcp_echo(a, b, b.inner_v4(), 500_000)?;
    tcp_echo(b, a, a.inner_v6(), 500_000)?;
    let flows = [
        Flow::start(a, b, b.inner_v4(), 1_000, 300)?,
        Flow::start(b, a, a.inner_v6(), 1_000, 300)?,
    ];
    // New keys as well: of three messages that may be lost, each is repeated.
    for _ in 0..2 {
        let (before, arrived) = (a.handshakes()?, flows.each_ref().map(Flow::received));
        a.control(&format!("rekey {}", a.device))?;
        until("a new handshake, and traffic under it", || {
            let moved = flows
                .iter()
                .zip(arrived)
                .all(|(flow, arrived)| flow.received() > arrived + 500);
            Ok(moved && a.handshakes()? > before)
        })?;
    }
    let mut lost = 0;
    for flow in flows {
        let name = flow.name.clone();
        let figures = flow.finish()?;
        ensure!(figures.duplicated == 0, "{name}: {figures:?}");
        ensure!(figures.reordered > 0, "{name}: the order is kept: {figures:?}");
        lost += figures.lost;
    }
    let done = relay.finish()?;
    // Nothing is lost but what the relay lost: a late datagram is not an old one.
    ensure!(
        0 < lost && lost <= done.lost.load(Ordering::Relaxed),
        "{lost} lost, {done:?}"
    );
    let replayed = a.drops("replayed")?;
    ensure!(replayed > 50, "{replayed} of {done:?}");
    for reason in ["not-authentic", "no-session", "inner-malformed", "internal"] {
        ensure!(a.drops(reason)? == 0, "{} {reason}", a.drops(reason)?);
    }
    Ok(())
}

#[test]
fn what_arrives_is_whole_and_comes_once() -> Result<()> {
    through([Engine::warren(), Engine::warren()])
}

#[test]
fn what_arrives_is_whole_and_comes_once_with_wireguard_go() -> Result<()> {
    through([Engine::warren(), Engine::WireguardGo])
}

#[test]
fn what_arrives_is_whole_and_comes_once_with_boringtun() -> Result<()> {
    through([Engine::warren_boringtun(), Engine::warren()])
}
