//! One packet's way through the node: which programs see it, with which mark, and what the oracle expects of each.

use std::{fmt, net::IpAddr};

use anyhow::Result;

use super::{
    cluster::{Cluster, Packet, Party, Way},
    dice::Dice,
    evaluate::allowed,
    generate,
    loaded::Loaded,
};
use crate::kernel::{Frame, Hook, Node, Seen};

/// MAC address of whoever is not a pod of this node.
const ELSEWHERE: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// Ports of services, which no policy names.
const SERVICE_PORT: u16 = 9_999;
const NODE_PORT: u16 = 30_080;
/// First of the ports that connections come from; each packet has one of its own.
const FIRST_PORT: u16 = 20_000;

/// The types of ICMP and ICMPv6 that are drawn: echo, its answer, and two errors.
const ICMP_KINDS: [(u16, u16); 4] = [(8, 128), (0, 129), (3, 1), (11, 2)];

/// The type of the same meaning in the other family; an echo where there is none.
fn same_kind(kind: u16, kinds: &[(u16, u16)], to_v4: bool) -> u16 {
    let pair = kinds
        .iter()
        .find(|(v4, v6)| kind == if to_v4 { *v6 } else { *v4 });
    let (v4, v6) = pair.unwrap_or(&kinds[0]);
    if to_v4 { *v4 } else { *v6 }
}

/// How a packet reaches its destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Address {
    /// It is sent to where it goes.
    Direct,
    /// It is sent to a service, and translated by the stack.
    Service,
    /// It is sent to a NodePort of this node, and translated by the stack.
    NodePort,
}

/// A packet with what the oracle does not care about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Trip {
    pub(super) packet: Packet,
    /// Where the peer is a pod: it lives on another node.
    remote: bool,
    address: Address,
    /// The stack puts this node's address in the place of the sender's.
    masqueraded: bool,
    /// The packet is sent twice, and answered where that is simple.
    again: bool,
    /// Tells packets apart.
    number: u16,
}

/// A program's answer that is not the oracle's.
#[derive(Debug, Clone)]
pub(super) struct Difference {
    hook: Hook,
    what: &'static str,
    passed: bool,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (did, should) = if self.passed {
            ("lets", "deny")
        } else {
            ("denies", "let")
        };
        write!(
            f,
            "{:?} {did} {} pass; it should {should} it",
            self.hook, self.what
        )
    }
}

/// How a trip ended.
#[derive(Debug)]
pub(super) struct Arrival {
    /// The oracle says that the packet passes at its subject.
    pub(super) allowed: bool,
    pub(super) difference: Option<Difference>,
}

impl Trip {
    pub(super) fn draw(dice: &mut Dice, cluster: &Cluster, number: u16) -> Self {
        let mut packet = generate::packet(dice, cluster);
        // What a packet of the other family cannot be.
        (packet.protocol, packet.port) = match (packet.protocol, packet.address, packet.port) {
            (1, IpAddr::V6(_), kind) => (58, same_kind(kind, &ICMP_KINDS, false)),
            (58, IpAddr::V4(_), kind) => (1, same_kind(kind, &ICMP_KINDS, true)),
            (protocol, _, port) => (protocol, port),
        };
        Self {
            packet,
            remote: dice.once_in(2),
            address: match dice.roll(6) {
                0 | 1 => Address::Service,
                2 => Address::NodePort,
                _ => Address::Direct,
            },
            masqueraded: dice.once_in(4),
            again: dice.once_in(4),
            number,
        }
    }

    /// It has ports, so it may be translated, and sockets of the host may get it.
    pub(super) fn has_ports(&self) -> bool {
        matches!(self.packet.protocol, 6 | 17 | 132)
    }

    /// Both ends and the protocol, whichever way.
    pub(super) fn ends(&self, cluster: &Cluster) -> (IpAddr, IpAddr, u8) {
        let own = self.own_address(cluster, self.packet.subject);
        let peer = self.packet.address;
        (own.min(peer), own.max(peer), self.packet.protocol)
    }

    /// Sends the packet, and compares what each program says with the oracle.
    pub(super) fn take(&self, loaded: &mut Loaded<'_>, cluster: &Cluster) -> Result<Arrival> {
        let away = match self.packet.peer {
            Party::Pod(_) => self.remote,
            Party::Node(_) | Party::World(_) => false,
            Party::Unknown(_)
            | Party::Init(_)
            | Party::Unmanaged(_)
            | Party::Health(_)
            | Party::Ingress(_) => true,
        };
        if away {
            loaded.move_away(self.packet.peer, self.packet.address)?;
        }
        let difference = Walk {
            trip: self,
            cluster,
            node: &*loaded.node,
            away,
        }
        .walk();
        if away {
            loaded.move_back(self.packet.peer, self.packet.address)?;
        }
        Ok(Arrival {
            allowed: allowed(cluster, &self.packet),
            difference: difference?,
        })
    }

    /// The address of a party of this node in the packet's family.
    fn own_address(&self, cluster: &Cluster, party: Party) -> IpAddr {
        let addresses = match party {
            Party::Pod(index) => &cluster.pods[index].addresses,
            Party::Node(index) => &cluster.nodes[index].addresses,
            _ => return self.packet.address,
        };
        let same = |address: &&IpAddr| address.is_ipv4() == self.packet.address.is_ipv4();
        *addresses.iter().find(same).unwrap_or(&addresses[0])
    }
}

/// A step of the way ends it where the two disagree (`Some`), or where the packet is rightly dropped.
enum Step {
    Passed { mark: u32 },
    Dropped,
    Differs(Difference),
}

struct Walk<'a> {
    trip: &'a Trip,
    cluster: &'a Cluster,
    node: &'a Node,
    away: bool,
}

impl Walk<'_> {
    fn walk(&self) -> Result<Option<Difference>> {
        let packet = self.trip.packet;
        match (packet.subject, packet.way) {
            (Party::Pod(pod), Way::Out) => self.out_of_pod(pod),
            (Party::Pod(pod), Way::In) => self.at_pod(pod),
            (_, Way::Out) => self.out_of_host(),
            (_, Way::In) => self.at_host(),
        }
    }

    /// What the oracle says at the packet's subject.
    fn allowed(&self) -> bool {
        allowed(self.cluster, &self.trip.packet)
    }

    /// What the oracle says at the other end, where that is on this node.
    fn allowed_at_peer(&self) -> bool {
        let packet = self.trip.packet;
        let of_this_node = match packet.peer {
            Party::Pod(_) => !self.away,
            Party::Node(0) => true,
            _ => false,
        };
        let seen = Packet {
            subject: packet.peer,
            peer: packet.subject,
            address: self.trip.own_address(self.cluster, packet.subject),
            way: match packet.way {
                Way::In => Way::Out,
                Way::Out => Way::In,
            },
            ..packet
        };
        !of_this_node || allowed(self.cluster, &seen)
    }

    fn frame(&self, mac: [u8; 6], source: IpAddr, destination: IpAddr, port: u16) -> Frame {
        Frame {
            mac,
            source,
            destination,
            protocol: self.trip.packet.protocol,
            source_port: FIRST_PORT + self.trip.number,
            port,
            tcp_flags: Frame::SYN,
        }
    }

    /// Runs a program; `expected`: it should let the packet pass.
    fn step(&self, hook: Hook, frame: &Frame, seen: Seen, expected: bool) -> Result<Step> {
        let bytes = frame.bytes();
        let mut answer = self.node.run(hook, &bytes, seen)?;
        let mut what = "the packet";
        if self.trip.again && answer.passed == expected {
            answer = self.node.run(hook, &bytes, seen)?;
            what = "the packet when it is sent again";
        }
        let passed = answer.passed;
        Ok(match (passed, expected) {
            (true, true) => Step::Passed { mark: answer.mark },
            (false, false) => Step::Dropped,
            (true, false) | (false, true) => Step::Differs(Difference { hook, what, passed }),
        })
    }

    /// From the pod's veth to where the packet leaves the node, or arrives.
    fn out_of_pod(&self, pod: usize) -> Result<Option<Difference>> {
        let packet = self.trip.packet;
        let (index, own) = (
            pod as u16 + 1,
            self.trip.own_address(self.cluster, packet.subject),
        );
        let device = self.node.device(index);
        let (first, port) = match self.trip.address {
            Address::Service if self.translatable() => (self.service(), SERVICE_PORT),
            Address::NodePort if self.translatable() => {
                (self.trip.own_address(self.cluster, Party::Node(0)), NODE_PORT)
            }
            _ => (packet.address, packet.port),
        };
        let sent = self.frame(Node::mac(index), own, first, port);
        let seen = Seen {
            ingress_ifindex: device,
            mark: 0,
        };
        let answer = self.node.run(Hook::FromPod(index), &sent.bytes(), seen)?;
        let to_host_without_ports = packet.peer == Party::Node(0) && !self.trip.has_ports();
        let judged = answer.mark == self.node.judged(index);
        // Where it is judged later, it has to pass here; where it is judged here, as the oracle says.
        let translated = first != packet.address;
        let expected = self.allowed() && (!to_host_without_ports || self.allowed_at_peer());
        if answer.passed == judged && answer.passed != expected
            || !answer.passed && (expected || translated)
            || answer.passed && judged && translated
        {
            return Ok(Some(Difference {
                hook: Hook::FromPod(index),
                what: if judged {
                    "the packet, as judged,"
                } else {
                    "the packet"
                },
                passed: answer.passed,
            }));
        }
        if !answer.passed || to_host_without_ports {
            return Ok(None);
        }
        let masqueraded = translated && self.trip.masqueraded;
        let source = if masqueraded {
            self.trip.own_address(self.cluster, Party::Node(0))
        } else {
            own
        };
        let last = self.frame(ELSEWHERE, source, packet.address, packet.port);
        let seen = Seen {
            ingress_ifindex: device,
            mark: answer.mark,
        };
        let expected = (judged || self.allowed()) && self.allowed_at_peer();
        let step = self.step(self.last_hook(), &last, seen, expected)?;
        if let Step::Passed { .. } = step
            && self.trip.again
            && !translated
            && self.trip.has_ports()
        {
            return self.answer_to_pod(index, &last);
        }
        Ok(difference(step))
    }

    /// The answer comes back to the pod that asked: it passes whatever policy says.
    fn answer_to_pod(&self, index: u16, request: &Frame) -> Result<Option<Difference>> {
        let packet = self.trip.packet;
        let reply = request.reply(ELSEWHERE);
        let seen = match packet.peer {
            Party::Pod(peer) if !self.away => {
                let other = peer as u16 + 1;
                let reply = request.reply(Node::mac(other));
                let seen = Seen {
                    ingress_ifindex: self.node.device(other),
                    mark: 0,
                };
                let step = self.reply_step(Hook::FromPod(other), &reply, seen)?;
                let Step::Passed { mark } = step else {
                    return Ok(difference(step));
                };
                Seen { mark, ..seen }
            }
            Party::Node(0) => Seen::default(),
            Party::World(_) => Seen {
                ingress_ifindex: self.node.uplink,
                mark: 0,
            },
            _ => self.off_tunnel(),
        };
        Ok(difference(self.reply_step(Hook::ToPod(index), &reply, seen)?))
    }

    fn reply_step(&self, hook: Hook, frame: &Frame, seen: Seen) -> Result<Step> {
        let answer = self.node.run(hook, &frame.bytes(), seen)?;
        Ok(if answer.passed {
            Step::Passed { mark: answer.mark }
        } else {
            Step::Differs(Difference {
                hook,
                what: "the answer",
                passed: false,
            })
        })
    }

    /// From wherever the packet comes to the pod's veth.
    fn at_pod(&self, pod: usize) -> Result<Option<Difference>> {
        let packet = self.trip.packet;
        let (index, own) = (
            pod as u16 + 1,
            self.trip.own_address(self.cluster, packet.subject),
        );
        let mut frame = self.frame(ELSEWHERE, packet.address, own, packet.port);
        let mut expected = self.allowed();
        let seen = match packet.peer {
            Party::Pod(peer) if !self.away => {
                let peer = peer as u16 + 1;
                if self.trip.masqueraded && self.trip.has_ports() {
                    frame.source = self.trip.own_address(self.cluster, Party::Node(0));
                }
                // As after a service: the sender's egress is judged here, too.
                let unjudged = self.trip.address != Address::Direct && self.trip.has_ports();
                expected &= !unjudged || self.allowed_at_peer();
                Seen {
                    ingress_ifindex: self.node.device(peer),
                    mark: if unjudged {
                        self.node.unjudged(peer)
                    } else {
                        self.node.judged(peer)
                    },
                }
            }
            Party::Node(0) => {
                expected &= self.allowed_at_peer();
                Seen::default()
            }
            Party::World(_) => match self.through(Hook::BarrierIn, &frame, self.node.uplink)? {
                Ok(seen) => seen,
                Err(difference) => return Ok(Some(difference)),
            },
            _ => match self.through(Hook::TunIn, &frame, self.node.tunnel)? {
                Ok(seen) => seen,
                Err(difference) => return Ok(Some(difference)),
            },
        };
        let step = self.step(Hook::ToPod(index), &frame, seen, expected)?;
        let simple = !self.trip.masqueraded && self.trip.has_ports();
        if let Step::Passed { .. } = step
            && self.trip.again
            && simple
        {
            let seen = Seen {
                ingress_ifindex: self.node.device(index),
                mark: 0,
            };
            let reply = frame.reply(Node::mac(index));
            return Ok(difference(self.reply_step(Hook::FromPod(index), &reply, seen)?));
        }
        Ok(difference(step))
    }

    /// A device that lets it in without a word about policy.
    fn through(&self, hook: Hook, frame: &Frame, device: u32) -> Result<Result<Seen, Difference>> {
        let seen = Seen {
            ingress_ifindex: device,
            mark: 0,
        };
        Ok(match self.step(hook, frame, seen, true)? {
            Step::Passed { mark } => Ok(Seen { mark, ..seen }),
            Step::Differs(difference) => Err(difference),
            Step::Dropped => unreachable!("a drop was not expected"),
        })
    }

    /// From a socket of the host.
    fn out_of_host(&self) -> Result<Option<Difference>> {
        let own = self.trip.own_address(self.cluster, Party::Node(0));
        let packet = self.trip.packet;
        let frame = self.frame(ELSEWHERE, own, packet.address, packet.port);
        let expected = self.allowed() && self.allowed_at_peer();
        Ok(difference(self.step(
            self.last_hook(),
            &frame,
            Seen::default(),
            expected,
        )?))
    }

    /// To a socket of the host; without ports, where it enters the node.
    fn at_host(&self) -> Result<Option<Difference>> {
        let packet = self.trip.packet;
        let own = self.trip.own_address(self.cluster, Party::Node(0));
        let frame = self.frame(ELSEWHERE, packet.address, own, packet.port);
        let (hook, device) = match packet.peer {
            Party::Pod(peer) if !self.away => {
                let index = peer as u16 + 1;
                (Hook::FromPod(index), self.node.device(index))
            }
            Party::World(_) => (Hook::BarrierIn, self.node.uplink),
            _ => (Hook::TunIn, self.node.tunnel),
        };
        let mut seen = Seen {
            ingress_ifindex: device,
            mark: 0,
        };
        if let Hook::FromPod(index) = hook {
            if self.trip.has_ports() {
                seen.mark = self.node.judged(index);
                return Ok(difference(self.step(
                    Hook::ToHost,
                    &frame,
                    seen,
                    self.allowed(),
                )?));
            }
            let frame = Frame {
                mac: Node::mac(index),
                ..frame
            };
            let expected = self.allowed() && self.allowed_at_peer();
            return Ok(difference(self.step(hook, &frame, seen, expected)?));
        }
        if !self.trip.has_ports() {
            return Ok(difference(self.step(hook, &frame, seen, self.allowed())?));
        }
        let seen = match self.through(hook, &frame, device)? {
            Ok(seen) => seen,
            Err(difference) => return Ok(Some(difference)),
        };
        Ok(difference(self.step(
            Hook::ToHost,
            &frame,
            seen,
            self.allowed(),
        )?))
    }

    fn off_tunnel(&self) -> Seen {
        Seen {
            ingress_ifindex: self.node.tunnel,
            mark: self.node.decrypted(),
        }
    }

    /// The last program before the packet is gone, by its destination.
    fn last_hook(&self) -> Hook {
        match self.trip.packet.peer {
            Party::Pod(peer) if !self.away => Hook::ToPod(peer as u16 + 1),
            Party::Node(0) => Hook::ToHost,
            Party::World(_) => Hook::BarrierOut,
            _ => Hook::TunEg,
        }
    }

    /// The stack could translate it on its way.
    fn translatable(&self) -> bool {
        self.trip.has_ports()
    }

    fn service(&self) -> IpAddr {
        if self.trip.packet.address.is_ipv4() {
            IpAddr::from([10, 96, 0, 10])
        } else {
            IpAddr::from([0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10])
        }
    }
}

fn difference(step: Step) -> Option<Difference> {
    match step {
        Step::Passed { .. } | Step::Dropped => None,
        Step::Differs(difference) => Some(difference),
    }
}
