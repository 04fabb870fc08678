//! Descriptors and bytes from one engine to another over a UNIX stream socket (`SCM_RIGHTS`, `unix(7)`).
#![expect(
    unsafe_code,
    reason = "descriptors that the kernel has passed come as plain numbers"
)]

use std::{
    io::{self, IoSlice, IoSliceMut, Read as _, Write as _},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    os::unix::net::UnixStream,
};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use zeroize::Zeroizing;

/// Descriptors of one message; Linux takes 253.
const TOGETHER: usize = 64;

/// What is taken at most: some 300 devices, and the sessions of 100,000 peers.
const MOST_DESCRIPTORS: u64 = 1024;
const MOST_BYTES: u64 = 1 << 30;

/// What stands beside descriptors, which need a byte to travel with.
const MARK: [u8; 1] = *b"D";

/// Sends both numbers, the descriptors, and the bytes.
pub(super) fn send(stream: &UnixStream, descriptors: &[OwnedFd], bytes: &[u8]) -> io::Result<()> {
    let mut writer = stream;
    let mut header = [0; 16];
    header[..8].copy_from_slice(&(descriptors.len() as u64).to_le_bytes());
    header[8..].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
    writer.write_all(&header)?;
    for together in descriptors.chunks(TOGETHER) {
        let numbers: Vec<_> = together.iter().map(|descriptor| descriptor.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        sendmsg::<()>(
            stream.as_raw_fd(),
            &[IoSlice::new(&MARK)],
            &rights,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
    }
    writer.write_all(bytes)
}

/// Receives what [`send`] has sent.
pub(super) fn receive(stream: &UnixStream) -> io::Result<(Vec<OwnedFd>, Zeroizing<Vec<u8>>)> {
    let mut reader = stream;
    let (mut count, mut len) = ([0; 8], [0; 8]);
    reader.read_exact(&mut count)?;
    reader.read_exact(&mut len)?;
    let (count, len) = (u64::from_le_bytes(count), u64::from_le_bytes(len));
    if count > MOST_DESCRIPTORS || len > MOST_BYTES {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut descriptors = Vec::new();
    while (descriptors.len() as u64) < count {
        let before = descriptors.len();
        receive_some(stream, &mut descriptors)?;
        if descriptors.len() == before {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    let mut bytes = Zeroizing::new(vec![0; len as usize]);
    reader.read_exact(&mut bytes)?;
    Ok((descriptors, bytes))
}

fn receive_some(stream: &UnixStream, descriptors: &mut Vec<OwnedFd>) -> io::Result<()> {
    let mut mark = [0];
    let mut control = nix::cmsg_space!([std::os::fd::RawFd; TOGETHER]);
    let mut parts = [IoSliceMut::new(&mut mark)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = part {
            descriptors.extend(numbers.into_iter().map(|number| {
                // SAFETY: the kernel has just made this descriptor for us, and nobody else has its number.
                unsafe { OwnedFd::from_raw_fd(number) }
            }));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Seek as _, SeekFrom},
    };

    use super::*;

    #[test]
    fn descriptors_and_bytes_arrive_in_order() {
        let (a, b) = UnixStream::pair().unwrap();
        let files: Vec<OwnedFd> = (0..150)
            .map(|number| {
                let mut file = tempfile::tempfile().unwrap();
                write!(file, "{number}").unwrap();
                file.into()
            })
            .collect();
        let bytes: Vec<u8> = (0..3_000_000u32).map(|number| (number % 251) as u8).collect();
        let expected = bytes.clone();
        let sender = std::thread::spawn(move || send(&a, &files, &bytes));
        let (received, content) = receive(&b).unwrap();
        sender.join().unwrap().unwrap();
        assert!(*content == expected);
        assert_eq!(received.len(), 150);
        for (number, descriptor) in received.into_iter().enumerate() {
            let (mut file, mut text) = (File::from(descriptor), String::new());
            file.seek(SeekFrom::Start(0)).unwrap();
            file.read_to_string(&mut text).unwrap();
            assert_eq!(text, number.to_string());
        }
    }

    #[test]
    fn what_is_too_much_or_cut_short_is_refused() {
        for (count, len, more) in [(5000, 0, 0), (0, u64::MAX, 0), (1, 0, 1), (0, 10, 9)] {
            let (mut a, b) = UnixStream::pair().unwrap();
            a.write_all(&u64::to_le_bytes(count)).unwrap();
            a.write_all(&u64::to_le_bytes(len)).unwrap();
            a.write_all(&vec![0; more]).unwrap();
            drop(a);
            assert!(receive(&b).is_err(), "{count} {len} {more}");
        }
    }
}
