//! The clock, the queue, and everything that is simulated.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap},
    rc::Rc,
};

use warren_agent_core::psk::Ends;
use warren_keyd_core::rotation::NodeKeys;
use warren_model::{NodeName, NodeUid, PublicKey};

use super::{
    MILLI, Micros, NodeId, Outcome, SECOND, Sabotage,
    agent::{Disk, Memory},
    control::{Keyd, Store},
    faults::Fault,
    judge::Judge,
    kernel::Kernel,
    network::{End, Packet},
    scale::Traffic,
    stream::{Connection, Down, Up},
};
use crate::oracle::Dice;

/// What happens at a moment.
#[derive(Debug)]
pub(super) enum Event {
    Packet(Packet),
    Timer {
        node: NodeId,
        slot: u8,
        peer: NodeId,
        timer: u64,
    },
    Traffic(NodeId),
    Start(NodeId, u32),
    Connect(NodeId, u32),
    Tick(NodeId, u32),
    /// A packet of an exchange of pre-shared keys.
    Exchange {
        from: End,
        to: End,
        bytes: Vec<u8>,
    },
    /// An exchange of a node has something to do.
    Due(NodeId, u32),
    Up(usize, Up),
    Down(usize, Down),
    AgentLoses(usize),
    KeydLoses(usize),
    Poll(usize, u64),
    Publish(usize, u64),
    Write {
        keyd: usize,
        epoch: u64,
        node: NodeId,
        was: Box<NodeKeys>,
        keys: Box<NodeKeys>,
    },
    Written(usize, u64, NodeId),
    Seen(usize, u64, NodeId),
    Lead,
    Resign(usize, u64),
    Fault(Fault),
    Check,
}

struct Queued {
    at: Micros,
    order: u64,
    event: Event,
}

impl PartialEq for Queued {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}
impl Eq for Queued {}
impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Queued {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// A machine with its agent.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) name: NodeName,
    pub(super) uid: NodeUid,
    pub(super) powered: bool,
    pub(super) kernel: Kernel,
    pub(super) disk: Disk,
    /// A copy of the disk from some time ago.
    pub(super) old_disk: Option<Disk>,
    pub(super) agent: Option<Memory>,
    /// Counts starts and ends of the agent: events for another life are void.
    pub(super) life: u32,
    /// The agent is killed before its so many next steps are done.
    pub(super) crash_in: Option<u32>,
}

/// Everything.
pub(super) struct World {
    pub(super) now: Micros,
    queue: BinaryHeap<Reverse<Queued>>,
    order: u64,
    pub(super) dice: Dice,
    pub(super) nodes: Vec<Node>,
    pub(super) index: HashMap<NodeName, NodeId>,
    pub(super) keyds: Vec<Keyd>,
    pub(super) store: Store,
    pub(super) connections: Vec<Connection>,
    /// Pairs of nodes that cannot reach each other.
    pub(super) cuts: Vec<(NodeId, NodeId)>,
    /// Nodes that cannot reach keyd.
    pub(super) control_cuts: Vec<bool>,
    pub(super) longest_delay: Micros,
    pub(super) loss_per_mille: u32,
    pub(super) publish_delay: Micros,
    /// How long a change in the store may take to reach a replica that did not make it.
    pub(super) watch_lag: Micros,
    /// How often an agent looks at everything.
    pub(super) scan: Micros,
    pub(super) traffic_every: Micros,
    pub(super) timers: u64,
    pub(super) sessions: u64,
    keys_made: u64,
    /// Keys that were made with pre-shared keys.
    with_psks: BTreeSet<PublicKey>,
    /// How many of a hundred are.
    pub(super) percent_with_psks: usize,
    pub(super) judge: Judge,
    pub(super) sabotage: Sabotage,
    pub(super) probes: bool,
    /// Faults end here; then everything must converge before `end`.
    pub(super) calm: Micros,
    pub(super) end: Micros,
    pub(super) finished: bool,
    pub(super) traffic: Option<Traffic>,
    events: u64,
    trace: Option<Vec<String>>,
}

impl World {
    pub(super) fn new(seed: u64, nodes: usize, sabotage: Sabotage, trace: bool) -> Self {
        let node = |index: usize| Node {
            name: format!("n{index:03}").into(),
            uid: format!("u{index}-0").into(),
            powered: false,
            kernel: Kernel::new(nodes),
            disk: Disk::default(),
            old_disk: None,
            agent: None,
            life: 0,
            crash_in: None,
        };
        let nodes: Vec<_> = (0..nodes).map(node).collect();
        let index = nodes
            .iter()
            .enumerate()
            .map(|(i, node)| (node.name.clone(), i))
            .collect();
        Self {
            now: 0,
            queue: BinaryHeap::new(),
            order: 0,
            dice: Dice::new(seed),
            index,
            keyds: vec![Keyd::default(), Keyd::default()],
            store: Store::new(nodes.len()),
            connections: Vec::new(),
            cuts: Vec::new(),
            control_cuts: vec![false; nodes.len()],
            longest_delay: 50 * MILLI,
            loss_per_mille: 0,
            publish_delay: 50 * MILLI,
            watch_lag: 50 * MILLI,
            scan: 5 * SECOND,
            traffic_every: SECOND,
            timers: 0,
            sessions: 0,
            keys_made: 0,
            with_psks: BTreeSet::new(),
            percent_with_psks: 100,
            judge: Judge::new(nodes.len()),
            sabotage,
            probes: true,
            calm: 0,
            end: 0,
            finished: false,
            traffic: None,
            events: 0,
            trace: trace.then(Vec::new),
            nodes,
        }
    }

    /// Lets something happen `after` from now.
    pub(super) fn at(&mut self, after: Micros, event: Event) {
        self.order += 1;
        self.queue.push(Reverse(Queued {
            at: self.now + after,
            order: self.order,
            event,
        }));
    }

    pub(super) fn note(&mut self, sentence: impl FnOnce() -> String) {
        let now = self.now;
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:>12.6} {}", now as f64 / 1e6, sentence()));
        }
    }

    pub(super) fn violation(&mut self, what: String) {
        self.note(|| format!("VIOLATION {what}"));
        self.judge.violation(self.now, what);
    }

    pub(super) fn new_key(&mut self) -> PublicKey {
        loop {
            self.keys_made += 1;
            let mut bytes = [7; 32];
            bytes[..8].copy_from_slice(&self.keys_made.to_le_bytes());
            if let Ok(key) = PublicKey::from_bytes(bytes) {
                if self.dice.roll(100) < self.percent_with_psks {
                    self.with_psks.insert(key);
                }
                return key;
            }
        }
    }

    /// Whether a key was made with pre-shared keys.
    pub(super) fn agrees(&self, key: PublicKey) -> bool {
        self.with_psks.contains(&key)
    }

    /// Whether a path between two keys has a pre-shared key.
    pub(super) fn is_shared(&self, one: PublicKey, other: PublicKey) -> bool {
        self.agrees(one) && self.agrees(other)
    }

    pub(super) fn between(&mut self, least: Micros, most: Micros) -> Micros {
        least + self.dice.bits() % (most - least + 1)
    }

    /// Until everything is done or the end is reached.
    pub(super) fn run(&mut self) {
        while let Some(Reverse(next)) = self.queue.pop() {
            self.now = next.at;
            self.events += 1;
            self.happen(next.event);
            // One cause is enough, and what follows from it would only take time.
            if self.finished || self.judge.found.len() > 3 {
                break;
            }
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Packet(packet) => self.arrive(packet),
            Event::Timer {
                node,
                slot,
                peer,
                timer,
            } => self.timer(node, slot, peer, timer),
            Event::Traffic(node) => self.send_to_all(node),
            Event::Start(node, life) => self.start(node, life),
            Event::Connect(node, life) => self.connect(node, life),
            Event::Tick(node, life) => self.tick(node, life),
            Event::Exchange { from, to, bytes } => self.exchange_arrives(from, to, &bytes),
            Event::Due(node, life) => self.exchange_due(node, life),
            Event::Up(connection, message) => self.up_arrives(connection, message),
            Event::Down(connection, message) => self.down_arrives(connection, message),
            Event::AgentLoses(connection) => self.agent_loses(connection),
            Event::KeydLoses(connection) => self.keyd_loses(connection),
            Event::Poll(keyd, epoch) => self.poll(keyd, epoch),
            Event::Publish(keyd, epoch) => self.publish(keyd, epoch),
            Event::Write {
                keyd,
                epoch,
                node,
                was,
                keys,
            } => self.write(keyd, epoch, node, &was, &keys),
            Event::Written(keyd, epoch, node) => self.written(keyd, epoch, node),
            Event::Seen(keyd, epoch, node) => self.seen(keyd, epoch, node),
            Event::Lead => self.lead(),
            Event::Resign(keyd, epoch) => self.resign(keyd, epoch),
            Event::Fault(fault) => self.fault(fault),
            Event::Check => self.check(),
        }
    }

    fn send_to_all(&mut self, node: NodeId) {
        for peer in 0..self.nodes.len() {
            if peer != node {
                let delay = self.between(200, self.longest_delay);
                self.send(node, peer, delay);
            }
        }
        let pause = self.between(self.traffic_every / 2, self.traffic_every * 3 / 2);
        self.at(pause, Event::Traffic(node));
    }

    /// Once the faults are over: has everything arrived where it should?
    fn check(&mut self) {
        let missing = match self.traffic {
            Some(_) => self.unfinished(),
            None => self.unsettled(),
        };
        if missing.is_none() {
            self.finished = true;
        } else if self.now >= self.end {
            self.finished = true;
            self.violation(format!("not settled in the end: {}", missing.unwrap_or_default()));
        } else {
            self.at(SECOND, Event::Check);
        }
    }

    /// What is not as it should be when all is quiet; `None` where all is.
    fn unsettled(&self) -> Option<String> {
        let members: Vec<NodeId> = (0..self.nodes.len())
            .filter(|node| self.store.nodes[*node].is_some())
            .collect();
        if let Some(what) = self.unfinished() {
            return Some(what);
        }
        for &node in &members {
            let keys = self.store.nodes[node].as_ref()?;
            let here = &self.nodes[node];
            if keys.slots.is_empty() || keys.generations().len() != 1 {
                return Some(format!("node {node} has generations {:?}", keys.generations()));
            }
            // A key that was asked for and never accepted may wait for the next time.
            let superfluous = |generation: &u64| *generation != keys.active && *generation <= keys.last;
            let memory = here.agent.as_ref().map(|agent| agent.keyring.held().keys());
            let Some(memory) = memory else {
                return Some(format!("the agent of node {node} does not run"));
            };
            let devices = here
                .kernel
                .devices
                .iter()
                .flatten()
                .map(|device| &device.generation);
            let mut places = here.disk.keys.keys().chain(memory).chain(devices);
            if let Some(left) = places.find(|generation| superfluous(generation)) {
                return Some(format!("node {node} still has key generation {left}"));
            }
            for &peer in members.iter().filter(|peer| **peer != node) {
                let other = self.store.nodes[peer].as_ref()?;
                let astray = self.astray(node, keys, peer, other);
                if let Some(what) = astray.or_else(|| self.unshared(node, peer)) {
                    return Some(what);
                }
            }
            let is_void = |ends: &&Ends| {
                let peers = members.iter().filter(|peer| **peer != node);
                let active = peers.filter_map(|peer| self.store.nodes[*peer].as_ref());
                Some(ends.own) != keys.key(keys.active)
                    || !active
                        .map(|other| other.key(other.active))
                        .any(|key| key == Some(ends.peer))
            };
            if let Some(left) = here.disk.psks.keys().find(is_void) {
                return Some(format!("node {node} still has pre-shared keys of {left:?}"));
            }
        }
        None
    }

    /// What is wrong with the path from a node to a peer.
    fn astray(&self, node: NodeId, keys: &NodeKeys, peer: NodeId, other: &NodeKeys) -> Option<String> {
        let kernel = &self.nodes[node].kernel;
        let slot = match kernel.sends(self.now, peer) {
            Ok((slot, _, key, entry)) => {
                let right = Some(key) == keys.key(keys.active) && Some(entry.key) == other.key(other.active);
                if !right {
                    return Some(format!(
                        "node {node} sends to node {peer} with other keys than the active ones"
                    ));
                }
                slot
            }
            Err(refused) => return Some(format!("node {node} cannot send to node {peer}: {refused:?}")),
        };
        if !self.judge.is_steady(node, peer) {
            return Some(format!("nothing arrives from node {node} at node {peer}"));
        }
        let peers = kernel
            .devices
            .iter()
            .flatten()
            .filter(|device| device.peers[peer].is_some());
        (peers.count() != 1 || !kernel.receives(slot, peer))
            .then(|| format!("node {node} has more than one path to node {peer}"))
    }

    /// What is wrong with the pre-shared key of the path from a node to a peer. (A disk that was set back may lack one that the
    /// devices work with.)
    fn unshared(&self, node: NodeId, peer: NodeId) -> Option<String> {
        let (_, _, _, here) = self.nodes[node].kernel.sends(self.now, peer).ok()?;
        let (_, _, _, there) = self.nodes[peer].kernel.sends(self.now, node).ok()?;
        (here.psk != there.psk).then(|| format!("nodes {node} and {peer} have different pre-shared keys"))
    }

    pub(super) fn outcome(self) -> Outcome {
        Outcome {
            violations: self.judge.found,
            judged_packets: self.judge.judged,
            commits: self.judge.commits,
            withdrawals: self.judge.withdrawals,
            pre_shared_keys: self.judge.pre_shared_keys,
            forgotten: self.judge.forgotten,
            events: self.events,
            trace: self.trace.unwrap_or_default(),
        }
    }
}

/// Keys as the agents' core has them.
pub(super) fn published(keys: &NodeKeys) -> Rc<warren_agent_core::slots::NodeKeys> {
    Rc::new(warren_agent_core::slots::NodeKeys {
        uid: keys.uid.clone(),
        slots: keys.slots.clone(),
        active: keys.active,
        last: keys.last,
    })
}

/// Keys by generation, as on a disk.
pub(super) type KeyFiles = BTreeMap<u64, PublicKey>;
