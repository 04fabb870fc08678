//! The agent around the functions of its core: disk, stream, devices. Killed between any two of its steps.

use std::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
    time::Duration,
};

use warren_agent_core::{
    psk::{Ends, Exchanges, Nonce, Record},
    slots::{self, KEY_SLOTS, Keyring, Mover, NodeKeys, Reporter, Seen},
};
use warren_keyd_core::rotation::{PairReport, PathState, slots_of};
use warren_model::SlotKey;

use super::{
    MILLI, Micros, NodeId, SECOND, Sabotage,
    exchange::{ends, psk_of},
    stream::{Down, Up, Update},
    world::{Event, KeyFiles, World},
};

/// What an agent keeps.
#[derive(Debug, Clone, Default)]
pub(super) struct Disk {
    pub(super) version: (u64, u64),
    pub(super) nodes: Vec<Option<Rc<NodeKeys>>>,
    pub(super) keys: KeyFiles,
    pub(super) psks: BTreeMap<Ends, Record>,
}

/// A running agent.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) version: (u64, u64),
    pub(super) nodes: Vec<Option<Rc<NodeKeys>>>,
    pub(super) keyring: Keyring,
    /// The directory may be applied: it came from keyd, or the disk is not older than what was applied last.
    trusted: bool,
    pub(super) connection: Option<usize>,
    /// A directory came by this stream.
    live: bool,
    reporter: Reporter,
    pub(super) exchanges: Exchanges,
    /// The paths with pre-shared keys, by peer.
    pub(super) shared: Vec<Vec<Ends>>,
    /// Secrets of the offers of this life.
    pub(super) offers: BTreeMap<Ends, (Nonce, u64)>,
    pub(super) next_exchange: Micros,
    pub(super) mover: Mover,
    dirty: BTreeSet<NodeId>,
    pub(super) draining: BTreeSet<NodeId>,
    /// The devices that should be open; `None` when it must be computed again.
    pub(super) open: Option<[Option<u64>; KEY_SLOTS as usize]>,
    next_tick: Micros,
    next_scan: Micros,
}

/// The agent was killed.
pub(super) struct Dead;

pub(super) type Step = Result<(), Dead>;

impl World {
    /// One step of an agent is about to be done.
    pub(super) fn step(&mut self, node: NodeId) -> Step {
        match &mut self.nodes[node].crash_in {
            None => Ok(()),
            Some(0) => {
                self.nodes[node].crash_in = None;
                self.kill(node);
                Err(Dead)
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
        }
    }

    /// Kills the agent; the node's devices stay. It is started again before long.
    pub(super) fn kill(&mut self, node: NodeId) {
        self.note(|| format!("agent {node} is killed"));
        self.nodes[node].life += 1;
        if let Some(connection) = self.nodes[node].agent.take().and_then(|agent| agent.connection) {
            self.break_connection(connection, false);
        }
        let pause = self.between(50 * MILLI, 8 * SECOND);
        let life = self.nodes[node].life;
        self.at(pause, Event::Start(node, life));
    }

    pub(super) fn start(&mut self, node: NodeId, life: u32) {
        let here = &mut self.nodes[node];
        if here.life != life || !here.powered || here.agent.is_some() {
            return;
        }
        // A key that the disk lost is still on the device.
        for device in here.kernel.devices.iter().flatten() {
            here.disk.keys.entry(device.generation).or_insert(device.key);
        }
        let salt = self.dice.bits().to_le_bytes();
        let here = &mut self.nodes[node];
        let disk = &here.disk;
        let stale = disk.version < here.kernel.marker && self.sabotage != Sabotage::TrustStaleDisk;
        let nodes = match disk.nodes.is_empty() {
            true => vec![None; self.control_cuts.len()],
            false => disk.nodes.clone(),
        };
        here.agent = Some(Memory {
            version: disk.version.max(here.kernel.marker),
            dirty: (0..nodes.len()).collect(),
            nodes,
            keyring: Keyring::new(disk.keys.clone()),
            trusted: !stale && disk.version > (0, 0),
            connection: None,
            live: false,
            reporter: Reporter::default(),
            exchanges: Exchanges::new(
                disk.psks.clone(),
                [salt[0], salt[1], salt[2], salt[3], salt[4], salt[5], salt[6]],
            ),
            shared: vec![vec![]; self.control_cuts.len()],
            offers: BTreeMap::new(),
            next_exchange: Micros::MAX,
            mover: Mover::default(),
            draining: BTreeSet::new(),
            open: None,
            next_tick: Micros::MAX,
            next_scan: 0,
        });
        self.note(|| {
            format!(
                "agent {node} starts{}",
                if stale { " with a stale disk" } else { "" }
            )
        });
        self.tick_within(node, 10 * MILLI);
        let pause = self.between(MILLI, 500 * MILLI);
        self.at(pause, Event::Connect(node, life));
    }

    pub(super) fn tick_within(&mut self, node: NodeId, most: Micros) {
        let after = self.between(most / 4 + 1, most + 1);
        let at = self.now + after;
        let life = self.nodes[node].life;
        if let Some(agent) = self.nodes[node]
            .agent
            .as_mut()
            .filter(|agent| agent.next_tick > at)
        {
            agent.next_tick = at;
            self.at(after, Event::Tick(node, life));
        }
    }

    /// Something about a peer has changed.
    pub(super) fn look_at(&mut self, node: NodeId, peer: NodeId) {
        if let Some(agent) = &mut self.nodes[node].agent {
            agent.dirty.insert(peer);
            self.tick_within(node, 100 * MILLI);
        }
    }

    pub(super) fn connect(&mut self, node: NodeId, life: u32) {
        let here = &self.nodes[node];
        if here.life != life || here.agent.as_ref().is_none_or(|agent| agent.connection.is_some()) {
            return;
        }
        let Some(connection) = self.open_connection(node) else {
            let pause = self.between(200 * MILLI, 2 * SECOND);
            return self.at(pause, Event::Connect(node, life));
        };
        let Some(agent) = self.nodes[node].agent.as_mut() else {
            return;
        };
        agent.connection = Some(connection);
        agent.live = false;
        agent.reporter = Reporter::default();
        let held = agent.keyring.held().clone();
        self.say(connection, Up::Hello);
        self.say(connection, Up::Held(held));
    }

    /// The agent's end of a stream is gone.
    pub(super) fn agent_loses(&mut self, connection: usize) {
        let node = self.connections[connection].node;
        let life = self.nodes[node].life;
        if let Some(agent) = self.nodes[node].agent.as_mut()
            && agent.connection == Some(connection)
        {
            agent.connection = None;
            agent.live = false;
            let pause = self.between(100 * MILLI, SECOND);
            self.at(pause, Event::Connect(node, life));
        }
    }

    pub(super) fn down_arrives(&mut self, connection: usize, message: Down) {
        let node = self.connections[connection].node;
        let mine = |agent: &&mut Memory| agent.connection == Some(connection);
        if self.connections[connection].broken || self.nodes[node].agent.as_mut().filter(mine).is_none() {
            return;
        }
        // A killed agent simply stops here.
        let _ = match message {
            Down::Update(update) => self.update(node, connection, &update),
            Down::Ask(generation) => self.asked(node, connection, generation),
            Down::Forget(forget) => self.forget_psk(node, &forget),
        };
    }

    fn update(&mut self, node: NodeId, connection: usize, update: &Rc<Update>) -> Step {
        let here = &mut self.nodes[node];
        let Some(agent) = here.agent.as_mut() else {
            return Err(Dead);
        };
        let version = (update.epoch, update.version);
        if version < agent.version {
            self.note(|| format!("agent {node} refuses version {version:?}"));
            self.break_connection(connection, true);
            return Ok(());
        }
        let mut nodes = agent.nodes.clone();
        if update.snapshot {
            let listed: BTreeSet<_> = update.nodes.iter().map(|(peer, _)| *peer).collect();
            (0..nodes.len())
                .filter(|peer| !listed.contains(peer))
                .for_each(|peer| nodes[peer] = None);
        }
        for (peer, keys) in &update.nodes {
            let stale = match (&nodes[*peer], keys) {
                (Some(known), Some(offered)) => !slots::newer(known, offered),
                _ => false,
            };
            if !stale {
                nodes[*peer].clone_from(keys);
            }
        }
        let changed: Vec<_> = (0..nodes.len())
            .filter(|peer| !same(&nodes[*peer], &agent.nodes[*peer]))
            .collect();
        // Write first, apply later: the disk is never older than the devices.
        self.step(node)?;
        let keep = self.probes && self.dice.once_in(8);
        let here = &mut self.nodes[node];
        let Some(agent) = here.agent.as_mut() else {
            return Err(Dead);
        };
        if keep {
            here.old_disk = Some(here.disk.clone());
        }
        here.disk.version = version;
        here.disk.nodes.clone_from(&nodes);
        agent.nodes = nodes;
        agent.version = version;
        if !agent.trusted || changed.contains(&node) || !std::mem::replace(&mut agent.live, true) {
            agent.dirty = (0..agent.nodes.len()).collect();
        }
        agent.live = true;
        agent.trusted = true;
        agent.open = None;
        agent.dirty.extend(changed);
        self.step(node)?;
        self.nodes[node].kernel.marker = version;
        self.tick_within(node, 20 * MILLI);
        Ok(())
    }

    fn asked(&mut self, node: NodeId, connection: usize, generation: u64) -> Step {
        self.step(node)?;
        let key = self.new_key();
        let here = &mut self.nodes[node];
        let Some(agent) = here.agent.as_mut() else {
            return Err(Dead);
        };
        if agent.keyring.must_make(generation) {
            here.disk.keys.insert(generation, key);
            agent.keyring.add(generation, key);
            let held = agent.keyring.held().clone();
            self.say(connection, Up::Held(held));
            self.step(node)?;
        }
        let public_key = self.nodes[node].disk.keys[&generation];
        let agrees = self.agrees(public_key);
        let place = |slot| SlotKey {
            slot,
            port: 51871 + u16::from(slot),
            generation,
            public_key,
            pre_shared_keys: agrees,
        };
        self.say(connection, Up::Offer(slots_of(generation).map(place).to_vec()));
        Ok(())
    }

    pub(super) fn tick(&mut self, node: NodeId, life: u32) {
        let now = self.now;
        let scan = self.scan;
        let here = &mut self.nodes[node];
        let Some(agent) = here
            .agent
            .as_mut()
            .filter(|agent| here.life == life && agent.next_tick == now)
        else {
            return;
        };
        agent.next_tick = Micros::MAX;
        if !agent.trusted {
            return;
        }
        if now >= agent.next_scan {
            agent.next_scan = now + scan;
            agent.dirty = (0..agent.nodes.len()).collect();
        }
        agent.dirty.remove(&node);
        agent.dirty.extend(&agent.draining);
        let targets: Vec<_> = std::mem::take(&mut agent.dirty).into_iter().collect();
        if self.apply(node, &targets).is_err() || self.exchange(node).is_err() {
            return;
        }
        if self.judge.is_booting(node) && self.is_live(node) && self.has_caught_up(node) {
            self.judge.applied(node);
        }
        self.report(node, &targets);
        let waiting = self.nodes[node]
            .agent
            .as_ref()
            .is_some_and(|agent| !agent.draining.is_empty());
        self.tick_within(node, if waiting { 500 * MILLI } else { scan });
    }

    /// Whether the agent has a directory by the stream that it has now.
    pub(super) fn is_live(&self, node: NodeId) -> bool {
        self.nodes[node].agent.as_ref().is_some_and(|agent| agent.live)
    }

    /// Whether the node has the key that others send with, and itself sends with the active keys: one whose disk was set
    /// back may have begun with others, although it had promised not to.
    fn has_caught_up(&self, node: NodeId) -> bool {
        let here = &self.nodes[node];
        let Some((agent, own)) = here
            .agent
            .as_ref()
            .and_then(|agent| Some((agent, agent.nodes[node].clone()?)))
        else {
            return false;
        };
        let sends_right = |peer: NodeId, other: &NodeKeys| {
            let paths = slots::paths(&own, &agent.keyring, other);
            let wanted = slots::target(&own, other, &paths).map(|path| path.slot);
            wanted.is_none() || here.kernel.paths[peer].map(|path| path.slot) == wanted
        };
        let others = agent.nodes.iter().enumerate().filter(|(peer, _)| *peer != node);
        agent.keyring.holds(&own, own.active)
            && others
                .filter_map(|(peer, other)| Some((peer, other.as_ref()?)))
                .all(|(peer, other)| sends_right(peer, other))
    }

    /// Tells keyd what has changed.
    fn report(&mut self, node: NodeId, targets: &[NodeId]) {
        let Some(mut agent) = self.nodes[node].agent.take() else {
            return;
        };
        if let (Some(connection), Some(own), true) = (agent.connection, agent.nodes[node].clone(), agent.live)
        {
            let pairs: Vec<_> = targets
                .iter()
                .filter_map(|peer| self.pair(node, *peer, &own, &mut agent))
                .collect();
            if !pairs.is_empty() {
                self.say(connection, Up::Report(pairs));
            }
        }
        self.nodes[node].agent = Some(agent);
    }

    fn pair(&self, node: NodeId, peer: NodeId, own: &NodeKeys, agent: &mut Memory) -> Option<PairReport> {
        let name = &self.nodes[peer].name;
        let now = Duration::from_micros(self.now);
        let report = match agent.nodes[peer].clone() {
            None => agent.reporter.gone(name),
            Some(other) => {
                let paths = slots::paths(own, &agent.keyring, &other);
                let mut seen = [Seen::default(); KEY_SLOTS as usize];
                for path in &paths {
                    let entry = self.nodes[node].kernel.peer(path.slot, peer);
                    let ends = ends(own, path);
                    seen[usize::from(path.slot)] = Seen {
                        verified: self.is_verified(
                            node,
                            peer,
                            path,
                            psk_of(self.now, &agent.exchanges, own, path),
                        ),
                        received: entry.map_or(0, |entry| entry.received),
                        conflict: ends.and_then(|ends| agent.exchanges.conflict(&ends)),
                    };
                }
                let sending = self.nodes[node].kernel.paths[peer].map(|path| path.slot);
                agent
                    .reporter
                    .pair(now, name, (own, &other), &paths, seen, sending)
            }
        }?;
        let lie = self.sabotage;
        let state = |path: slots::PathReport| PathState {
            own: path.own,
            peer: path.peer,
            verified: path.verified || lie == Sabotage::Blind,
            sending: match lie {
                Sabotage::EarlyMoved => (path.own, path.peer) == (own.active, report_active(agent, peer)),
                _ => path.sending,
            },
            quiet: path.quiet || lie == Sabotage::EarlyMoved,
            conflict: path.conflict,
        };
        Some(PairReport {
            peer: report.peer,
            uid: report.uid,
            paths: report.paths.into_iter().map(state).collect(),
        })
    }
}

fn report_active(agent: &Memory, peer: NodeId) -> u64 {
    agent.nodes[peer].as_ref().map_or(0, |keys| keys.active)
}

fn same(a: &Option<Rc<NodeKeys>>, b: &Option<Rc<NodeKeys>>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => Rc::ptr_eq(a, b) || a == b,
        (None, None) => true,
        _ => false,
    }
}
