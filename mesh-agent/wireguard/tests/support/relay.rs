//! A bad network between two nodes: a relay on the underlay, which nodes 1 and 2 take for each other, and which delays,
//! loses, doubles and reorders datagrams. What happens to a datagram depends on the seed, its direction and its number
//! alone: two runs with one seed treat the same numbers alike.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    net::{SocketAddr, UdpSocket},
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    poll::{PollFd, PollFlags, ppoll},
    sys::{
        signal::SigSet,
        socket::{setsockopt, sockopt},
        time::{TimeSpec, TimeValLike as _},
    },
};

use super::{Lab, Node, PATIENCE, PORT, peer_line, traffic::join};

/// The relay's address, and its ports: what faces node 1, what faces node 2.
const ADDRESS: &str = "192.0.2.200";
const FACES: [u16; 2] = [40_001, 40_002];

/// Bytes of the relay's socket buffers, and datagrams that may be under way; more are lost.
const BUFFER: usize = 16 << 20;
const UNDER_WAY: usize = 100_000;

/// What happens to datagrams. Shares are of a million.
#[derive(Debug, Clone, Copy, Default)]
pub struct Impairment {
    pub seed: u64,
    /// One way.
    pub delay: Duration,
    pub lost: u64,
    pub doubled: u64,
    /// These are sent `held` later than others.
    pub reordered: u64,
    pub held: Duration,
}

/// What a relay did, both directions together.
#[derive(Debug, Default)]
pub struct Done {
    pub passed: AtomicU64,
    pub lost: AtomicU64,
    pub doubled: AtomicU64,
    pub reordered: AtomicU64,
}

/// A running relay.
pub struct Relay {
    stop: Arc<AtomicBool>,
    done: Arc<Done>,
    thread: JoinHandle<Result<()>>,
}

impl Relay {
    /// Starts it in the lab's underlay.
    pub fn start(lab: &Lab, impairment: Impairment) -> Result<Self> {
        lab.underlay_ip(&format!("addr replace {ADDRESS}/24 dev br0"))?;
        let enter = lab.enter_underlay();
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(Done::default()));
        let (ended, counts) = (Arc::clone(&stop), Arc::clone(&done));
        let (ready, started) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            enter()?;
            let faces = [open(FACES[0])?, open(FACES[1])?];
            ready.send(())?;
            relay(&faces, impairment, &counts, &ended)
        });
        started
            .recv_timeout(PATIENCE)
            .context("the relay did not start")?;
        Ok(Self { stop, done, thread })
    }

    /// Makes the nodes peers of each other, by way of the relay.
    pub fn mesh(lab: &Lab) -> Result<()> {
        let [a, b] = &lab.nodes[..2] else { unreachable!() };
        let peer = |node: &Node, other: &Node, face: u16| {
            let [v4, v6] = other.prefixes();
            node.must_set(&format!(
                "{}endpoint={ADDRESS}:{face}\nallowed_ip={v4}\nallowed_ip={v6}\n",
                peer_line(&other.key)
            ))
        };
        a.set_device()?;
        b.set_device()?;
        peer(a, b, FACES[0])?;
        peer(b, a, FACES[1])
    }

    pub fn done(&self) -> &Done {
        &self.done
    }

    /// Ends it; what is under way is lost.
    pub fn finish(self) -> Result<Arc<Done>> {
        self.stop.store(true, Ordering::Relaxed);
        join(self.thread)?;
        Ok(self.done)
    }
}

fn open(port: u16) -> Result<UdpSocket> {
    let socket = UdpSocket::bind((ADDRESS, port))?;
    socket.set_nonblocking(true)?;
    setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)?;
    setsockopt(&socket, sockopt::SndBufForce, &BUFFER)?;
    Ok(socket)
}

/// A datagram that leaves by `face` at `due`. Ordered by when it leaves, then by when it came.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Waiting {
    due: Instant,
    number: u64,
    face: usize,
    bytes: Vec<u8>,
}

fn relay(faces: &[UdpSocket; 2], impairment: Impairment, done: &Done, stop: &AtomicBool) -> Result<()> {
    let nodes: [SocketAddr; 2] = [
        format!("192.0.2.1:{PORT}").parse()?,
        format!("192.0.2.2:{PORT}").parse()?,
    ];
    let mut fates = [1, 2].map(|direction: u64| Fates(impairment.seed.wrapping_mul(2) + direction));
    let (mut waiting, mut number, mut buffer) = (BinaryHeap::new(), 0u64, vec![0; 65_536]);
    while !stop.load(Ordering::Relaxed) {
        let now = Instant::now();
        for from in [0, 1] {
            while let Ok((len, sender)) = faces[from].recv_from(&mut buffer) {
                if sender != nodes[from] {
                    continue;
                }
                let mut due = now + impairment.delay;
                let fates = &mut fates[from];
                let (lost, doubled, reordered) = (
                    fates.hits(impairment.lost),
                    fates.hits(impairment.doubled),
                    fates.hits(impairment.reordered),
                );
                if lost || waiting.len() >= UNDER_WAY {
                    done.lost.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                if reordered {
                    due += impairment.held;
                    done.reordered.fetch_add(1, Ordering::Relaxed);
                }
                done.doubled.fetch_add(doubled.into(), Ordering::Relaxed);
                for _ in 0..=u8::from(doubled) {
                    number += 1;
                    waiting.push(Reverse(Waiting {
                        due,
                        number,
                        face: 1 - from,
                        bytes: buffer[..len].to_vec(),
                    }));
                }
            }
        }
        let now = Instant::now();
        while waiting.peek().is_some_and(|Reverse(next)| next.due <= now) {
            let Some(Reverse(next)) = waiting.pop() else { break };
            match faces[next.face].send_to(&next.bytes, nodes[next.face]) {
                Ok(_) => done.passed.fetch_add(1, Ordering::Relaxed),
                Err(_) => done.lost.fetch_add(1, Ordering::Relaxed),
            };
        }
        let until = waiting.peek().map_or(Duration::from_millis(20), |Reverse(next)| {
            next.due.saturating_duration_since(Instant::now())
        });
        let mut fds = faces
            .each_ref()
            .map(|face| PollFd::new(face.as_fd(), PollFlags::POLLIN));
        let timeout = TimeSpec::nanoseconds(until.min(Duration::from_millis(20)).as_nanos() as i64);
        // An interruption is as good as a time-out.
        let _ = ppoll(&mut fds, Some(timeout), Some(SigSet::empty()));
    }
    Ok(())
}

/// Numbers of one direction (splitmix64, Steele et al., 2014).
struct Fates(u64);

impl Fates {
    /// Whether it is one of so many in a million.
    fn hits(&mut self, share: u64) -> bool {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % 1_000_000 < share
    }
}
