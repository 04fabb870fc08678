//! A device's UDP sockets: one per address family, on the same port.

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket},
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrIn6, SockaddrLike, sockopt},
};

use crate::SocketOffloads;

use super::{
    image::{Damaged, Reader, Writer},
    loops::OwnPort,
    mmsg::{self, MOST_SEGMENTS, Outgoing},
    tun,
};

/// Bytes of a socket's buffers: what a burst at several Gb/s needs while a thread waits for a CPU.
const BUFFER: usize = 4 * 1024 * 1024;

/// How long a sender waits for room in a socket's buffer, in milliseconds.
const SEND_WAIT: u16 = 100;

/// How often a free port is tried that must be free in both families.
const RANDOM_PORTS: usize = 32;

/// How long datagrams to a destination are handed over one by one after the kernel refused to cut a buffer for it. The
/// route may have changed: a device without checksums (`EIO`), a smaller MTU (`EINVAL`, since Linux 6.14 `EMSGSIZE`).
const REFUSED: Duration = Duration::from_secs(10);

/// Destinations that are remembered so.
const MOST_REFUSALS: usize = 1024;

/// Destinations for which the kernel does not cut buffers, and until when that is believed.
#[derive(Debug, Default)]
pub(super) struct Refusals(HashMap<SocketAddr, Instant>);

impl Refusals {
    fn holds(&mut self, to: &SocketAddr, now: Instant) -> bool {
        // Empty nearly always.
        if self.0.is_empty() {
            return false;
        }
        match self.0.get(to) {
            Some(until) if *until > now => true,
            Some(_) => {
                self.0.remove(to);
                false
            }
            None => false,
        }
    }

    fn note(&mut self, to: SocketAddr, now: Instant) {
        if self.0.len() >= MOST_REFUSALS {
            self.0.clear();
        }
        self.0.insert(to, now + REFUSED);
    }
}

#[derive(Debug)]
pub(super) struct Sockets {
    v4: Socket,
    /// `None` where the machine has no IPv6.
    v6: Option<Socket>,
    port: OwnPort,
    /// What [`Self::new_overflows`] has told already.
    overflows: AtomicU64,
}

/// A socket, and what the kernel does for it.
#[derive(Debug)]
struct Socket {
    socket: Arc<UdpSocket>,
    /// Cuts buffers into datagrams.
    gso: bool,
    /// Puts datagrams together.
    gro: bool,
}

impl Socket {
    fn new(socket: UdpSocket) -> Self {
        Self {
            gso: mmsg::probe_gso(&socket).is_ok(),
            gro: mmsg::enable_gro(&socket).is_ok(),
            socket: Arc::new(socket),
        }
    }

    fn adopt(
        descriptors: &mut impl Iterator<Item = OwnedFd>,
        from: &mut Reader<'_>,
    ) -> Result<Self, Damaged> {
        Ok(Self {
            socket: Arc::new(descriptors.next().ok_or(Damaged)?.into()),
            gso: from.flag()?,
            gro: from.flag()?,
        })
    }
}

impl Sockets {
    /// Binds `port` on all addresses of both families; 0 takes a free one. `fwmark` 0 is none.
    pub(super) fn bind(port: u16, fwmark: u32) -> io::Result<Self> {
        let mut tries = if port == 0 { RANDOM_PORTS } else { 1 };
        loop {
            tries -= 1;
            match Self::bind_both(port, fwmark) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse && tries > 0 => {}
                result => return result,
            }
        }
    }

    fn bind_both(port: u16, fwmark: u32) -> io::Result<Self> {
        let any = SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port));
        let v4 = open(AddressFamily::Inet, &any)?;
        let port = v4.local_addr()?.port();
        let any = SockaddrIn6::from(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0));
        let v6 = match open(AddressFamily::Inet6, &any) {
            Ok(socket) => Some(Socket::new(socket)),
            // IPv6 is not built in, or switched off.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)
                ) =>
            {
                None
            }
            Err(error) => return Err(error),
        };
        let sockets = Self {
            v4: Socket::new(v4),
            v6,
            port: OwnPort::new(port),
            overflows: AtomicU64::new(0),
        };
        if fwmark != 0 {
            sockets.set_fwmark(fwmark)?;
        }
        Ok(sockets)
    }

    /// Takes over the descriptors of [`Self::descriptors`], and what the predecessor knew about them.
    pub(super) fn adopt(
        descriptors: &mut impl Iterator<Item = OwnedFd>,
        from: &mut Reader<'_>,
    ) -> Result<Self, Damaged> {
        Ok(Self {
            port: OwnPort::new(from.u16()?),
            overflows: AtomicU64::new(from.u64()?),
            v4: Socket::adopt(descriptors, from)?,
            v6: from.option(|from| Socket::adopt(descriptors, from))?,
        })
    }

    /// Adds the sockets for a successor, and writes what there is to know about them.
    pub(super) fn descriptors(&self, descriptors: &mut Vec<OwnedFd>, out: &mut Writer) -> io::Result<()> {
        out.u16(self.port());
        out.u64(self.overflows.load(Ordering::Relaxed));
        let write = |out: &mut Writer, socket: &Socket| {
            out.flag(socket.gso);
            out.flag(socket.gro);
        };
        write(out, &self.v4);
        out.option(self.v6.as_ref(), write);
        for socket in self.each() {
            descriptors.push(socket.as_fd().try_clone_to_owned()?);
        }
        Ok(())
    }

    pub(super) fn port(&self) -> u16 {
        self.port.number()
    }

    pub(super) fn each(&self) -> impl Iterator<Item = &Arc<UdpSocket>> {
        self.all().map(|socket| &socket.socket)
    }

    fn all(&self) -> impl Iterator<Item = &Socket> {
        std::iter::once(&self.v4).chain(&self.v6)
    }

    /// Datagrams that the kernel dropped since the last call because nobody read them in time.
    pub(super) fn new_overflows(&self) -> u64 {
        let total = self
            .each()
            .filter_map(|socket| tun::socket_overflows(socket.as_fd()).ok())
            .sum();
        total - self.overflows.swap(total, Ordering::Relaxed).min(total)
    }

    pub(super) fn set_fwmark(&self, fwmark: u32) -> io::Result<()> {
        for socket in self.each() {
            socket::setsockopt(socket, sockopt::Mark, &fwmark)?;
        }
        Ok(())
    }

    /// Sends one datagram; waits a moment for room.
    pub(super) fn send(&self, datagram: &[u8], to: SocketAddr) -> io::Result<()> {
        let socket = &*self.socket(&to)?.socket;
        match socket.send_to(datagram, to) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                await_room(socket)?;
                socket.send_to(datagram, to).map(drop)
            }
            result => result.map(drop),
        }
    }

    fn socket(&self, to: &SocketAddr) -> io::Result<&Socket> {
        match to {
            SocketAddr::V4(_) => Ok(&self.v4),
            SocketAddr::V6(_) => Ok(self.v6.as_ref().ok_or(Errno::EAFNOSUPPORT)?),
        }
    }

    /// Sends buffers of datagrams in order. Tells for each how many datagrams and bytes were sent.
    pub(super) fn send_all(
        &self,
        messages: &[Outgoing<'_>],
        now: Instant,
        refusals: &mut Refusals,
        mut sent: impl FnMut(usize, usize, usize),
    ) {
        let mut next = 0;
        while let Some(first) = messages.get(next) {
            let Ok(Socket { socket, gso, .. }) = self.socket(&first.to) else {
                sent(next, 0, 0);
                next += 1;
                continue;
            };
            let mut single = |message: &Outgoing<'_>| {
                message.bytes.len() > message.segment && (!gso || refusals.holds(&message.to, now))
            };
            if single(first) {
                let (count, bytes) = self.send_singly(first);
                sent(next, count, bytes);
                next += 1;
                continue;
            }
            let alike = messages[next..]
                .iter()
                .take_while(|message| message.to.is_ipv4() == first.to.is_ipv4() && !single(message));
            let alike = alike.count();
            match send_some(socket, &messages[next..next + alike]) {
                Ok(count) => {
                    for (place, message) in messages.iter().enumerate().skip(next).take(count) {
                        let datagrams = message.bytes.len().div_ceil(message.segment);
                        sent(place, datagrams, message.bytes.len());
                    }
                    next += count;
                }
                Err(error) => {
                    let cut = first.bytes.len() > first.segment;
                    let (count, bytes) = match error.raw_os_error() {
                        Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE) if cut => {
                            refusals.note(first.to, now);
                            self.send_singly(first)
                        }
                        _ => (0, 0),
                    };
                    sent(next, count, bytes);
                    next += 1;
                }
            }
        }
    }

    /// Sends each datagram of a buffer by itself. How many, and how many bytes.
    fn send_singly(&self, message: &Outgoing<'_>) -> (usize, usize) {
        let mut singles = [Outgoing {
            bytes: &[],
            ..*message
        }; MOST_SEGMENTS];
        let mut count = 0;
        for (single, bytes) in singles.iter_mut().zip(message.bytes.chunks(message.segment)) {
            single.bytes = bytes;
            count += 1;
        }
        let (mut sent, mut sent_bytes, mut next) = (0, 0, 0);
        let Ok(Socket { socket, .. }) = self.socket(&message.to) else {
            return (0, 0);
        };
        while next < count {
            match send_some(socket, &singles[next..count]) {
                Ok(taken) => {
                    sent += taken;
                    sent_bytes += singles[next..next + taken]
                        .iter()
                        .map(|single| single.bytes.len())
                        .sum::<usize>();
                    next += taken;
                }
                Err(_) => next += 1,
            }
        }
        (sent, sent_bytes)
    }

    /// What the kernel does for each socket.
    pub(super) fn offloads(&self) -> impl Iterator<Item = SocketOffloads> {
        let names = ["ipv4", "ipv6"];
        self.all().zip(names).map(|(socket, family)| SocketOffloads {
            family: family.into(),
            gso: socket.gso,
            gro: socket.gro,
        })
    }
}

/// Sends at least one message, or the error of the first; waits a moment for room.
fn send_some(socket: &UdpSocket, messages: &[Outgoing<'_>]) -> io::Result<usize> {
    loop {
        match mmsg::send(socket, messages) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                await_room(socket)?;
                return mmsg::send(socket, messages);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

fn await_room(socket: &UdpSocket) -> io::Result<()> {
    poll(
        &mut [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)],
        PollTimeout::from(SEND_WAIT),
    )?;
    Ok(())
}

fn open(family: AddressFamily, address: &dyn SockaddrLike) -> io::Result<UdpSocket> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket::socket(family, SockType::Datagram, flags, None)?;
    if family == AddressFamily::Inet6 {
        socket::setsockopt(&fd, sockopt::Ipv6V6Only, &true)?;
    }
    // Beyond the system's limit where we may, up to the limit otherwise; a small buffer only costs speed.
    if socket::setsockopt(&fd, sockopt::RcvBufForce, &BUFFER).is_err() {
        let _ = socket::setsockopt(&fd, sockopt::RcvBuf, &BUFFER);
    }
    if socket::setsockopt(&fd, sockopt::SndBufForce, &BUFFER).is_err() {
        let _ = socket::setsockopt(&fd, sockopt::SndBuf, &BUFFER);
    }
    socket::bind(std::os::fd::AsRawFd::as_raw_fd(&fd), address)?;
    Ok(UdpSocket::from(fd))
}
