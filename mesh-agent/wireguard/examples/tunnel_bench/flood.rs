//! Handshakes of nobody, from addresses that do not exist, with sound first authenticators.

use std::{
    os::fd::AsRawFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::Result;
use boringtun::{
    noise::{Tunn, TunnResult},
    x25519,
};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket,
};

use super::{
    pair::Pair,
    report::{Better, Measured},
    support::{
        PORT, public,
        traffic::{join, within},
    },
};

/// Initiations in a second.
const RATE: u64 = 5_000;

/// TCP through a tunnel whose receiving end is flooded, as a share of that without, each flood against its own: the
/// generator runs both times, the first time at a port where nobody listens. And how long a new handshake takes in it.
pub(super) fn measure(pair: &Pair, seconds: u64) -> Result<Vec<Measured>> {
    let (sender, receiver) = (pair.sender(), pair.receiver());
    let _ = receiver
        .namespace
        .ip("route add 198.18.0.0/15 via 198.51.100.1 dev direct0");
    let mut rates = Vec::new();
    for port in [PORT + 100, PORT] {
        let flood = Flood::start(pair, port);
        let mut measured = pair.tcp("flood_share", seconds, &[], None)?;
        flood.stop()?;
        rates.push(measured.remove(0).value());
    }
    let share = rates[1] / rates[0].max(1e-9);
    let mut figures = vec![Measured::new("flood_throughput_share", "", Better::More, share)];
    // Only our engine can be asked for a handshake.
    if sender.device == "warren0" {
        let flood = Flood::start(pair, PORT);
        std::thread::sleep(Duration::from_millis(500));
        let (before, start) = (sender.handshakes()?, Instant::now());
        sender.control("rekey warren0")?;
        super::support::until("a new handshake in the flood", || {
            Ok(sender.handshakes()? > before)
        })?;
        let milliseconds = start.elapsed().as_secs_f64() * 1e3;
        flood.stop()?;
        figures.push(Measured::new(
            "flood_handshake_ms",
            "ms",
            Better::Less,
            milliseconds,
        ));
    }
    Ok(figures)
}

struct Flood {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

impl Flood {
    fn start(pair: &Pair, port: u16) -> Self {
        let key = *public(&pair.receiver().key).as_bytes();
        let stop = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&stop);
        Self {
            stop,
            thread: within(pair.sender(), move || flood(key, port, &ended)),
        }
    }

    fn stop(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        join(self.thread)
    }
}

fn flood(key: [u8; 32], port: u16, stop: &AtomicBool) -> Result<()> {
    let (family, kind) = (AddressFamily::Inet, SockType::Raw);
    let socket = socket(family, kind, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)?;
    let secret = x25519::StaticSecret::from([7; 32]);
    let mut tunn = Tunn::new(secret, key.into(), None, None, 1, None);
    let mut out = [0; 256];
    let TunnResult::WriteToNetwork(message) = tunn.format_handshake_initiation(&mut out, true) else {
        anyhow::bail!("no initiation");
    };
    let to = SockaddrIn::new(198, 51, 100, 2, 0);
    let (start, mut sent) = (Instant::now(), 0u64);
    while !stop.load(Ordering::Relaxed) {
        let due = start.elapsed().as_millis() as u64 * RATE / 1000;
        // What a pause of the machine has left undone is not made up for.
        sent = sent.max(due.saturating_sub(256));
        while sent < due {
            let packet = spoofed(sent as u32, port, message);
            // A full queue is the flood's loss.
            let _ = sendto(socket.as_raw_fd(), &packet, &to, MsgFlags::empty());
            sent += 1;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// An IPv4 datagram (RFC 791, RFC 768 without a checksum) from one of 100,000 addresses of 198.18.0.0/15.
fn spoofed(n: u32, port: u16, content: &[u8]) -> Vec<u8> {
    let source = (0xc612_0001 + n % 100_000).to_be_bytes();
    let (udp, total) = (8 + content.len() as u16, 28 + content.len() as u16);
    let mut packet = vec![0x45, 0];
    packet.extend(total.to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    packet.extend(source);
    packet.extend([198, 51, 100, 2]);
    for field in [1024 + n as u16 / 2, port, udp, 0] {
        packet.extend(field.to_be_bytes());
    }
    packet.extend(content);
    packet
}
