//! What survives an agent: WireGuard devices and the path map of one node, as far as rotation needs them.
//!
//! Sessions follow the WireGuard paper (section 6) and its `next`, `current` and `previous` key pairs: an initiator may
//! send when it has the response; a responder when it has received something under the new session.

use warren_agent_core::{NodePath, slots::KEY_SLOTS};
use warren_model::{PskId, PublicKey};

use super::{Micros, NodeId, SECOND};

/// A session is refused after this (REJECT_AFTER_TIME).
pub(super) const REJECT_AFTER: Micros = 180 * SECOND;
/// A new handshake is begun after this (REKEY_AFTER_TIME).
const REKEY_AFTER: Micros = 120 * SECOND;
/// The same at the end that did not begin the last one (REJECT_AFTER_TIME - KEEPALIVE_TIMEOUT - REKEY_TIMEOUT).
const RESPONDER_REKEY_AFTER: Micros = 165 * SECOND;
/// A handshake without answer is begun again after this (REKEY_TIMEOUT).
pub(super) const REKEY_TIMEOUT: Micros = 5 * SECOND;

/// Bytes of a packet without content.
pub(super) const KEEPALIVE: u64 = 32;

/// A pair of transport keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Session {
    pub(super) id: u64,
    pub(super) at: Micros,
    /// This end began the handshake.
    pub(super) mine: bool,
}

impl Session {
    /// When this end begins the next handshake.
    pub(super) fn rekey_at(self) -> Micros {
        self.at
            + if self.mine {
                REKEY_AFTER
            } else {
                RESPONDER_REKEY_AFTER
            }
    }

    fn is_alive(self, now: Micros) -> bool {
        now < self.at + REJECT_AFTER
    }
}

/// A peer of a device, with all prefixes of its node.
#[derive(Debug, Clone)]
pub(super) struct Peer {
    pub(super) key: PublicKey,
    /// The slot behind its port.
    pub(super) slot: u8,
    /// Set when the peer is added, and never after.
    pub(super) psk: Option<PskId>,
    /// Seconds; 0 for none.
    pub(super) keepalive: u16,
    pub(super) next: Option<Session>,
    pub(super) current: Option<Session>,
    /// More than WireGuard keeps: where both ends begin a handshake at once, it may drop the session that the other end
    /// still sends with, and that is not what is examined here.
    pub(super) previous: [Option<Session>; 4],
    /// The handshake that this end has begun.
    pub(super) begun: Option<u64>,
    /// The newest initiation seen: older ones are replays (its timestamp says so).
    newest: u64,
    pub(super) received: u64,
    pub(super) added: Micros,
    /// The timer that counts; older ones are ignored.
    pub(super) timer: u64,
}

impl Peer {
    pub(super) fn new(key: PublicKey, slot: u8, psk: Option<PskId>, keepalive: u16, added: Micros) -> Self {
        Self {
            key,
            slot,
            psk,
            keepalive,
            next: None,
            current: None,
            previous: [None; 4],
            begun: None,
            newest: 0,
            received: 0,
            added,
            timer: 0,
        }
    }

    fn retire(&mut self, session: Option<Session>) {
        if session.is_some() {
            self.previous.rotate_right(1);
            self.previous[0] = session;
        }
    }

    /// The last handshake is young enough to prove something.
    pub(super) fn is_fresh(&self, now: Micros) -> bool {
        self.current.is_some_and(|session| session.is_alive(now))
    }
}

/// A device. One peer per node: a prefix belongs to one peer.
#[derive(Debug, Clone)]
pub(super) struct Device {
    pub(super) generation: u64,
    pub(super) key: PublicKey,
    pub(super) peers: Vec<Option<Peer>>,
    /// Peers whose only prefix is their link-local address, without pre-shared key: their key and slot.
    pub(super) exchange: Vec<Option<(PublicKey, u8)>>,
}

/// Devices and maps.
#[derive(Debug, Clone, Default)]
pub(super) struct Kernel {
    pub(super) devices: [Option<Device>; KEY_SLOTS as usize],
    pub(super) paths: Vec<Option<NodePath>>,
    /// The directory that was last applied, kept beside the maps.
    pub(super) marker: (u64, u64),
}

/// Why a packet is not accepted, or not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    NoPath,
    NoDevice,
    WrongKey,
    NoPeer,
    NoSession,
    NoReceiveBit,
    Replay,
}

impl Kernel {
    pub(super) fn new(nodes: usize) -> Self {
        Self {
            devices: Default::default(),
            paths: vec![None; nodes],
            marker: (0, 0),
        }
    }

    pub(super) fn device(&self, slot: u8) -> Option<&Device> {
        self.devices.get(usize::from(slot))?.as_ref()
    }

    pub(super) fn peer(&self, slot: u8, node: NodeId) -> Option<&Peer> {
        self.device(slot)?.peers.get(node)?.as_ref()
    }

    pub(super) fn peer_mut(&mut self, slot: u8, node: NodeId) -> Option<&mut Peer> {
        self.devices
            .get_mut(usize::from(slot))?
            .as_mut()?
            .peers
            .get_mut(node)?
            .as_mut()
    }

    pub(super) fn receives(&self, slot: u8, node: NodeId) -> bool {
        self.paths[node].is_some_and(|path| path.receive & (1 << slot) != 0)
    }

    /// An initiation from a peer's key to ours. Where it is answered: the pre-shared key of the answer.
    pub(super) fn on_init(
        &mut self,
        now: Micros,
        slot: u8,
        from: (NodeId, PublicKey),
        to: PublicKey,
        id: u64,
    ) -> Result<Option<PskId>, Refused> {
        self.addressed(slot, from, to)?;
        let peer = self.peer_mut(slot, from.0).ok_or(Refused::NoPeer)?;
        if id <= peer.newest {
            return Err(Refused::Replay);
        }
        peer.newest = id;
        peer.next = Some(Session {
            id,
            at: now,
            mine: false,
        });
        Ok(peer.psk)
    }

    /// A response. Returns whether it completes a handshake: not where it was made with another pre-shared key.
    pub(super) fn on_response(
        &mut self,
        now: Micros,
        slot: u8,
        from: (NodeId, PublicKey),
        to: PublicKey,
        (id, psk): (u64, Option<PskId>),
    ) -> bool {
        if self.addressed(slot, from, to).is_err() {
            return false;
        }
        let Some(peer) = self
            .peer_mut(slot, from.0)
            .filter(|peer| peer.begun == Some(id) && peer.psk == psk)
        else {
            return false;
        };
        peer.begun = None;
        let replaced = peer.current;
        peer.retire(replaced);
        let unused = peer.next.take();
        peer.retire(unused);
        peer.current = Some(Session {
            id,
            at: now,
            mine: true,
        });
        true
    }

    /// A transport packet. Returns whether it confirmed a session.
    pub(super) fn on_data(
        &mut self,
        now: Micros,
        slot: u8,
        from: (NodeId, PublicKey),
        to: PublicKey,
        id: u64,
        bytes: u64,
    ) -> Result<bool, Refused> {
        self.addressed(slot, from, to)?;
        let receives = self.receives(slot, from.0);
        let peer = self.peer_mut(slot, from.0).ok_or(Refused::NoPeer)?;
        let known = [peer.next, peer.current].into_iter().chain(peer.previous);
        if !known
            .flatten()
            .any(|session| session.id == id && session.is_alive(now))
        {
            return Err(Refused::NoSession);
        }
        peer.received += bytes;
        let confirmed = peer.next.filter(|next| next.id == id);
        if let Some(next) = confirmed {
            let replaced = peer.current;
            peer.retire(replaced);
            peer.current = Some(next);
            peer.next = None;
        }
        // A keepalive is taken by the device itself.
        if bytes > KEEPALIVE && !receives {
            return Err(Refused::NoReceiveBit);
        }
        Ok(confirmed.is_some())
    }

    fn addressed(&self, slot: u8, from: (NodeId, PublicKey), to: PublicKey) -> Result<(), Refused> {
        let device = self.device(slot).ok_or(Refused::NoDevice)?;
        if device.key != to {
            return Err(Refused::WrongKey);
        }
        match self.peer(slot, from.0) {
            Some(peer) if peer.key == from.1 => Ok(()),
            _ => Err(Refused::NoPeer),
        }
    }

    /// The session that a packet to a node leaves with: (slot, session, own key, peer).
    pub(super) fn sends(&self, now: Micros, to: NodeId) -> Result<(u8, u64, PublicKey, &Peer), Refused> {
        let path = self.paths[to].ok_or(Refused::NoPath)?;
        let device = self.device(path.slot).ok_or(Refused::NoDevice)?;
        let peer = self.peer(path.slot, to).ok_or(Refused::NoPeer)?;
        let session = peer.current.filter(|session| session.is_alive(now));
        let session = session.ok_or(Refused::NoSession)?;
        Ok((path.slot, session.id, device.key, peer))
    }
}
