//! All paths of a node that have a pre-shared key.

use std::{
    collections::{BTreeMap, HashMap},
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
    paths: BTreeMap<Ends, (u8, Exchange)>,
    /// The path of a peer's link-local address on a slot.
    places: HashMap<(u8, Ipv6Addr), Ends>,
    counters: Counters,
    changed: bool,
    work: Vec<Work>,
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
        let mut named = BTreeMap::new();
        for (ends, slot, seen) in paths {
            let record = self.found.remove(&ends);
            let path = self.paths.entry(ends).or_insert_with(|| {
                let begins = begins(ends.own, ends.peer);
                (
                    slot,
                    Exchange::new(now, begins, record.unwrap_or_default(), self.salt),
                )
            });
            path.0 = slot;
            let mut wants = vec![];
            path.1.look(now, seen, &mut wants);
            self.take(ends, slot, wants);
            named.insert(ends, slot);
        }
        // What was found and is of no path that there is.
        for (ends, record) in std::mem::take(&mut self.found) {
            let begins = begins(ends.own, ends.peer);
            self.paths
                .insert(ends, (0, Exchange::new(now, begins, record, self.salt)));
        }
        for (ends, (_, exchange)) in &mut self.paths {
            if !named.contains_key(ends) && !exchange.over {
                exchange.end();
            }
        }
        self.paths.retain(|_, (_, exchange)| !exchange.is_done());
        let place = |(ends, slot): (&Ends, &u8)| ((*slot, link_address(&ends.peer)), *ends);
        self.places = named.iter().map(place).collect();
    }

    /// What the path's peer is to have on its device.
    pub fn psk(&self, now: Duration, ends: &Ends) -> PskUse {
        match self.paths.get(ends).and_then(|(_, exchange)| exchange.key(now)) {
            Some(id) => PskUse::With(id),
            None => PskUse::Awaited,
        }
    }

    /// What both ends have, where it is known to differ.
    pub fn conflict(&self, ends: &Ends) -> Option<PskConflict> {
        self.paths.get(ends)?.1.conflict
    }

    /// `keyd` says that a path's key, if it is this one, is to be forgotten.
    pub fn forget(&mut self, now: Duration, ends: &Ends, id: PskId) {
        if let Some((slot, exchange)) = self.paths.get_mut(ends) {
            let slot = *slot;
            exchange.forget(now, id);
            self.take(*ends, slot, vec![]);
        }
    }

    /// A packet came on a slot's device, from its port of the exchange and to ours.
    pub fn received(&mut self, now: Duration, slot: u8, from: Ipv6Addr, bytes: &[u8]) {
        let path = self.places.get(&(slot, from)).copied();
        let Some((ends, (_, exchange))) = path.and_then(|ends| Some((ends, self.paths.get_mut(&ends)?)))
        else {
            self.counters.malformed += 1;
            return;
        };
        if !exchange.admits(now) {
            self.counters.refused += 1;
            return;
        }
        let Some(message) = Message::parse(bytes) else {
            self.counters.malformed += 1;
            return;
        };
        let mut wants = vec![];
        match exchange.hear(now, message, &mut wants) {
            Heard::Good => {}
            Heard::Unexpected => self.counters.unexpected += 1,
            Heard::TooMany => self.counters.refused += 1,
        }
        self.take(ends, slot, wants);
    }

    /// The device of a path's slot has a peer with this key by now.
    pub fn placed(&mut self, ends: &Ends, id: PskId) {
        if let Some((slot, exchange)) = self.paths.get_mut(ends) {
            let mut wants = vec![];
            let slot = *slot;
            exchange.placed(id, &mut wants);
            self.take(*ends, slot, wants);
        }
    }

    /// What came of something that was to be done.
    pub fn done(&mut self, now: Duration, done: Done) {
        let ends = match &done {
            Done::Begun(ends, ..) | Done::Answered(ends, ..) => *ends,
            Done::Finished(ends, ..) | Done::Saved(ends, ..) => *ends,
        };
        let failed = matches!(
            done,
            Done::Begun(_, _, None)
                | Done::Answered(_, _, None)
                | Done::Finished(_, _, None)
                | Done::Saved(_, _, false)
        );
        self.counters.failed += u64::from(failed);
        let Some((slot, exchange)) = self.paths.get_mut(&ends) else {
            return;
        };
        let (slot, mut wants) = (*slot, vec![]);
        match done {
            Done::Begun(_, nonce, offer) => exchange.begun(now, nonce, offer),
            Done::Answered(_, nonce, answer) => exchange.answered(nonce, answer),
            Done::Finished(_, nonce, id) => exchange.finished(nonce, id),
            Done::Saved(_, record, written) => {
                let agreed = record.agreed.filter(|_| written);
                self.counters.agreed += u64::from(agreed.is_some() && exchange.agreed() != agreed);
                exchange.saved(now, record, written, &mut wants);
            }
        }
        if exchange.is_done() {
            self.paths.remove(&ends);
        }
        self.take(ends, slot, wants);
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
        if let Some((_, exchange)) = self.paths.get_mut(&ends) {
            self.changed |= std::mem::take(&mut exchange.changed);
        }
    }

    /// What is to be done now.
    pub fn poll(&mut self, now: Duration) -> Vec<Work> {
        let ends: Vec<Ends> = self.paths.keys().copied().collect();
        for ends in ends {
            let mut wants = vec![];
            if let Some((slot, exchange)) = self.paths.get_mut(&ends) {
                let slot = *slot;
                exchange.poll(now, &mut wants);
                self.take(ends, slot, wants);
            }
        }
        std::mem::take(&mut self.work)
    }

    /// When to poll again though nothing happens.
    pub fn next(&self, now: Duration) -> Option<Duration> {
        self.paths
            .values()
            .filter_map(|(_, exchange)| exchange.next(now))
            .min()
    }

    /// Whether a device may have to be given another key than before; asked once for each change.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// What has happened.
    pub fn counters(&self) -> Counters {
        self.counters
    }
}
