//! What an engine does with datagrams that nobody honest sends.

use std::{
    collections::HashMap,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use crate::support::{
    self, Engine, Lab, PORT, peer_line, public,
    traffic::{Flow, ping, udp_echo, within},
    until,
};
use anyhow::{Context as _, Result, ensure};
use boringtun::{
    noise::{Tunn, TunnResult},
    x25519,
};

/// A deterministic source of numbers: failures can be repeated.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        // xorshift64 (Marsaglia, 2003)
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[test]
fn garbage_and_truncated_messages_are_counted_and_change_nothing() -> Result<()> {
    garbage(Engine::warren())
}

#[test]
fn garbage_and_truncated_messages_are_counted_and_change_nothing_with_boringtun() -> Result<()> {
    garbage(Engine::warren_boringtun())
}

fn garbage(engine: Engine) -> Result<()> {
    let lab = Lab::new([engine.clone(), engine.clone(), engine])?;
    lab.mesh(false)?;
    let [target, friend, attacker] = &lab.nodes[..] else {
        unreachable!()
    };
    ping(target, friend.inner_v4(), 56)?;
    let flow = Flow::start(friend, target, target.inner_v4(), 500, 100)?;
    let sent = support::traffic::join(within(attacker, || {
        let mut numbers = Numbers(0x5eed);
        let mut count = 0u64;
        for to in ["192.0.2.1", "2001:db8::1"] {
            let to: SocketAddr = SocketAddr::new(to.parse()?, PORT);
            let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
            for round in 0..4000u64 {
                // All message types and one beyond, at and around their exact sizes, and any size at all.
                let exact = [148, 92, 64, 32, 16, 4, 0][(round % 7) as usize];
                let len = match round % 3 {
                    0 => exact,
                    1 => (exact + (numbers.next() % 5) as usize).saturating_sub(2),
                    _ => (numbers.next() % 1400) as usize,
                };
                let mut bytes: Vec<u8> = (0..len).map(|_| numbers.next() as u8).collect();
                if round % 4 != 3 {
                    for (place, byte) in bytes.iter_mut().take(4).enumerate() {
                        *byte = if place == 0 { (round % 6) as u8 } else { 0 };
                    }
                }
                socket.send_to(&bytes, to)?;
                count += 1;
                if round % 50 == 0 {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
        Ok(count)
    }))?;
    until("every bad datagram is counted", || {
        let mut drops = 0;
        for reason in [
            "malformed",
            "unknown-index",
            "unknown-peer",
            "no-session",
            "handshake-refused",
            "not-authentic",
        ] {
            drops += target.drops(reason)?;
        }
        Ok(drops >= sent)
    })?;
    let figures = flow.finish()?;
    ensure!(figures.lost == 0 && figures.duplicated == 0, "{figures:?}");
    ensure!(target.get_all("endpoint")?.contains(&friend.outer(false)));
    udp_echo(target, friend, friend.inner_v6(), 1000)
}

/// Forwards datagrams between two nodes and adds hostile ones.
struct Relay {
    stop: Arc<AtomicBool>,
    /// Counts up when the relay shall use another port towards node 1.
    hop: Arc<AtomicU64>,
    thread: JoinHandle<Result<()>>,
}

/// The address that the nodes take for each other's.
const RELAY: &str = "192.0.2.200";

impl Relay {
    /// In the namespace of node 3, which no longer has an engine's work to do.
    fn start(lab: &Lab) -> Result<Self> {
        let host = &lab.nodes[2];
        host.namespace.ip(&format!("addr add {RELAY}/24 dev eth0"))?;
        let (stop, hop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (ended, hops) = (Arc::clone(&stop), Arc::clone(&hop));
        let thread = within(host, move || relay(&ended, &hops));
        Ok(Self { stop, hop, thread })
    }

    fn finish(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        support::traffic::join(self.thread)
    }
}

fn relay(stop: &AtomicBool, hop: &AtomicU64) -> Result<()> {
    let open = |port: u16| -> Result<UdpSocket> {
        let socket = UdpSocket::bind((RELAY, port))?;
        socket.set_read_timeout(Some(Duration::from_millis(1)))?;
        Ok(socket)
    };
    let nodes: [SocketAddr; 2] = ["192.0.2.1:51871".parse()?, "192.0.2.2:51871".parse()?];
    // What faces node 1, what faces node 2, and an unrelated address that hostile copies come from.
    let mut faces = [open(40_000)?, open(40_500)?];
    let other = open(41_000)?;
    let mut hops = 0;
    let mut numbers = Numbers(0xbad);
    let mut buffer = [0; 2048];
    while !stop.load(Ordering::Relaxed) {
        if hop.load(Ordering::Relaxed) != hops {
            hops = hop.load(Ordering::Relaxed);
            faces[0] = open(40_000 + hops as u16)?;
        }
        for (from, to) in [(0, 1), (1, 0)] {
            while let Ok((len, sender)) = faces[from].recv_from(&mut buffer) {
                if sender != nodes[from] {
                    continue;
                }
                let message = &mut buffer[..len];
                faces[to].send_to(message, nodes[to])?;
                let _ = faces[from].set_nonblocking(true);
                match numbers.next() % 4 {
                    // Again, from the right place and from another.
                    0 => {
                        faces[to].send_to(message, nodes[to])?;
                        other.send_to(message, nodes[to])?;
                    }
                    // Cut short, from another place.
                    1 => {
                        other.send_to(&message[..(numbers.next() as usize) % len], nodes[to])?;
                    }
                    // One bit changed, from another place.
                    2 => {
                        let bit = (numbers.next() as usize) % (len * 8);
                        message[bit / 8] ^= 1 << (bit % 8);
                        other.send_to(message, nodes[to])?;
                    }
                    _ => {}
                }
            }
            faces[from].set_nonblocking(false)?;
            faces[from].set_read_timeout(Some(Duration::from_millis(1)))?;
        }
    }
    Ok(())
}

#[test]
fn replays_forgeries_and_roaming() -> Result<()> {
    replays(Engine::warren())
}

#[test]
fn replays_forgeries_and_roaming_with_boringtun() -> Result<()> {
    replays(Engine::warren_boringtun())
}

fn replays(engine: Engine) -> Result<()> {
    let lab = Lab::new([engine.clone(), engine.clone(), engine])?;
    let [a, b, _] = &lab.nodes[..] else { unreachable!() };
    lab.mesh(false)?;
    let relay = Relay::start(&lab)?;
    a.must_set(&format!("{}endpoint={RELAY}:40000\n", peer_line(&b.key)))?;
    b.must_set(&format!("{}endpoint={RELAY}:40500\n", peer_line(&a.key)))?;
    let peers_endpoint = || -> Result<Option<String>> {
        let answer = a.raw(b"get=1\n\n")?;
        let key = peer_line(&b.key);
        let peer = answer
            .split(key.trim())
            .nth(1)
            .context("node 2 is no peer of node 1")?;
        Ok(peer
            .lines()
            .find_map(|line| line.strip_prefix("endpoint="))
            .map(str::to_owned))
    };
    ping(a, b.inner_v4(), 56)?;
    let flows = [
        Flow::start(a, b, b.inner_v4(), 300, 200)?,
        Flow::start(b, a, a.inner_v6(), 300, 200)?,
    ];
    let rekeys = a.handshakes()?;
    for round in 1..=5 {
        let arrived = flows[1].received();
        until("more traffic", || Ok(flows[1].received() > arrived + 100))?;
        // Handshakes are replayed and forged as well.
        a.control("rekey warren0")?;
        ensure!(peers_endpoint()?.is_some_and(|endpoint| endpoint.starts_with(&format!("{RELAY}:400"))));
        relay.hop.store(round, Ordering::Relaxed);
        let moved = format!("{RELAY}:{}", 40_000 + round);
        until("node 1 follows node 2", || {
            Ok(peers_endpoint()? == Some(moved.clone()))
        })?;
    }
    let mut counts = HashMap::new();
    for flow in flows {
        let name = flow.name.clone();
        let figures = flow.finish()?;
        ensure!(figures.duplicated == 0, "{name}: {figures:?}");
        // A socket that the relay closes takes what was under way to it along.
        ensure!(figures.lost < 100, "{name}: {figures:?}");
        counts.insert(name, figures);
    }
    relay.finish()?;
    ensure!(
        a.handshakes()? >= rekeys + 5,
        "handshakes completed among forged ones"
    );
    for node in [a, b] {
        for reason in ["replayed", "not-authentic", "malformed"] {
            ensure!(
                node.drops(reason)? > 0,
                "node {}: no {reason}; {counts:?}",
                node.number
            );
        }
    }
    Ok(())
}

/// A handshake initiation that knows the target's public key.
fn initiation(secret: &x25519::StaticSecret, target: [u8; 32], index: u32) -> (Tunn, Vec<u8>) {
    let mut tunn = Tunn::new(secret.clone(), target.into(), None, None, index, None);
    let mut out = [0; 256];
    let TunnResult::WriteToNetwork(message) = tunn.format_handshake_initiation(&mut out, true) else {
        panic!("no initiation")
    };
    let message = message.to_vec();
    (tunn, message)
}

#[test]
fn a_flood_of_handshakes_is_answered_with_cookies_and_peers_get_through() -> Result<()> {
    flood(Engine::warren())
}

#[test]
fn a_flood_of_handshakes_is_answered_with_cookies_and_peers_get_through_with_boringtun() -> Result<()> {
    flood(Engine::warren_boringtun())
}

fn flood(engine: Engine) -> Result<()> {
    let lab = Lab::new([engine.clone(), engine.clone(), engine])?;
    lab.mesh(false)?;
    let [target, friend, attacker] = &lab.nodes[..] else {
        unreachable!()
    };
    ping(target, friend.inner_v4(), 56)?;
    let key = *public(&target.key).as_bytes();
    let flow = Flow::start(friend, target, target.inner_v4(), 500, 100)?;
    let stop = Arc::new(AtomicBool::new(false));
    let ended = Arc::clone(&stop);
    let flood = within(attacker, move || {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_nonblocking(true)?;
        let messages: Vec<_> = (1..=300u32)
            .map(|n| {
                let mut bytes = [7; 32];
                bytes[..4].copy_from_slice(&n.to_le_bytes());
                initiation(&x25519::StaticSecret::from(bytes), key, n).1
            })
            .collect();
        let (mut cookies, mut answers, mut buffer) = (0u64, 0u64, [0; 256]);
        while !ended.load(Ordering::Relaxed) {
            for message in &messages {
                socket.send_to(message, "192.0.2.1:51871")?;
                while let Ok(len) = socket.recv(&mut buffer) {
                    match (buffer[0], len) {
                        (3, 64) => cookies += 1,
                        _ => answers += 1,
                    }
                }
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok((cookies, answers))
    });
    // Several rounds of the flood, so that answers to the first are read.
    until("the target is under load", || {
        Ok(target.drops("under-load")? > 500)
    })?;
    // A friend's new handshake needs a cookie, and gets one.
    let handshakes = target.handshakes()?;
    friend.control("rekey warren0")?;
    until("the friend's handshake", || Ok(target.handshakes()? > handshakes))?;
    stop.store(true, Ordering::Relaxed);
    let (cookies, answers) = support::traffic::join(flood)?;
    ensure!(
        cookies > 100 && answers == 0,
        "{cookies} cookies, {answers} other answers"
    );
    ensure!(
        target.drops("unknown-peer")? > 0,
        "those below the limit are judged by their key"
    );
    let figures = flow.finish()?;
    ensure!(figures.lost == 0, "{figures:?}");
    Ok(())
}

/// An IPv4 datagram from any address (RFC 791, RFC 768 without a checksum).
fn spoofed(source: [u8; 4], to: [u8; 4], port: u16, content: &[u8]) -> Vec<u8> {
    let (udp, total) = (8 + content.len() as u16, 28 + content.len() as u16);
    let mut packet = vec![0x45, 0];
    packet.extend(total.to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    packet.extend(source);
    packet.extend(to);
    for field in [port, PORT, udp, 0] {
        packet.extend(field.to_be_bytes());
    }
    packet.extend(content);
    packet
}

fn memory_kib(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line
        .and_then(|line| line.split_whitespace().next())
        .context("no VmRSS")?;
    Ok(number.parse()?)
}

/// Sources that do not exist, each once: nothing of them is remembered, and who is real gets through, in both roles.
#[test]
fn a_flood_from_many_sources_is_forgotten() -> Result<()> {
    let lab = Lab::new([Engine::warren(), Engine::warren(), Engine::warren()])?;
    lab.mesh(false)?;
    let [target, friend, attacker] = &lab.nodes[..] else {
        unreachable!()
    };
    // Answers find a way, and end there.
    target
        .namespace
        .ip("route add 198.18.0.0/15 via 192.0.2.3 dev eth0")?;
    ping(target, friend.inner_v4(), 56)?;
    ping(target, attacker.inner_v4(), 56)?;
    let flow = Flow::start(friend, target, target.inner_v4(), 500, 100)?;
    let key = *public(&target.key).as_bytes();
    let stop = Arc::new(AtomicBool::new(false));
    let ended = Arc::clone(&stop);
    let sent = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&sent);
    let flood = within(attacker, move || {
        use nix::sys::socket::{
            AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket,
        };
        let socket = socket(
            AddressFamily::Inet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::Raw,
        )?;
        let (_, message) = initiation(&x25519::StaticSecret::from([7; 32]), key, 1);
        let to = SockaddrIn::new(192, 0, 2, 1, 0);
        let mut n = 0u32;
        while !ended.load(Ordering::Relaxed) {
            for _ in 0..100 {
                let [_, b, c, d] = n.to_be_bytes();
                let packet = spoofed(
                    [198, 18 + (b & 1), c, d],
                    [192, 0, 2, 1],
                    1024 + n as u16 / 2,
                    &message,
                );
                let fd = std::os::fd::AsRawFd::as_raw_fd(&socket);
                // A full queue is the flood's loss.
                let _ = sendto(fd, &packet, &to, MsgFlags::empty());
                n += 1;
                counted.fetch_add(1, Ordering::Relaxed);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    });
    until("the target is under load", || {
        Ok(target.drops("under-load")? > 2000)
    })?;
    let memory = memory_kib(target.pid())?;
    for node in [friend, target] {
        let done = [target.handshakes()?, friend.handshakes()?];
        node.control("rekey warren0")?;
        until("a new handshake in the flood", || {
            Ok(target.handshakes()? > done[0] && friend.handshakes()? > done[1])
        })?;
    }
    until("a flood of 20,000", || Ok(sent.load(Ordering::Relaxed) > 20_000))?;
    let grown = memory_kib(target.pid())?.saturating_sub(memory);
    stop.store(true, Ordering::Relaxed);
    support::traffic::join(flood)?;
    ensure!(grown < 2048, "{grown} KiB more than before");
    let figures = flow.finish()?;
    ensure!(figures.lost == 0, "{figures:?}");
    Ok(())
}
