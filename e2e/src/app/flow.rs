//! Sequence-numbered UDP at a steady rate.

use std::{
    io::Read as _,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::{
    pace::Pace,
    wire::{FlowPacket, FlowReport},
};

/// What `warren-lab-app flow` takes.
#[derive(Debug, clap::Args)]
pub struct FlowArgs {
    /// Whom.
    #[arg(long)]
    pub to: SocketAddr,
    /// Packets per second.
    #[arg(long, default_value_t = 1000)]
    pub rate: u32,
    /// Stop after this many packets; without it, when stdin closes.
    #[arg(long)]
    pub count: Option<u64>,
    /// Bytes of payload.
    #[arg(long, default_value_t = 200)]
    pub size: usize,
    /// Milliseconds to ask the receiver for its report; without one, all count as lost.
    #[arg(long, default_value_t = 5000)]
    pub patience: u64,
}

/// How long after the first report missing packets may still arrive.
const STRAGGLERS: Duration = Duration::from_millis(1000);

/// Sends until stdin closes or `count` is reached, and returns what became of it.
pub fn run(args: &FlowArgs) -> Result<FlowReport> {
    let stop = Arc::new(AtomicBool::new(false));
    if args.count.is_none() {
        let stop = Arc::clone(&stop);
        thread::spawn(move || {
            let _ = std::io::stdin().read_to_end(&mut Vec::new());
            stop.store(true, Ordering::Relaxed);
        });
    }
    let count = args.count.unwrap_or(u64::MAX);
    let patience = Duration::from_millis(args.patience);
    send(args.to, args.rate, args.size, patience, |number| {
        number >= count || stop.load(Ordering::Relaxed)
    })
}

/// Sends `count` packets and returns what became of them.
pub fn send_count(to: SocketAddr, count: u64, rate: u32, size: usize) -> Result<FlowReport> {
    send(to, rate, size, Duration::from_secs(5), |number| number >= count)
}

fn send(
    to: SocketAddr,
    rate: u32,
    size: usize,
    patience: Duration,
    mut done: impl FnMut(u64) -> bool,
) -> Result<FlowReport> {
    ensure!(rate > 0, "a rate of 0 sends nothing: give --rate 1 or more");
    let any: IpAddr = if to.is_ipv4() {
        [0, 0, 0, 0].into()
    } else {
        [0u16; 8].into()
    };
    // Not connected: a bounced packet must not turn the next send into an error.
    let socket = UdpSocket::bind((any, 0)).context("cannot bind")?;
    let flow = u64::from(std::process::id()) << 32 | u64::from(socket.local_addr()?.port());
    let (start, mut number, mut refused) = (Instant::now(), 0, 0);
    let mut pace = Pace::new(rate.into());
    while !done(number) {
        if !pace.take(start.elapsed()) {
            thread::sleep(pace.next().saturating_sub(start.elapsed()));
            continue;
        }
        if socket
            .send_to(
                &FlowPacket {
                    flow,
                    number,
                    last: false,
                }
                .encode(size),
                to,
            )
            .is_err()
        {
            refused += 1;
        }
        number += 1;
    }
    let report = ask_for_report(
        &socket,
        to,
        patience,
        FlowPacket {
            flow,
            number,
            last: true,
        },
    );
    // Nobody answered: all are lost, which is the truth as far as anybody can see.
    let report = report.unwrap_or(FlowReport {
        sent: number,
        lost: number,
        ..FlowReport::default()
    });
    Ok(FlowReport { refused, ..report })
}

pub(super) fn ask_for_report(
    socket: &UdpSocket,
    to: SocketAddr,
    patience: Duration,
    packet: FlowPacket,
) -> Option<FlowReport> {
    let start = Instant::now();
    let (mut best, mut first): (Option<FlowReport>, Option<Instant>) = (None, None);
    let mut buffer = [0; 2048];
    socket.set_read_timeout(Some(Duration::from_millis(50))).ok()?;
    while start.elapsed() < patience && first.is_none_or(|first| first.elapsed() < STRAGGLERS) {
        let _ = socket.send_to(&packet.encode(0), to);
        let Ok((length, from)) = socket.recv_from(&mut buffer) else {
            continue;
        };
        if from.ip() != to.ip() {
            continue;
        }
        if let Ok(report) = serde_json::from_slice::<FlowReport>(&buffer[..length]) {
            first.get_or_insert_with(Instant::now);
            let complete = report.lost == 0;
            best = Some(report);
            if complete {
                break;
            }
        }
    }
    best
}
