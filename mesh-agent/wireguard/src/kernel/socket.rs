//! A generic netlink socket for messages with keys: what it sends and receives is wiped.
//!
//! The usual connection keeps its buffers as they are, and the kernel tells a device's private key with every dump: it would
//! stay in memory long after the device has another one.

use std::{fmt, io};

use netlink_packet_core::{DecodeError, NetlinkBuffer, NetlinkMessage, NetlinkPayload};
use netlink_packet_generic::GenlMessage;
use netlink_packet_wireguard::{WireguardAttribute, WireguardCmd, WireguardMessage};
use netlink_sys::{
    AsyncSocket as _, AsyncSocketExt as _, SocketAddr, TokioSocket, protocols::NETLINK_GENERIC,
};
use zeroize::{Zeroize as _, Zeroizing};

use super::message::{self, Attributes};

/// Bytes of what is received at once: the kernel makes dumps in parts of at most 32 KiB.
const BUFFER: usize = 64 * 1024;

/// Bytes of generic netlink's header: the attributes come behind it.
const GENERIC_HEADER: usize = 4;

pub(super) struct Socket {
    socket: TokioSocket,
    buffer: Zeroizing<Vec<u8>>,
    /// Of the last request.
    sequence: u32,
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Socket({})", self.sequence)
    }
}

impl Socket {
    /// Opens it in the calling thread's network namespace. Must run within a tokio runtime.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_GENERIC)?;
        socket.socket_mut().bind_auto()?;
        // To the kernel: no other process's messages are taken.
        socket.socket_ref().connect(&SocketAddr::new(0, 0))?;
        // Without it, errors repeat the whole request, keys included.
        socket.socket_ref().set_cap_ack(true)?;
        Ok(Self {
            socket,
            buffer: Zeroizing::new(vec![0; BUFFER]),
            sequence: 0,
        })
    }

    /// Sends one request and collects what it is answered with, without the keys. What is left of an exchange that was
    /// given up is passed over.
    pub(super) async fn exchange(
        &mut self,
        family: u16,
        flags: u16,
        command: WireguardCmd,
        attributes: Attributes,
    ) -> io::Result<Vec<WireguardAttribute>> {
        self.sequence = self.sequence.wrapping_add(1);
        let request = message::request(family, flags, self.sequence, command, attributes);
        crate::wipe_stack();
        self.socket.send(&request).await?;
        drop(request);
        let mut answer = Vec::new();
        loop {
            let mut free = &mut self.buffer[..];
            self.socket.recv(&mut free).await?;
            let length = BUFFER - free.len();
            let received = &mut self.buffer[..length];
            let done = read(received, self.sequence, &mut answer);
            received.zeroize();
            if done? {
                return Ok(answer);
            }
        }
    }
}

/// Reads the messages of a datagram and adds the attributes of those with this number. Whether that was all.
fn read(mut messages: &mut [u8], sequence: u32, answer: &mut Vec<WireguardAttribute>) -> io::Result<bool> {
    let malformed = |error: DecodeError| io::Error::new(io::ErrorKind::InvalidData, error);
    while !messages.is_empty() {
        let mut message = NetlinkBuffer::new_checked(&mut *messages).map_err(malformed)?;
        let length = message.length() as usize;
        if let Some(attributes) = message.payload_mut().get_mut(GENERIC_HEADER..) {
            message::redact(attributes);
        }
        let message = NetlinkMessage::<GenlMessage<WireguardMessage>>::deserialize(&messages[..length])
            .map_err(malformed)?;
        let next = length.next_multiple_of(4).min(messages.len());
        messages = &mut messages[next..];
        if message.header.sequence_number != sequence {
            continue;
        }
        match message.payload {
            NetlinkPayload::InnerMessage(message) => answer.extend(message.into_parts().1.attributes),
            NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
            NetlinkPayload::Done(done) if done.code != 0 => {
                return Err(io::Error::from_raw_os_error(-done.code));
            }
            NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(true),
            _ => {}
        }
    }
    Ok(false)
}
