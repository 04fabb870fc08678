//! A client that waits for nobody: datagrams and connections to addresses whether anybody lives there or not, so
//! that a pod meets them from its first moment on.

use std::{
    io::Read as _,
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    os::fd::{AsFd as _, AsRawFd as _},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, poll},
    sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket,
        sockopt::{Linger, ReuseAddr},
    },
};
use serde::{Deserialize, Serialize};

/// How long a connection is given before the next one is tried, in milliseconds.
const CONNECTION: u8 = 3;

/// What `warren-lab-app hammer` takes.
#[derive(Debug, clap::Args)]
pub struct HammerArgs {
    /// Whom; several addresses are hammered at once.
    #[arg(long, value_delimiter = ',', required = true)]
    pub to: Vec<SocketAddr>,
    /// Datagrams per second and address; not quite as many connections are tried.
    #[arg(long, default_value_t = 500)]
    pub rate: u32,
}

/// What came back from one address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hammered {
    /// The address.
    pub to: SocketAddr,
    /// Datagrams sent.
    pub datagrams: u64,
    /// Datagrams answered.
    pub datagrams_answered: u64,
    /// Connections tried.
    pub connections: u64,
    /// Connections that were accepted.
    pub connections_accepted: u64,
}

#[derive(Debug, Default)]
struct Counts {
    datagrams: AtomicU64,
    datagrams_answered: AtomicU64,
    connections: AtomicU64,
    connections_accepted: AtomicU64,
}

/// Hammers until stdin closes. Prints `ready` once every address has been sent to.
pub fn hammer(args: &HammerArgs) -> Result<Vec<Hammered>> {
    let over = AtomicBool::new(false);
    let counts: Vec<_> = args.to.iter().map(|to| (*to, Counts::default())).collect();
    thread::scope(|scope| {
        let over = &over;
        let threads: Vec<_> = counts
            .iter()
            .flat_map(|(to, counts)| {
                [
                    scope.spawn(move || datagrams(*to, args.rate, counts, over)),
                    scope.spawn(move || connections(*to, args.rate, counts, over)),
                ]
            })
            .collect();
        while counts.iter().any(|(_, counts)| {
            counts.datagrams.load(Ordering::Relaxed) == 0 || counts.connections.load(Ordering::Relaxed) == 0
        }) && threads.iter().all(|thread| !thread.is_finished())
        {
            thread::sleep(Duration::from_millis(1));
        }
        println!("{}", crate::inside::READY);
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        over.store(true, Ordering::Relaxed);
        for thread in threads {
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("the hammer panicked"))??;
        }
        Ok(counts
            .iter()
            .map(|(to, counts)| Hammered {
                to: *to,
                datagrams: counts.datagrams.load(Ordering::Relaxed),
                datagrams_answered: counts.datagrams_answered.load(Ordering::Relaxed),
                connections: counts.connections.load(Ordering::Relaxed),
                connections_accepted: counts.connections_accepted.load(Ordering::Relaxed),
            })
            .collect())
    })
}

fn datagrams(to: SocketAddr, rate: u32, counts: &Counts, over: &AtomicBool) -> Result<()> {
    let any: IpAddr = if to.is_ipv4() {
        [0, 0, 0, 0].into()
    } else {
        [0u16; 8].into()
    };
    // Not connected: a bounced packet must not turn the next send into an error.
    let socket = UdpSocket::bind((any, 0)).context("cannot bind")?;
    socket.set_nonblocking(true)?;
    let mut buffer = [0; 2048];
    while !over.load(Ordering::Relaxed) {
        // A refusal by the own kernel (nobody lives there yet) is no reason to stop.
        let _ = socket.send_to(b"now?", to);
        counts.datagrams.fetch_add(1, Ordering::Relaxed);
        while socket.recv_from(&mut buffer).is_ok() {
            counts.datagrams_answered.fetch_add(1, Ordering::Relaxed);
        }
        thread::sleep(Duration::from_secs(1) / rate.max(1));
    }
    Ok(())
}

fn connections(to: SocketAddr, rate: u32, counts: &Counts, over: &AtomicBool) -> Result<()> {
    let mut from = 0;
    while !over.load(Ordering::Relaxed) {
        counts.connections.fetch_add(1, Ordering::Relaxed);
        match connection(to, &mut from) {
            Ok(true) => {
                counts.connections_accepted.fetch_add(1, Ordering::Relaxed);
            }
            Ok(false) => {}
            // Nobody lives there, or the port is still in use by an attempt before: another one will do.
            Err(_) => from = 0,
        }
        thread::sleep(Duration::from_secs(1) / rate.max(1));
    }
    Ok(())
}

/// One attempt, always from the same port: a new one each time would use up the flows that a pod may have.
fn connection(to: SocketAddr, from: &mut u16) -> Result<bool> {
    let (family, any): (_, IpAddr) = if to.is_ipv4() {
        (AddressFamily::Inet, [0, 0, 0, 0].into())
    } else {
        (AddressFamily::Inet6, [0u16; 8].into())
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, SockType::Stream, flags, None)?;
    setsockopt(&socket, ReuseAddr, &true)?;
    // The end is a reset, which leaves nothing behind.
    setsockopt(
        &socket,
        Linger,
        &libc::linger {
            l_onoff: 1,
            l_linger: 0,
        },
    )?;
    bind(
        socket.as_raw_fd(),
        &SockaddrStorage::from(SocketAddr::new(any, *from)),
    )?;
    let stream = TcpStream::from(socket);
    *from = stream.local_addr()?.port();
    match connect(stream.as_raw_fd(), &SockaddrStorage::from(to)) {
        Ok(()) => return Ok(true),
        Err(Errno::EINPROGRESS) => {}
        Err(error) => return Err(error.into()),
    }
    let mut waits = [PollFd::new(stream.as_fd(), PollFlags::POLLOUT)];
    poll(&mut waits, CONNECTION)?;
    Ok(stream.peer_addr().is_ok())
}
