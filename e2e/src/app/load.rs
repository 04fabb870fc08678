//! Much traffic from one process: numbered UDP packets and long TCP conversations, each counted.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    str::FromStr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::{
    flow::ask_for_report,
    pace::Pace,
    wire::{ECHO, FlowPacket, FlowReport, read_block, write_block},
};

/// How often packets are sent: those that are due, together.
const TICK: Duration = Duration::from_millis(1);
/// A conversation without an answer for this long has stalled.
const STALLED: Duration = Duration::from_secs(30);
/// How long the receiver is asked for its report.
const PATIENCE: Duration = Duration::from_secs(20);
/// A conversation needs little.
const STACK: usize = 256 << 10;

/// So much of something to an address: `10.0.0.1:8080@500`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Whom.
    pub to: SocketAddr,
    /// Packets per second, or connections.
    pub amount: u32,
}

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text
            .split_once('@')
            .and_then(|(to, amount)| Some((to.parse().ok()?, amount.parse().ok()?)));
        let (to, amount) = parsed.ok_or("write ADDRESS:PORT@AMOUNT")?;
        Ok(Self { to, amount })
    }
}

impl std::fmt::Display for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.to, self.amount)
    }
}

/// What `warren-lab-app load` takes.
#[derive(Debug, clap::Args)]
pub struct LoadArgs {
    /// Numbered UDP packets: how many per second to whom.
    #[arg(long, value_delimiter = ',')]
    pub flow: Vec<Share>,
    /// TCP conversations: how many with whom.
    #[arg(long, value_delimiter = ',')]
    pub tcp: Vec<Share>,
    /// Bytes of a packet's payload.
    #[arg(long, default_value_t = 200)]
    pub size: usize,
    /// Milliseconds between an answer and the next question.
    #[arg(long, default_value_t = 250)]
    pub interval: u64,
}

/// What became of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadReport {
    /// In the order of the arguments.
    pub flows: Vec<FlowReport>,
    /// Conversations.
    pub connections: u64,
    /// Questions that were answered in them.
    pub answers: u64,
    /// Conversations that broke: why.
    pub resets: Vec<String>,
}

/// Runs until stdin closes. Prints `ready` once every conversation has had an answer and packets flow.
pub fn load(args: &LoadArgs) -> Result<LoadReport> {
    let over = AtomicBool::new(false);
    let (answers, ready) = (AtomicU64::new(0), AtomicU64::new(0));
    let resets = Mutex::new(Vec::new());
    let wanted: u64 = args.tcp.iter().map(|share| u64::from(share.amount)).sum();
    let flows = thread::scope(|scope| -> Result<Vec<FlowReport>> {
        for share in &args.tcp {
            for _ in 0..share.amount {
                let talk = || {
                    let ended = conversation(share.to, args.interval, &over, &answers, &ready);
                    if let Err(error) = ended {
                        let mut resets = resets.lock().unwrap_or_else(PoisonError::into_inner);
                        resets.push(format!("{}: {error:#}", share.to));
                    }
                };
                thread::Builder::new()
                    .stack_size(STACK)
                    .spawn_scoped(scope, talk)
                    .context("no thread for a conversation")?;
            }
        }
        let sender = scope.spawn(|| send(&args.flow, args.size, &over));
        let broken = || !resets.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
        while ready.load(Ordering::Relaxed) < wanted && !broken() {
            thread::sleep(TICK);
        }
        println!("{}", crate::inside::READY);
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        over.store(true, Ordering::Relaxed);
        sender
            .join()
            .map_err(|_| anyhow::anyhow!("the sender panicked"))?
    })?;
    Ok(LoadReport {
        flows,
        connections: wanted,
        answers: answers.into_inner(),
        resets: resets.into_inner().unwrap_or_else(PoisonError::into_inner),
    })
}

struct Flow {
    share: Share,
    socket: UdpSocket,
    id: u64,
    pace: Pace,
    number: u64,
    refused: u64,
}

impl Flow {
    fn new(share: Share) -> Result<Self> {
        let any: IpAddr = if share.to.is_ipv4() {
            [0, 0, 0, 0].into()
        } else {
            [0u16; 8].into()
        };
        // Not connected: a bounced packet must not turn the next send into an error.
        let socket = UdpSocket::bind((any, 0)).context("cannot bind")?;
        let id = u64::from(std::process::id()) << 32 | u64::from(socket.local_addr()?.port());
        Ok(Self {
            share,
            socket,
            id,
            pace: Pace::new(share.amount.into()),
            number: 0,
            refused: 0,
        })
    }

    fn packet(&self, last: bool) -> FlowPacket {
        FlowPacket {
            flow: self.id,
            number: self.number,
            last,
        }
    }

    fn catch_up(&mut self, elapsed: Duration, size: usize) {
        while self.pace.take(elapsed) {
            let packet = self.packet(false).encode(size);
            self.refused += u64::from(self.socket.send_to(&packet, self.share.to).is_err());
            self.number += 1;
        }
    }

    fn report(&self) -> FlowReport {
        let report = ask_for_report(&self.socket, self.share.to, PATIENCE, self.packet(true));
        // Nobody answered: all are lost, which is the truth as far as anybody can see.
        let report = report.unwrap_or(FlowReport {
            sent: self.number,
            lost: self.number,
            ..FlowReport::default()
        });
        FlowReport {
            refused: self.refused,
            ..report
        }
    }
}

fn send(shares: &[Share], size: usize, over: &AtomicBool) -> Result<Vec<FlowReport>> {
    let mut flows = shares
        .iter()
        .map(|share| Flow::new(*share))
        .collect::<Result<Vec<_>>>()?;
    let start = Instant::now();
    while !over.load(Ordering::Relaxed) {
        for flow in &mut flows {
            flow.catch_up(start.elapsed(), size);
        }
        thread::sleep(TICK);
    }
    thread::scope(|scope| {
        let threads: Vec<_> = flows.iter().map(|flow| scope.spawn(|| flow.report())).collect();
        let reports = threads.into_iter().map(|thread| thread.join());
        reports
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| anyhow::anyhow!("a report panicked"))
    })
}

fn conversation(
    to: SocketAddr,
    interval: u64,
    over: &AtomicBool,
    answers: &AtomicU64,
    ready: &AtomicU64,
) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, STALLED).context("cannot connect")?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(STALLED))?;
    let mut request = ECHO.to_vec();
    write_block(&mut request, &[7; 600])?;
    let mut first = true;
    while !over.load(Ordering::Relaxed) {
        stream.write_all(&request).context("cannot send")?;
        read_block(&mut stream).context("no answer")?;
        read_block(&mut stream).context("the answer broke off")?;
        answers.fetch_add(1, Ordering::Relaxed);
        if std::mem::take(&mut first) {
            ready.fetch_add(1, Ordering::Relaxed);
        }
        thread::sleep(Duration::from_millis(interval));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_written_as_they_are_read() {
        for text in ["10.0.0.1:80@5", "[fd00::1]:8080@500"] {
            assert_eq!(text.parse::<Share>().unwrap().to_string(), text);
        }
        for bad in ["", "10.0.0.1:80", "10.0.0.1@5", "10.0.0.1:80@", "x@1"] {
            assert!(bad.parse::<Share>().is_err(), "{bad}");
        }
    }
}
