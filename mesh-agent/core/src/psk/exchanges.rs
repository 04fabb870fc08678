//! All paths of a node that have a pre-shared key.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::Ipv6Addr,
    time::Duration,
};

use warren_model::{PskConflict, PskId, link_address};

use super::{
    Done, Ends, PskUse, Record, Seen, Work,
    exchange::{Exchange, Heard, Want},
    message::Message,
};
use crate::slots::begins;

/// What has happened since the agent started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Offers made or answered.
    pub begun: u64,
    /// Keys that were agreed on.
    pub agreed: u64,
    /// Offers and answers that no key could be computed from, and keys that could not be written.
    pub failed: u64,
    /// Packets that are no message, or from nobody who has a path.
    pub malformed: u64,
    /// Messages that answer nothing that was asked.
    pub unexpected: u64,
    /// Packets beyond what a peer may send.
    pub refused: u64,
}

/// The exchanges of all paths.
#[derive(Debug, Default)]
pub struct Exchanges {
    salt: [u8; 7],
    /// What was on disk at the start, of paths that were not named yet.
    found: BTreeMap<Ends, Record>,
    paths: BTreeMap<Ends, Path>,
    /// The path of a peer's link-local address on a slot.
    places: HashMap<(u8, Ipv6Addr), Ends>,
    /// When a path has something to do.
    queue: BTreeSet<(Duration, Ends)>,
    counters: Counters,
    changed: BTreeSet<Ends>,
    work: Vec<Work>,
}

#[derive(Debug)]
struct Path {
    /// Of the exchange.
    slot: u8,
    exchange: Exchange,
    /// Its place in the queue.
    due: Option<Duration>,
}

impl Exchanges {
    /// With what is on disk, and 7 random bytes.
    pub fn new(found: BTreeMap<Ends, Record>, salt: [u8; 7]) -> Self {
        Self {
            salt,
            found,
            ..Self::default()
        }
    }

    /// All paths that there are, each with the slot of its exchange and what the devices show of it. Others are over: their keys
    /// are destroyed.
    pub fn update(&mut self, now: Duration, paths: impl IntoIterator<Item = (Ends, u8, Seen)>) {
        let mut named = BTreeSet::new();
        for (ends, slot, seen) in paths {
            self.see(now, ends, slot, seen);
            named.insert(ends);
        }
        self.retain(now, |ends| named.contains(ends));
    }

    /// A path with the slot of its exchange and what the devices show of it.
    pub fn see(&mut self, now: Duration, ends: Ends, slot: u8, seen: Seen) {
        let record = self.found.remove(&ends);
        if !self.paths.contains_key(&ends) {
            self.open(now, ends, slot, record.unwrap_or_default());
        }
        self.places.insert((slot, link_address(&ends.peer)), ends);
        self.with(ends, |path, wants| {
            path.slot = slot;
            path.exchange.look(now, seen, wants);
        });
    }

    /// Paths that are not to be `kept` are over, also those that are on disk alone.
    pub fn retain(&mut self, now: Duration, kept: impl Fn(&Ends) -> bool) {
        for (ends, record) in std::mem::take(&mut self.found) {
            self.open(now, ends, 0, record);
        }
        let gone = self
            .paths
            .iter()
            .filter(|(ends, path)| !path.exchange.over && !kept(ends));
        for ends in gone.map(|(ends, _)| *ends).collect::<Vec<_>>() {
            self.end(&ends);
        }
    }

    /// A path is over: its keys are destroyed.
    pub fn end(&mut self, ends: &Ends) {
        let slot = self.with(*ends, |path, _| {
            path.exchange.end();
            path.slot
        });
        let place = slot.map(|slot| (slot, link_address(&ends.peer)));
        if let Some(place) = place.filter(|place| self.places.get(place) == Some(ends)) {
            self.places.remove(&place);
        }
    }

    fn open(&mut self, now: Duration, ends: Ends, slot: u8, record: Record) {
        let begins = begins(ends.own, ends.peer);
        let path = Path {
            slot,
            exchange: Exchange::new(now, begins, record, self.salt),
            due: None,
        };
        self.paths.insert(ends, path);
    }

    /// Lets a path do something, and takes what comes of it.
    fn with<T>(&mut self, ends: Ends, work: impl FnOnce(&mut Path, &mut Vec<Want>) -> T) -> Option<T> {
        let path = self.paths.get_mut(&ends)?;
        let mut wants = vec![];
        let result = work(path, &mut wants);
        if std::mem::take(&mut path.exchange.changed) {
            self.changed.insert(ends);
        }
        let slot = path.slot;
        let due = path.exchange.next();
        if let Some(before) = std::mem::replace(&mut path.due, due) {
            self.queue.remove(&(before, ends));
        }
        self.queue.extend(due.map(|due| (due, ends)));
        if path.exchange.is_done() {
            self.paths.remove(&ends);
        }
        self.take(ends, slot, wants);
        Some(result)
    }

    fn take(&mut self, ends: Ends, slot: u8, wants: Vec<Want>) {
        for want in wants {
            self.counters.begun += u64::from(matches!(want, Want::Begin(_) | Want::Answer(..)));
            self.work.push(match want {
                Want::Begin(nonce) => Work::Begin { ends, nonce },
                Want::Answer(nonce, offer) => Work::Answer { ends, nonce, offer },
                Want::Finish(nonce, answer, id) => Work::Finish {
                    ends,
                    nonce,
                    answer,
                    id,
                },
                Want::Save(record) => Work::Save { ends, record },
                Want::Send(message) => Work::Send {
                    ends,
                    slot,
                    bytes: message.to_bytes(),
                },
            });
        }
    }

    /// What the path's peer is to have on its device.
    pub fn psk(&self, now: Duration, ends: &Ends) -> PskUse {
        match self.paths.get(ends).and_then(|path| path.exchange.key(now)) {
            Some(id) => PskUse::With(id),
            None => PskUse::Awaited,
        }
    }

    /// What both ends have, where it is known to differ.
    pub fn conflict(&self, ends: &Ends) -> Option<PskConflict> {
        self.paths.get(ends)?.exchange.conflict
    }

    /// `keyd` says that a path's key, if it is this one, is to be forgotten. Returns whether it is.
    pub fn forget(&mut self, now: Duration, ends: &Ends, id: PskId) -> bool {
        let forgotten = self.with(*ends, |path, _| path.exchange.forget(now, id));
        forgotten.unwrap_or_default()
    }

    /// A packet came on a slot's device, from its port of the exchange and to ours.
    pub fn received(&mut self, now: Duration, slot: u8, from: Ipv6Addr, bytes: &[u8]) {
        let ends = self.places.get(&(slot, from)).copied();
        let Some(path) = ends.and_then(|ends| self.paths.get_mut(&ends)) else {
            self.counters.malformed += 1;
            return;
        };
        if !path.exchange.admits(now) {
            self.counters.refused += 1;
            return;
        }
        let (Some(ends), Some(message)) = (ends, Message::parse(bytes)) else {
            self.counters.malformed += 1;
            return;
        };
        match self.with(ends, |path, wants| path.exchange.hear(now, message, wants)) {
            Some(Heard::Good) | None => {}
            Some(Heard::Unexpected) => self.counters.unexpected += 1,
            Some(Heard::TooMany) => self.counters.refused += 1,
        }
    }

    /// The device of a path's slot has a peer with this key by now.
    pub fn placed(&mut self, ends: &Ends, id: PskId) {
        self.with(*ends, |path, wants| path.exchange.placed(id, wants));
    }

    /// What came of something that was to be done.
    pub fn done(&mut self, now: Duration, done: Done) {
        let failed = matches!(
            done,
            Done::Begun(_, _, None)
                | Done::Answered(_, _, None)
                | Done::Finished(_, _, None)
                | Done::Saved(_, _, false)
        );
        self.counters.failed += u64::from(failed);
        match done {
            Done::Begun(ends, nonce, offer) => {
                self.with(ends, |path, _| path.exchange.begun(now, nonce, offer));
            }
            Done::Answered(ends, nonce, answer) => {
                self.with(ends, |path, _| path.exchange.answered(nonce, answer));
            }
            Done::Finished(ends, nonce, id) => {
                self.with(ends, |path, _| path.exchange.finished(nonce, id));
            }
            Done::Saved(ends, record, written) => {
                let agreed = self.with(ends, |path, wants| {
                    let before = path.exchange.agreed();
                    path.exchange.saved(now, record, written, wants);
                    path.exchange
                        .agreed()
                        .filter(|_| path.exchange.agreed() != before)
                });
                self.counters.agreed += u64::from(agreed.flatten().is_some());
            }
        }
    }

    /// What is to be done now.
    pub fn poll(&mut self, now: Duration) -> Vec<Work> {
        let due: Vec<Ends> = self
            .queue
            .iter()
            .take_while(|(at, _)| *at <= now)
            .map(|(_, ends)| *ends)
            .collect();
        for ends in due {
            self.with(ends, |path, wants| path.exchange.poll(now, wants));
        }
        std::mem::take(&mut self.work)
    }

    /// When to poll again though nothing happens.
    pub fn next(&self) -> Option<Duration> {
        self.queue.first().map(|(at, _)| *at)
    }

    /// Paths whose devices may have to be given another key than before; each is named once for each change.
    pub fn take_changed(&mut self) -> BTreeSet<Ends> {
        std::mem::take(&mut self.changed)
    }

    /// What has happened.
    pub fn counters(&self) -> Counters {
        self.counters
    }
}
