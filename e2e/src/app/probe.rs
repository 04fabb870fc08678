//! Many questions at once: some must be answered, the others must meet silence.
//!
//! Silence cannot be waited for. What is allowed is asked together with what is denied, and is its control: once it
//! has been answered, the way is known to work, and what was sent at the same time should have arrived long ago.

use std::{
    fmt,
    io::ErrorKind,
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    str::FromStr,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::{
    ask::{Protocol, ask},
    ping::{PingArgs, ping},
};

/// How long silence must last after every control was answered.
const HOLD: Duration = Duration::from_millis(300);
/// How long it must last without a control: longer than a connection's first retransmission (1 s, RFC 6298).
const ALONE: Duration = Duration::from_millis(1300);
/// One attempt to get through.
const ATTEMPT: Duration = Duration::from_millis(100);

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Target {
    /// A server, by the lab's protocol over TCP.
    Tcp(SocketAddr),
    /// A server, by a datagram.
    Udp(SocketAddr),
    /// A host, by ICMP echo.
    Icmp(IpAddr),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(to) => write!(f, "tcp:{to}"),
            Self::Udp(to) => write!(f, "udp:{to}"),
            Self::Icmp(to) => write!(f, "icmp:{to}"),
        }
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fault =
            || format!("{text:?} is no target: write tcp:ADDRESS:PORT, udp:ADDRESS:PORT or icmp:ADDRESS");
        let (kind, to) = text.split_once(':').ok_or_else(fault)?;
        match kind {
            "tcp" => to.parse().map(Self::Tcp).map_err(|_| fault()),
            "udp" => to.parse().map(Self::Udp).map_err(|_| fault()),
            "icmp" => to.parse().map(Self::Icmp).map_err(|_| fault()),
            _ => Err(fault()),
        }
    }
}

impl TryFrom<String> for Target {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Target> for String {
    fn from(target: Target) -> Self {
        target.to_string()
    }
}

/// What `warren-lab-app probe` takes.
#[derive(Debug, clap::Args)]
pub struct ProbeArgs {
    /// Must be answered: tcp:ADDRESS:PORT, udp:ADDRESS:PORT or icmp:ADDRESS.
    #[arg(long, value_delimiter = ',')]
    pub allow: Vec<Target>,
    /// Should meet silence.
    #[arg(long, value_delimiter = ',')]
    pub deny: Vec<Target>,
    /// Milliseconds to wait for what must be answered.
    #[arg(long, default_value_t = 5000)]
    pub timeout: u64,
}

/// What became of a question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Outcome {
    /// Answered, by this name (empty for ICMP).
    Answered(String),
    /// Something came back that says no: a reset, an ICMP error.
    Refused(String),
    /// Nothing came back.
    Silent,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answered(name) => write!(f, "answered by {name:?}"),
            Self::Refused(why) => write!(f, "refused: {why}"),
            Self::Silent => f.write_str("silence"),
        }
    }
}

/// A question and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probed {
    /// The question.
    pub target: Target,
    /// What became of it.
    pub outcome: Outcome,
}

/// Asks all at once.
pub fn probe(args: &ProbeArgs) -> Result<Vec<Probed>> {
    let timeout = Duration::from_millis(args.timeout);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let denied: Vec<_> = args
            .deny
            .iter()
            .map(|target| scope.spawn(|| insist(*target, &over)))
            .collect();
        let allowed: Vec<_> = args
            .allow
            .iter()
            .map(|target| scope.spawn(move || once(*target, timeout)))
            .collect();
        let mut probed = Vec::new();
        for (target, thread) in args.allow.iter().zip(allowed) {
            probed.push(join(*target, thread)?);
        }
        let controlled =
            !probed.is_empty() && probed.iter().all(|p| matches!(p.outcome, Outcome::Answered(_)));
        if !denied.is_empty() {
            thread::sleep(if controlled { HOLD } else { ALONE });
        }
        over.store(true, Ordering::Relaxed);
        for (target, thread) in args.deny.iter().zip(denied) {
            probed.push(join(*target, thread)?);
        }
        Ok(probed)
    })
}

fn join(target: Target, thread: thread::ScopedJoinHandle<'_, Result<Outcome>>) -> Result<Probed> {
    let outcome = thread.join().map_err(|_| anyhow::anyhow!("a probe panicked"))?;
    Ok(Probed {
        target,
        outcome: outcome.with_context(|| target.to_string())?,
    })
}

/// Asks until there is an answer or the time is over.
fn once(target: Target, timeout: Duration) -> Result<Outcome> {
    let (protocol, to) = match target {
        Target::Tcp(to) => (Protocol::Tcp, to),
        Target::Udp(to) => (Protocol::Udp, to),
        Target::Icmp(to) => return echo(to, 3, timeout / 3),
    };
    Ok(match ask(protocol, to, None, 64, timeout) {
        Ok(answer) => Outcome::Answered(answer.name),
        Err(error) if refused(&error) => Outcome::Refused(format!("{error:#}")),
        Err(_) => Outcome::Silent,
    })
}

/// Whether something came back: anything but a time that ran out.
fn refused(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| !matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock))
}

fn echo(to: IpAddr, count: u16, timeout: Duration) -> Result<Outcome> {
    let report = ping(&PingArgs {
        to,
        count,
        size: 56,
        timeout: timeout.as_millis() as u64,
    })?;
    Ok(if report.received > 0 {
        Outcome::Answered(String::new())
    } else {
        Outcome::Silent
    })
}

/// Tries again and again to get through, until it is over.
fn insist(target: Target, over: &AtomicBool) -> Result<Outcome> {
    let udp = match target {
        Target::Udp(to) => Some(datagrams(to)?),
        Target::Tcp(_) | Target::Icmp(_) => None,
    };
    loop {
        let outcome = match (target, &udp) {
            (Target::Udp(_), Some(socket)) => datagram(socket)?,
            (Target::Icmp(to), _) => echo(to, 1, ATTEMPT)?,
            (Target::Tcp(to) | Target::Udp(to), _) => match TcpStream::connect_timeout(&to, ATTEMPT) {
                Ok(stream) => {
                    drop(stream);
                    // Who was it?
                    match once(target, Duration::from_secs(2))? {
                        Outcome::Silent => Outcome::Answered("somebody who accepts and says nothing".into()),
                        other => other,
                    }
                }
                Err(error) if error.kind() == ErrorKind::TimedOut => Outcome::Silent,
                Err(error) => Outcome::Refused(error.to_string()),
            },
        };
        if outcome != Outcome::Silent || over.load(Ordering::Relaxed) {
            return Ok(outcome);
        }
    }
}

fn datagrams(to: SocketAddr) -> Result<UdpSocket> {
    let any: IpAddr = if to.is_ipv4() {
        [0, 0, 0, 0].into()
    } else {
        [0u16; 8].into()
    };
    let socket = UdpSocket::bind((any, 0)).context("cannot bind")?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(ATTEMPT))?;
    Ok(socket)
}

fn datagram(socket: &UdpSocket) -> Result<Outcome> {
    let mut buffer = [0; 2048];
    if let Err(error) = socket.send(b"may I?") {
        return Ok(Outcome::Refused(error.to_string()));
    }
    Ok(match socket.recv(&mut buffer) {
        Ok(length) => {
            let answer = &buffer[..length];
            let end = answer.iter().position(|byte| *byte == b'\n').unwrap_or(length);
            Outcome::Answered(String::from_utf8_lossy(&answer[..end]).into_owned())
        }
        Err(error) if matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock) => Outcome::Silent,
        Err(error) => Outcome::Refused(error.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read_as_they_are_written() {
        for text in [
            "tcp:10.0.0.1:80",
            "udp:[fd00::1]:53",
            "icmp:fd00::1",
            "icmp:10.0.0.1",
        ] {
            assert_eq!(text.parse::<Target>().unwrap().to_string(), text);
        }
        for bad in ["tcp:10.0.0.1", "10.0.0.1:80", "sctp:10.0.0.1:80", ""] {
            assert!(bad.parse::<Target>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_answer_a_refusal_and_silence_are_told_apart() {
        let port = UdpSocket::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let served: SocketAddr = ([127, 0, 0, 1], port).into();
        super::super::serve::start("me", served).unwrap();
        // Bound and never read: nobody answers, nobody refuses.
        let mute = UdpSocket::bind("127.0.0.1:0").unwrap();
        let closed = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let probed = probe(&ProbeArgs {
            allow: vec![Target::Tcp(served), Target::Udp(served)],
            deny: vec![
                Target::Udp(mute.local_addr().unwrap()),
                Target::Tcp(closed),
                Target::Tcp(served),
                Target::Udp(served),
            ],
            timeout: 10_000,
        })
        .unwrap();
        let me = || Outcome::Answered("me".into());
        let outcomes: Vec<_> = probed.into_iter().map(|p| p.outcome).collect();
        assert_eq!(outcomes[..3], [me(), me(), Outcome::Silent]);
        assert!(matches!(outcomes[3], Outcome::Refused(_)), "{outcomes:?}");
        assert_eq!(outcomes[4..], [me(), me()]);
    }
}
