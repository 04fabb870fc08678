//! Many datagrams in one system call: `sendmmsg(2)` with `UDP_SEGMENT`, `recvmmsg(2)` with `UDP_GRO`.
//!
//! Linux cuts a buffer into datagrams of one size (the last may be shorter), and hands over datagrams of one size from
//! one sender as one buffer. Source: `udp(7)`; at most 64 datagrams and 65,507 bytes in one buffer.
#![expect(
    unsafe_code,
    reason = "sendmmsg(2) and recvmmsg(2) with control messages have no wrapper that does not allocate"
)]

use std::{
    io,
    mem::MaybeUninit,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket},
    ops::Range,
    os::fd::AsRawFd as _,
};

/// Datagrams of one buffer that the kernel cuts: `UDP_MAX_SEGMENTS` of every kernel that has it.
pub(super) const MOST_SEGMENTS: usize = 64;

/// Bytes of one buffer that the kernel cuts: 65,535 without the headers of IPv4 and UDP.
pub(super) const MOST_BYTES: usize = 65_507;

/// Messages of one system call.
const BATCH: usize = 16;

/// Messages that one call receives at most; and while the kernel puts datagrams together, so that what is received stays in
/// the CPU's cache.
const RECEIVED: usize = 64;
const RECEIVED_LARGE: usize = 8;

/// Bytes of a message's place: a datagram of the usual MTU fits, and places lie close together. What is larger goes on in a
/// place of its own, and is moved there as a whole. An odd number of cache lines: the same words of many messages are looked
/// at together, and must not all fall into one set.
const PLACE: usize = 35 * 64;
const LARGE: usize = 65_536 + 17 * 64;

const _: () = assert!(LARGE > PLACE);

/// Room for one control message that holds an integer, aligned as `cmsghdr` is.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; 32]);

const _: () = assert!(align_of::<Control>() >= align_of::<libc::cmsghdr>());
// SAFETY: CMSG_SPACE only computes.
const _: () = assert!(size_of::<Control>() >= unsafe { libc::CMSG_SPACE(4) } as usize);

/// A buffer to be sent as datagrams of `segment` bytes, the last of which may be shorter.
#[derive(Debug, Clone, Copy)]
pub(super) struct Outgoing<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) segment: usize,
    pub(super) to: SocketAddr,
}

/// A socket address as the kernel takes it.
union Address {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl Address {
    fn new(address: SocketAddr) -> (Self, libc::socklen_t) {
        match address {
            SocketAddr::V4(address) => {
                let v4 = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: address.port().to_be(),
                    sin_addr: libc::in_addr {
                        s_addr: u32::from_ne_bytes(address.ip().octets()),
                    },
                    sin_zero: [0; 8],
                };
                (Self { v4 }, size_of::<libc::sockaddr_in>() as libc::socklen_t)
            }
            SocketAddr::V6(address) => {
                let v6 = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: address.port().to_be(),
                    sin6_flowinfo: address.flowinfo(),
                    sin6_addr: libc::in6_addr {
                        s6_addr: address.ip().octets(),
                    },
                    sin6_scope_id: address.scope_id(),
                };
                (Self { v6 }, size_of::<libc::sockaddr_in6>() as libc::socklen_t)
            }
        }
    }

    /// What the kernel wrote; `None` for another family.
    fn read(&self) -> Option<SocketAddr> {
        // SAFETY: both members begin with the family, and every bit pattern is valid for them.
        match libc::c_int::from(unsafe { self.v4.sin_family }) {
            libc::AF_INET => {
                // SAFETY: plain integers; the family says that the kernel wrote this member.
                let v4 = unsafe { self.v4 };
                let ip = Ipv4Addr::from(v4.sin_addr.s_addr.to_ne_bytes());
                Some(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into())
            }
            libc::AF_INET6 => {
                // SAFETY: as above.
                let v6 = unsafe { self.v6 };
                let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
                // The flow label is nothing to answer with.
                Some(SocketAddrV6::new(ip, u16::from_be(v6.sin6_port), 0, v6.sin6_scope_id).into())
            }
            _ => None,
        }
    }
}

/// Sends at most 16 messages in one system call. How many the kernel took, at least one; the error is that of the first.
pub(super) fn send(socket: &UdpSocket, messages: &[Outgoing<'_>]) -> io::Result<usize> {
    let count = messages.len().min(BATCH);
    let mut addresses = [const { MaybeUninit::<Address>::uninit() }; BATCH];
    let mut vectors = [const { MaybeUninit::<libc::iovec>::uninit() }; BATCH];
    let mut controls = [Control([0; 32]); BATCH];
    // SAFETY: mmsghdr is plain data for which all zeroes is a valid value.
    let mut headers: [libc::mmsghdr; BATCH] = unsafe { std::mem::zeroed() };
    for (place, message) in messages.iter().take(count).enumerate() {
        let (address, length) = Address::new(message.to);
        let header = &mut headers[place].msg_hdr;
        header.msg_name = std::ptr::from_mut(addresses[place].write(address)).cast();
        header.msg_namelen = length;
        header.msg_iov = vectors[place].write(libc::iovec {
            // Only read from by sendmmsg.
            iov_base: message.bytes.as_ptr().cast_mut().cast(),
            iov_len: message.bytes.len(),
        });
        header.msg_iovlen = 1;
        if message.bytes.len() > message.segment {
            set_segment(header, &mut controls[place], message.segment as u16);
        }
    }
    // SAFETY: `count` headers point to addresses, buffers and control messages that live through the call.
    let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), headers.as_mut_ptr(), count as _, 0) };
    match usize::try_from(sent) {
        Ok(sent) => Ok(sent),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Asks the kernel to cut the message.
fn set_segment(header: &mut libc::msghdr, control: &mut Control, segment: u16) {
    header.msg_control = control.0.as_mut_ptr().cast();
    // SAFETY: CMSG_SPACE only computes.
    header.msg_controllen = unsafe { libc::CMSG_SPACE(size_of::<u16>() as u32) } as _;
    // SAFETY: the control buffer is aligned for a cmsghdr and has room for it and its data (asserted above), so that
    // CMSG_FIRSTHDR is not null and CMSG_DATA points into the buffer.
    unsafe {
        let first = libc::CMSG_FIRSTHDR(header);
        (*first).cmsg_level = libc::SOL_UDP;
        (*first).cmsg_type = libc::UDP_SEGMENT;
        (*first).cmsg_len = libc::CMSG_LEN(size_of::<u16>() as u32) as _;
        libc::CMSG_DATA(first).cast::<u16>().write_unaligned(segment);
    }
}

/// Has the kernel put datagrams of one sender together. An error where it cannot.
pub(super) fn enable_gro(socket: &UdpSocket) -> io::Result<()> {
    set(socket, libc::UDP_GRO, 1)
}

/// An error where the kernel does not cut buffers: it would send them whole.
pub(super) fn probe_gso(socket: &UdpSocket) -> io::Result<()> {
    // Zero is for messages that do not say into what they are to be cut.
    set(socket, libc::UDP_SEGMENT, 0)
}

fn set(socket: &UdpSocket, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: both options read one integer.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            option,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Buffers for what one call receives.
pub(super) struct Inbox {
    /// Places for all messages, then those for large ones.
    buffer: Box<[u8]>,
    messages: Vec<Incoming>,
    /// How many messages the next call receives.
    at_once: usize,
}

/// A buffer that was received: datagrams of `segment` bytes from one sender, the last of which may be shorter.
#[derive(Debug, Clone)]
pub(super) struct Incoming {
    pub(super) range: Range<usize>,
    pub(super) segment: usize,
    pub(super) from: SocketAddr,
    /// It did not fit and is not whole.
    pub(super) cut: bool,
}

impl Inbox {
    pub(super) fn new() -> Self {
        Self {
            // Zeroed memory is not touched, and so not there, before it is needed.
            buffer: vec![0; RECEIVED * (PLACE + LARGE)].into_boxed_slice(),
            messages: Vec::with_capacity(RECEIVED),
            at_once: RECEIVED_LARGE,
        }
    }

    /// Receives what there is, up to 64 messages.
    pub(super) fn receive(&mut self, socket: &UdpSocket) -> io::Result<()> {
        self.messages.clear();
        // SAFETY: plain data, for which all zeroes is a valid value.
        let mut addresses: [Address; RECEIVED] = unsafe { std::mem::zeroed() };
        let mut controls = [Control([0; 32]); RECEIVED];
        let mut vectors = [const { MaybeUninit::<[libc::iovec; 2]>::uninit() }; RECEIVED];
        // SAFETY: as above.
        let mut headers: [libc::mmsghdr; RECEIVED] = unsafe { std::mem::zeroed() };
        let (places, large) = self.buffer.split_at_mut(RECEIVED * PLACE);
        let buffers = places.chunks_exact_mut(PLACE).zip(large.chunks_exact_mut(LARGE));
        for (number, (place, large)) in buffers.enumerate().take(self.at_once) {
            let header = &mut headers[number].msg_hdr;
            header.msg_name = (&raw mut addresses[number]).cast();
            header.msg_namelen = size_of::<Address>() as libc::socklen_t;
            let vector = |bytes: &mut [u8]| libc::iovec {
                iov_base: bytes.as_mut_ptr().cast(),
                iov_len: bytes.len(),
            };
            let vectors = vectors[number].write([vector(place), vector(&mut large[PLACE..])]);
            header.msg_iov = vectors.as_mut_ptr();
            header.msg_iovlen = vectors.len() as _;
            header.msg_control = controls[number].0.as_mut_ptr().cast();
            header.msg_controllen = size_of::<Control>() as _;
        }
        // SAFETY: the headers point to addresses, disjoint buffers and control buffers that live through the call.
        let received = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                self.at_once as _,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
        self.at_once = RECEIVED;
        for (number, header) in headers.iter().take(received).enumerate() {
            let length = (header.msg_len as usize).min(LARGE);
            let Some(from) = addresses[number].read() else {
                continue;
            };
            let range = if length <= PLACE {
                number * PLACE..number * PLACE + length
            } else {
                self.at_once = RECEIVED_LARGE;
                self.join(number, length)
            };
            self.messages.push(Incoming {
                range,
                segment: segment(&header.msg_hdr).unwrap_or(length).max(1),
                from,
                cut: header.msg_hdr.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0,
            });
        }
        Ok(())
    }

    /// Moves the beginning of a large message to where it goes on. Where it is then.
    fn join(&mut self, number: usize, length: usize) -> Range<usize> {
        let (from, to) = (number * PLACE, RECEIVED * PLACE + number * LARGE);
        self.buffer.copy_within(from..from + PLACE, to);
        to..to + length
    }

    /// What was received last, and the buffer that its ranges are of.
    pub(super) fn parts(&mut self) -> (&[Incoming], &mut [u8]) {
        (&self.messages, &mut self.buffer)
    }
}

/// The size of the datagrams, where the kernel put several together.
fn segment(header: &libc::msghdr) -> Option<usize> {
    // SAFETY: the kernel has set msg_controllen to what it wrote to the control buffer, which lives; CMSG_FIRSTHDR and
    // CMSG_NXTHDR stay within it.
    unsafe {
        let mut control = libc::CMSG_FIRSTHDR(header);
        while !control.is_null() {
            if (*control).cmsg_level == libc::SOL_UDP && (*control).cmsg_type == libc::UDP_GRO {
                let size = libc::CMSG_DATA(control).cast::<libc::c_int>().read_unaligned();
                return usize::try_from(size).ok().filter(|size| *size > 0);
            }
            control = libc::CMSG_NXTHDR(header, control);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn pair(address: &str) -> (UdpSocket, UdpSocket) {
        let sockets = (
            UdpSocket::bind(address).unwrap(),
            UdpSocket::bind(address).unwrap(),
        );
        for socket in [&sockets.0, &sockets.1] {
            socket.set_nonblocking(true).unwrap();
        }
        sockets
    }

    /// Receives `count` datagrams.
    fn collect(socket: &UdpSocket, count: usize) -> Vec<(Vec<u8>, SocketAddr)> {
        let (mut inbox, mut datagrams) = (Inbox::new(), Vec::new());
        let start = Instant::now();
        while datagrams.len() < count {
            assert!(
                start.elapsed() < Duration::from_secs(10),
                "{} of {count}",
                datagrams.len()
            );
            if inbox.receive(socket).is_err() {
                continue;
            }
            let (messages, buffer) = inbox.parts();
            for message in messages {
                assert!(!message.cut);
                for datagram in buffer[message.range.clone()].chunks(message.segment) {
                    datagrams.push((datagram.to_vec(), message.from));
                }
            }
        }
        datagrams
    }

    #[test]
    fn what_is_cut_and_put_together_arrives_as_it_was() {
        for (address, gro) in [
            ("127.0.0.1:0", true),
            ("127.0.0.1:0", false),
            ("[::1]:0", true),
            ("[::1]:0", false),
        ] {
            let (from, to) = pair(address);
            if gro {
                enable_gro(&to).unwrap();
            }
            let bytes: Vec<u8> = (0..10 * 1000 + 17).map(|n| (n % 251) as u8).collect();
            let messages = [
                Outgoing {
                    bytes: &bytes,
                    segment: 1000,
                    to: to.local_addr().unwrap(),
                },
                Outgoing {
                    bytes: b"alone",
                    segment: 5,
                    to: to.local_addr().unwrap(),
                },
            ];
            assert_eq!(send(&from, &messages).unwrap(), 2);
            let received = collect(&to, 12);
            assert!(
                received
                    .iter()
                    .all(|(_, sender)| *sender == from.local_addr().unwrap())
            );
            let expected: Vec<&[u8]> = bytes.chunks(1000).chain([&b"alone"[..]]).collect();
            let received: Vec<&[u8]> = received.iter().map(|(bytes, _)| &bytes[..]).collect();
            assert_eq!(received, expected);
        }
    }

    #[test]
    fn datagrams_of_every_size_are_whole() {
        let (from, to) = pair("127.0.0.1:0");
        let sizes = [1, 63, PLACE - 1, PLACE, PLACE + 1, 9_000, 65_507, 2, PLACE, 3];
        for (number, size) in sizes.into_iter().enumerate() {
            let bytes: Vec<u8> = (0..size).map(|n| (n * 7 + number) as u8).collect();
            from.send_to(&bytes, to.local_addr().unwrap()).unwrap();
        }
        for (number, (bytes, _)) in collect(&to, sizes.len()).into_iter().enumerate() {
            assert_eq!(bytes.len(), sizes[number]);
            assert!((0..).zip(&bytes).all(|(n, byte)| *byte == (n * 7 + number) as u8));
        }
    }

    #[test]
    fn an_empty_datagram_is_a_datagram() {
        let (from, to) = pair("127.0.0.1:0");
        from.send_to(&[], to.local_addr().unwrap()).unwrap();
        let mut inbox = Inbox::new();
        while inbox.receive(&to).is_err() {}
        assert_eq!(inbox.parts().0.len(), 1);
        assert!(inbox.parts().0[0].range.is_empty());
    }

    #[test]
    fn no_more_than_the_kernel_takes() {
        let (from, to) = pair("127.0.0.1:0");
        let bytes = vec![0; 1000 * 65];
        let to = to.local_addr().unwrap();
        let refused = send(
            &from,
            &[Outgoing {
                bytes: &bytes,
                segment: 100,
                to,
            }],
        );
        assert!(refused.is_err(), "650 datagrams in one buffer");
    }
}
