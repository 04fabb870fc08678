//! A device's UDP sockets: one per address family, on the same port.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket},
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrIn6, SockaddrLike, sockopt},
};

use super::tun;

/// Bytes of a socket's buffers: what a burst at several Gb/s needs while a thread waits for a CPU.
const BUFFER: usize = 4 * 1024 * 1024;

/// How long a sender waits for room in a socket's buffer, in milliseconds.
const SEND_WAIT: u16 = 100;

/// How often a free port is tried that must be free in both families.
const RANDOM_PORTS: usize = 32;

#[derive(Debug)]
pub(super) struct Sockets {
    v4: Arc<UdpSocket>,
    /// `None` where the machine has no IPv6.
    v6: Option<Arc<UdpSocket>>,
    port: u16,
    /// What [`Self::new_overflows`] has told already.
    overflows: AtomicU64,
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
            Ok(socket) => Some(Arc::new(socket)),
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
            v4: Arc::new(v4),
            v6,
            port,
            overflows: AtomicU64::new(0),
        };
        if fwmark != 0 {
            sockets.set_fwmark(fwmark)?;
        }
        Ok(sockets)
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }

    pub(super) fn each(&self) -> impl Iterator<Item = &Arc<UdpSocket>> {
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
        let socket = match to {
            SocketAddr::V4(_) => &self.v4,
            SocketAddr::V6(_) => self.v6.as_ref().ok_or(Errno::EAFNOSUPPORT)?,
        };
        match socket.send_to(datagram, to) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                poll(
                    &mut [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)],
                    PollTimeout::from(SEND_WAIT),
                )?;
                socket.send_to(datagram, to).map(drop)
            }
            result => result.map(drop),
        }
    }
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
