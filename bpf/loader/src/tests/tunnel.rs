//! A node with a pod and two TUN devices: what the pod sends comes out of the device of the path, what comes in
//! by a device reaches the pod where the owner of its source may use the slot. The test is the WireGuard engine.

#![expect(unsafe_code, reason = "TUN devices are made by ioctl")]

use std::{
    fs::File,
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddrV6, UdpSocket},
    os::fd::AsRawFd as _,
    path::Path as FilePath,
    time::{Duration, Instant},
};

use super::{
    config, connect_pod, dropped,
    frames::udp,
    isolation::{Peer, ifindex, ip as ip_command, isolated},
    open_policies, pod, set_owners,
};
use crate::{AttachMode, Config, Datapath, Path, Role};

const PATIENCE: Duration = Duration::from_secs(10);

/// Packets in and out of a TUN device, without header.
struct Tun(File);

impl Tun {
    fn open(name: &str) -> Self {
        let file = File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .expect("the kernel has TUN");
        // SAFETY: all zero is a valid value of this struct of integers.
        let mut request = unsafe { std::mem::zeroed::<libc::ifreq>() };
        for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *place = byte.cast_signed();
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as i16;
        // SAFETY: the request is the struct that this ioctl reads and fills.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        // SAFETY: plain arguments.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        Self(file)
    }

    /// The next packet with a destination address, where there is one by now.
    fn next_to(&mut self, destination: &str) -> bool {
        let mut packet = [0; 2048];
        loop {
            match self.0.read(&mut packet) {
                Ok(length) if destination_of(&packet[..length]) == destination => return true,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn inject(&mut self, source: &str, destination: &str, port: u16) {
        let mut packet = udp([0; 6], source, destination)[14..].to_vec();
        let header = if source.contains(':') { 40 } else { 20 };
        packet[header + 2..header + 4].copy_from_slice(&port.to_be_bytes());
        finish_checksums(&mut packet, header);
        self.0.write_all(&packet).expect("the device is up");
    }
}

fn destination_of(packet: &[u8]) -> String {
    match packet.first().map(|first| first >> 4) {
        Some(4) => {
            std::net::Ipv4Addr::from(<[u8; 4]>::try_from(&packet[16..20]).expect("four bytes")).to_string()
        }
        Some(6) => {
            std::net::Ipv6Addr::from(<[u8; 16]>::try_from(&packet[24..40]).expect("16 bytes")).to_string()
        }
        _ => String::new(),
    }
}

/// The checksum of IPv4 and UDP's, which is optional with IPv4.
fn finish_checksums(packet: &mut [u8], header: usize) {
    if header == 20 {
        let sum = checksum(packet[..20].chunks(2));
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        return;
    }
    let length = [0, 0, packet[4], packet[5]];
    let pseudo = [&packet[8..40], &length[..], &[0, 0, 0, 17], &packet[40..]].concat();
    let sum = checksum(pseudo.chunks(2));
    packet[46..48].copy_from_slice(&sum.to_be_bytes());
}

fn checksum<'a>(words: impl Iterator<Item = &'a [u8]>) -> u16 {
    let mut sum: u32 = words
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

struct Node {
    datapath: Datapath,
    peer: Peer,
    tunnels: [Tun; 2],
}

impl Node {
    /// A routing node with everything in place, but no path.
    fn new(pins: &FilePath, attach: AttachMode) -> Self {
        let mut datapath = Datapath::open(&Config {
            attach,
            ..config(pins)
        })
        .unwrap();
        for (path, value) in [
            ("ipv4/ip_forward", "1"),
            ("ipv6/conf/all/forwarding", "1"),
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/default/rp_filter", "0"),
        ] {
            std::fs::write(format!("/proc/sys/net/{path}"), value).expect("sets an option");
        }
        let tunnels = ["tun0", "tun1"].map(Tun::open);
        for slot in 0..2_u8 {
            datapath
                .attach(ifindex(&format!("tun{slot}")), Role::Tunnel { slot })
                .unwrap();
            ip_command(&format!("link set tun{slot} up"));
        }
        ip_command("route add 10.244.0.0/16 dev tun0");
        ip_command("-6 route add fd00:10:244::/48 dev tun0");
        let peer = connect_pod();
        let device = ifindex("pod0");
        datapath.attach(device, Role::Pod).unwrap();
        datapath.set_endpoint(&pod(device)).unwrap();
        set_owners(&mut datapath);
        open_policies(&mut datapath);
        Self {
            datapath,
            peer,
            tunnels,
        }
    }

    /// Sends from the pod until a packet comes out of a tunnel or is counted.
    fn leaves(&mut self, destination: &str, slot: usize, reason: &str) -> bool {
        let before = dropped(&self.datapath, reason);
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let (target, any) = target_of(destination, 9);
            self.peer
                .run(move || drop(UdpSocket::bind(any).expect("binds").send_to(b"warren", target)));
            for _ in 0..10 {
                if self.tunnels[slot].next_to(destination) {
                    return true;
                }
                if dropped(&self.datapath, reason) > before {
                    return false;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        panic!(
            "neither left nor was counted: {:?}",
            self.datapath.drops_by_hook()
        );
    }

    /// Injects until the pod has a packet or it is counted.
    fn arrives(&mut self, source: &str, slot: usize, reason: &str) -> bool {
        let address = if source.contains(':') {
            "fd00:10:244:1::2"
        } else {
            "10.244.1.2"
        };
        let socket = self.peer.run(move || {
            let socket = UdpSocket::bind((address, 0)).expect("binds");
            socket.set_nonblocking(true).expect("sets an option");
            socket
        });
        let port = socket.local_addr().expect("is bound").port();
        let before = dropped(&self.datapath, reason);
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            self.tunnels[slot].inject(source, address, port);
            for _ in 0..10 {
                if socket.recv(&mut [0; 16]).is_ok() {
                    return true;
                }
                if dropped(&self.datapath, reason) > before {
                    return false;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        panic!(
            "neither arrived nor was counted: {:?}",
            self.datapath.drops_by_hook()
        );
    }
}

fn target_of(destination: &str, port: u16) -> (std::net::SocketAddr, std::net::SocketAddr) {
    let target = std::net::SocketAddr::new(destination.parse().expect("is an address"), port);
    let any = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    (target, any.parse().expect("is an address"))
}

fn both_modes(test: fn(Node)) {
    for mode in [AttachMode::Tcx, AttachMode::Clsact] {
        isolated(move |pins| test(Node::new(pins, mode)));
    }
}

#[test]
fn out_by_the_device_of_the_path() {
    both_modes(|mut node| {
        for remote in ["10.244.2.9", "fd00:10:244:2::9"] {
            node.datapath.remove_path(2).unwrap();
            assert!(!node.leaves(remote, 0, "no-path"));
            node.datapath
                .set_path(
                    2,
                    Path {
                        ifindex: ifindex("tun0"),
                        receive_slots: 1,
                    },
                )
                .unwrap();
            assert!(
                node.leaves(remote, 0, "no-path"),
                "{remote} by the device of the route"
            );
            node.datapath
                .set_path(
                    2,
                    Path {
                        ifindex: ifindex("tun1"),
                        receive_slots: 1,
                    },
                )
                .unwrap();
            assert!(node.leaves(remote, 1, "no-path"), "{remote} by the other");
        }
        assert!(!node.leaves("10.244.99.9", 0, "no-owner"));
        assert!(!node.leaves("fd00:10:244:99::9", 0, "no-owner"));
    });
}

#[test]
fn in_by_a_slot_of_the_owner() {
    both_modes(|mut node| {
        let path = |receive_slots| Path {
            ifindex: 77,
            receive_slots,
        };
        for remote in ["10.244.2.9", "fd00:10:244:2::9"] {
            node.datapath.remove_path(2).unwrap();
            assert!(!node.arrives(remote, 0, "wrong-slot"));
            node.datapath.set_path(2, path(0b10)).unwrap();
            assert!(
                !node.arrives(remote, 0, "wrong-slot"),
                "{remote} by a slot that is not its owner's"
            );
            assert!(
                node.arrives(remote, 1, "wrong-slot"),
                "{remote} marked, forwarded, and taken by to_pod"
            );
            node.datapath.set_path(2, path(0b11)).unwrap();
            assert!(
                node.arrives(remote, 0, "wrong-slot"),
                "{remote} during a rotation"
            );
        }
        for own in ["10.244.1.7", "192.168.0.1", "8.8.8.8", "fd00:10:244:1::7"] {
            assert!(!node.arrives(own, 0, "bad-owner"), "{own}");
        }
    });
}

#[test]
fn in_by_another_device_is_not_from_the_tunnel() {
    both_modes(|mut node| {
        // The same device with no program of ours: what to_pod holds alone.
        node.datapath.detach(ifindex("tun1")).unwrap();
        for remote in ["10.244.2.9", "fd00:10:244:2::9"] {
            assert!(!node.arrives(remote, 1, "not-from-tunnel"));
        }
        node.datapath.attach(ifindex("tun1"), Role::Barrier).unwrap();
        for remote in ["10.244.2.9", "fd00:10:244:2::9"] {
            assert!(!node.arrives(remote, 1, "cleartext-in"));
        }
    });
}

#[test]
fn a_barrier_on_a_device_without_link_layer() {
    both_modes(|mut node| {
        node.datapath.attach(ifindex("tun0"), Role::Barrier).unwrap();
        for remote in ["10.244.2.9", "fd00:10:244:2::9"] {
            assert!(!node.leaves(remote, 0, "cleartext-out"));
        }
        ip_command("route add 198.51.100.0/24 dev tun0");
        assert!(node.leaves("198.51.100.9", 0, "cleartext-out"), "the world");
    });
}

/// Tries again until it is so.
fn until(node: &mut Node, mut done: impl FnMut(&mut Node) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done(node) {
        assert!(Instant::now() < deadline, "{:?}", node.datapath.drops_by_hook());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The exchange of pre-shared keys: a socket of the host on the link-local address of a device, by no path and under a host
/// policy that lets nothing through.
#[test]
fn packets_of_the_exchange_stay_on_their_device() {
    both_modes(|mut node| {
        let port = warren_abi::EXCHANGE_PORT;
        ip_command("-6 addr add fe80::1/64 dev tun1 nodad");
        let own = crate::Owner {
            kind: crate::OwnerKind::LocalNode,
            node: 0,
            identity: 1,
        };
        node.datapath
            .set_owner("fe80::1/128".parse().unwrap(), own)
            .unwrap();
        let closed = crate::PolicyEndpoint {
            policy: 1,
            cidr_table: 1,
            audit: false,
            ingress_open: false,
            egress_open: false,
        };
        node.datapath.set_policy_endpoint(0, closed).unwrap();
        let device = ifindex("tun1");
        let address = |text: &str, port| SocketAddrV6::new(text.parse().unwrap(), port, 0, device);
        let socket = UdpSocket::bind(address("fe80::1", port)).unwrap();
        socket.set_nonblocking(true).unwrap();
        let strange = UdpSocket::bind(address("fe80::1", 0)).unwrap();
        socket.send_to(b"warren", address("fe80::2", port)).unwrap();
        until(&mut node, |node| node.tunnels[1].next_to("fe80::2"));
        for (socket, port) in [(&strange, port), (&socket, 53)] {
            until(&mut node, |node| {
                let before = dropped(&node.datapath, "not-unicast");
                socket.send_to(b"warren", address("fe80::2", port)).unwrap();
                let counted = dropped(&node.datapath, "not-unicast") > before;
                assert!(!node.tunnels[1].next_to("fe80::2"));
                counted
            });
        }
        let inject = |node: &mut Node, to: &str, source_port: u16, port: u16| {
            let mut packet = udp([0; 6], "fe80::2", to)[14..].to_vec();
            packet[40..42].copy_from_slice(&source_port.to_be_bytes());
            packet[42..44].copy_from_slice(&port.to_be_bytes());
            packet[46..48].fill(0);
            finish_checksums(&mut packet, 40);
            node.tunnels[1].0.write_all(&packet).expect("the device is up");
        };
        until(&mut node, |node| {
            inject(node, "fe80::1", port, port);
            socket.recv(&mut [0; 64]).is_ok()
        });
        while socket.recv(&mut [0; 64]).is_ok() {}
        for (to, source_port) in [("fe80::1", 50_000), ("fe80::3", port), ("fd00:10:244:1::2", port)] {
            until(&mut node, |node| {
                let before = dropped(&node.datapath, "link-scope");
                inject(node, to, source_port, port);
                dropped(&node.datapath, "link-scope") > before
            });
        }
        assert!(socket.recv(&mut [0; 64]).is_err());
    });
}
