//! Packet sockets in another network namespace: receive all, send anything.
#![expect(
    unsafe_code,
    reason = "nix has no constructor for sockaddr_ll and does not know PACKET_STATISTICS"
)]

use std::{
    collections::BTreeMap,
    fs::File,
    mem,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::Arc,
    thread,
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
    sys::{
        socket::{
            AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvmsg, setsockopt, socket,
            sockopt::{RcvBufForce, ReceiveTimeout},
        },
        time::{TimeVal, TimeValLike as _},
    },
};

use crate::lab::Place;

/// A frame that was received.
#[derive(Debug, Clone, Copy)]
pub(super) struct Frame {
    /// Bytes in the buffer: the start of the frame.
    pub(super) length: usize,
    /// Index of the interface.
    pub(super) interface: usize,
    /// Sent, not received, by that interface.
    pub(super) outgoing: bool,
}

/// Receives every frame of every interface of a namespace.
#[derive(Debug)]
pub(super) struct Receiver(Arc<OwnedFd>);

/// Reads how many frames a receiver missed.
#[derive(Debug)]
pub(super) struct Statistics(Arc<OwnedFd>);

impl Receiver {
    pub(super) fn open(underlay: &Place) -> Result<(Self, Statistics)> {
        let socket = packet_socket(underlay, SockProtocol::EthAll)?;
        setsockopt(&socket, RcvBufForce, &(64 << 20)).context("cannot enlarge the capture's buffer")?;
        setsockopt(&socket, ReceiveTimeout, &TimeVal::milliseconds(50))?;
        let socket = Arc::new(socket);
        Ok((Self(Arc::clone(&socket)), Statistics(socket)))
    }

    /// The next frame; `None` when none came for 50 ms.
    pub(super) fn next(&self, buffer: &mut [u8]) -> Result<Option<Frame>> {
        let mut parts = [std::io::IoSliceMut::new(buffer)];
        let message = match recvmsg::<LinkAddr>(self.0.as_raw_fd(), &mut parts, None, MsgFlags::empty()) {
            Ok(message) => message,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
            // An interface went away.
            Err(Errno::ENETDOWN) => return Ok(None),
            Err(error) => return Err(error).context("the capture broke"),
        };
        let address = message.address.context("a frame without interface")?;
        Ok(Some(Frame {
            length: message.bytes,
            interface: address.ifindex(),
            outgoing: address.pkttype() == libc::PACKET_OUTGOING,
        }))
    }
}

impl Statistics {
    /// Frames that found the buffer full, since the last call.
    pub(super) fn lost(&self) -> Result<u32> {
        // SAFETY: tpacket_stats is two integers; all-zero is a value of it.
        let mut statistics: libc::tpacket_stats = unsafe { mem::zeroed() };
        let mut length = mem::size_of_val(&statistics) as libc::socklen_t;
        // SAFETY: the pointers are to live locals and `length` is the size of the one written to.
        let result = unsafe {
            libc::getsockopt(
                self.0.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut statistics).cast(),
                &raw mut length,
            )
        };
        Errno::result(result)?;
        Ok(statistics.tp_drops)
    }
}

/// Sends whole frames from an interface, as nobody honest would.
#[derive(Debug)]
pub struct Injector {
    socket: OwnedFd,
    interface: i32,
}

impl Injector {
    /// Opens an interface of the namespaces of `place`.
    pub fn open(place: &Place, interface: &str) -> Result<Self> {
        let interfaces = interfaces(place)?;
        let index = interfaces
            .iter()
            .find(|(_, name)| name.as_str() == interface)
            .map(|(index, _)| *index)
            .with_context(|| format!("{}: no interface {interface}", place.name))?;
        Ok(Self {
            socket: packet_socket_raw(place, 0)?,
            interface: i32::try_from(index)?,
        })
    }

    /// Sends one frame, Ethernet header included.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        // SAFETY: sockaddr_ll is plain integers; all-zero is a value of it.
        let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = self.interface;
        address.sll_halen = 6;
        // SAFETY: `frame` and `address` live through the call and the lengths are theirs.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const address).cast(),
                mem::size_of_val(&address) as libc::socklen_t,
            )
        };
        Errno::result(sent).context("cannot send a frame")?;
        Ok(())
    }
}

/// The interfaces of a namespace by index.
fn interfaces(place: &Place) -> Result<BTreeMap<usize, String>> {
    let links: Vec<serde_json::Value> = serde_json::from_str(&place.run(["ip", "-json", "link", "show"])?)?;
    let pairs = links.iter().filter_map(|link| {
        Some((
            usize::try_from(link["ifindex"].as_u64()?).ok()?,
            link["ifname"].as_str()?.to_owned(),
        ))
    });
    Ok(pairs.collect())
}

/// The bridge ports of the underlay by index.
pub(super) fn ports(underlay: &Place) -> Result<BTreeMap<usize, String>> {
    let mut all = interfaces(underlay)?;
    all.retain(|_, name| name.starts_with('p'));
    Ok(all)
}

fn packet_socket(place: &Place, protocol: SockProtocol) -> Result<OwnedFd> {
    in_namespace(place, move || {
        Ok(socket(
            AddressFamily::Packet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            protocol,
        )?)
    })
}

/// A packet socket that receives nothing unless `protocol` is set.
fn packet_socket_raw(place: &Place, protocol: i32) -> Result<OwnedFd> {
    in_namespace(place, move || {
        // SAFETY: takes no pointers.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
        let fd = Errno::result(fd)?;
        // SAFETY: the descriptor was just made and nobody else has it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    })
}

/// Runs `make` in the network namespace of `place`, on a thread of its own: a socket stays where it was made.
fn in_namespace<T: Send + 'static>(
    place: &Place,
    make: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let path = format!("/proc/{}/ns/net", place.pid);
    let file = File::open(&path).with_context(|| format!("{} is gone", place.name))?;
    thread::spawn(move || {
        setns(file, CloneFlags::CLONE_NEWNET).context("cannot join a network namespace: run as root")?;
        make()
    })
    .join()
    .map_err(|_| anyhow::anyhow!("the thread panicked"))?
}
