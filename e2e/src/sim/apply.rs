//! The agent's steps on its node's devices and maps, as its core orders them.

use std::rc::Rc;

use warren_agent_core::{
    NodePath,
    psk::PskUse,
    slots::{self, KEY_SLOTS, NodeKeys, Path},
};

use super::{
    MILLI, Micros, NodeId, Sabotage,
    agent::{Dead, Step},
    kernel::{Device, Peer},
    stream::Up,
    world::World,
};

/// [`slots::YIELD`] on the virtual clock.
const YIELDED: Micros = slots::YIELD.as_micros() as Micros;

impl World {
    /// The steps from what is there to what the directory says, in their order.
    pub(super) fn apply(&mut self, node: NodeId, targets: &[NodeId]) -> Step {
        let Some(agent) = self.nodes[node].agent.as_ref() else {
            return Err(Dead);
        };
        let own = agent.nodes[node].clone();
        let paths_to = |peer: &NodeId| match (&own, &agent.nodes[*peer]) {
            (Some(own), Some(other)) if *peer != node => slots::paths(own, &agent.keyring, other),
            _ => vec![],
        };
        let wanted: Vec<_> = targets.iter().map(|peer| (*peer, paths_to(peer))).collect();
        let open = agent.open.unwrap_or_else(|| {
            let all: Vec<Path> = (0..agent.nodes.len()).flat_map(|peer| paths_to(&peer)).collect();
            own.as_ref()
                .map_or([None; 4], |own| slots::devices(own, &agent.keyring, &all))
        });
        if let Some(agent) = self.nodes[node].agent.as_mut() {
            agent.open = Some(open);
        }
        self.see_exchanges(node, own.as_deref(), &wanted);
        self.add_receive_bits(node, own.as_deref(), &wanted)?;
        self.open_devices(node, &open)?;
        self.open_exchanges(node, own.as_deref(), &wanted)?;
        self.add_peers(node, own.as_deref(), &wanted)?;
        self.move_paths(node, own.as_deref(), &wanted)?;
        self.unreach(node, &wanted)?;
        self.close_devices(node, &open)?;
        self.destroy_keys(node, own.as_deref())
    }

    fn set_path(&mut self, node: NodeId, peer: NodeId, path: Option<NodePath>) -> Step {
        if self.nodes[node].kernel.paths[peer] == path {
            return Ok(());
        }
        self.step(node)?;
        self.probe(node, peer);
        self.nodes[node].kernel.paths[peer] = path;
        self.note(|| format!("node {node}: path to node {peer} is {path:?}"));
        self.probe(node, peer);
        Ok(())
    }

    fn add_receive_bits(
        &mut self,
        node: NodeId,
        own: Option<&NodeKeys>,
        wanted: &[(NodeId, Vec<Path>)],
    ) -> Step {
        for (peer, paths) in wanted {
            let there = self.nodes[node].kernel.paths[*peer];
            let other = self.record(node, *peer);
            let slot = match (there, own, &other) {
                (Some(path), ..) => Some(path.slot),
                (None, Some(own), Some(other)) => slots::sending(own, other, paths, None, 0),
                _ => None,
            };
            let Some(mut path) = slots::node_path(paths, slot) else {
                continue;
            };
            path.receive |= there.map_or(0, |path| path.receive);
            self.set_path(node, *peer, Some(path))?;
        }
        Ok(())
    }

    fn record(&self, node: NodeId, peer: NodeId) -> Option<Rc<NodeKeys>> {
        self.nodes[node].agent.as_ref()?.nodes[peer].clone()
    }

    fn open_devices(&mut self, node: NodeId, open: &[Option<u64>; 4]) -> Step {
        for (slot, wanted) in open.iter().enumerate() {
            let Some(generation) = *wanted else { continue };
            let there = self.nodes[node].kernel.devices[slot].as_ref();
            let key = self.nodes[node].disk.keys.get(&generation).copied();
            if there.is_some_and(|device| device.generation == generation && Some(device.key) == key) {
                continue;
            }
            self.step(node)?;
            let count = self.nodes.len();
            let here = &mut self.nodes[node];
            let Some(key) = key else { continue };
            here.kernel.devices[slot] = Some(Device {
                generation,
                key,
                peers: vec![None; count],
                exchange: vec![None; count],
            });
        }
        Ok(())
    }

    fn add_peers(&mut self, node: NodeId, own: Option<&NodeKeys>, wanted: &[(NodeId, Vec<Path>)]) -> Step {
        for (peer, paths) in wanted {
            let (Some(own), Some(other)) = (own, self.record(node, *peer)) else {
                continue;
            };
            for path in paths {
                let there = self.nodes[node]
                    .kernel
                    .peer(path.slot, *peer)
                    .filter(|entry| entry.key == path.key);
                let waited = |entry: &Peer| entry.is_fresh(self.now) || self.now >= entry.added + YIELDED;
                let begins = own.key(path.own).is_some_and(|key| slots::begins(key, path.key));
                let may_begin = begins || there.is_some_and(waited);
                let keepalive = slots::keepalive(own, &other, paths, path, may_begin, 25);
                let slot = slots::slot_of(path.peer, path.own);
                let psk = match self.psk_of(node, own, path) {
                    PskUse::Awaited => {
                        let there = there.is_some();
                        self.await_psk(node, *peer, path, there)?;
                        continue;
                    }
                    PskUse::Without => None,
                    PskUse::With(id) => Some(id),
                };
                let same = |entry: &Peer| entry.key == path.key && entry.psk == psk;
                if there.is_some_and(|entry| same(entry) && entry.keepalive == keepalive) {
                    continue;
                }
                self.step(node)?;
                self.note(|| {
                    format!(
                        "node {node} slot {}: peer node {peer} generation {}, keepalive {keepalive}",
                        path.slot, path.peer
                    )
                });
                let now = self.now;
                if let Some(device) = self.nodes[node].kernel.devices[usize::from(path.slot)].as_mut() {
                    match &mut device.peers[*peer] {
                        Some(entry) if same(entry) => entry.keepalive = keepalive,
                        entry => *entry = Some(Peer::new(path.key, slot, psk, keepalive, now)),
                    }
                    if keepalive > 0 {
                        self.arm(node, path.slot, *peer, MILLI);
                    }
                }
                self.placed(node, own, path, psk);
                self.probe(node, *peer);
            }
        }
        Ok(())
    }

    fn move_paths(&mut self, node: NodeId, own: Option<&NodeKeys>, wanted: &[(NodeId, Vec<Path>)]) -> Step {
        for (peer, paths) in wanted {
            let (Some(own), Some(other)) = (own, self.record(node, *peer)) else {
                continue;
            };
            let Some(there) = self.nodes[node].kernel.paths[*peer] else {
                continue;
            };
            let ready = self.ready(node, *peer, own, there.slot, slots::target(own, &other, paths));
            if let Some(slot) = slots::sending(own, &other, paths, Some(there.slot), ready) {
                let path = NodePath { slot, ..there };
                self.set_path(node, *peer, Some(path))?;
            }
            let yields = |path: &Path| {
                let entry = self.nodes[node].kernel.peer(path.slot, *peer);
                path.exchange.is_some() && entry.is_none()
                    || entry.is_some_and(|entry| entry.keepalive == 0 && !entry.is_fresh(self.now))
            };
            let draining = paths
                .iter()
                .any(|path| yields(path) || slots::is_draining(own, &other, path));
            if let Some(agent) = self.nodes[node].agent.as_mut() {
                match draining {
                    true => agent.draining.insert(*peer),
                    false => agent.draining.remove(peer),
                };
            }
        }
        Ok(())
    }

    /// The bit of the path to move to, once it is ready.
    fn ready(
        &mut self,
        node: NodeId,
        peer: NodeId,
        own: &NodeKeys,
        current: u8,
        target: Option<&Path>,
    ) -> u8 {
        let name = self.nodes[peer].name.clone();
        let blind = self.sabotage == Sabotage::Blind;
        let verified = target.filter(|path| {
            let psk = self.psk_of(node, own, path);
            path.slot != current && self.is_verified(node, peer, path, psk)
        });
        let here = &mut self.nodes[node];
        let (Some(agent), Some(path)) = (here.agent.as_mut(), target.filter(|path| path.slot != current))
        else {
            here.agent.iter_mut().for_each(|agent| agent.mover.forget(&name));
            return 0;
        };
        let device = here.kernel.device(path.slot).map(|device| device.key);
        let received = here
            .kernel
            .peer(path.slot, peer)
            .map_or(0, |entry| entry.received);
        let heard = device.is_some_and(|key| agent.mover.is_heard(&name, key, path, received))
            || blind
            || self.sabotage == Sabotage::MoveUnheard;
        u8::from(heard && (verified.is_some() || blind)) << path.slot
    }

    fn unreach(&mut self, node: NodeId, wanted: &[(NodeId, Vec<Path>)]) -> Step {
        for (peer, paths) in wanted {
            self.close_exchanges(node, *peer, paths)?;
            for slot in 0..KEY_SLOTS {
                let stays = paths.iter().any(|path| path.slot == slot);
                if stays || self.nodes[node].kernel.peer(slot, *peer).is_none() {
                    continue;
                }
                self.step(node)?;
                self.note(|| format!("node {node} slot {slot}: without peer node {peer}"));
                if let Some(device) = self.nodes[node].kernel.devices[usize::from(slot)].as_mut() {
                    device.peers[*peer] = None;
                }
                self.probe(node, *peer);
            }
            let there = self.nodes[node].kernel.paths[*peer];
            let path = slots::node_path(paths, there.map(|path| path.slot));
            self.set_path(node, *peer, path.filter(|path| path.receive != 0))?;
        }
        Ok(())
    }

    fn close_devices(&mut self, node: NodeId, open: &[Option<u64>; 4]) -> Step {
        for (slot, wanted) in open.iter().enumerate() {
            if wanted.is_none() && self.nodes[node].kernel.devices[slot].is_some() {
                self.step(node)?;
                self.nodes[node].kernel.devices[slot] = None;
            }
        }
        Ok(())
    }

    fn destroy_keys(&mut self, node: NodeId, own: Option<&NodeKeys>) -> Step {
        let (Some(own), Some(agent)) = (own, self.nodes[node].agent.as_ref()) else {
            return Ok(());
        };
        let void = agent.keyring.void(own);
        let connection = agent.connection;
        for generation in void {
            self.step(node)?;
            self.note(|| format!("agent {node} destroys key generation {generation}"));
            let here = &mut self.nodes[node];
            if let Some(key) = here.disk.keys.remove(&generation) {
                here.disk.psks.retain(|ends, _| ends.own != key);
            }
            let Some(agent) = here.agent.as_mut() else {
                return Err(Dead);
            };
            agent.keyring.remove(generation);
            let held = agent.keyring.held().clone();
            if let Some(connection) = connection {
                self.say(connection, Up::Held(held));
            }
        }
        Ok(())
    }

    pub(super) fn is_verified(&self, node: NodeId, peer: NodeId, path: &Path, psk: PskUse) -> bool {
        let psk = match psk {
            PskUse::Awaited => return false,
            PskUse::Without => None,
            PskUse::With(id) => Some(id),
        };
        let here = &self.nodes[node];
        let device = here.kernel.device(path.slot);
        let entry = here.kernel.peer(path.slot, peer);
        device.is_some_and(|device| device.generation == path.own)
            && entry
                .is_some_and(|entry| entry.key == path.key && entry.psk == psk && entry.is_fresh(self.now))
            && here.kernel.receives(path.slot, peer)
    }
}
