//! Starting, and being replaced.

use std::{
    net::UdpSocket,
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::{
    report::{Better, Measured},
    support::{
        Engine, Lab, PATIENCE,
        traffic::{Flow, join, ping, within},
    },
};

/// From the start of the process to the first packet that arrives through it, configured by its socket, in milliseconds.
pub(super) fn start(engine: &Engine) -> Result<Vec<Measured>> {
    let mut lab = Lab::new([engine.clone(), engine.clone()])?;
    lab.mesh(false)?;
    ping(&lab.nodes[0], lab.nodes[1].inner_v4(), 56)?;
    lab.nodes[0].stop(nix::sys::signal::Signal::SIGTERM)?;
    let address = lab.nodes[1].inner_v4();
    let (announce, port) = mpsc::channel();
    let receiver = within(&lab.nodes[1], move || {
        let socket = UdpSocket::bind((address, 0))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        announce.send(socket.local_addr()?)?;
        socket.recv(&mut [0; 64])?;
        Ok(Instant::now())
    });
    let to = port
        .recv_timeout(PATIENCE)
        .context("the receiver did not start")?;
    let start = Instant::now();
    lab.nodes[0].start()?;
    if !matches!(engine, Engine::Warren(..)) {
        // Their devices end with the process.
        lab.nodes[0].configure_links()?;
    }
    lab.nodes[0].peer(&lab.nodes[1], false)?;
    join(within(&lab.nodes[0], move || {
        UdpSocket::bind("0.0.0.0:0")?.send_to(b"first", to)?;
        Ok(())
    }))?;
    let took = join(receiver)?.duration_since(start);
    let milliseconds = took.as_secs_f64() * 1e3;
    Ok(vec![Measured::new(
        "start_to_first_packet_ms",
        "ms",
        Better::Less,
        milliseconds,
    )])
}

/// Our engine under 10,000 packets a second: an upgrade, and a kill with a restart. What was lost.
pub(super) fn replace(engine: &Engine) -> Result<Vec<Measured>> {
    let mut lab = Lab::new([engine.clone(), engine.clone()])?;
    lab.mesh(false)?;
    ping(&lab.nodes[0], lab.nodes[1].inner_v4(), 56)?;
    let flows = |lab: &Lab| -> Result<[Flow; 2]> {
        let [a, b] = &lab.nodes[..] else { unreachable!() };
        Ok([
            Flow::start(a, b, b.inner_v4(), 5_000, 200)?,
            Flow::start(b, a, a.inner_v4(), 5_000, 200)?,
        ])
    };
    let running = flows(&lab)?;
    let (mut pauses, handshakes) = (Vec::new(), lab.nodes[1].handshakes()?);
    for _ in 0..5 {
        std::thread::sleep(Duration::from_millis(300));
        lab.nodes[0].succeed(&[])?.wait()?;
        let answer = lab.nodes[0].control("ping")?;
        pauses.push(answer["took_over_ms"].as_f64().context("it did not take over")?);
    }
    let mut lost = 0;
    for flow in running {
        lost += flow.finish()?.lost;
    }
    ensure!(
        lab.nodes[1].handshakes()? == handshakes,
        "sessions were not gone on with"
    );
    let longest = pauses.iter().copied().fold(0.0, f64::max);
    let running = flows(&lab)?;
    std::thread::sleep(Duration::from_millis(300));
    let arrived = running[1].received();
    let start = Instant::now();
    lab.nodes[0].stop(nix::sys::signal::Signal::SIGKILL)?;
    lab.nodes[0].start()?;
    lab.nodes[0].peer(&lab.nodes[1], false)?;
    let before = running[1].received().max(arrived);
    super::support::until("traffic is back", || Ok(running[1].received() > before))?;
    let back = start.elapsed().as_secs_f64() * 1e3;
    for flow in running {
        flow.finish()?;
    }
    Ok(vec![
        Measured::new("handover_pause_ms", "ms", Better::Less, longest),
        Measured::new("handover_lost", "", Better::Less, lost as f64),
        Measured::new("restart_ms", "ms", Better::Less, back),
    ])
}
