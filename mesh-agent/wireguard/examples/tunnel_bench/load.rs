//! Datagrams at a rate that nothing is lost at.

use std::{
    net::UdpSocket,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{setsockopt, sockopt};

use super::{
    pair::Pair,
    report::{Better, Measured},
    support::{
        PATIENCE,
        traffic::{join, within},
    },
};

/// Of 1,000 datagrams so many may be lost: a shared machine takes the CPU away for longer than any queue lasts.
const LOSS_PER_MILLE: u64 = 1;

/// How long a rate is tried.
const TRIAL: Duration = Duration::from_millis(500);

/// A rate fails when it fails this often in a row.
const TRIES: usize = 2;

/// Where the search begins, in datagrams a second, and by how much it goes up.
const FIRST: f64 = 20_000.0;
const STEP: f64 = 1.5;

/// Halvings between the last rate that passed and the first that failed.
const HALVINGS: usize = 3;

/// Contents of datagrams that are packets of 40, 576 and 1,420 bytes, seven to four to one: the simple Internet mix, with
/// the largest as the tunnel takes it.
pub(super) const IMIX: &[usize] = &[12, 548, 12, 548, 12, 1392, 12, 548, 12, 548, 12, 12];

/// The highest rate at which at most [`LOSS_PER_MILLE`] of the datagrams of these sizes, in turn, are lost.
pub(super) fn lossfree(pair: &Pair, name: &'static str, sizes: &'static [usize]) -> Result<Vec<Measured>> {
    let mut best = 0.0f64;
    let passes = |rate: f64, best: &mut f64| -> Result<bool> {
        for _ in 0..TRIES {
            let (sent, received) = trial(pair, rate, sizes)?;
            if (sent - received.min(sent)) * 1000 <= sent * LOSS_PER_MILLE {
                let reached = sent as f64 / TRIAL.as_secs_f64();
                *best = best.max(reached);
                // A sender that cannot keep up has found the machine's end, not the tunnel's.
                return Ok(reached > rate * 0.9);
            }
        }
        Ok(false)
    };
    let (mut low, mut high) = (0.0, FIRST);
    while passes(high, &mut best)? {
        low = high;
        high *= STEP;
    }
    for _ in 0..HALVINGS {
        let middle = (low + high) / 2.0;
        match passes(middle, &mut best)? {
            true => low = middle,
            false => high = middle,
        }
    }
    Ok(vec![Measured::new(name, "kpps", Better::More, best / 1000.0)])
}

/// Sends at a rate. How many were sent and received.
fn trial(pair: &Pair, rate: f64, sizes: &'static [usize]) -> Result<(u64, u64)> {
    let address = pair.receiver().inner_v4();
    let (announce, port) = mpsc::channel();
    let (done, received) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let (ended, counted) = (Arc::clone(&done), Arc::clone(&received));
    let receiver = within(pair.receiver(), move || {
        let socket = UdpSocket::bind((address, 0))?;
        setsockopt(&socket, sockopt::RcvBufForce, &(32 << 20))?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        announce.send(socket.local_addr()?)?;
        let mut buffer = [0; 2048];
        let mut quiet = 0;
        while quiet < 3 {
            match socket.recv(&mut buffer) {
                Ok(_) => {
                    counted.fetch_add(1, Ordering::Relaxed);
                    quiet = 0;
                }
                Err(_) if ended.load(Ordering::Relaxed) => quiet += 1,
                Err(_) => {}
            }
        }
        Ok(())
    });
    let target = port
        .recv_timeout(PATIENCE)
        .context("the receiver did not start")?;
    let sender = within(pair.sender(), move || {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        setsockopt(&socket, sockopt::SndBufForce, &(8 << 20))?;
        socket.connect(target)?;
        let payload = [0x5a; 1500];
        let (start, mut sent) = (Instant::now(), 0u64);
        loop {
            let elapsed = start.elapsed();
            if elapsed >= TRIAL {
                return Ok(sent);
            }
            // What a pause of the machine has left undone is not made up for in one burst.
            let due = ((elapsed.as_secs_f64() * rate) as u64).min(sent + 256);
            if sent >= due {
                std::thread::sleep(Duration::from_micros(50));
            }
            while sent < due {
                socket.send(&payload[..sizes[sent as usize % sizes.len()]])?;
                sent += 1;
            }
        }
    });
    let sent = join(sender);
    done.store(true, Ordering::Relaxed);
    join(receiver)?;
    Ok((sent?, received.load(Ordering::Relaxed)))
}
