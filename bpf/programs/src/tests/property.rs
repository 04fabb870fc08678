//! Random packets, rules and changes of rules: nothing passes that neither policy nor an established, judged flow allows.

use std::collections::{HashMap, HashSet};

use warren_abi::{EGRESS, INGRESS};

use super::packets::*;
use crate::testing::{POD_INDEX, World};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[(self.next() % choices.len() as u64) as usize]
    }
}

/// A packet between the pod and a peer.
#[derive(Debug, Clone, Copy)]
struct Shot {
    family: Family,
    peer: End,
    protocol: u8,
    outbound: bool,
    /// Port of the pod and of the peer; identifier of an echo.
    ports: (u16, u16),
    /// Flags, chunk, or whether an echo is a reply.
    kind: u8,
}

/// What policy is asked for the direction that a packet goes.
type Question = (u8, End, u8, u16);

impl Shot {
    fn random(random: &mut Random) -> Self {
        let family = random.of(&FAMILIES);
        let protocol = random.of(&[TCP, UDP, SCTP, family.icmp().0]);
        let kinds: &[u8] = match protocol {
            TCP => &[SYN, SYN, SYN | ACK, ACK, FIN | ACK, RST, SYN | FIN, 0],
            SCTP => &[1, 1, 2, 0, 6, 14],
            UDP => &[0],
            _ => &[0, 0, 1],
        };
        Self {
            family,
            peer: random.of(&[End::Remote, End::Peer]),
            protocol,
            outbound: random.of(&[true, false]),
            ports: (random.of(&[80, 4000]), random.of(&[80, 4000])),
            kind: random.of(kinds),
        }
    }

    fn is_echo(self) -> bool {
        self.protocol == self.family.icmp().0
    }

    fn packet(self) -> Vec<u8> {
        let (from, to) = if self.outbound {
            (End::Pod, self.peer)
        } else {
            (self.peer, End::Pod)
        };
        if self.is_echo() {
            return self.family.echo(from, to, self.ports.0, self.kind == 1);
        }
        let (source, destination) = if self.outbound {
            self.ports
        } else {
            (self.ports.1, self.ports.0)
        };
        let payload = match self.protocol {
            TCP => tcp(source, destination, self.kind),
            UDP => udp(source, destination),
            _ => sctp(source, destination, self.kind),
        };
        self.family.packet(from, to, self.protocol, &payload)
    }

    /// Whether it may open a connection, by the protocols' own rules.
    fn opens(self) -> bool {
        match self.protocol {
            TCP => self.kind == SYN,
            SCTP => self.kind == 1,
            UDP => true,
            _ => self.kind == 0,
        }
    }

    fn question(self) -> Question {
        let direction = if self.outbound { EGRESS } else { INGRESS };
        let (_, request, reply, _) = self.family.icmp();
        let port = if self.is_echo() {
            if self.kind == 1 {
                reply.into()
            } else {
                request.into()
            }
        } else if self.outbound {
            self.ports.1
        } else {
            self.ports.0
        };
        (direction, self.peer, self.protocol, port)
    }

    /// The connection that it belongs to, by who opened it.
    fn connection(self, by_pod: bool) -> Connection {
        let ports = if self.is_echo() {
            (self.ports.0, 0)
        } else {
            self.ports
        };
        Connection(self.family, self.peer, self.protocol, ports, by_pod)
    }
}

/// A connection: family, peer, protocol, ports, opened by the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Connection(Family, End, u8, (u16, u16), bool);

/// Rules and what was opened: the obvious way.
#[derive(Default)]
struct Model {
    allowed: HashSet<Question>,
    /// What a connection was opened with, and when its last packet passed.
    opened: HashMap<Connection, (Question, u32)>,
}

/// No connection outlives this many seconds without a packet.
fn longest(protocol: u8) -> u32 {
    match protocol {
        TCP => 6 * 3600,
        SCTP => 3600,
        UDP => 180,
        _ => 30,
    }
}

impl Model {
    fn may_open(&self, shot: Shot) -> bool {
        self.allowed.contains(&shot.question())
    }

    /// It belongs to a connection that was opened by either end, is not over, and may be opened by the rules of now. What
    /// only opens connections belongs to those of its own direction.
    fn may_follow(&self, shot: Shot, now: u32) -> bool {
        let ways: &[bool] = if shot.opens() && shot.protocol != UDP {
            &[shot.outbound]
        } else {
            &[true, false]
        };
        ways.iter().any(|by_pod| {
            let opened = self.opened.get(&shot.connection(*by_pod));
            opened.is_some_and(|(question, last)| {
                now - last <= longest(shot.protocol) && self.allowed.contains(question)
            })
        })
    }

    /// Notes that it passed.
    fn passed(&mut self, shot: Shot, now: u32) {
        for by_pod in [true, false] {
            if let Some((_, last)) = self.opened.get_mut(&shot.connection(by_pod)) {
                *last = now;
            }
        }
        if shot.opens() && self.may_open(shot) {
            self.opened
                .insert(shot.connection(shot.outbound), (shot.question(), now));
        }
    }

    fn knows(&self, shot: Shot) -> bool {
        [true, false]
            .iter()
            .any(|by_pod| self.opened.contains_key(&shot.connection(*by_pod)))
    }
}

fn change(node: &mut Node, model: &mut Model, random: &mut Random) {
    let shot = Shot::random(random);
    let question @ (direction, peer, protocol, port) = shot.question();
    let allow = random.of(&[true, true, false]);
    if allow {
        model.allowed.insert(question);
    } else {
        model.allowed.remove(&question);
    }
    let world: &World = &node.world;
    world.rule(POD_INDEX, direction, (protocol, port), identity_of(peer), allow);
    node.world.state.revision += 1;
}

#[test]
fn nothing_passes_that_neither_policy_nor_a_flow_allows() {
    let mut passes = 0;
    for seed in 0..400 {
        let mut random = Random(seed);
        let mut node = Node::closed();
        let mut model = Model::default();
        for step in 0..300 {
            match random.next() % 10 {
                0 => change(&mut node, &mut model, &mut random),
                1 => node.wait(random.of(&[1, 29, 200, 30_000])),
                _ => {}
            }
            let shot = Shot::random(&mut random);
            let judged = match (shot.outbound, shot.peer) {
                (true, _) => node.pod_sends(&shot.packet()),
                (false, End::Peer) => node.pod_gets(&shot.packet(), PEER_JUDGED, ELSEWHERE),
                (false, _) => node.pod_gets_remote(&shot.packet()),
            };
            let now = node.world.seconds.get();
            let case = format!("seed {seed}, step {step}: {shot:?}");
            if judged.is_ok() {
                assert!(
                    model.may_open(shot) || model.may_follow(shot, now),
                    "passes: {case}"
                );
            } else if model.may_open(shot) {
                assert!(model.knows(shot), "dropped, though policy allows it: {case}");
            }
            if judged.is_ok() {
                passes += 1;
                model.passed(shot, now);
            }
        }
        for (key, value) in node.world.flows() {
            let shown = format!("seed {seed}: {key:?} {value:?}");
            assert!(value.lifetime > 0 && value.last_seen >= value.created, "{shown}");
        }
    }
    assert!(passes > 10_000, "the test looks at packets that pass: {passes}");
}

#[test]
fn what_was_opened_is_answered() {
    for seed in 0..2_000 {
        let mut random = Random(seed);
        let node = Node::closed();
        let mut call = Shot::random(&mut random);
        call.kind = match call.protocol {
            TCP => SYN,
            SCTP => 1,
            _ => 0,
        };
        let (direction, peer, protocol, port) = call.question();
        node.world
            .rule(POD_INDEX, direction, (protocol, port), identity_of(peer), true);
        let answer = Shot {
            outbound: !call.outbound,
            kind: match call.protocol {
                TCP => random.of(&[SYN | ACK, ACK, RST, FIN | ACK]),
                SCTP => random.of(&[2, 0, 6]),
                UDP => 0,
                _ => 1,
            },
            ..call
        };
        for shot in [call, answer, call, answer] {
            let judged = if shot.outbound {
                node.pod_sends(&shot.packet())
            } else {
                let mark = if shot.peer == End::Peer {
                    PEER_JUDGED
                } else {
                    crate::testing::TUNNEL_MARK
                };
                node.pod_gets(&shot.packet(), mark, ELSEWHERE)
            };
            assert!(judged.is_ok(), "seed {seed}: {shot:?}: {judged:?}");
            node.wait(random.of(&[0, 1, 5]));
        }
    }
}
