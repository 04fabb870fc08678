//! Many peers: memory of idle ones, and 500 that shake hands at once.

use std::{
    collections::HashMap,
    fs,
    net::{Ipv4Addr, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use boringtun::{
    noise::{Tunn, TunnResult},
    x25519,
};

use super::{
    report::{Better, Measured},
    support::{
        Engine, Lab, Node, PATIENCE, PORT, public,
        traffic::{join, within},
    },
};

/// Peers of one request: engines have limits.
const TOGETHER: u32 = 250;

/// Peers that shake hands at once.
const AT_ONCE: u32 = 500;

/// The private key of peer `n`: not in the first byte, whose lowest bits mean nothing.
fn private(n: u32) -> [u8; 32] {
    let mut key = [0x40; 32];
    key[4..8].copy_from_slice(&n.to_le_bytes());
    key
}

/// Peers that are configured and never heard from.
fn configure(node: &Node, numbers: std::ops::Range<u32>) -> Result<()> {
    let numbers: Vec<u32> = numbers.collect();
    for together in numbers.chunks(TOGETHER as usize) {
        let mut lines = String::new();
        for n in together {
            let key = warren_model::PrivateKey::from_bytes(private(*n));
            let [_, b, c, d] = n.to_be_bytes();
            lines += &format!(
                "public_key={}\nendpoint=192.0.2.{}:{}\nallowed_ip=10.{}.{c}.{d}/32\n",
                hex::encode(public(&key).as_bytes()),
                10 + n % 200,
                1024 + n % 60_000,
                100 + b,
            );
        }
        node.must_set(&lines)?;
    }
    Ok(())
}

fn memory_kib(node: &Node) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{}/status", node.pid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.context("no VmRSS")?.parse()?)
}

/// What an idle peer takes, with so many of them, in KiB.
pub(super) fn memory(engine: &Engine) -> Result<Vec<Measured>> {
    let lab = Lab::new([engine.clone()])?;
    let node = &lab.nodes[0];
    node.set_device()?;
    let (before, mut count, mut measured) = (memory_kib(node)?, 0, Vec::new());
    for (name, wanted) in [
        ("idle_peer_kib_10", 10),
        ("idle_peer_kib_1000", 1000),
        ("idle_peer_kib_5000", 5000),
    ] {
        configure(node, count..wanted)?;
        count = wanted;
        let grown = (memory_kib(node)? - before).max(0.0) / f64::from(wanted);
        measured.push(Measured::new(name, "KiB", Better::Less, grown));
    }
    Ok(measured)
}

/// Until 500 peers, each with an address of its own, have shaken hands that all began at once, in milliseconds.
pub(super) fn handshakes(engine: &Engine) -> Result<Vec<Measured>> {
    let lab = Lab::new([engine.clone(), engine.clone()])?;
    let [target, host] = &lab.nodes[..] else {
        unreachable!()
    };
    target.set_device()?;
    configure(target, 0..AT_ONCE)?;
    target
        .namespace
        .ip("route add 198.18.0.0/15 via 192.0.2.2 dev eth0")?;
    host.namespace.ip("route add local 198.18.0.0/15 dev lo")?;
    let key = *public(&target.key).as_bytes();
    let took = join(within(host, move || {
        let mut clients = (0..AT_ONCE)
            .map(|n| Client::new(n, key))
            .collect::<Result<Vec<_>>>()?;
        let start = Instant::now();
        for client in &mut clients {
            client.begin()?;
        }
        let mut left: HashMap<usize, Instant> = (0..clients.len()).map(|n| (n, Instant::now())).collect();
        while !left.is_empty() {
            ensure!(
                start.elapsed() < PATIENCE,
                "{} handshakes are missing",
                left.len()
            );
            left.retain(|n, asked| !clients[*n].poll(asked).unwrap_or(false));
            std::thread::sleep(Duration::from_micros(500));
        }
        Ok(start.elapsed())
    }))?;
    let milliseconds = took.as_secs_f64() * 1e3;
    Ok(vec![Measured::new(
        "handshakes_500_ms",
        "ms",
        Better::Less,
        milliseconds,
    )])
}

/// One peer, with a socket of its own.
struct Client {
    tunn: Tunn,
    socket: UdpSocket,
}

impl Client {
    fn new(n: u32, target: [u8; 32]) -> Result<Self> {
        let secret = x25519::StaticSecret::from(private(n));
        let address = Ipv4Addr::from(0xc612_0001 + n);
        let socket = UdpSocket::bind((address, 0))?;
        socket.connect(("192.0.2.1", PORT))?;
        socket.set_nonblocking(true)?;
        Ok(Self {
            tunn: Tunn::new(secret, target.into(), None, None, n, None),
            socket,
        })
    }

    fn begin(&mut self) -> Result<()> {
        let mut out = [0; 256];
        if let TunnResult::WriteToNetwork(message) = self.tunn.format_handshake_initiation(&mut out, true) {
            self.socket.send(message)?;
        }
        Ok(())
    }

    /// Whether the handshake is done. A cookie is answered at once, silence after five seconds.
    fn poll(&mut self, asked: &mut Instant) -> Result<bool> {
        let (mut message, mut out) = ([0; 256], [0; 256]);
        while let Ok(len) = self.socket.recv(&mut message) {
            match (message[0], self.tunn.decapsulate(None, &message[..len], &mut out)) {
                (2, TunnResult::WriteToNetwork(answer)) => {
                    self.socket.send(answer)?;
                    return Ok(true);
                }
                (3, _) => {
                    *asked = Instant::now();
                    self.begin()?;
                }
                _ => {}
            }
        }
        if asked.elapsed() > Duration::from_secs(5) {
            *asked = Instant::now();
            self.begin()?;
        }
        Ok(false)
    }
}
