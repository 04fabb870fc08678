//! The little rtnetlink that clsact needs: messages by device index, in the namespace of the calling thread.

#![expect(unsafe_code, reason = "raw netlink socket")]

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

pub(crate) const REQUEST: u16 = 0x1;
pub(crate) const ACK: u16 = 0x4;
pub(crate) const CREATE: u16 = 0x400;
pub(crate) const EXCLUSIVE: u16 = 0x200;
pub(crate) const DUMP: u16 = 0x300;

const ERROR: u16 = 2;
const DONE: u16 = 3;
const HEADER: usize = 16;

/// A request under construction.
pub(crate) struct Message(Vec<u8>);

impl Message {
    pub(crate) fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        bytes[8..12].copy_from_slice(&1_u32.to_ne_bytes());
        bytes.extend_from_slice(body);
        Self(bytes)
    }

    /// Adds an attribute.
    pub(crate) fn attribute(mut self, kind: u16, payload: &[u8]) -> Self {
        self.0.extend_from_slice(&attribute(kind, payload));
        self
    }
}

/// An attribute as bytes, to nest.
pub(crate) fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + payload.len()).unwrap_or(u16::MAX);
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend_from_slice(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// The attributes in a buffer; what does not parse ends them.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let header = bytes.get(..4)?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & 0x3fff;
        let payload = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    })
}

/// Sends a request and returns the bodies of the answers, without their headers.
pub(crate) fn exchange(message: Message) -> io::Result<Vec<Vec<u8>>> {
    let socket = open()?;
    let mut bytes = message.0;
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    bytes[..4].copy_from_slice(&length.to_ne_bytes());
    // SAFETY: the buffer is as long as said.
    let sent = unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut answers = Vec::new();
    let mut buffer = vec![0_u8; 64 * 1024];
    loop {
        // SAFETY: the buffer is as long as said.
        let received = unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
        if collect(&buffer[..received], &mut answers)? {
            return Ok(answers);
        }
    }
}

fn open() -> io::Result<OwnedFd> {
    // SAFETY: plain arguments.
    let fd = unsafe {
        libc::socket(
            libc::AF_NETLINK,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            libc::NETLINK_ROUTE,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call returned a descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes the messages of one datagram; `true` after the last answer.
fn collect(mut bytes: &[u8], answers: &mut Vec<Vec<u8>>) -> io::Result<bool> {
    while let Some(header) = bytes.get(..HEADER) {
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let body = bytes
            .get(HEADER..length)
            .ok_or_else(|| io::Error::other("truncated netlink answer"))?;
        match kind {
            DONE => return Ok(true),
            ERROR => {
                let code = body
                    .get(..4)
                    .and_then(|code| code.try_into().ok())
                    .map_or(0, i32::from_ne_bytes);
                return if code == 0 {
                    Ok(true)
                } else {
                    Err(io::Error::from_raw_os_error(-code))
                };
            }
            _ => answers.push(body.to_vec()),
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_come_back() {
        let bytes = [attribute(1, b"bpf\0"), attribute(2, &[7; 5]), attribute(3, &[])].concat();
        let found: Vec<_> = attributes(&bytes).collect();
        assert_eq!(found, [(1, &b"bpf\0"[..]), (2, &[7; 5][..]), (3, &[][..])]);
    }

    #[test]
    fn truncated_attributes_end() {
        let bytes = attribute(1, &[1, 2, 3, 4]);
        assert_eq!(attributes(&bytes[..6]).count(), 0);
        assert_eq!(
            attributes(&[0, 0, 0, 0]).count(),
            0,
            "a length of zero does not loop"
        );
    }
}
