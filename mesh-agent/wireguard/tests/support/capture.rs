//! What passes on the underlay, looked at for packets in clear.

use std::{
    io::ErrorKind,
    net::UdpSocket,
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt,
};

use super::{Lab, traffic::join};

/// A running capture.
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Seen>>,
}

/// What was seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// IP packets of any kind.
    pub packets: u64,
    /// Packets with an address that is used inside the tunnel only.
    pub clear: u64,
    /// Datagrams to the tunnel's port.
    pub tunnel: u64,
    /// Content of the largest of them that node 1 sent over IPv4, bytes.
    pub largest: usize,
}

impl Capture {
    /// Looks at everything that passes between the nodes of the lab.
    pub fn start(lab: &Lab) -> Result<Self> {
        let enter = lab.enter_underlay();
        let stop = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&stop);
        let (ready, started) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            enter()?;
            let socket = open()?;
            ready.send(())?;
            watch(&socket, &ended)
        });
        started
            .recv_timeout(super::PATIENCE)
            .context("the capture did not start")?;
        Ok(Self { stop, thread })
    }

    /// What was seen so far.
    pub fn finish(self) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        join(self.thread)
    }
}

fn open() -> Result<UdpSocket> {
    // On all interfaces of the namespace, which are those of the underlay.
    let socket: OwnedFd = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::EthAll,
    )?;
    setsockopt(&socket, sockopt::RcvBufForce, &(32 << 20))?;
    // Only for its time-outs.
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(std::time::Duration::from_millis(50)))?;
    Ok(socket)
}

fn watch(socket: &UdpSocket, stop: &AtomicBool) -> Result<Seen> {
    let (mut seen, mut frame) = (Seen::default(), [0; 128]);
    loop {
        match recv(socket.as_raw_fd(), &mut frame, MsgFlags::MSG_TRUNC) {
            Ok(len) => note(&mut seen, &frame[..len.min(frame.len())]),
            Err(error) if std::io::Error::from(error).kind() == ErrorKind::WouldBlock => {
                if stop.load(Ordering::Relaxed) {
                    return Ok(seen);
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn note(seen: &mut Seen, frame: &[u8]) {
    let inner = |at: usize, prefix: &[u8]| frame.get(at..at + prefix.len()) == Some(prefix);
    let clear = match frame.get(12..14) {
        // Inside, addresses are of 10.0.0.0/8 and fd00::/16.
        Some([0x08, 0x00]) => inner(26, &[10]) || inner(30, &[10]),
        Some([0x86, 0xdd]) => inner(22, &[0xfd, 0]) || inner(38, &[0xfd, 0]),
        _ => return,
    };
    seen.packets += 1;
    // Without options: UDP begins at 34, its destination port at 36, its length at 38.
    if inner(12, &[0x08, 0x00]) && inner(23, &[17]) && inner(36, &super::PORT.to_be_bytes()) {
        let len = frame
            .get(38..40)
            .map_or(0, |len| u16::from_be_bytes([len[0], len[1]]));
        seen.tunnel += 1;
        if inner(26, &[192, 0, 2, 1]) {
            seen.largest = seen.largest.max(usize::from(len).saturating_sub(8));
        }
    }
    seen.clear += u64::from(clear);
}
