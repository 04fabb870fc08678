//! ICMP echo, both families, any size.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, connect, recvfrom,
        sendto, setsockopt, socket, sockopt::ReceiveTimeout,
    },
    time::{TimeVal, TimeValLike as _},
};
use serde::{Deserialize, Serialize};

use super::wire::pattern_block;

/// What `warren-lab-app ping` takes.
#[derive(Debug, clap::Args)]
pub struct PingArgs {
    /// Whom.
    #[arg(long)]
    pub to: IpAddr,
    /// How many.
    #[arg(long, default_value_t = 3)]
    pub count: u16,
    /// Bytes of payload, 65,000 at most.
    #[arg(long, default_value_t = 56)]
    pub size: usize,
    /// Milliseconds to wait for each.
    #[arg(long, default_value_t = 3000)]
    pub timeout: u64,
}

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PingReport {
    /// Requests.
    pub sent: u16,
    /// Replies with the same payload.
    pub received: u16,
}

/// Sends one request after the other, each when its predecessor is answered or given up.
pub fn ping(args: &PingArgs) -> Result<PingReport> {
    ensure!(args.size <= super::wire::MAX_UDP, "at most 65,000 bytes");
    let (family, protocol) = match args.to {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6),
    };
    let socket = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)
        .context("cannot open a raw socket: run as root")?;
    setsockopt(&socket, ReceiveTimeout, &TimeVal::milliseconds(100))?;
    let to = SockaddrStorage::from(SocketAddr::new(args.to, 0));
    // A raw socket hears every reply; several pings may run in one process, with one identifier.
    if let Err(error) = connect(socket.as_raw_fd(), &to) {
        bail!("cannot reach {}: {error}", args.to);
    }
    let id = std::process::id() as u16;
    let payload = pattern_block(u64::from(id), args.size);
    let mut report = PingReport { sent: 0, received: 0 };
    let mut buffer = vec![0; 66_000];
    for sequence in 0..args.count {
        let deadline = Instant::now() + Duration::from_millis(args.timeout);
        let request = request(args.to, id, sequence, &payload);
        report.sent += 1;
        match sendto(socket.as_raw_fd(), &request, &to, MsgFlags::empty()) {
            // The first one above the path's MTU; and a refusal counts as lost.
            Ok(_) => {}
            Err(nix::errno::Errno::EMSGSIZE | nix::errno::Errno::EINVAL | nix::errno::Errno::EACCES) => {
                continue;
            }
            Err(error) => bail!("cannot send to {}: {error}", args.to),
        }
        while Instant::now() < deadline {
            let Ok((length, _)) = recvfrom::<SockaddrStorage>(socket.as_raw_fd(), &mut buffer) else {
                continue;
            };
            if is_reply(args.to, &buffer[..length], id, sequence, &payload) {
                report.received += 1;
                break;
            }
        }
    }
    Ok(report)
}

fn request(to: IpAddr, id: u16, sequence: u16, payload: &[u8]) -> Vec<u8> {
    let kind = if to.is_ipv4() { 8 } else { 128 };
    let mut packet = vec![kind, 0, 0, 0];
    packet.extend_from_slice(&id.to_be_bytes());
    packet.extend_from_slice(&sequence.to_be_bytes());
    packet.extend_from_slice(payload);
    // The kernel fills in ICMPv6's (it covers addresses that only the kernel knows yet).
    if to.is_ipv4() {
        let sum = internet_checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    packet
}

fn is_reply(to: IpAddr, packet: &[u8], id: u16, sequence: u16, payload: &[u8]) -> bool {
    // A raw IPv4 socket delivers the IP header too.
    let (icmp, kind) = match to {
        IpAddr::V4(_) => {
            let header = packet.first().map_or(0, |byte| usize::from(byte & 15) * 4);
            (packet.get(header..), 0)
        }
        IpAddr::V6(_) => (Some(packet), 129),
    };
    icmp.is_some_and(|icmp| {
        icmp.len() == 8 + payload.len()
            && icmp[0] == kind
            && icmp[4..6] == id.to_be_bytes()
            && icmp[6..8] == sequence.to_be_bytes()
            && icmp[8..] == *payload
    })
}

/// RFC 1071.
pub fn internet_checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_of_a_packet_with_its_checksum_is_zero() {
        for size in [0, 1, 56, 1401] {
            let mut packet = request([10, 0, 0, 1].into(), 7, 9, &pattern_block(3, size));
            if packet.len() % 2 == 1 {
                packet.push(0);
            }
            assert_eq!(internet_checksum(&packet), 0, "{size}");
        }
    }

    #[test]
    fn only_the_reply_to_this_request_counts() {
        let payload = [1, 2, 3];
        let reply = [129, 0, 0, 0, 0, 7, 0, 9, 1, 2, 3];
        let to: IpAddr = "fd00::1".parse().unwrap();
        assert!(is_reply(to, &reply, 7, 9, &payload));
        assert!(!is_reply(to, &reply, 7, 8, &payload));
        assert!(!is_reply(to, &reply[..10], 7, 9, &payload));
        assert!(!is_reply("10.0.0.1".parse().unwrap(), &[], 7, 9, &payload));
    }
}
