//! The API server, and the replicas of `keyd` around the machine of its core.

use std::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

use warren_agent_core::slots;
use warren_keyd_core::rotation::{self, Machine, NodeKeys, Output, Progress, RotationSpec};

use super::{
    MILLI, Micros, NodeId, SECOND, Sabotage, scale,
    stream::{Down, Update},
    world::{Event, World, published},
};

/// What is durable.
#[derive(Debug)]
pub(super) struct Store {
    /// Until when it answers nobody.
    pub(super) down_until: Micros,
    epoch: u64,
    /// `None`: the Node does not exist.
    pub(super) nodes: Vec<Option<NodeKeys>>,
    pub(super) rotations: BTreeMap<String, Stored>,
}

/// A KeyRotation.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) created: u64,
    pub(super) spec: RotationSpec,
    progress: Progress,
    /// The resource version.
    version: u64,
}

impl Store {
    pub(super) fn new(nodes: usize) -> Self {
        Self {
            down_until: 0,
            epoch: 0,
            nodes: vec![None; nodes],
            rotations: BTreeMap::new(),
        }
    }
}

/// A replica.
#[derive(Debug, Default)]
pub(super) struct Keyd {
    pub(super) down: bool,
    pub(super) term: Option<Term>,
}

/// What a replica has while it believes that it leads.
#[derive(Debug)]
pub(super) struct Term {
    pub(super) epoch: u64,
    pub(super) version: u64,
    pub(super) machine: Machine,
    pub(super) directory: Vec<Option<Rc<slots::NodeKeys>>>,
    changed: BTreeSet<NodeId>,
    pub(super) streams: Vec<Option<usize>>,
    /// Resource versions of the rotations as this replica knows them.
    versions: BTreeMap<String, u64>,
    unsaved: BTreeMap<String, Progress>,
    next_poll: Micros,
    publishing: bool,
}

impl World {
    pub(super) fn term(&mut self, keyd: usize, epoch: u64) -> Option<&mut Term> {
        self.keyds[keyd].term.as_mut().filter(|term| term.epoch == epoch)
    }

    /// Somebody has to lead: begins a term where nobody does.
    pub(super) fn lead(&mut self) {
        let leads = self
            .keyds
            .iter()
            .any(|keyd| keyd.term.as_ref().is_some_and(|t| t.epoch == self.store.epoch));
        if leads {
            return;
        }
        let up: Vec<_> = (0..self.keyds.len())
            .filter(|keyd| !self.keyds[*keyd].down)
            .collect();
        if up.is_empty() || self.now < self.store.down_until {
            return self.at(SECOND, Event::Lead);
        }
        let keyd = self.dice.pick(&up);
        self.begin_term(keyd);
    }

    /// A new term of a replica, whatever the others believe.
    pub(super) fn begin_term(&mut self, keyd: usize) {
        if let Some(epoch) = self.keyds[keyd].term.as_ref().map(|term| term.epoch) {
            self.resign(keyd, epoch);
        }
        let epoch = rotation_epoch(self.store.epoch, self.now);
        self.store.epoch = epoch;
        self.note(|| format!("keyd {keyd} leads, epoch {epoch}"));
        let count = self.nodes.len();
        self.keyds[keyd].term = Some(Term {
            epoch,
            version: 1,
            machine: Machine::default(),
            directory: vec![None; count],
            changed: BTreeSet::new(),
            streams: vec![None; count],
            versions: BTreeMap::new(),
            unsaved: BTreeMap::new(),
            next_poll: Micros::MAX,
            publishing: false,
        });
        for node in 0..count {
            self.see(keyd, node);
        }
        let names: Vec<_> = self.store.rotations.keys().cloned().collect();
        names.iter().for_each(|name| self.see_rotation(keyd, name));
        self.poll_within(keyd, 10 * MILLI);
    }

    /// A replica believes no longer that it leads.
    pub(super) fn resign(&mut self, keyd: usize, epoch: u64) {
        if self.term(keyd, epoch).is_none() {
            return;
        }
        self.note(|| format!("keyd {keyd} no longer leads with epoch {epoch}"));
        let term = self.keyds[keyd].term.take();
        for connection in term.into_iter().flat_map(|term| term.streams).flatten() {
            self.break_connection(connection, false);
        }
        self.at(2 * SECOND, Event::Lead);
    }

    /// What the store has of a node reaches a replica.
    pub(super) fn see(&mut self, keyd: usize, node: NodeId) {
        let keys = self.store.nodes[node].clone();
        let now = self.now / MILLI;
        let name = self.nodes[node].name.clone();
        let Some(term) = self.keyds[keyd].term.as_mut() else {
            return;
        };
        match keys {
            Some(keys) => {
                let entry = (!keys.slots.is_empty()).then(|| published(&keys));
                if term.directory[node] != entry {
                    term.directory[node] = entry;
                    term.changed.insert(node);
                }
                term.machine
                    .handle(now, rotation::Event::Keys { node: name, keys });
            }
            None => {
                if term.directory[node].take().is_some() {
                    term.changed.insert(node);
                }
                term.machine.handle(now, rotation::Event::Gone(name));
                if let Some(connection) = term.streams[node].take() {
                    self.break_connection(connection, true);
                }
            }
        }
    }

    fn see_rotation(&mut self, keyd: usize, name: &str) {
        let now = self.now / MILLI;
        let Some(term) = self.keyds[keyd].term.as_mut() else {
            return;
        };
        match self.store.rotations.get(name) {
            None => term
                .machine
                .handle(now, rotation::Event::RotationGone(name.to_owned())),
            Some(stored) => {
                term.versions.insert(name.to_owned(), stored.version);
                let event = rotation::Event::Rotation {
                    name: name.to_owned(),
                    created: stored.created,
                    spec: stored.spec.clone(),
                    progress: Some(stored.progress.clone()),
                };
                term.machine.handle(now, event);
            }
        }
    }

    pub(super) fn seen(&mut self, keyd: usize, epoch: u64, node: NodeId) {
        if self.term(keyd, epoch).is_some() {
            self.see(keyd, node);
            self.publish_soon(keyd);
            self.poll_within(keyd, 5 * MILLI);
        }
    }

    /// Tells all replicas, sooner or later, that a node changed.
    pub(super) fn watchers_see(&mut self, node: NodeId) {
        for keyd in 0..self.keyds.len() {
            if let Some(epoch) = self.keyds[keyd].term.as_ref().map(|term| term.epoch) {
                let lag = self.between(MILLI, self.watch_lag);
                self.at(lag, Event::Seen(keyd, epoch, node));
            }
        }
    }

    /// A rotation is created or its spec changed.
    pub(super) fn put_rotation(&mut self, name: &str, spec: RotationSpec) {
        self.note(|| format!("rotation {name}: {spec:?}"));
        let created = self.now;
        let stored = self
            .store
            .rotations
            .entry(name.to_owned())
            .or_insert_with(|| Stored {
                created,
                spec: spec.clone(),
                progress: Progress::default(),
                version: 0,
            });
        stored.spec = spec;
        stored.version += 1;
        for keyd in 0..self.keyds.len() {
            // A replica's own newest progress is in the store or on its way there by the next poll.
            self.save(keyd);
            self.see_rotation(keyd, name);
            self.poll_within(keyd, 5 * MILLI);
        }
    }

    pub(super) fn drop_rotation(&mut self, name: &str) {
        self.store.rotations.remove(name);
        (0..self.keyds.len()).for_each(|keyd| self.see_rotation(keyd, name));
    }

    pub(super) fn poll_within(&mut self, keyd: usize, after: Micros) {
        let at = self.now + after;
        if let Some(term) = self.keyds[keyd].term.as_mut().filter(|term| term.next_poll > at) {
            term.next_poll = at;
            let epoch = term.epoch;
            self.at(after, Event::Poll(keyd, epoch));
        }
    }

    pub(super) fn poll(&mut self, keyd: usize, epoch: u64) {
        let now = self.now;
        let Some(term) = self.term(keyd, epoch).filter(|term| term.next_poll == now) else {
            return;
        };
        term.next_poll = Micros::MAX;
        let outputs = term.machine.poll(now / MILLI, now / SECOND);
        for output in outputs {
            self.output(keyd, epoch, output);
        }
        self.save(keyd);
        self.publish_soon(keyd);
        self.poll_within(keyd, SECOND);
    }

    fn output(&mut self, keyd: usize, epoch: u64, output: Output) {
        match output {
            Output::AskKey { node, generation } => {
                let node = self.index[&node];
                self.note(|| format!("keyd {keyd} asks node {node} for generation {generation}"));
                if let Some(connection) = self.term(keyd, epoch).and_then(|term| term.streams[node]) {
                    self.tell(connection, Down::Ask(generation));
                }
            }
            Output::Forget { node, forget } => {
                let node = self.index[&node];
                self.note(|| format!("keyd {keyd} tells node {node}: {forget:?}"));
                if let Some(connection) = self.term(keyd, epoch).and_then(|term| term.streams[node]) {
                    self.tell(connection, Down::Forget(forget));
                }
            }
            Output::Write { node, was, keys } => {
                let node = self.index[&node];
                let delay = self.between(MILLI, 30 * MILLI);
                let event = Event::Write {
                    keyd,
                    epoch,
                    node,
                    was: Box::new(was),
                    keys: Box::new(keys),
                };
                self.at(delay, event);
            }
            Output::Revoke(node) => {
                let node = self.index[&node];
                self.note(|| format!("keyd {keyd} revokes node {node}"));
                self.delete_node(node);
            }
            Output::Status {
                rotation, progress, ..
            } => {
                self.note(|| format!("keyd {keyd}: rotation {rotation} is {:?}", progress.phase));
                if let Some(term) = self.term(keyd, epoch) {
                    term.unsaved.insert(rotation, progress);
                }
            }
            Output::Note { message, .. } => self.note(|| format!("keyd {keyd}: {message}")),
        }
    }

    /// Writes the progress of rotations, where nobody else has written.
    fn save(&mut self, keyd: usize) {
        if self.now < self.store.down_until {
            return;
        }
        let Some(term) = self.keyds[keyd].term.as_mut() else {
            return;
        };
        let unsaved = std::mem::take(&mut term.unsaved);
        for (name, progress) in unsaved {
            let Some(stored) = self.store.rotations.get_mut(&name) else {
                continue;
            };
            let known = self.keyds[keyd]
                .term
                .as_mut()
                .and_then(|term| term.versions.get_mut(&name));
            match known {
                Some(known) if *known == stored.version => {
                    stored.version += 1;
                    *known = stored.version;
                    stored.progress = progress;
                }
                _ => self.see_rotation(keyd, &name),
            }
        }
    }

    pub(super) fn write(&mut self, keyd: usize, epoch: u64, node: NodeId, was: &NodeKeys, keys: &NodeKeys) {
        if self.now < self.store.down_until {
            // Not tried again as it is: by then it may be wrong. The machine decides anew.
            return self.at(SECOND, Event::Written(keyd, epoch, node));
        }
        let forced = self.sabotage == Sabotage::ForcedWrites;
        if let Some(stored) = self.store.nodes[node].as_mut()
            && (stored == was || forced)
            && stored.uid == keys.uid
        {
            let before = std::mem::replace(stored, keys.clone());
            self.judge.written(self.now, node, &before, keys);
            self.note(|| {
                format!(
                    "keyd {keyd} writes node {node}: generations {:?}, active {}, last {}",
                    keys.generations(),
                    keys.active,
                    keys.last
                )
            });
            scale::count_write(self, node);
            self.watchers_see(node);
        }
        // The writer learns at once what is there now.
        if self.term(keyd, epoch).is_some() {
            let delay = self.between(MILLI, 10 * MILLI);
            self.at(delay, Event::Written(keyd, epoch, node));
        }
    }

    /// A write is answered. The term is read again before anything of it is published: whoever leads by then has begun by
    /// reading all that was published before.
    pub(super) fn written(&mut self, keyd: usize, epoch: u64, node: NodeId) {
        let fenced = self.sabotage != Sabotage::Unfenced;
        if self.term(keyd, epoch).is_none() {
        } else if self.now < self.store.down_until && fenced {
            self.at(SECOND, Event::Written(keyd, epoch, node));
        } else if self.store.epoch != epoch && fenced {
            self.resign(keyd, epoch);
        } else {
            self.seen(keyd, epoch, node);
        }
    }

    fn publish_soon(&mut self, keyd: usize) {
        let delay = self.publish_delay;
        if let Some(term) = self.keyds[keyd].term.as_mut()
            && !term.publishing
            && !term.changed.is_empty()
        {
            term.publishing = true;
            let epoch = term.epoch;
            self.at(delay, Event::Publish(keyd, epoch));
        }
    }

    pub(super) fn publish(&mut self, keyd: usize, epoch: u64) {
        let Some(term) = self.term(keyd, epoch) else {
            return;
        };
        term.publishing = false;
        term.version += 1;
        let nodes = std::mem::take(&mut term.changed);
        let nodes = nodes
            .into_iter()
            .map(|node| (node, term.directory[node].clone()))
            .collect();
        let update = Rc::new(Update {
            epoch,
            version: term.version,
            snapshot: false,
            nodes,
        });
        let streams: Vec<_> = term.streams.iter().flatten().copied().collect();
        for connection in streams {
            self.tell(connection, Down::Update(update.clone()));
        }
    }

    /// What keyd has not finished.
    pub(super) fn unfinished(&self) -> Option<String> {
        let leader = self
            .keyds
            .iter()
            .filter_map(|keyd| keyd.term.as_ref())
            .max_by_key(|term| term.epoch)?;
        if let Some((node, waiting)) = leader.machine.flying().next() {
            return Some(format!(
                "node {node} is still on its way, waiting for {waiting:?}"
            ));
        }
        let open = self
            .store
            .rotations
            .iter()
            .find(|(_, stored)| !stored.progress.phase.is_over());
        open.map(|(name, _)| format!("rotation {name} is not over"))
    }
}

/// As `warren_keyd_core::next_epoch`, in virtual time.
fn rotation_epoch(last: u64, now: Micros) -> u64 {
    (last + 1).max(now / MILLI)
}
