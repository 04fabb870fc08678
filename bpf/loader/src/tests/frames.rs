//! Packets, and runs of the loaded programs on them.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::{Datapath, testing::TestPacket};

pub(crate) const PASS: i32 = -1;
pub(crate) const DROP: i32 = 2;
pub(crate) const REDIRECT: i32 = 7;

/// Runs a program on a frame that is on a device and came from this host; returns its answer and the mark afterwards.
pub(crate) fn run(datapath: &Datapath, program: &str, frame: &[u8], ifindex: u32, mark: u32) -> (i32, u32) {
    let packet = TestPacket {
        frame,
        ifindex,
        ingress_ifindex: 0,
        mark,
        repeat: 1,
    };
    let answer = datapath.test_run(program, &packet).expect("runs");
    (answer.action, answer.mark)
}

pub(crate) fn ethernet(source: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [
        &[2, 0, 0, 0, 0, 2],
        &source[..],
        &ethertype.to_be_bytes(),
        payload,
    ]
    .concat()
}

pub(crate) fn vlan(ethertype: u16, frame: &[u8]) -> Vec<u8> {
    [&frame[..12], &ethertype.to_be_bytes(), &[0, 7], &frame[12..]].concat()
}

/// A UDP packet of the family of its addresses, in a frame.
pub(crate) fn udp(mac: [u8; 6], source: &str, destination: &str) -> Vec<u8> {
    let datagram = [0x30, 0x39, 0, 80, 0, 12, 0, 0, 1, 2, 3, 4];
    match source.parse::<Ipv4Addr>() {
        Ok(source) => {
            let destination: Ipv4Addr = destination.parse().expect("of the same family");
            let header = [0x45, 0, 0, 32, 0, 1, 0, 0, 64, 17, 0, 0];
            let packet = [&header[..], &source.octets(), &destination.octets(), &datagram].concat();
            ethernet(mac, 0x0800, &packet)
        }
        Err(_) => ethernet(mac, 0x86dd, &v6(source, destination, 17, 64, &datagram)),
    }
}

pub(crate) fn v6(source: &str, destination: &str, next: u8, hops: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).expect("fits").to_be_bytes();
    let octets = |text: &str| text.parse::<Ipv6Addr>().expect("is an address").octets();
    [
        &[0x60, 0, 0, 0, length[0], length[1], next, hops],
        &octets(source)[..],
        &octets(destination),
        payload,
    ]
    .concat()
}

pub(crate) fn arp(mac: [u8; 6], sender: [u8; 4]) -> Vec<u8> {
    let body = [
        &[0, 1, 8, 0, 6, 4, 0, 1],
        &mac[..],
        &sender,
        &[0; 6],
        &[10, 244, 1, 1],
    ]
    .concat();
    ethernet(mac, 0x0806, &body)
}

/// A neighbour advertisement for a target, with a link-layer address.
pub(crate) fn advertisement(mac: [u8; 6], source: &str, target: &str, claimed: [u8; 6]) -> Vec<u8> {
    let target = target.parse::<Ipv6Addr>().expect("is an address").octets();
    let message = [&[136, 0, 0, 0, 0x20, 0, 0, 0], &target[..], &[2, 1], &claimed].concat();
    ethernet(mac, 0x86dd, &v6(source, "ff02::1", 58, 255, &message))
}

/// Flags of TCP.
pub(crate) const FIN: u8 = 0x01;
pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
pub(crate) const ACK: u8 = 0x10;

/// An IPv4 packet; `fragment` is the field of flags and offset.
pub(crate) fn v4(source: &str, destination: &str, protocol: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).expect("fits").to_be_bytes();
    let [high, low] = fragment.to_be_bytes();
    let octets = |text: &str| text.parse::<Ipv4Addr>().expect("is an address").octets();
    [
        &[
            0x45, 0, length[0], length[1], 0x12, 0x34, high, low, 64, protocol, 0, 0,
        ],
        &octets(source)[..],
        &octets(destination),
        payload,
    ]
    .concat()
}

/// A packet of the family of its addresses.
pub(crate) fn packet(source: &str, destination: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
    if source.contains(':') {
        v6(source, destination, protocol, 64, payload)
    } else {
        v4(source, destination, protocol, 0, payload)
    }
}

/// A packet in a frame.
pub(crate) fn framed(mac: [u8; 6], packet: &[u8]) -> Vec<u8> {
    ethernet(mac, if packet[0] >> 4 == 6 { 0x86dd } else { 0x0800 }, packet)
}

pub(crate) fn tcp(source: u16, destination: u16, flags: u8) -> Vec<u8> {
    let mut header = [source.to_be_bytes(), destination.to_be_bytes()].concat();
    header.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    header
}

/// An IPv6 fragment header before a part of a payload; `offset` in units of eight bytes.
pub(crate) fn fragment(next: u8, offset: u16, more: bool, id: u32, part: &[u8]) -> Vec<u8> {
    let field = (offset << 3 | u16::from(more)).to_be_bytes();
    [&[next, 0, field[0], field[1]], &id.to_be_bytes()[..], part].concat()
}

/// An ICMP error that says "unreachable", of the family of the packet that it quotes.
pub(crate) fn unreachable(quoted: &[u8]) -> (u8, Vec<u8>) {
    let (protocol, kind) = if quoted[0] >> 4 == 6 { (58, 1) } else { (1, 3) };
    (protocol, [&[kind, 1, 0, 0, 0, 0, 0, 0], quoted].concat())
}
