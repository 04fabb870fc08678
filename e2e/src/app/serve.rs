//! The server of every pod: TCP, HTTP and UDP on one port number, answering with the pod's own name.

use std::{
    collections::HashMap,
    io::{self, BufRead as _, BufReader, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};

use super::wire::{ECHO, FlowPacket, FlowReport, TransferReport, XFER, pattern, read_block, write_block};

/// A silent client is given up after this long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Starts serving at an address, TCP and UDP, in threads; returns when both listen.
pub fn start(name: &str, address: SocketAddr) -> Result<()> {
    let tcp = TcpListener::bind(address).with_context(|| format!("cannot listen on tcp {address}"))?;
    let udp = UdpSocket::bind(address).with_context(|| format!("cannot listen on udp {address}"))?;
    // A machine under load may not run us for a while: what arrives meanwhile is not lost.
    setsockopt(&udp, RcvBufForce, &(8 << 20)).context("cannot enlarge the receive buffer")?;
    let (tcp_name, udp_name) = (name.to_owned(), name.to_owned());
    thread::spawn(move || {
        for stream in tcp.incoming().flatten() {
            let name = tcp_name.clone();
            thread::spawn(move || {
                if let Err(error) = serve_tcp(&name, &stream)
                    && error.kind() != io::ErrorKind::UnexpectedEof
                {
                    eprintln!("{name}: connection: {error}");
                }
            });
        }
    });
    thread::spawn(move || serve_udp(&udp_name, &udp));
    Ok(())
}

fn serve_tcp(name: &str, stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let (mut input, mut output) = (BufReader::new(stream), stream);
    loop {
        let mut verb = [0; 4];
        input.read_exact(&mut verb)?;
        match &verb {
            verb if verb == ECHO => {
                let payload = read_block(&mut input)?;
                write_block(&mut output, name.as_bytes())?;
                write_block(&mut output, &payload)?;
            }
            verb if verb == XFER => {
                let report = receive_transfer(name, &mut input)?;
                let text = serde_json::to_vec(&report)?;
                write_block(&mut output, &text)?;
            }
            b"GET " | b"POST" | b"HEAD" => return serve_http(name, &mut input, &mut output),
            _ => return Err(io::Error::other("unknown request")),
        }
    }
}

fn serve_http(name: &str, input: &mut impl io::BufRead, output: &mut impl Write) -> io::Result<()> {
    let mut line = String::new();
    loop {
        line.clear();
        if input.take(16 << 10).read_line(&mut line)? == 0 || line.trim_end().is_empty() {
            break;
        }
    }
    let body = format!("{name}\n");
    write!(
        output,
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

fn receive_transfer(name: &str, input: &mut impl Read) -> io::Result<TransferReport> {
    let mut length = [0; 8];
    input.read_exact(&mut length)?;
    let length = u64::from_be_bytes(length);
    let (mut bytes, mut corrupt_at, mut buffer) = (0u64, None, vec![0; 64 << 10]);
    while bytes < length {
        let want = buffer
            .len()
            .min(usize::try_from(length - bytes).unwrap_or(usize::MAX));
        let got = input.read(&mut buffer[..want])?;
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if corrupt_at.is_none() {
            corrupt_at = (bytes..)
                .zip(&buffer[..got])
                .find(|(at, byte)| pattern(*at) != **byte)
                .map(|(at, _)| at);
        }
        bytes += got as u64;
    }
    Ok(TransferReport {
        receiver: name.into(),
        bytes,
        corrupt_at,
    })
}

/// Echoes with the name in front; flow packets are counted instead, per sender and flow.
fn serve_udp(name: &str, socket: &UdpSocket) {
    let mut flows: HashMap<(IpAddr, u64), Tracker> = HashMap::new();
    let mut buffer = vec![0; 66_000];
    loop {
        let (length, from) = match socket.recv_from(&mut buffer) {
            Ok(packet) => packet,
            // An earlier answer bounced; the next packet is still to come.
            Err(error) => {
                eprintln!("{name}: udp: {error}");
                continue;
            }
        };
        let packet = &buffer[..length];
        let answer = match FlowPacket::decode(packet) {
            Some(FlowPacket {
                flow,
                number,
                last: false,
            }) => {
                flows
                    .entry((from.ip(), flow))
                    .or_default()
                    .arrived(number, Instant::now());
                continue;
            }
            Some(FlowPacket {
                flow,
                number,
                last: true,
            }) => {
                let report = flows.entry((from.ip(), flow)).or_default().report(number, name);
                serde_json::to_vec(&report).unwrap_or_default()
            }
            None => [name.as_bytes(), b"\n", packet].concat(),
        };
        if let Err(error) = socket.send_to(&answer, from) {
            eprintln!("{name}: udp answer to {from}: {error}");
        }
    }
}

/// Which packets of a flow have arrived.
#[derive(Debug, Default)]
struct Tracker {
    seen: Vec<u64>,
    received: u64,
    duplicated: u64,
    reordered: u64,
    highest: Option<u64>,
    last: Option<Instant>,
    longest_gap: Duration,
}

impl Tracker {
    /// Numbers beyond are no honest sender's: the table stays small.
    const LIMIT: u64 = 1 << 26;
    /// How many runs of lost packets a report names.
    const RUNS: usize = 8;

    fn arrived(&mut self, number: u64, now: Instant) {
        if number >= Self::LIMIT {
            return;
        }
        let (word, bit) = ((number / 64) as usize, 1 << (number % 64));
        if self.seen.len() <= word {
            self.seen.resize(word + 1, 0);
        }
        if self.seen[word] & bit != 0 {
            self.duplicated += 1;
            return;
        }
        self.seen[word] |= bit;
        self.received += 1;
        if self.highest.is_some_and(|highest| number < highest) {
            self.reordered += 1;
        }
        self.highest = self.highest.max(Some(number));
        if let Some(last) = self.last {
            self.longest_gap = self.longest_gap.max(now - last);
        }
        self.last = Some(now);
    }

    /// The first runs of numbers below `sent` that have not been seen: where in a flow packets were lost often says why.
    fn lost_runs(&self, sent: u64) -> Vec<(u64, u64)> {
        let seen = |number: u64| {
            let word = self.seen.get((number / 64) as usize);
            word.is_some_and(|word| word & (1 << (number % 64)) != 0)
        };
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for number in (0..sent.min(Self::LIMIT)).filter(|number| !seen(*number)) {
            if let Some((_, last)) = runs.last_mut()
                && *last + 1 == number
            {
                *last = number;
            } else if runs.len() < Self::RUNS {
                runs.push((number, number));
            } else {
                break;
            }
        }
        runs
    }

    fn report(&self, sent: u64, receiver: &str) -> FlowReport {
        FlowReport {
            sent,
            refused: 0,
            received: self.received,
            lost: sent.saturating_sub(self.received),
            lost_runs: self.lost_runs(sent),
            duplicated: self.duplicated,
            reordered: self.reordered,
            longest_gap_ms: self.longest_gap.as_millis() as u64,
            receiver: receiver.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tracker_counts_lost_duplicated_and_reordered_packets() {
        let mut tracker = Tracker::default();
        let start = Instant::now();
        for (at, number) in [(0, 0), (1, 1), (9, 3), (10, 2), (11, 2), (12, 70)] {
            tracker.arrived(number, start + Duration::from_millis(at));
        }
        let report = tracker.report(72, "pod");
        let expected = FlowReport {
            sent: 72,
            received: 5,
            lost: 67,
            lost_runs: vec![(4, 69), (71, 71)],
            duplicated: 1,
            reordered: 1,
            longest_gap_ms: 8,
            receiver: "pod".into(),
            ..FlowReport::default()
        };
        assert_eq!(report, expected);
    }

    #[test]
    fn absurd_numbers_do_not_exhaust_memory() {
        let mut tracker = Tracker::default();
        tracker.arrived(u64::MAX, Instant::now());
        assert!(tracker.seen.is_empty());
    }

    #[test]
    fn one_port_speaks_all_protocols() {
        // A port of the loopback that is free now; the server binds TCP and UDP to the same number.
        let port = UdpSocket::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        start("me", address).unwrap();
        let timeout = Duration::from_secs(10);
        for protocol in [
            super::super::ask::Protocol::Tcp,
            super::super::ask::Protocol::Udp,
            super::super::ask::Protocol::Http,
        ] {
            let answer = super::super::ask::ask(protocol, address, None, 3000, timeout).unwrap();
            assert_eq!(answer.name, "me", "{protocol:?}");
        }
        let report = super::super::transfer::transfer(address, 1 << 20, timeout).unwrap();
        assert_eq!(
            report,
            TransferReport {
                receiver: "me".into(),
                bytes: 1 << 20,
                corrupt_at: None
            }
        );
        let report = super::super::flow::send_count(address, 500, 10_000, 64).unwrap();
        assert_eq!(
            (report.sent, report.lost, report.receiver.as_str()),
            (500, 0, "me")
        );
    }
}
