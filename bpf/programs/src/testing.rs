//! Packets and maps for the tests of the host.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use warren_abi::{DeviceValue, EndpointValue, NodeValue, OwnerTag, OwnerValue, PathValue, SettingsValue};

use crate::{Address, Maps, Packet};

pub(crate) const MARK_MASK: u32 = 0x3f7f;
pub(crate) const TUNNEL_MARK: u32 = 0x2000;
pub(crate) const POD_MARK: u32 = 0x5;
pub(crate) const POD_IFINDEX: u32 = 11;
pub(crate) const POD_IDENTITY: u32 = 256;
pub(crate) const POD_MAC: [u8; 6] = [0x0a, 0x58, 0x0a, 0xf4, 1, 2];
pub(crate) const POD_V4: [u8; 4] = [10, 244, 1, 2];
pub(crate) const POD_V6: &str = "fd00:10:244:1::2";
pub(crate) const TUNNEL0: u32 = 21;
pub(crate) const TUNNEL1: u32 = 22;
pub(crate) const UNDERLAY: u32 = 31;
pub(crate) const OVERLAY: u32 = 32;

pub(crate) struct Bytes<'a>(pub(crate) &'a [u8]);

impl Packet for Bytes<'_> {
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.get(offset..offset.checked_add(N)?)?.try_into().ok()
    }

    fn length(&self) -> usize {
        self.0.len()
    }
}

/// Node 1 of a cluster: one pod; nodes 2 (slot 0), 3 (slot 1) and 4 (no path).
#[derive(Default)]
pub(crate) struct World {
    pub(crate) settings: Option<SettingsValue>,
    devices: HashMap<u32, DeviceValue>,
    endpoints: HashMap<u32, EndpointValue>,
    owners: Vec<(IpAddr, u8, OwnerValue)>,
    paths: HashMap<u16, PathValue>,
    pools: Vec<(IpAddr, u8)>,
    nodes: HashMap<IpAddr, NodeValue>,
}

impl World {
    pub(crate) fn new() -> Self {
        let mut world = Self {
            settings: Some(SettingsValue {
                version: warren_abi::VERSION,
                mark_mask: MARK_MASK,
                tunnel_mark: TUNNEL_MARK,
                encryption: 1,
            }),
            ..Self::default()
        };
        for (ifindex, l2_length, slot) in [
            (TUNNEL0, 0, 0),
            (TUNNEL1, 0, 1),
            (UNDERLAY, 14, 0),
            (OVERLAY, 0, 0),
        ] {
            world.devices.insert(
                ifindex,
                DeviceValue {
                    l2_length,
                    slot_bit: 1 << slot,
                    slot,
                    role: 0,
                },
            );
        }
        world.endpoints.insert(POD_IFINDEX, endpoint());
        for (prefix, length, tag, node, identity) in [
            ("10.244.1.0", 24, OwnerTag::LocalPod, 0, 0),
            ("10.244.2.0", 24, OwnerTag::RemotePod, 2, 300),
            ("10.244.2.77", 32, OwnerTag::RemotePod, 3, 301),
            ("10.244.3.0", 24, OwnerTag::RemotePod, 3, 0),
            ("10.244.4.0", 24, OwnerTag::RemotePod, 4, 0),
            ("192.168.0.1", 32, OwnerTag::LocalNode, 0, 1),
            ("192.168.0.2", 32, OwnerTag::RemoteNode, 2, 6),
            ("fd00:10:244:1::", 64, OwnerTag::LocalPod, 0, 0),
            ("fd00:10:244:2::", 64, OwnerTag::RemotePod, 2, 300),
            ("fd00:10:244:3::", 64, OwnerTag::RemotePod, 3, 0),
        ] {
            let value = OwnerValue {
                identity,
                node,
                tag: tag as u8,
                padding: 0,
            };
            world.owners.push((prefix.parse().unwrap(), length, value));
        }
        world.paths.insert(
            2,
            PathValue {
                ifindex: TUNNEL0,
                receive_slots: 0b01,
                padding: [0; 3],
            },
        );
        world.paths.insert(
            3,
            PathValue {
                ifindex: TUNNEL1,
                receive_slots: 0b10,
                padding: [0; 3],
            },
        );
        world.pools = vec![
            ("10.244.0.0".parse().unwrap(), 16),
            ("fd00:10:244::".parse().unwrap(), 48),
        ];
        for (node, own) in [
            ("192.168.0.1", 1),
            ("fd00:192::1", 1),
            ("192.168.0.2", 0),
            ("fd00:192::2", 0),
        ] {
            world.nodes.insert(node.parse().unwrap(), NodeValue { own });
        }
        world
    }
}

fn address(address: &Address) -> IpAddr {
    match address {
        Address::V4(a) => Ipv4Addr::from(*a).into(),
        Address::V6(a) => Ipv6Addr::from(*a).into(),
    }
}

fn covers(prefix: IpAddr, length: u8, address: IpAddr) -> bool {
    match (prefix, address) {
        (IpAddr::V4(p), IpAddr::V4(a)) => (p.to_bits() ^ a.to_bits()).leading_zeros() >= u32::from(length),
        (IpAddr::V6(p), IpAddr::V6(a)) => (p.to_bits() ^ a.to_bits()).leading_zeros() >= u32::from(length),
        _ => false,
    }
}

impl Maps for World {
    fn settings(&self) -> Option<&SettingsValue> {
        self.settings.as_ref()
    }
    fn device(&self, ifindex: u32) -> Option<&DeviceValue> {
        self.devices.get(&ifindex)
    }
    fn endpoint(&self, ifindex: u32) -> Option<&EndpointValue> {
        self.endpoints.get(&ifindex)
    }
    fn endpoint_identity(&self, mark: u32) -> u32 {
        self.endpoints
            .values()
            .find(|e| e.mark == mark)
            .map_or(0, |e| e.identity)
    }
    fn owner(&self, a: &Address) -> Option<&OwnerValue> {
        let a = address(a);
        let covering = self
            .owners
            .iter()
            .filter(|(prefix, length, _)| covers(*prefix, *length, a));
        covering
            .max_by_key(|(_, length, _)| *length)
            .map(|(_, _, value)| value)
    }
    fn path(&self, node: u16) -> Option<&PathValue> {
        self.paths.get(&node)
    }
    fn is_pod(&self, a: &Address) -> bool {
        self.pools
            .iter()
            .any(|(prefix, length)| covers(*prefix, *length, address(a)))
    }
    fn node(&self, a: &Address) -> Option<&NodeValue> {
        self.nodes.get(&address(a))
    }
}

pub(crate) fn endpoint() -> EndpointValue {
    let mut value = EndpointValue {
        mark: POD_MARK,
        identity: POD_IDENTITY,
        index: 5,
        mac: POD_MAC,
        ..EndpointValue::default()
    };
    value.v4[0] = POD_V4;
    value.v6[1] = octets(POD_V6);
    value
}

pub(crate) fn octets(text: &str) -> [u8; 16] {
    text.parse::<Ipv6Addr>().unwrap().octets()
}

pub(crate) fn ethernet(ethertype: u16, payload: &[u8]) -> Vec<u8> {
    ethernet_from([2, 0, 0, 0, 0, 1], ethertype, payload)
}

pub(crate) fn ethernet_from(source: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [
        &[2, 0, 0, 0, 0, 2],
        &source[..],
        &ethertype.to_be_bytes(),
        payload,
    ]
    .concat()
}

/// Puts a tag into a frame.
pub(crate) fn vlan(ethertype: u16, frame: &[u8]) -> Vec<u8> {
    [&frame[..12], &ethertype.to_be_bytes(), &[0, 7], &frame[12..]].concat()
}

pub(crate) fn v4(source: [u8; 4], destination: [u8; 4], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).unwrap_or(0).to_be_bytes();
    let header = [0x45, 0, length[0], length[1], 0, 1, 0, 0, 64, protocol, 0, 0];
    [&header[..], &source, &destination, payload].concat()
}

pub(crate) fn v4_with_options(protocol: u8, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut packet = v4(
        [10, 1, 0, 2],
        [10, 1, 1, 3],
        protocol,
        &[options, payload].concat(),
    );
    packet[0] = 0x45 + u8::try_from(options.len() / 4).unwrap();
    packet
}

pub(crate) fn v6(source: &str, destination: &str, next: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap_or(0).to_be_bytes();
    let header = [0x60, 0, 0, 0, length[0], length[1], next, 64];
    [&header[..], &octets(source), &octets(destination), payload].concat()
}

/// An extension header of `units` units beyond the least, before a payload.
pub(crate) fn extension(kind: u8, next: u8, units: u8, payload: &[u8]) -> Vec<u8> {
    let bytes = match kind {
        51 => (usize::from(units) + 2) * 4,
        44 => 8,
        _ => (usize::from(units) + 1) * 8,
    };
    let mut header = vec![0; bytes];
    header[0] = next;
    header[1] = if kind == 44 { 0 } else { units };
    [&header[..], payload].concat()
}

/// A fragment header; the offset is in units of eight bytes.
pub(crate) fn fragment_header(next: u8, offset: u16, more: bool, payload: &[u8]) -> Vec<u8> {
    let [high, low] = ((offset << 3) | u16::from(more)).to_be_bytes();
    [&[next, 0, high, low, 0, 0, 0, 1], payload].concat()
}

pub(crate) fn arp(operation: u8, mac: [u8; 6], sender: [u8; 4]) -> Vec<u8> {
    [
        &[0, 1, 8, 0, 6, 4, 0, operation],
        &mac[..],
        &sender,
        &[0; 6],
        &[10, 244, 1, 1],
    ]
    .concat()
}

/// An ICMPv6 message: type, checksum and reserved bytes, body, and perhaps a link-layer address option.
pub(crate) fn icmp6(source: &str, kind: u8, hops: u8, body: &[u8], option: Option<(u8, [u8; 6])>) -> Vec<u8> {
    let mut message = [&[kind, 0, 0, 0, 0, 0, 0, 0], body].concat();
    if let Some((kind, mac)) = option {
        message.extend_from_slice(&[kind, 1]);
        message.extend_from_slice(&mac);
    }
    let mut packet = v6(source, "ff02::1", 58, &message);
    packet[7] = hops;
    packet
}
