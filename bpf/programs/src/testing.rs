//! Packets and maps for the tests of the host.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    rc::Rc,
};

use warren_abi::{
    DeviceValue, EndpointValue, Event, FlowKey, FlowState, FlowValue, FragmentKey, FragmentValue, MarkValue,
    NodeValue, OwnerTag, OwnerValue, POLICY_EGRESS_OPEN, POLICY_INGRESS_OPEN, POOL_PODS, POOL_SERVICES,
    PathValue, PolicyValue, PortKey, PortValue, RepeatKey, RepeatValue, SettingsValue, VerdictKey,
    VerdictValue,
};

use crate::{Address, FlowCells, Judgement, Maps, Meta, Packet, RepeatCells, Scratch, Table};

pub(crate) const MARK_MASK: u32 = 0x3f7f;
pub(crate) const TUNNEL_MARK: u32 = 0x2000;
pub(crate) const POD_MARK: u32 = 0x5;
pub(crate) const POD_INDEX: u16 = 5;
pub(crate) const POD_IFINDEX: u32 = 11;
pub(crate) const POD_IDENTITY: u32 = 256;
pub(crate) const POD_MAC: [u8; 6] = [0x0a, 0x58, 0x0a, 0xf4, 1, 2];
pub(crate) const POD_V4: [u8; 4] = [10, 244, 1, 2];
pub(crate) const POD_V6: &str = "fd00:10:244:1::2";
/// Another pod of the node.
pub(crate) const PEER_MARK: u32 = 0x6;
pub(crate) const PEER_INDEX: u16 = 6;
pub(crate) const PEER_IFINDEX: u32 = 12;
pub(crate) const PEER_IDENTITY: u32 = 257;
pub(crate) const PEER_MAC: [u8; 6] = [0x0a, 0x58, 0x0a, 0xf4, 1, 3];
pub(crate) const PEER_V4: [u8; 4] = [10, 244, 1, 3];
pub(crate) const PEER_V6: &str = "fd00:10:244:1::3";
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

/// Runs a program with a memory of its own.
pub(crate) fn run<'a>(
    program: fn(&Bytes<'a>, &World, &Meta, &mut Scratch) -> Judgement,
    bytes: &'a [u8],
    world: &World,
    meta: &Meta,
) -> Judgement {
    program(&Bytes(bytes), world, meta, &mut Scratch::default())
}

/// Node 1 of a cluster: two pods; nodes 2 (slot 0), 3 (slot 1) and 4 (no path). All policies are open.
#[derive(Default)]
pub(crate) struct World {
    pub(crate) settings: Option<SettingsValue>,
    devices: HashMap<u32, DeviceValue>,
    endpoints: HashMap<u32, EndpointValue>,
    marks: HashMap<u32, MarkValue>,
    owners: Vec<(IpAddr, u8, OwnerValue)>,
    paths: HashMap<u16, PathValue>,
    pools: Vec<(IpAddr, u8, u32)>,
    nodes: HashMap<IpAddr, NodeValue>,
    pub(crate) seconds: Cell<u32>,
    pub(crate) policies: RefCell<HashMap<u16, PolicyValue>>,
    /// With the length of the prefix in bits.
    pub(crate) ports: RefCell<Vec<(PortKey, u8, PortValue)>>,
    pub(crate) verdicts: RefCell<HashMap<VerdictKey, VerdictValue>>,
    pub(crate) prefixes: RefCell<Vec<(u32, IpAddr, u8, u32)>>,
    pub(crate) state: FlowState,
    pub(crate) established: RefCell<HashMap<FlowKey, Rc<FlowCells>>>,
    pub(crate) new: RefCell<HashMap<FlowKey, Rc<FlowCells>>>,
    /// How many flows fit into the map of established ones.
    pub(crate) room: Option<usize>,
    pub(crate) counts: RefCell<HashMap<u16, u32>>,
    fragments: RefCell<HashMap<FragmentKey, FragmentValue>>,
    repeats: RefCell<HashMap<RepeatKey, Rc<RepeatCells>>>,
    pub(crate) events: RefCell<Vec<Event>>,
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
        for (ifindex, endpoint) in [(POD_IFINDEX, endpoint()), (PEER_IFINDEX, peer())] {
            let mark = MarkValue {
                identity: endpoint.identity,
                index: endpoint.index,
                padding: [0; 2],
                v4: endpoint.v4[0],
                v6: endpoint.v6[0],
            };
            world.endpoints.insert(ifindex, endpoint);
            world.marks.insert(endpoint.mark, mark);
        }
        for endpoint in [0, POD_INDEX, PEER_INDEX] {
            world.open(endpoint);
        }
        world.seconds.set(1_000);
        world.state = FlowState {
            revision: 1,
            node_ports: 30_000 << 16 | 32_767,
            wireguard_ports: 51_871 << 16 | 51_873,
            ..FlowState::default()
        };
        for (prefix, length, tag, node, identity) in [
            ("10.244.1.0", 24, OwnerTag::LocalPod, 0, 0),
            ("10.244.1.3", 32, OwnerTag::LocalPod, 0, PEER_IDENTITY),
            ("10.244.2.0", 24, OwnerTag::RemotePod, 2, 300),
            ("10.244.2.77", 32, OwnerTag::RemotePod, 3, 301),
            ("10.244.3.0", 24, OwnerTag::RemotePod, 3, 0),
            ("10.244.4.0", 24, OwnerTag::RemotePod, 4, 0),
            ("192.168.0.1", 32, OwnerTag::LocalNode, 0, 1),
            ("192.168.0.2", 32, OwnerTag::RemoteNode, 2, 6),
            ("fd00:10:244:1::", 64, OwnerTag::LocalPod, 0, 0),
            ("fd00:10:244:1::3", 128, OwnerTag::LocalPod, 0, PEER_IDENTITY),
            ("fd00:10:244:2::", 64, OwnerTag::RemotePod, 2, 300),
            ("fd00:10:244:3::", 64, OwnerTag::RemotePod, 3, 0),
            ("fd00:192::1", 128, OwnerTag::LocalNode, 0, 1),
            ("fd00:192::2", 128, OwnerTag::RemoteNode, 2, 6),
            ("fe80::1", 128, OwnerTag::LocalNode, 0, 1),
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
            ("10.244.0.0".parse().unwrap(), 16, POOL_PODS),
            ("fd00:10:244::".parse().unwrap(), 48, POOL_PODS),
            ("10.96.0.0".parse().unwrap(), 12, POOL_SERVICES),
            ("fd00:10:96::".parse().unwrap(), 112, POOL_SERVICES),
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

    /// Opens an endpoint in both directions.
    pub(crate) fn open(&self, endpoint: u16) {
        let policy = PolicyValue {
            flags: POLICY_INGRESS_OPEN | POLICY_EGRESS_OPEN,
            ..PolicyValue::default()
        };
        self.policies.borrow_mut().insert(endpoint, policy);
    }

    /// Makes an endpoint default-deny in both directions.
    pub(crate) fn close(&self, endpoint: u16) {
        let policy = u32::from(endpoint) + 1;
        let value = PolicyValue {
            policy,
            cidr_table: 1,
            flags: 0,
        };
        self.policies.borrow_mut().insert(endpoint, value);
        let mut ports = self.ports.borrow_mut();
        ports.retain(|(key, _, _)| key.policy != policy.to_be_bytes());
        for direction in [0, 1] {
            let key = PortKey {
                policy: policy.to_be_bytes(),
                direction,
                ..PortKey::default()
            };
            let value = PortValue {
                class: policy * 1000 + u32::from(direction),
                has_cidrs: 0,
            };
            ports.push((key, 40, value));
        }
    }

    /// Files a verdict of a closed endpoint for a peer at a port; returns the class.
    pub(crate) fn rule(
        &self,
        endpoint: u16,
        direction: u8,
        (protocol, port): (u8, u16),
        peer: u32,
        allow: bool,
    ) -> u32 {
        let key = PortKey {
            policy: (u32::from(endpoint) + 1).to_be_bytes(),
            direction,
            protocol,
            port: port.to_be_bytes(),
        };
        let mut ports = self.ports.borrow_mut();
        let class = match ports
            .iter()
            .find(|(other, length, _)| *other == key && *length == 64)
        {
            Some((_, _, value)) => value.class,
            None => {
                let class = 1_000_000 + ports.len() as u32;
                ports.push((key, 64, PortValue { class, has_cidrs: 1 }));
                class
            }
        };
        let key = VerdictKey {
            class,
            kind: 0,
            id: peer,
        };
        let value = VerdictValue {
            allow: allow.into(),
            rule: 70 + peer,
        };
        self.verdicts.borrow_mut().insert(key, value);
        class
    }

    /// Forgets the verdicts of all endpoints.
    pub(crate) fn forget_rules(&mut self) {
        self.verdicts.borrow_mut().clear();
        self.state.revision += 1;
    }

    pub(crate) fn flows(&self) -> Vec<(FlowKey, FlowValue)> {
        let (established, new) = (self.established.borrow(), self.new.borrow());
        let all = established.iter().chain(new.iter());
        all.map(|(key, flow)| (*key, flow.load())).collect()
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
    type Flow = Rc<FlowCells>;
    type Repeat = Rc<RepeatCells>;

    fn clock(&self) -> u64 {
        u64::from(self.seconds.get()) * 1_000_000_000
    }
    fn settings(&self) -> Option<&SettingsValue> {
        self.settings.as_ref()
    }
    fn device(&self, ifindex: u32) -> Option<&DeviceValue> {
        self.devices.get(&ifindex)
    }
    fn endpoint(&self, ifindex: u32) -> Option<&EndpointValue> {
        self.endpoints.get(&ifindex)
    }
    fn marked(&self, mark: u32) -> Option<&MarkValue> {
        self.marks.get(&mark)
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
    fn pool(&self, a: &Address) -> Option<u32> {
        let covering = self
            .pools
            .iter()
            .filter(|(prefix, length, _)| covers(*prefix, *length, address(a)));
        covering
            .max_by_key(|(_, length, _)| *length)
            .map(|(_, _, kind)| *kind)
    }
    fn node(&self, a: &Address) -> Option<&NodeValue> {
        self.nodes.get(&address(a))
    }
    fn policy(&self, endpoint: u16) -> Option<PolicyValue> {
        self.policies.borrow().get(&endpoint).copied()
    }
    fn port(&self, key: PortKey) -> Option<PortValue> {
        let bits = |key: &PortKey| {
            let [a, b, c, d] = key.policy;
            let [e, f] = key.port;
            u64::from_be_bytes([a, b, c, d, key.direction, key.protocol, e, f])
        };
        let ports = self.ports.borrow();
        let covering = ports
            .iter()
            .filter(|(other, length, _)| (bits(other) ^ bits(&key)).leading_zeros() >= u32::from(*length));
        covering
            .max_by_key(|(_, length, _)| *length)
            .map(|(_, _, value)| *value)
    }
    fn verdict(&self, key: VerdictKey) -> Option<VerdictValue> {
        self.verdicts.borrow().get(&key).copied()
    }
    fn prefix(&self, table: u32, a: &Address) -> Option<u32> {
        let prefixes = self.prefixes.borrow();
        let covering = prefixes
            .iter()
            .filter(|(other, prefix, length, _)| *other == table && covers(*prefix, *length, address(a)));
        covering
            .max_by_key(|(_, _, length, _)| *length)
            .map(|(_, _, _, number)| *number)
    }
    fn flow_state(&self) -> Option<&FlowState> {
        Some(&self.state)
    }
    fn flow(&self, table: Table, key: &FlowKey) -> Option<Rc<FlowCells>> {
        self.table(table).borrow().get(key).cloned()
    }
    fn insert_flow(&self, table: Table, key: &FlowKey, value: &FlowValue) -> bool {
        let mut flows = self.table(table).borrow_mut();
        let full = table == Table::Established && self.room.is_some_and(|room| flows.len() >= room);
        if full && !flows.contains_key(key) {
            return false;
        }
        let cells = FlowCells::default();
        cells.store(value);
        flows.insert(*key, Rc::new(cells));
        true
    }
    fn remove_flow(&self, table: Table, key: &FlowKey) {
        self.table(table).borrow_mut().remove(key);
    }
    fn flow_count(&self, endpoint: u16) -> u32 {
        self.counts.borrow().get(&endpoint).copied().unwrap_or(0)
    }
    fn add_flow(&self, endpoint: u16) {
        *self.counts.borrow_mut().entry(endpoint).or_default() += 1;
    }
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentValue> {
        self.fragments.borrow().get(key).copied()
    }
    fn insert_fragment(&self, key: &FragmentKey, value: &FragmentValue) {
        self.fragments.borrow_mut().insert(*key, *value);
    }
    fn repeat(&self, key: &RepeatKey) -> Option<Rc<RepeatCells>> {
        self.repeats.borrow().get(key).cloned()
    }
    fn insert_repeat(&self, key: &RepeatKey, value: &RepeatValue) {
        self.repeats
            .borrow_mut()
            .insert(*key, Rc::new(RepeatCells::new(value)));
    }
    fn emit(&self, event: &Event) {
        self.events.borrow_mut().push(*event);
    }
}

impl World {
    fn table(&self, table: Table) -> &RefCell<HashMap<FlowKey, Rc<FlowCells>>> {
        match table {
            Table::Established => &self.established,
            Table::New => &self.new,
        }
    }
}

pub(crate) fn endpoint() -> EndpointValue {
    let mut value = EndpointValue {
        mark: POD_MARK,
        identity: POD_IDENTITY,
        index: POD_INDEX,
        mac: POD_MAC,
        ..EndpointValue::default()
    };
    value.v4[0] = POD_V4;
    value.v6[0] = octets(POD_V6);
    value
}

fn peer() -> EndpointValue {
    let mut value = EndpointValue {
        mark: PEER_MARK,
        identity: PEER_IDENTITY,
        index: PEER_INDEX,
        mac: PEER_MAC,
        ..EndpointValue::default()
    };
    value.v4[1] = PEER_V4;
    value.v4[0] = [10, 244, 1, 33];
    value.v6[0] = octets(PEER_V6);
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
