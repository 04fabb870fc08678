//! Two agents rotate their keys, each when it likes, while their plans are executed step by step in any interleaving, and
//! agents are killed between any two steps: at every moment what one end sends, the other accepts, with a pre-shared
//! key wherever both keys were made with them; in the end only active keys are left.

mod common;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use common::{apply, bare, config, directory, settings};
use warren_agent_core::{
    Action, Agent, Directory, Observed, Settings, State,
    psk::{Done, Ends, Exchanges, Nonce, Record, Work, message},
    slots::{Keyring, PathReport, half},
};
use warren_model::{NodeKeys, NodeName, NodeRecord, PskId, PublicKey, SlotKey, keys::slots_of, link_address};

/// Rotations of each node in one history.
const ROTATIONS: u32 = 3;

/// A generator of choices (splitmix64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }
}

fn name(node: usize) -> NodeName {
    format!("node{}", node + 1).into()
}

fn key(node: usize, generation: u64) -> PublicKey {
    let mut bytes = [9; 32];
    bytes[0] = node as u8 + 1;
    bytes[1] = generation as u8;
    PublicKey::from_bytes(bytes).unwrap()
}

fn slots(node: usize, generation: u64, mixed: bool) -> Vec<SlotKey> {
    let slot = |slot: u8| SlotKey {
        slot,
        port: 51871 + u16::from(slot),
        generation,
        public_key: key(node, generation),
        // Turned off and on again, by one node earlier than by the other.
        pre_shared_keys: !mixed || !(generation + node as u64).is_multiple_of(3),
    };
    slots_of(generation).map(slot).into()
}

struct Node {
    agent: Agent,
    machine: State,
    /// As it was last looked at.
    seen: Observed,
    plan: VecDeque<Action>,
    disk: BTreeMap<u64, PublicKey>,
    psks: BTreeMap<Ends, Record>,
    /// Offers of this life of the agent.
    offers: BTreeMap<Nonce, u64>,
    /// The newest version that it has.
    version: usize,
    reports: Vec<PathReport>,
    /// A new key is made, but not published yet.
    offered: Option<u64>,
    rotations: u32,
}

/// A session between the device of a slot of the first node and one of the second.
type Session = ((u8, PublicKey), (u8, PublicKey));

struct World {
    dice: Dice,
    now: Duration,
    nodes: [Node; 2],
    keys: [NodeKeys; 2],
    versions: Vec<Directory>,
    sessions: BTreeSet<Session>,
    received: BTreeMap<(usize, u8, PublicKey), u64>,
    /// Packets of exchanges: to which node, slot and key, from which key.
    exchanges: Vec<(usize, u8, PublicKey, PublicKey, Vec<u8>)>,
    lives: u8,
    mixed: bool,
    connected: bool,
}

fn agent_of(node: usize, disk: &BTreeMap<u64, PublicKey>, psks: &BTreeMap<Ends, Record>, life: u8) -> Agent {
    let settings = Settings {
        node: name(node),
        ..settings(config())
    };
    let mut agent = Agent::new(settings, Keyring::new(disk.clone()));
    agent.restore_pre_shared_keys(Exchanges::new(psks.clone(), [life; 7]));
    agent
}

impl World {
    fn new(seed: u64) -> Self {
        let keys = [0, 1].map(|node| NodeKeys {
            uid: format!("uid{}", node + 1).as_str().into(),
            slots: slots(node, 1, seed % 2 == 1),
            active: 1,
            last: 1,
        });
        let node = |node: usize| {
            let disk = BTreeMap::from([(1, key(node, 1))]);
            Node {
                agent: agent_of(node, &disk, &BTreeMap::new(), node as u8),
                machine: State::default(),
                seen: bare(),
                plan: VecDeque::new(),
                disk,
                psks: BTreeMap::new(),
                offers: BTreeMap::new(),
                version: 0,
                reports: vec![],
                offered: None,
                rotations: 0,
            }
        };
        let mut world = Self {
            dice: Dice(seed),
            now: Duration::ZERO,
            nodes: [node(0), node(1)],
            keys,
            versions: vec![],
            sessions: BTreeSet::new(),
            received: BTreeMap::new(),
            exchanges: vec![],
            lives: 2,
            mixed: seed % 2 == 1,
            connected: false,
        };
        world.publish();
        for n in 0..2 {
            world.give(n);
        }
        world
    }

    fn publish(&mut self) {
        let record = |n: usize| -> NodeRecord {
            let mut record = common::node(n as u8 + 1);
            let keys = self.keys[n].clone();
            (record.slots, record.active, record.last) = (keys.slots, keys.active, keys.last);
            record
        };
        let version = self.versions.len() as u64 + 1;
        self.versions.push(directory(version, vec![record(0), record(1)]));
    }

    /// The directory on the disk of a node, and then in its agent.
    fn give(&mut self, n: usize) {
        let contents = self.versions[self.nodes[n].version].clone();
        self.nodes[n].agent.set_directory(contents);
    }

    fn step(&mut self) {
        let n = self.dice.below(2) as usize;
        match self.dice.below(50) {
            40..50 => self.exchange(n),
            0..16 => self.agent(n),
            16..22 => self.handshake(),
            22..28 => self.keepalives(),
            // What comes is looked at between plans.
            28..31 if self.nodes[n].plan.is_empty() && self.nodes[n].version + 1 < self.versions.len() => {
                self.nodes[n].version += 1;
                self.give(n);
            }
            31..34 => self.keyd(n),
            34 if self.dice.below(6) == 0 => self.kill(n),
            _ => self.now += Duration::from_millis(self.dice.below(400)),
        }
    }

    fn kill(&mut self, n: usize) {
        self.lives = self.lives.wrapping_add(1);
        let node = &mut self.nodes[n];
        node.agent = agent_of(n, &node.disk, &node.psks, self.lives);
        node.offers.clear();
        node.plan.clear();
        node.reports.clear();
        self.give(n);
    }

    /// One step of a plan, or a look and a new plan.
    fn agent(&mut self, n: usize) {
        let now = self.now;
        if let Some(step) = self.nodes[n].plan.pop_front() {
            let node = &mut self.nodes[n];
            assert!(node.agent.may_run(&step), "{step}");
            apply(&mut node.machine, &step);
            node.agent.report(&step, Ok(()), now);
            self.forget_sessions();
            if self.nodes[n].plan.is_empty() {
                self.told(n);
            }
            return;
        }
        let mut seen = Observed {
            state: self.nodes[n].machine.clone(),
            ..bare()
        };
        for (slot, device) in &mut seen.state.devices {
            for (peer, found) in &mut device.wireguard.peers {
                found.received = self.received.get(&(n, *slot, *peer)).copied().unwrap_or_default();
                found.silent = !self.sessions.iter().any(|session| {
                    let (own, other) = if n == 0 { *session } else { (session.1, session.0) };
                    own.0 == *slot && other.1 == *peer
                });
            }
        }
        let node = &mut self.nodes[n];
        node.plan = node.agent.plan(&seen, now).into();
        node.seen = seen;
        if node.plan.is_empty() {
            self.told(n);
        }
    }

    /// What follows a plan: reports, and keys that nobody needs.
    fn told(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        for pair in node.agent.path_reports(&node.seen, self.now) {
            node.reports = pair.paths;
        }
        for generation in node.agent.void_keys(&node.seen) {
            let gone = node.disk.remove(&generation);
            let mut devices = node.machine.devices.values();
            assert!(
                !devices.any(|device| device.wireguard.public_key == gone),
                "a key that a device has"
            );
        }
        node.agent.set_keyring(Keyring::new(node.disk.clone()));
    }

    /// The device of a slot with its key, where it has a peer.
    fn end(&self, n: usize, slot: u8, peer: PublicKey) -> Option<PublicKey> {
        let wireguard = &self.nodes[n].machine.devices.get(&slot)?.wireguard;
        wireguard.peers.get(&peer)?;
        wireguard.public_key
    }

    fn both(&self, ((a, key_a), (b, key_b)): Session) -> bool {
        let psk = |n: usize, slot: u8, peer: PublicKey| {
            self.nodes[n]
                .machine
                .devices
                .get(&slot)?
                .wireguard
                .peers
                .get(&peer)?
                .pre_shared
        };
        self.end(0, a, key_b) == Some(key_a)
            && self.end(1, b, key_a) == Some(key_b)
            && psk(0, a, key_b) == psk(1, b, key_a)
    }

    /// One end of the exchanges does what it has to, or a packet of theirs arrives, or is lost.
    fn exchange(&mut self, n: usize) {
        let now = self.now;
        if !self.exchanges.is_empty() && self.dice.below(4) != 0 {
            let at = self.dice.below(self.exchanges.len() as u64) as usize;
            let (to, slot, own, from, bytes) = self.exchanges.swap_remove(at);
            let device = self.nodes[to].machine.devices.get(&slot);
            let there = device.is_some_and(|device| {
                device.wireguard.public_key == Some(own) && device.wireguard.peers.contains_key(&from)
            });
            let lost = self.exchanges.len() > 4 || self.dice.below(5) == 0;
            if there && !lost {
                let exchanges = self.nodes[to].agent.exchanges();
                exchanges.received(now, slot, link_address(&from), &bytes);
            }
            return;
        }
        for work in self.nodes[n].agent.exchanges().poll(now) {
            let done = match work {
                Work::Begin { ends, nonce } => {
                    let secret = self.dice.below(u64::MAX);
                    self.nodes[n].offers.insert(nonce, secret);
                    Done::Begun(ends, nonce, Some(public(secret, message::OFFER)))
                }
                Work::Answer { ends, nonce, offer } => {
                    let secret = self.dice.below(u64::MAX);
                    let id = shared(&offer, secret);
                    Done::Answered(ends, nonce, Some((id, public(secret, message::ANSWER))))
                }
                Work::Finish {
                    ends,
                    nonce,
                    answer,
                    id,
                } => {
                    let secret = self.nodes[n].offers.get(&nonce);
                    let secret = secret.map(|secret| public(*secret, message::OFFER));
                    let mine = secret.map(|offer| shared(&offer, number(&answer)));
                    Done::Finished(ends, nonce, mine.filter(|mine| *mine == id))
                }
                Work::Save { ends, record } => {
                    match record == Record::default() {
                        true => self.nodes[n].psks.remove(&ends),
                        false => self.nodes[n].psks.insert(ends, record.clone()),
                    };
                    Done::Saved(ends, record, true)
                }
                Work::Send { ends, slot, bytes } => {
                    let device = self.nodes[n].machine.devices.get(&slot);
                    let peer = device.and_then(|device| device.wireguard.peers.get(&ends.peer));
                    if let Some(endpoint) = peer.and_then(|peer| peer.endpoint) {
                        let there = (endpoint.port() - 51871) as u8;
                        self.exchanges.push((1 - n, there, ends.peer, ends.own, bytes));
                    }
                    continue;
                }
            };
            self.nodes[n].agent.exchanges().done(now, done);
        }
    }

    fn forget_sessions(&mut self) {
        let gone: Vec<_> = self.sessions.iter().copied().filter(|s| !self.both(*s)).collect();
        for session in gone {
            self.sessions.remove(&session);
        }
    }

    /// Where both ends are in place and one of them begins.
    fn handshake(&mut self) {
        let mut ready = Vec::new();
        for (&a, device) in &self.nodes[0].machine.devices {
            let Some(key_a) = device.wireguard.public_key else {
                continue;
            };
            for (&key_b, peer) in &device.wireguard.peers {
                for (&b, other) in &self.nodes[1].machine.devices {
                    let session = ((a, key_a), (b, key_b));
                    let begins = other.wireguard.peers.get(&key_a).map_or(0, |peer| peer.keepalive);
                    let reaches = peer.endpoint.map(|endpoint| endpoint.port()) == Some(51871 + u16::from(b));
                    if self.both(session) && reaches && (peer.keepalive > 0 || begins > 0) {
                        ready.push(session);
                    }
                }
            }
        }
        if !ready.is_empty() {
            let chosen = self.dice.below(ready.len() as u64) as usize;
            self.sessions.insert(ready[chosen]);
        }
    }

    fn keepalives(&mut self) {
        for ((a, key_a), (b, key_b)) in self.sessions.clone() {
            for (n, own, peer, here, there) in [(0, a, key_b, 1, (b, key_a)), (1, b, key_a, 0, (a, key_b))] {
                let sender = &self.nodes[here].machine.devices[&there.0].wireguard.peers[&there.1];
                if sender.keepalive > 0 {
                    *self.received.entry((n, own, peer)).or_default() += 32;
                }
            }
        }
    }

    /// What `keyd` does next for a node, as its core decides it.
    fn keyd(&mut self, n: usize) {
        let (keys, other) = (self.keys[n].clone(), self.keys[1 - n].clone());
        let (mine, theirs) = (&self.nodes[n].reports, &self.nodes[1 - n].reports);
        let verified = |paths: &[PathReport], own: u64, peer: u64| {
            paths
                .iter()
                .any(|path| (path.own, path.peer) == (own, peer) && path.verified)
        };
        let moved = |paths: &[PathReport], generation: fn(&PathReport) -> u64| {
            let sends = paths
                .iter()
                .any(|path| path.sending && generation(path) == keys.active);
            let done = |path: &PathReport| generation(path) == keys.active || (path.quiet && !path.sending);
            sends && paths.iter().all(done)
        };
        let next = match (keys.candidate(), keys.former()) {
            (Some(candidate), _) => {
                let proved =
                    verified(mine, candidate, other.active) && verified(theirs, other.active, candidate);
                match proved {
                    true => keys.commit(),
                    // Once in a while an operator aborts.
                    false if self.dice.below(300) == 0 => keys.only_active(),
                    false => return,
                }
            }
            (None, Some(_)) if moved(mine, |path| path.own) && moved(theirs, |path| path.peer) => {
                keys.only_active()
            }
            (None, Some(_)) => return,
            (None, None) => match self.nodes[n].offered.take() {
                Some(generation) => keys.admit(&slots(n, generation, self.mixed), false).unwrap(),
                None => return self.ask(n, &keys),
            },
        };
        self.keys[n] = next;
        self.publish();
    }

    fn ask(&mut self, n: usize, keys: &NodeKeys) {
        let node = &mut self.nodes[n];
        let settled = node.disk.keys().copied().eq([keys.active]);
        if settled && node.rotations < ROTATIONS {
            let generation = keys.next();
            assert_ne!(half(generation), half(keys.active));
            node.disk.insert(generation, key(n, generation));
            node.agent.set_keyring(Keyring::new(node.disk.clone()));
            node.offered = Some(generation);
            node.rotations += 1;
        }
    }

    /// Whether what one end sends now arrives.
    fn arrives(&self, from: usize) -> Result<(), String> {
        let (here, there) = (&self.nodes[from].machine, &self.nodes[1 - from].machine);
        let (Some(path), Some(back)) = (here.paths.get(&1), there.paths.get(&1)) else {
            return Err("no path".into());
        };
        let device = here.devices.get(&path.slot).ok_or("no device")?;
        let own = device.wireguard.public_key.ok_or("no key")?;
        let prefix = common::node(2 - from as u8).prefixes[0];
        let peers = &device.wireguard.peers;
        let (peer, _) = peers
            .iter()
            .find(|(_, peer)| peer.allowed_ips.contains(&prefix))
            .ok_or("no peer has the prefix")?;
        let matches = |session: &&Session| {
            let (a, b) = if from == 0 {
                **session
            } else {
                (session.1, session.0)
            };
            a == (path.slot, own) && b.1 == *peer
        };
        let session = self.sessions.iter().find(matches).ok_or("no session")?;
        let slot = if from == 0 { session.1.0 } else { session.0.0 };
        if back.receive & (1 << slot) == 0 {
            return Err(format!("slot {slot} is not received on"));
        }
        let source = common::node(from as u8 + 1).prefixes[0];
        let agreed = |keys: &NodeKeys, key| {
            keys.slots
                .iter()
                .any(|slot| slot.public_key == key && slot.pre_shared_keys)
        };
        let shared = agreed(&self.keys[from], own) && agreed(&self.keys[1 - from], *peer);
        if peers[peer].pre_shared.is_some() != shared {
            return Err(format!(
                "a pre-shared key where there is to be none, or none: {shared}"
            ));
        }
        match there.devices[&slot].wireguard.peers[&own]
            .allowed_ips
            .contains(&source)
        {
            true => Ok(()),
            false => Err(format!("slot {slot} does not accept the source")),
        }
    }

    fn check(&mut self, seed: u64, step: u32) {
        let result = [self.arrives(0), self.arrives(1)];
        self.connected |= result.iter().all(Result::is_ok);
        if self.connected {
            assert_eq!(
                result,
                [Ok(()), Ok(())],
                "seed {seed}, step {step}, keys {:?}",
                self.keys
            );
        }
    }

    fn is_done(&self) -> bool {
        let settled = |n: usize| {
            let (node, active) = (&self.nodes[n], self.keys[n].active);
            let devices = node
                .machine
                .devices
                .values()
                .map(|device| device.wireguard.public_key);
            node.rotations == ROTATIONS
                && node.offered.is_none()
                && self.keys[n].generations() == [active].into()
                && node.disk.keys().copied().eq([active])
                && devices.flatten().all(|known| known == key(n, active))
                && node.psks.keys().all(|ends| ends.own == key(n, active))
                && node.psks.len() <= 1
        };
        self.connected && settled(0) && settled(1)
    }
}

/// What is sent of a secret.
fn public(secret: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    bytes[..8].copy_from_slice(&secret.to_le_bytes());
    bytes
}

fn number(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

/// The name of the key of an offer and an answer.
fn shared(offer: &[u8], answer: u64) -> PskId {
    PskId((u128::from(number(offer)) << 64 | u128::from(answer)).to_le_bytes())
}

#[test]
fn whatever_the_order_of_steps_no_packet_is_lost() {
    for seed in 0..30 {
        let mut world = World::new(seed);
        let mut step = 0;
        while !world.is_done() {
            step += 1;
            assert!(
                step < 200_000,
                "seed {seed} does not come to an end: {:?}",
                world.keys
            );
            world.step();
            world.check(seed, step);
        }
    }
}
