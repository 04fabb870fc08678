//! Pre-shared keys in the simulated world: the exchanges of the agent's core, with secrets that are numbers.
//!
//! Their tunnel is a peer at either end with a link-local address. It loses, doubles and delays packets as the network does; its
//! handshakes are not simulated.

use std::{collections::BTreeSet, time::Duration};

use warren_agent_core::{
    psk::{Done, Ends, Exchanges, PskUse, Record, Seen, Work, message},
    slots::{self, KEY_SLOTS, NodeKeys, Path},
};
use warren_model::{ForgetPsk, PskId, link_address};

use super::{
    MILLI, Micros, NodeId, Sabotage,
    agent::{Dead, Step},
    network::End,
    world::{Event, World},
};

/// The keys of both ends of a path.
pub(super) fn ends(own: &NodeKeys, path: &Path) -> Option<Ends> {
    let own = own.key(path.own)?;
    Some(Ends { own, peer: path.key })
}

/// What a path's peer is to have.
pub(super) fn psk_of(now: Micros, exchanges: &Exchanges, own: &NodeKeys, path: &Path) -> PskUse {
    match (path.exchange, ends(own, path)) {
        (None, _) => PskUse::Without,
        (Some(_), Some(ends)) => exchanges.psk(Duration::from_micros(now), &ends),
        (Some(_), None) => PskUse::Awaited,
    }
}

/// What is sent of a secret.
fn public(secret: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    bytes[..8].copy_from_slice(&secret.to_le_bytes());
    bytes
}

fn number(bytes: &[u8]) -> u64 {
    let mut first = [0; 8];
    first.copy_from_slice(&bytes[..8]);
    u64::from_le_bytes(first)
}

/// The name of the key of an offer and an answer.
fn id(offer: u64, answer: u64) -> PskId {
    PskId((u128::from(offer) << 64 | u128::from(answer)).to_le_bytes())
}

impl World {
    fn moment(&self) -> Duration {
        Duration::from_micros(self.now)
    }

    pub(super) fn psk_of(&self, node: NodeId, own: &NodeKeys, path: &Path) -> PskUse {
        let psk = match &self.nodes[node].agent {
            Some(agent) => psk_of(self.now, &agent.exchanges, own, path),
            None => PskUse::Awaited,
        };
        match psk {
            PskUse::Awaited if self.sabotage == Sabotage::WithoutPsk => PskUse::Without,
            psk => psk,
        }
    }

    /// What the devices show of these pairs. Paths that they have no more are over.
    pub(super) fn see_exchanges(
        &mut self,
        node: NodeId,
        own: Option<&NodeKeys>,
        wanted: &[(NodeId, Vec<Path>)],
    ) {
        let Some(own) = own else { return };
        let now = self.moment();
        for (peer, paths) in wanted {
            let shared = paths.iter().filter(|path| path.exchange.is_some());
            let named: Vec<_> = shared.filter_map(|path| Some((ends(own, path)?, path))).collect();
            let seen: Vec<_> = named
                .iter()
                .map(|(ends, path)| (*ends, path.exchange_slot(), self.shown(node, *peer, path, ends)))
                .collect();
            let Some(agent) = self.nodes[node].agent.as_mut() else {
                return;
            };
            for ends in std::mem::take(&mut agent.shared[*peer]) {
                if !named.iter().any(|(named, _)| *named == ends) {
                    agent.exchanges.end(&ends);
                }
            }
            agent.shared[*peer] = named.iter().map(|(ends, _)| *ends).collect();
            for (ends, slot, seen) in seen {
                agent.exchanges.see(now, ends, slot, seen);
            }
        }
        let Some(agent) = self.nodes[node].agent.as_mut() else {
            return;
        };
        // What was on disk, and is of nobody.
        if wanted.len() + 1 == agent.nodes.len() {
            let named: BTreeSet<Ends> = agent.shared.iter().flatten().copied().collect();
            agent.exchanges.retain(now, |ends| named.contains(ends));
        }
    }

    fn shown(&self, node: NodeId, peer: NodeId, path: &Path, ends: &Ends) -> Seen {
        let kernel = &self.nodes[node].kernel;
        let device = kernel
            .device(path.exchange_slot())
            .filter(|device| device.key == ends.own);
        let there = device.and_then(|device| device.exchange[peer]);
        let entry = kernel.peer(path.slot, peer).filter(|entry| entry.key == path.key);
        Seen {
            open: there.is_some_and(|(key, _)| key == ends.peer),
            on_device: entry.and_then(|entry| entry.psk),
            fresh: entry.is_some_and(|entry| entry.is_fresh(self.now)),
        }
    }

    /// Adds the peers with which pre-shared keys are agreed on.
    pub(super) fn open_exchanges(
        &mut self,
        node: NodeId,
        own: Option<&NodeKeys>,
        wanted: &[(NodeId, Vec<Path>)],
    ) -> Step {
        for (peer, paths) in wanted {
            for path in paths.iter().filter(|path| path.exchange.is_some()) {
                let slot = usize::from(path.exchange_slot());
                let entry = Some((path.key, slots::slot_of(path.peer, path.own) ^ 1));
                let device = self.nodes[node].kernel.devices[slot].as_ref();
                if device.is_none_or(|device| device.exchange[*peer] == entry) {
                    continue;
                }
                self.step(node)?;
                if let Some(device) = self.nodes[node].kernel.devices[slot].as_mut() {
                    device.exchange[*peer] = entry;
                }
                self.look_at(node, *peer);
            }
        }
        self.see_exchanges(node, own, wanted);
        Ok(())
    }

    pub(super) fn close_exchanges(&mut self, node: NodeId, peer: NodeId, paths: &[Path]) -> Step {
        for slot in 0..KEY_SLOTS {
            let stays = paths
                .iter()
                .any(|path| path.exchange.is_some() && path.exchange_slot() == slot);
            let device = self.nodes[node].kernel.device(slot);
            if stays || device.is_none_or(|device| device.exchange[peer].is_none()) {
                continue;
            }
            self.step(node)?;
            if let Some(device) = self.nodes[node].kernel.devices[usize::from(slot)].as_mut() {
                device.exchange[peer] = None;
            }
        }
        Ok(())
    }

    /// A peer that is not to be there without its pre-shared key goes, where it has another.
    pub(super) fn await_psk(&mut self, node: NodeId, peer: NodeId, path: &Path, there: bool) -> Step {
        if there {
            self.step(node)?;
            self.note(|| {
                format!(
                    "node {node} slot {}: without peer node {peer}, whose key is forgotten",
                    path.slot
                )
            });
            if let Some(device) = self.nodes[node].kernel.devices[usize::from(path.slot)].as_mut() {
                device.peers[peer] = None;
            }
            self.probe(node, peer);
        }
        Ok(())
    }

    pub(super) fn placed(&mut self, node: NodeId, own: &NodeKeys, path: &Path, psk: Option<PskId>) {
        if let (Some(psk), Some(ends)) = (psk, ends(own, path))
            && let Some(agent) = self.nodes[node].agent.as_mut()
        {
            agent.exchanges.placed(&ends, psk);
        }
    }

    pub(super) fn forget_psk(&mut self, node: NodeId, forget: &ForgetPsk) -> Step {
        self.step(node)?;
        self.judge.forgotten += 1;
        let now = self.moment();
        let peer = self.index[&forget.peer];
        let Some(agent) = self.nodes[node].agent.as_mut() else {
            return Err(Dead);
        };
        let own = agent.nodes[node].as_ref().and_then(|keys| keys.key(forget.own));
        let other = agent.nodes[peer].as_ref().and_then(|keys| keys.key(forget.other));
        if let (Some(own), Some(peer)) = (own, other) {
            agent.exchanges.forget(now, &Ends { own, peer }, forget.id);
        }
        self.exchange(node)
    }

    /// Everything that the exchanges of a node have to do.
    pub(super) fn exchange(&mut self, node: NodeId) -> Step {
        let now = self.moment();
        loop {
            let Some(agent) = self.nodes[node].agent.as_mut() else {
                return Err(Dead);
            };
            let works = agent.exchanges.poll(now);
            if works.is_empty() {
                break;
            }
            for work in works {
                let done = self.exchange_work(node, work)?;
                if let (Some(done), Some(agent)) = (done, self.nodes[node].agent.as_mut()) {
                    agent.exchanges.done(now, done);
                }
            }
        }
        let Some(agent) = self.nodes[node].agent.as_mut() else {
            return Err(Dead);
        };
        let changed = agent.exchanges.take_changed();
        let due = agent.exchanges.next();
        for ends in changed {
            self.look_at_key(node, ends);
        }
        if let Some(due) = due {
            self.exchange_within(node, (due.as_micros() as Micros).saturating_sub(self.now));
        }
        Ok(())
    }

    fn look_at_key(&mut self, node: NodeId, ends: Ends) {
        let has = |keys: &NodeKeys| keys.slots.iter().any(|slot| slot.public_key == ends.peer);
        let agent = self.nodes[node].agent.as_ref();
        let nodes = agent.into_iter().flat_map(|agent| agent.nodes.iter().enumerate());
        let peer = nodes
            .filter_map(|(peer, keys)| Some((peer, keys.as_ref()?)))
            .find(|(_, keys)| has(keys));
        if let Some(peer) = peer.map(|(peer, _)| peer) {
            self.look_at(node, peer);
        }
    }

    fn exchange_work(&mut self, node: NodeId, work: Work) -> Result<Option<Done>, Dead> {
        Ok(Some(match work {
            Work::Begin { ends, nonce } => {
                let secret = self.dice.bits();
                if let Some(agent) = self.nodes[node].agent.as_mut() {
                    agent.offers.insert(ends, (nonce, secret));
                }
                Done::Begun(ends, nonce, Some(public(secret, message::OFFER)))
            }
            Work::Answer { ends, nonce, offer } => {
                let secret = self.dice.bits();
                let answer = public(secret, message::ANSWER);
                Done::Answered(ends, nonce, Some((id(number(&offer), secret), answer)))
            }
            Work::Finish {
                ends,
                nonce,
                answer,
                id: named,
            } => {
                let agent = self.nodes[node].agent.as_mut();
                let offer = agent.and_then(|agent| agent.offers.remove(&ends));
                let mine = offer.filter(|(of, _)| *of == nonce);
                let mine = mine.map(|(_, secret)| id(secret, number(&answer)));
                Done::Finished(ends, nonce, mine.filter(|mine| *mine == named))
            }
            Work::Save { ends, record } => {
                self.step(node)?;
                self.note(|| format!("agent {node} keeps {record:?} of {ends:?}"));
                self.judge.pre_shared_keys += u64::from(record.agreed.is_some());
                let psks = &mut self.nodes[node].disk.psks;
                match record == Record::default() {
                    true => psks.remove(&ends),
                    false => psks.insert(ends, record.clone()),
                };
                self.step(node)?;
                Done::Saved(ends, record, true)
            }
            Work::Send { ends, slot, bytes } => {
                self.step(node)?;
                self.exchange_sends(node, &ends, slot, bytes);
                return Ok(None);
            }
        }))
    }

    fn exchange_sends(&mut self, node: NodeId, ends: &Ends, slot: u8, bytes: Vec<u8>) {
        let device = self.nodes[node]
            .kernel
            .device(slot)
            .filter(|device| device.key == ends.own);
        let peers = device
            .into_iter()
            .flat_map(|device| device.exchange.iter().enumerate());
        let found = peers
            .filter_map(|(peer, entry)| Some((peer, (*entry)?)))
            .find(|(_, (key, _))| *key == ends.peer);
        let Some((peer, (_, there))) = found else { return };
        if self.is_cut(node, peer) {
            return;
        }
        let from = End {
            node,
            slot,
            key: ends.own,
        };
        let to = End {
            node: peer,
            slot: there,
            key: ends.peer,
        };
        for _ in 0..self.copies() {
            let delay = self.delay();
            let bytes = bytes.clone();
            self.at(delay, Event::Exchange { from, to, bytes });
        }
    }

    pub(super) fn exchange_arrives(&mut self, from: End, to: End, bytes: &[u8]) {
        if self.is_cut(from.node, to.node) || !self.nodes[to.node].powered {
            return;
        }
        let now = self.moment();
        let here = &mut self.nodes[to.node];
        let device = here.kernel.device(to.slot).filter(|device| device.key == to.key);
        let known = device.and_then(|device| device.exchange[from.node]);
        if let (Some((key, _)), Some(agent)) = (known, here.agent.as_mut())
            && key == from.key
        {
            agent
                .exchanges
                .received(now, to.slot, link_address(&from.key), bytes);
            // Killed: it simply stops here.
            let _ = self.exchange(to.node);
        }
    }

    fn exchange_within(&mut self, node: NodeId, after: Micros) {
        let after = after.max(MILLI);
        let (at, life) = (self.now + after, self.nodes[node].life);
        if let Some(agent) = self.nodes[node].agent.as_mut()
            && agent.next_exchange > at
        {
            agent.next_exchange = at;
            self.at(after, Event::Due(node, life));
        }
    }

    pub(super) fn exchange_due(&mut self, node: NodeId, life: u32) {
        let now = self.now;
        let here = &mut self.nodes[node];
        let Some(agent) = here.agent.as_mut().filter(|agent| agent.next_exchange == now) else {
            return;
        };
        if here.life == life {
            agent.next_exchange = Micros::MAX;
            let _ = self.exchange(node);
        }
    }
}
