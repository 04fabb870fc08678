//! The streams between agents and `keyd`: in order, with a delay, until they break.

use std::rc::Rc;

use warren_agent_core::slots;
use warren_keyd_core::rotation::{self, PairReport};
use warren_model::{ForgetPsk, SlotKey};

use super::{
    MILLI, Micros, NodeId, SECOND, scale,
    world::{Event, KeyFiles, World},
};

/// From an agent.
#[derive(Debug)]
pub(super) enum Up {
    Hello,
    Held(KeyFiles),
    Report(Vec<PairReport>),
    Offer(Vec<SlotKey>),
}

/// To an agent.
#[derive(Debug)]
pub(super) enum Down {
    Update(Rc<Update>),
    Ask(u64),
    Forget(ForgetPsk),
}

/// A version of the directory.
#[derive(Debug)]
pub(super) struct Update {
    pub(super) epoch: u64,
    pub(super) version: u64,
    pub(super) snapshot: bool,
    pub(super) nodes: Vec<(NodeId, Option<Rc<slots::NodeKeys>>)>,
}

/// A stream. In order, until it breaks; either end notices that in its own time.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) node: NodeId,
    keyd: usize,
    epoch: u64,
    pub(super) broken: bool,
    last_up: Micros,
    last_down: Micros,
}

impl World {
    /// An agent finds somebody who believes to lead.
    pub(super) fn open_connection(&mut self, node: NodeId) -> Option<usize> {
        let leading = |keyd: &usize| self.keyds[*keyd].term.is_some();
        let keyds: Vec<_> = (0..self.keyds.len()).filter(leading).collect();
        if self.control_cuts[node] || keyds.is_empty() {
            return None;
        }
        let keyd = self.dice.pick(&keyds);
        let epoch = self.keyds[keyd].term.as_ref()?.epoch;
        self.connections.push(Connection {
            node,
            keyd,
            epoch,
            broken: false,
            last_up: self.now,
            last_down: self.now,
        });
        Some(self.connections.len() - 1)
    }

    /// A stream breaks. `at_once`: both ends notice within a moment, otherwise only after a while.
    pub(super) fn break_connection(&mut self, connection: usize, at_once: bool) {
        if std::mem::replace(&mut self.connections[connection].broken, true) {
            return;
        }
        let longest = if at_once { 50 * MILLI } else { 15 * SECOND };
        let agent = self.between(MILLI, longest);
        let keyd = self.between(MILLI, longest);
        self.at(agent, Event::AgentLoses(connection));
        self.at(keyd, Event::KeydLoses(connection));
    }

    pub(super) fn keyd_loses(&mut self, connection: usize) {
        let Connection {
            node, keyd, epoch, ..
        } = self.connections[connection];
        let name = self.nodes[node].name.clone();
        let now = self.now / MILLI;
        if let Some(term) = self.term(keyd, epoch)
            && term.streams[node] == Some(connection)
        {
            term.streams[node] = None;
            term.machine.handle(now, rotation::Event::Disconnected(name));
            self.poll_within(keyd, 5 * MILLI);
        }
    }

    /// Agent to keyd.
    pub(super) fn say(&mut self, connection: usize, message: Up) {
        let delay = self.between(200, 30 * MILLI);
        let node = self.connections[connection].node;
        if self.control_cuts[node] {
            self.break_connection(connection, false);
        }
        let stream = &mut self.connections[connection];
        if stream.broken {
            return;
        }
        stream.last_up = (self.now + delay).max(stream.last_up);
        let after = stream.last_up - self.now;
        scale::count_up(self, node, &message);
        self.at(after, Event::Up(connection, message));
    }

    /// keyd to agent.
    pub(super) fn tell(&mut self, connection: usize, message: Down) {
        let delay = self.between(200, 30 * MILLI);
        let node = self.connections[connection].node;
        if self.control_cuts[node] {
            self.break_connection(connection, false);
        }
        let stream = &mut self.connections[connection];
        if stream.broken {
            return;
        }
        stream.last_down = (self.now + delay).max(stream.last_down);
        let after = stream.last_down - self.now;
        scale::count_down(self, node, &message);
        self.at(after, Event::Down(connection, message));
    }

    pub(super) fn up_arrives(&mut self, connection: usize, message: Up) {
        let Connection {
            node,
            keyd,
            epoch,
            broken,
            ..
        } = self.connections[connection];
        if broken || self.term(keyd, epoch).is_none() {
            return self.break_connection(connection, true);
        }
        let exists = self.store.nodes[node].is_some();
        let uid = self.nodes[node].uid.clone();
        let name = self.nodes[node].name.clone();
        let now = self.now / MILLI;
        let Some(term) = self.term(keyd, epoch) else {
            return;
        };
        let event = match message {
            Up::Hello if !exists => return self.break_connection(connection, true),
            Up::Hello => return self.hello(connection),
            _ if term.streams[node] != Some(connection) => return,
            Up::Held(keys) => rotation::Event::Held { node: name, keys },
            Up::Report(pairs) => rotation::Event::Report { node: name, pairs },
            Up::Offer(slots) => {
                let result = term.machine.proved(&name, &slots);
                self.note(|| format!("keyd {keyd}: node {node} ({uid}) offers a key: {result:?}"));
                return self.poll_within(keyd, 5 * MILLI);
            }
        };
        term.machine.handle(now, event);
        let pause = self.publish_delay / 2;
        self.poll_within(keyd, pause);
    }

    fn hello(&mut self, connection: usize) {
        let Connection {
            node, keyd, epoch, ..
        } = self.connections[connection];
        let name = self.nodes[node].name.clone();
        let now = self.now / MILLI;
        // What exists in the store exists for keyd: authentication looks there.
        self.see(keyd, node);
        let Some(term) = self.term(keyd, epoch) else {
            return;
        };
        let older = term.streams[node].replace(connection);
        term.machine
            .handle(now, rotation::Event::Disconnected(name.clone()));
        term.machine.handle(now, rotation::Event::Connected(name));
        let listed = |(node, keys): (NodeId, &Option<_>)| Some((node, Some(Rc::clone(keys.as_ref()?))));
        let update = Update {
            epoch,
            version: term.version,
            snapshot: true,
            nodes: term.directory.iter().enumerate().filter_map(listed).collect(),
        };
        if let Some(older) = older {
            self.break_connection(older, true);
        }
        self.tell(connection, Down::Update(Rc::new(update)));
        self.poll_within(keyd, 5 * MILLI);
    }
}
