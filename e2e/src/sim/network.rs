//! Packets between the nodes.

use warren_model::{PskId, PublicKey};

use super::{
    MILLI, Micros, NodeId, SECOND,
    kernel::{KEEPALIVE, REKEY_TIMEOUT, Refused, Session},
    world::{Event, World},
};

/// One end of a path.
#[derive(Debug, Clone, Copy)]
pub(super) struct End {
    pub(super) node: NodeId,
    pub(super) slot: u8,
    pub(super) key: PublicKey,
}

/// What a packet is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Init,
    /// With this pre-shared key.
    Response(Option<PskId>),
    Keepalive,
    /// Whether its loss is a violation, and the era of the pair.
    Data(bool, u32),
}

/// A packet on its way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Packet {
    pub(super) from: End,
    pub(super) to: End,
    pub(super) session: u64,
    pub(super) kind: Kind,
}

/// Size of a data packet; any number that is not 0.
const DATA_BYTES: u64 = 1_000;

impl World {
    pub(super) fn delay(&mut self) -> Micros {
        200 + self.dice.bits() % self.longest_delay
    }

    pub(super) fn is_cut(&self, a: NodeId, b: NodeId) -> bool {
        self.cuts.iter().any(|cut| *cut == (a.min(b), a.max(b)))
    }

    /// Sends; handshakes and keepalives may be lost or doubled.
    fn transmit(&mut self, packet: Packet) {
        if self.is_cut(packet.from.node, packet.to.node) {
            return;
        }
        let times = match packet.kind {
            Kind::Data(..) => 1,
            Kind::Init | Kind::Response(_) | Kind::Keepalive => self.copies(),
        };
        for _ in 0..times {
            let delay = self.delay();
            self.at(delay, Event::Packet(packet));
        }
    }

    /// How often something arrives that may be lost or doubled.
    pub(super) fn copies(&mut self) -> u32 {
        match self.dice.roll(1000) as u32 {
            chance if chance < self.loss_per_mille => 0,
            991.. => 2,
            _ => 1,
        }
    }

    /// A data packet from one node to another, as the path map says now.
    pub(super) fn send(&mut self, from: NodeId, to: NodeId, delay: Micros) {
        if !self.nodes[from].powered || self.is_cut(from, to) {
            return;
        }
        let judged = self.judge.is_steady(from, to);
        let (slot, session, key, other) = match self.nodes[from].kernel.sends(self.now, to) {
            Ok((slot, session, key, peer)) => {
                let (shared, psk) = (self.is_shared(key, peer.key), peer.psk);
                let other = (peer.slot, peer.key);
                if shared != psk.is_some() {
                    self.violation(format!(
                        "a packet from node {from} to node {to} by slot {slot}: pre-shared key {psk:?}, to have one: {shared}"
                    ));
                }
                (slot, session, key, other)
            }
            Err(refused) => {
                if judged {
                    self.lost(from, to, "is not sent", refused);
                }
                return;
            }
        };
        let packet = Packet {
            from: End {
                node: from,
                slot,
                key,
            },
            to: End {
                node: to,
                slot: other.0,
                key: other.1,
            },
            session,
            kind: Kind::Data(judged, self.judge.era(from, to)),
        };
        self.at(delay, Event::Packet(packet));
    }

    /// Packets both ways, with the shortest and the longest delay: something is about to change, or has changed.
    pub(super) fn probe(&mut self, a: NodeId, b: NodeId) {
        if !self.probes {
            return;
        }
        for (from, to) in [(a, b), (b, a)] {
            let delay = if self.dice.once_in(2) {
                1
            } else {
                self.longest_delay
            };
            self.send(from, to, delay);
        }
    }

    pub(super) fn arrive(&mut self, packet: Packet) {
        let Packet {
            from,
            to,
            session,
            kind,
        } = packet;
        if self.is_cut(from.node, to.node) || !self.nodes[to.node].powered {
            return;
        }
        let now = self.now;
        let kernel = &mut self.nodes[to.node].kernel;
        let sender = (from.node, from.key);
        match kind {
            Kind::Init => {
                if let Ok(psk) = kernel.on_init(now, to.slot, sender, to.key, session) {
                    self.transmit(Packet {
                        from: to,
                        to: from,
                        session,
                        kind: Kind::Response(psk),
                    });
                }
            }
            Kind::Response(psk) => {
                if kernel.on_response(now, to.slot, sender, to.key, (session, psk)) {
                    self.handshake_done(to.node, to.slot, from.node, session);
                    self.transmit(Packet {
                        from: to,
                        to: from,
                        session,
                        kind: Kind::Keepalive,
                    });
                }
            }
            Kind::Keepalive => {
                if kernel.on_data(now, to.slot, sender, to.key, session, KEEPALIVE) == Ok(true) {
                    self.handshake_done(to.node, to.slot, from.node, session);
                }
            }
            Kind::Data(_, era) if era != self.judge.era(from.node, to.node) => {}
            Kind::Data(judged, _) => {
                match kernel.on_data(now, to.slot, sender, to.key, session, DATA_BYTES) {
                    Ok(confirmed) => {
                        if confirmed {
                            self.handshake_done(to.node, to.slot, from.node, session);
                        }
                        self.judge.delivered(from.node, to.node, judged);
                    }
                    Err(refused) if judged => self.lost(from.node, to.node, "is not accepted", refused),
                    Err(_) => {}
                }
            }
        }
    }

    fn handshake_done(&mut self, node: NodeId, slot: u8, peer: NodeId, session: u64) {
        self.note(|| format!("node {node} slot {slot}: session {session} with node {peer}"));
        let often = self.nodes[node]
            .kernel
            .peer(slot, peer)
            .is_some_and(|entry| entry.keepalive == 1);
        if often {
            self.arm(node, slot, peer, SECOND);
        }
        self.look_at(node, peer);
    }

    fn lost(&mut self, from: NodeId, to: NodeId, what: &str, refused: Refused) {
        let path = self.nodes[from].kernel.paths[to].map(|path| path.slot);
        let sentence = format!("a packet from node {from} to node {to} by slot {path:?} {what}: {refused:?}");
        self.violation(sentence);
        // Said once; the rest follows from it.
        self.judge.disturb(from, to);
    }

    /// Arms the timer of a peer that wants a handshake soon.
    pub(super) fn arm(&mut self, node: NodeId, slot: u8, peer: NodeId, after: Micros) {
        self.timers += 1;
        let timer = self.timers;
        if let Some(entry) = self.nodes[node].kernel.peer_mut(slot, peer) {
            entry.timer = timer;
            let event = Event::Timer {
                node,
                slot,
                peer,
                timer,
            };
            self.at(after, event);
        }
    }

    /// WireGuard's own timers: begins a handshake where the last one is old.
    pub(super) fn timer(&mut self, node: NodeId, slot: u8, peer: NodeId, timer: u64) {
        if !self.nodes[node].powered {
            return;
        }
        let now = self.now;
        let Some(device) = self.nodes[node].kernel.devices[usize::from(slot)].as_mut() else {
            return;
        };
        let key = device.key;
        let Some(entry) = device.peers[peer].as_mut().filter(|entry| entry.timer == timer) else {
            return;
        };
        if entry.keepalive == 0 {
            return;
        }
        let often = entry.keepalive == 1;
        let due = entry.current.map_or(now, Session::rekey_at);
        let to = End {
            node: peer,
            slot: entry.slot,
            key: entry.key,
        };
        let from = End { node, slot, key };
        if due > now {
            // The usual keepalive changes nothing here, so it is not sent.
            let Some(session) = entry.current.filter(|_| often) else {
                let jitter = self.dice.bits() % (2 * SECOND);
                return self.arm(node, slot, peer, due - now + jitter);
            };
            self.transmit(Packet {
                from,
                to,
                session: session.id,
                kind: Kind::Keepalive,
            });
            return self.arm(node, slot, peer, SECOND);
        }
        self.sessions += 1;
        let session = self.sessions;
        entry.begun = Some(session);
        self.transmit(Packet {
            from,
            to,
            session,
            kind: Kind::Init,
        });
        let jitter = self.dice.bits() % (333 * MILLI);
        self.arm(node, slot, peer, REKEY_TIMEOUT + jitter);
    }
}
