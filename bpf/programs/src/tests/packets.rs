//! A node whose programs are run on packets of both families.

use warren_abi::{DropReason, EGRESS, INGRESS};

use crate::{
    Judgement, Meta, Verdict, barrier_in, barrier_out, from_pod,
    testing::{
        PEER_IDENTITY, PEER_IFINDEX, PEER_MAC, PEER_MARK, POD_IDENTITY, POD_IFINDEX, POD_INDEX, POD_MAC,
        POD_MARK, TUNNEL_MARK, TUNNEL0, UNDERLAY, World, ethernet_from, run, v4, v6,
    },
    to_host, to_pod, tun_eg, tun_in,
};

pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const SCTP: u8 = 132;

pub(super) const FIN: u8 = 1;
pub(super) const SYN: u8 = 2;
pub(super) const RST: u8 = 4;
pub(super) const ACK: u8 = 16;

pub(super) const REMOTE_IDENTITY: u32 = 300;
pub(super) const NODE_IDENTITY: u32 = 6;
pub(super) const HOST_IDENTITY: u32 = 1;
pub(super) const WORLD_IDENTITY: u32 = 2;

/// Ends of packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum End {
    Pod,
    Peer,
    Remote,
    World,
    Service,
    Host,
    OtherNode,
}

/// A family of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Family {
    V4,
    V6,
}

pub(super) const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

impl Family {
    /// The number of ICMP, and its type of an echo request and reply, and of "unreachable".
    pub(super) fn icmp(self) -> (u8, u8, u8, u8) {
        match self {
            Self::V4 => (1, 8, 0, 3),
            Self::V6 => (58, 128, 129, 1),
        }
    }

    /// A packet between two ends.
    pub(super) fn packet(self, from: End, to: End, protocol: u8, payload: &[u8]) -> Vec<u8> {
        match self {
            Self::V4 => v4(v4_of(from), v4_of(to), protocol, payload),
            Self::V6 => v6(v6_of(from), v6_of(to), protocol, payload),
        }
    }

    /// An echo request, or the reply.
    pub(super) fn echo(self, from: End, to: End, id: u16, reply: bool) -> Vec<u8> {
        let (protocol, request, answer, _) = self.icmp();
        let [high, low] = id.to_be_bytes();
        let kind = if reply { answer } else { request };
        self.packet(from, to, protocol, &[kind, 0, 0, 0, high, low, 0, 1])
    }

    /// An "unreachable" that quotes a packet, cut off after so many bytes.
    pub(super) fn error(self, from: End, to: End, quoted: &[u8], length: usize) -> Vec<u8> {
        let (protocol, _, _, kind) = self.icmp();
        let quoted = &quoted[..quoted.len().min(length)];
        self.packet(
            from,
            to,
            protocol,
            &[&[kind, 1, 0, 0, 0, 0, 0, 0], quoted].concat(),
        )
    }
}

fn v4_of(end: End) -> [u8; 4] {
    match end {
        End::Pod => [10, 244, 1, 2],
        End::Peer => [10, 244, 1, 3],
        End::Remote => [10, 244, 2, 9],
        End::World => [8, 8, 8, 8],
        End::Service => [10, 96, 0, 10],
        End::Host => [192, 168, 0, 1],
        End::OtherNode => [192, 168, 0, 2],
    }
}

fn v6_of(end: End) -> &'static str {
    match end {
        End::Pod => "fd00:10:244:1::2",
        End::Peer => "fd00:10:244:1::3",
        End::Remote => "fd00:10:244:2::9",
        End::World => "2001:db8::8",
        End::Service => "fd00:10:96::a",
        End::Host => "fd00:192::1",
        End::OtherNode => "fd00:192::2",
    }
}

pub(super) fn tcp(from: u16, to: u16, flags: u8) -> Vec<u8> {
    let ports = [from.to_be_bytes(), to.to_be_bytes()].concat();
    [
        &ports[..],
        &[0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 255, 255, 0, 0, 0, 0],
    ]
    .concat()
}

pub(super) fn udp(from: u16, to: u16) -> Vec<u8> {
    [&from.to_be_bytes()[..], &to.to_be_bytes(), &[0, 8, 0, 0]].concat()
}

pub(super) fn sctp(from: u16, to: u16, chunk: u8) -> Vec<u8> {
    let ports = [from.to_be_bytes(), to.to_be_bytes()].concat();
    [&ports[..], &[0, 0, 0, 9, 0, 0, 0, 0, chunk, 0, 0, 4]].concat()
}

/// The identity of the pod's peers as the pod's rules name it.
pub(super) fn identity_of(end: End) -> u32 {
    match end {
        End::Pod => POD_IDENTITY,
        End::Peer => PEER_IDENTITY,
        End::Remote => REMOTE_IDENTITY,
        End::World | End::Service => WORLD_IDENTITY,
        End::Host => HOST_IDENTITY,
        End::OtherNode => NODE_IDENTITY,
    }
}

/// The mark of packets of the pod that were judged.
pub(super) const POD_JUDGED: u32 = TUNNEL_MARK | POD_MARK;
pub(super) const PEER_JUDGED: u32 = TUNNEL_MARK | PEER_MARK;
/// An ifindex of packets that came in.
pub(super) const ELSEWHERE: u32 = 77;

/// A node.
pub(super) struct Node {
    pub(super) world: World,
}

impl Node {
    /// The pod is default-deny in both directions; all others are open.
    pub(super) fn closed() -> Self {
        let node = Self { world: World::new() };
        node.world.close(POD_INDEX);
        node
    }

    pub(super) fn open() -> Self {
        Self { world: World::new() }
    }

    /// Lets the pod be reached.
    pub(super) fn allow_in(&self, from: End, protocol: u8, port: u16) {
        self.world
            .rule(POD_INDEX, INGRESS, (protocol, port), identity_of(from), true);
    }

    /// Lets the pod reach.
    pub(super) fn allow_out(&self, to: End, protocol: u8, port: u16) {
        self.world
            .rule(POD_INDEX, EGRESS, (protocol, port), identity_of(to), true);
    }

    /// Takes all rules away.
    pub(super) fn forbid(&mut self) {
        self.world.forget_rules();
    }

    pub(super) fn wait(&self, seconds: u32) {
        self.world.seconds.set(self.world.seconds.get() + seconds);
    }

    fn meta(ifindex: u32, mark: u32, ingress_ifindex: u32) -> Meta {
        Meta {
            ifindex,
            mark,
            ingress_ifindex,
            ..Meta::default()
        }
    }

    fn framed(mac: [u8; 6], packet: &[u8]) -> Vec<u8> {
        let ethertype = if packet[0] >> 4 == 6 { 0x86dd } else { 0x0800 };
        ethernet_from(mac, ethertype, packet)
    }

    /// The pod sends.
    pub(super) fn pod_sends(&self, packet: &[u8]) -> Judgement {
        let frame = Self::framed(POD_MAC, packet);
        run(
            from_pod,
            &frame,
            &self.world,
            &Self::meta(POD_IFINDEX, 0, POD_IFINDEX),
        )
    }

    /// The pod's peer sends.
    pub(super) fn peer_sends(&self, packet: &[u8]) -> Judgement {
        let frame = Self::framed(PEER_MAC, packet);
        run(
            from_pod,
            &frame,
            &self.world,
            &Self::meta(PEER_IFINDEX, 0, PEER_IFINDEX),
        )
    }

    /// Something reaches the pod. `ingress_ifindex` 0 = the host made it.
    pub(super) fn pod_gets(&self, packet: &[u8], mark: u32, ingress_ifindex: u32) -> Judgement {
        let frame = Self::framed([2, 0, 0, 0, 0, 9], packet);
        run(
            to_pod,
            &frame,
            &self.world,
            &Self::meta(POD_IFINDEX, mark, ingress_ifindex),
        )
    }

    pub(super) fn peer_gets(&self, packet: &[u8], mark: u32, ingress_ifindex: u32) -> Judgement {
        let frame = Self::framed([2, 0, 0, 0, 0, 9], packet);
        run(
            to_pod,
            &frame,
            &self.world,
            &Self::meta(PEER_IFINDEX, mark, ingress_ifindex),
        )
    }

    /// From a remote pod or node to the pod.
    pub(super) fn pod_gets_remote(&self, packet: &[u8]) -> Judgement {
        self.pod_gets(packet, TUNNEL_MARK, TUNNEL0)
    }

    pub(super) fn leaves_by_tunnel(&self, packet: &[u8], mark: u32, ingress_ifindex: u32) -> Judgement {
        run(
            tun_eg,
            packet,
            &self.world,
            &Self::meta(TUNNEL0, mark, ingress_ifindex),
        )
    }

    pub(super) fn comes_by_tunnel(&self, packet: &[u8]) -> Judgement {
        run(tun_in, packet, &self.world, &Self::meta(TUNNEL0, 0, TUNNEL0))
    }

    pub(super) fn leaves(&self, packet: &[u8], mark: u32, ingress_ifindex: u32) -> Judgement {
        let frame = Self::framed([2, 0, 0, 0, 0, 9], packet);
        run(
            barrier_out,
            &frame,
            &self.world,
            &Self::meta(UNDERLAY, mark, ingress_ifindex),
        )
    }

    pub(super) fn comes(&self, packet: &[u8]) -> Judgement {
        let frame = Self::framed([2, 0, 0, 0, 0, 9], packet);
        run(
            barrier_in,
            &frame,
            &self.world,
            &Self::meta(UNDERLAY, 0, UNDERLAY),
        )
    }

    pub(super) fn socket_gets(&self, packet: &[u8], mark: u32, ingress_ifindex: u32) -> Judgement {
        run(
            to_host,
            packet,
            &self.world,
            &Self::meta(UNDERLAY, mark, ingress_ifindex),
        )
    }
}

/// The mark that a packet passed with.
pub(super) fn mark(judgement: Judgement) -> Result<u32, DropReason> {
    judgement.map(|verdict| match verdict {
        Verdict::Pass { mark } | Verdict::Redirect { mark, .. } => mark,
    })
}

/// The reason of a drop.
pub(super) fn dropped(judgement: Judgement) -> DropReason {
    judgement.expect_err("is dropped")
}
