//! An engine that is replaced by another while packets flow: with its consent, and without.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
};

use crate::support::{
    self, Engine, Lab, Node,
    capture::Capture,
    peer_line,
    traffic::{Flow, ping, within},
    until,
};
use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;

/// Datagrams of each flow in a second.
const RATE: u64 = 2_500;

/// Four flows, one in each direction and address family.
fn flows(lab: &Lab) -> Result<Vec<Flow>> {
    let [a, b] = &lab.nodes[..] else { unreachable!() };
    let mut flows = Vec::new();
    for (from, to) in [(a, b), (b, a)] {
        for address in [to.inner_v4(), to.inner_v6()] {
            flows.push(Flow::start(from, to, address, RATE, 200)?);
        }
    }
    Ok(flows)
}

/// Waits until every flow has moved on by so many datagrams.
fn progress(flows: &[Flow], count: u64) -> Result<()> {
    for flow in flows {
        let before = flow.received();
        until(&format!("traffic {}", flow.name), || {
            Ok(flow.received() > before + count)
        })?;
    }
    Ok(())
}

fn no_loss(lab: &Lab, flows: Vec<Flow>) -> Result<()> {
    for flow in flows {
        let name = flow.name.clone();
        let figures = flow.finish()?;
        if figures.lost > 0 || figures.duplicated > 0 {
            let stats = lab.nodes.iter().map(|node| node.control("stats warren0"));
            bail!("{name}: {figures:?}; {:?}", stats.collect::<Vec<_>>());
        }
    }
    Ok(())
}

fn nothing_wrong(node: &Node) -> Result<()> {
    for reason in [
        "replayed",
        "not-authentic",
        "no-session",
        "unknown-index",
        "internal",
    ] {
        let count = node.drops(reason)?;
        ensure!(count == 0, "node {}: {count} {reason}", node.number);
    }
    Ok(())
}

#[test]
fn successors_take_over_without_loss() -> Result<()> {
    let mut lab = Lab::new([Engine::warren(), Engine::warren()])?;
    lab.mesh(false)?;
    ping(&lab.nodes[0], lab.nodes[1].inner_v4(), 56)?;
    let capture = Capture::start(&lab)?;
    let flows = flows(&lab)?;
    progress(&flows, 500)?;
    let before = lab.nodes[0].raw(b"get=1\n\n")?;
    let handshakes = [lab.nodes[0].handshakes()?, lab.nodes[1].handshakes()?];
    for round in 0..8 {
        let node = &mut lab.nodes[round % 2];
        let mut old = node.succeed(&[])?;
        until("the old engine has ended", || Ok(old.try_wait()?.is_some()))?;
        ensure!(old.wait()?.success());
        println!("round {round}: {}", node.control("ping")?);
        progress(&flows, 200)?;
        // What waited for the successor is answered by it.
        ensure!(node.control("list")?["devices"] == serde_json::json!(["warren0"]));
    }
    no_loss(&lab, flows)?;
    for (node, handshakes) in lab.nodes.iter().zip(handshakes) {
        nothing_wrong(node)?;
        ensure!(node.handshakes()? == handshakes, "sessions are gone on with");
    }
    let settings = |text: &str| -> Vec<String> {
        let mut lines: Vec<_> = text
            .lines()
            .filter(|line| !line.contains("x_bytes") && !line.contains("handshake"))
            .map(str::to_owned)
            .collect();
        lines.sort();
        lines
    };
    let after = lab.nodes[0].raw(b"get=1\n\n")?;
    ensure!(settings(&before) == settings(&after), "{before}{after}");
    // Timers, roaming, new keys and changes work as before.
    let [a, b] = &lab.nodes[..] else { unreachable!() };
    for node in [a, b] {
        let done = node.handshakes()?;
        node.control("rekey warren0")?;
        until("a new handshake", || Ok(node.handshakes()? > done))?;
    }
    a.must_set(&format!("{}allowed_ip=10.77.0.0/16\n", peer_line(&b.key)))?;
    ping(a, b.inner_v6(), 1_300)?;
    ping(b, a.inner_v4(), 1_300)?;
    let seen = capture.finish()?;
    ensure!(seen.clear == 0 && seen.packets > 10_000, "{seen:?}");
    Ok(())
}

/// In the middle of handshakes, some of which the successor has to finish.
#[test]
fn handshakes_go_on_through_a_handover() -> Result<()> {
    let mut lab = Lab::new([Engine::warren(), Engine::warren()])?;
    lab.mesh(true)?;
    ping(&lab.nodes[0], lab.nodes[1].inner_v4(), 56)?;
    let flows = flows(&lab)?;
    progress(&flows, 100)?;
    for round in 0..6 {
        lab.nodes[(round + 1) % 2].control("rekey warren0")?;
        let mut old = lab.nodes[round % 2].succeed(&[])?;
        ensure!(old.wait()?.success());
        progress(&flows, 100)?;
    }
    no_loss(&lab, flows)
}

/// What cannot be taken out of sessions is made anew.
#[test]
fn another_implementation_takes_over_with_new_sessions() -> Result<()> {
    let mut lab = Lab::new([Engine::warren(), Engine::warren()])?;
    lab.mesh(false)?;
    ping(&lab.nodes[0], lab.nodes[1].inner_v4(), 56)?;
    for engine in [
        Engine::warren_boringtun(),
        Engine::warren_boringtun(),
        Engine::warren(),
    ] {
        lab.nodes[0].engine = engine;
        let before = lab.nodes[1].handshakes()?;
        ensure!(lab.nodes[0].succeed(&[])?.wait()?.success());
        until("a handshake begun by the successor", || {
            Ok(lab.nodes[1].handshakes()? > before)
        })?;
        let [a, b] = &lab.nodes[..] else { unreachable!() };
        ping(a, b.inner_v4(), 56)?;
        ping(b, a.inner_v6(), 56)?;
    }
    Ok(())
}

#[test]
fn one_that_lingers_holds_nothing() -> Result<()> {
    let mut lab = Lab::new([Engine::warren(), Engine::warren()])?;
    lab.mesh(false)?;
    lab.nodes[0].stop(Signal::SIGTERM)?;
    lab.nodes[0].start_with(&["--linger"])?;
    let [a, b] = &lab.nodes[..] else { unreachable!() };
    a.peer(b, false)?;
    ping(a, b.inner_v4(), 56)?;
    let mut first = lab.nodes[0].succeed(&["--linger"])?;
    ping(&lab.nodes[0], lab.nodes[1].inner_v4(), 56)?;
    ensure!(first.try_wait()?.is_none(), "it stays");
    // Its successor dies: another one gets everything, though the first still runs.
    lab.nodes[0].stop(Signal::SIGKILL)?;
    lab.nodes[0].start()?;
    let [a, b] = &lab.nodes[..] else { unreachable!() };
    a.peer(b, false)?;
    ping(a, b.inner_v4(), 56)?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(first.id() as i32), Signal::SIGTERM)?;
    ensure!(first.wait()?.success());
    ensure!(a.control("list")?["devices"] == serde_json::json!(["warren0"]));
    ping(b, a.inner_v4(), 56)
}

/// The engine is killed and started again, as its supervisor would, and the peer goes on to send by a session that is gone.
fn killed(engine: Engine) -> Result<()> {
    let mut lab = Lab::new([engine.clone(), engine])?;
    lab.mesh(false)?;
    let [a, b] = &lab.nodes[..] else { unreachable!() };
    ping(a, b.inner_v4(), 56)?;
    let capture = Capture::start(&lab)?;
    // Nothing that the killed engine would send begins a handshake.
    let flow = Flow::start(b, a, a.inner_v4(), 1000, 200)?;
    for _ in 0..3 {
        progress(std::slice::from_ref(&flow), 200)?;
        let (before, sent) = (lab.nodes[1].handshakes()?, flow.sent());
        lab.nodes[0].stop(Signal::SIGKILL)?;
        ensure!(lab.nodes[0].has_device(), "the device stays");
        lab.nodes[0].start()?;
        let [a, b] = &lab.nodes[..] else { unreachable!() };
        a.peer(b, false)?;
        let arrived = flow.received();
        until("traffic is back", || Ok(flow.received() > arrived))?;
        println!("back after {} datagrams", flow.sent() - sent);
        // By itself the peer would have begun one 15 seconds later.
        ensure!(
            flow.sent() - sent < 10_000,
            "{} were sent meanwhile",
            flow.sent() - sent
        );
        ensure!(b.handshakes()? > before);
    }
    flow.finish()?;
    let seen = capture.finish()?;
    ensure!(seen.clear == 0 && seen.packets > 600, "{seen:?}");
    Ok(())
}

#[test]
fn after_a_kill_sessions_are_there_again_at_once() -> Result<()> {
    killed(Engine::warren())
}

#[test]
fn after_a_kill_sessions_are_there_again_at_once_with_boringtun() -> Result<()> {
    killed(Engine::warren_boringtun())
}

/// One line, and then as much of the engine's side as it wants to say.
fn ask(node: &Node, request: &str) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(node.run_dir().join("warren-engine.control"))?;
    stream.set_read_timeout(Some(support::PATIENCE))?;
    writeln!(stream, "{request}")?;
    Ok(stream)
}

#[test]
fn a_successor_that_fails_changes_nothing() -> Result<()> {
    let lab = Lab::new([Engine::warren(), Engine::warren()])?;
    lab.mesh(false)?;
    let [a, b] = &lab.nodes[..] else { unreachable!() };
    ping(a, b.inner_v4(), 56)?;
    let flows = flows(&lab)?;
    progress(&flows, 100)?;
    let place = support::traffic::join(within(a, || {
        Ok(std::fs::read_link("/proc/thread-self/ns/net")?
            .display()
            .to_string())
    }))?;
    for (request, reason) in [
        (format!("handover 99 {place}"), "version 99"),
        (format!("handover nonsense {place}"), "version nonsense"),
        ("handover 1 net:[1]".to_owned(), "another network namespace"),
        ("handover 1".to_owned(), "another network namespace"),
    ] {
        let mut answer = String::new();
        ask(a, &request)?.read_to_string(&mut answer)?;
        let answer: serde_json::Value = serde_json::from_str(&answer)?;
        let error = answer["error"].as_str().context("it was accepted")?;
        ensure!(error.contains(reason), "{request}: {error}");
    }
    // One that goes away, one that says something else, one that goes away once packets wait for it.
    for word in [&b""[..], b"what\n", b"go\n", b"go\nready", b"go\nmaybe\n"] {
        let mut stream = ask(a, &format!("handover 1 {place}"))?;
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        stream.write_all(word)?;
        if word.starts_with(b"go") {
            // Until its sessions come: they begin with no descriptor.
            stream.set_nonblocking(false)?;
        }
        stream.shutdown(std::net::Shutdown::Write)?;
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
        drop(stream);
        progress(&flows, 100)?;
        ensure!(a.control("ping")?["pid"].as_u64() == Some(a.pid().into()));
    }
    nothing_wrong(a)?;
    no_loss(&lab, flows)?;
    ping(a, b.inner_v6(), 56)
}
