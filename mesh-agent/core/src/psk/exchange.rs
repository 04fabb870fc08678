//! One path: what this end has, and what it says next.

use std::time::Duration;

use warren_model::{PskConflict, PskId};

use super::{
    Record, Seen,
    allowance::Allowance,
    message::{Former, Message, Nonce},
};

/// The first pause until something is said again; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(300);
const LONGEST_PAUSE: Duration = Duration::from_secs(8);
/// How long a path with a key from the disk may take for its handshake until the other end is asked for its key.
const CHECK_AFTER: Duration = Duration::from_secs(3);
/// How long the beginning end waits with its device for the other one's: a handshake that is answered without the key
/// is tried again only after 5 s.
const HOLD: Duration = Duration::from_secs(1);
/// How long until a key is written again that could not be written.
const WRITE_AGAIN: Duration = Duration::from_secs(1);

/// What an exchange wants from whoever has keys, disk and network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Want {
    Begin(Nonce),
    Answer(Nonce, Vec<u8>),
    Finish(Nonce, Vec<u8>, PskId),
    Save(Record),
    Send(Message),
}

/// What came of a packet, for the counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Heard {
    Good,
    /// Not for this end, or not an answer to what it asked.
    Unexpected,
    /// More than an honest end says.
    TooMany,
}

/// An answer to an offer, kept for when the offer is repeated.
#[derive(Debug)]
struct Answered {
    nonce: Nonce,
    id: PskId,
    answer: Vec<u8>,
    said: bool,
}

#[derive(Debug)]
pub(super) struct Exchange {
    /// This end begins: its key is the lower one.
    begins: bool,
    salt: [u8; 7],
    nonces: u64,
    /// On disk.
    record: Record,
    /// To be on disk.
    wanted: Record,
    saving: bool,
    save_after: Duration,
    pub(super) seen: Seen,
    /// `keyd` said so; a device may still have it.
    forgotten: Option<PskId>,
    pub(super) conflict: Option<PskConflict>,
    /// A computation is under way.
    busy: bool,
    /// Of the offer or the question of this end that counts.
    nonce: Option<Nonce>,
    offer: Option<Vec<u8>>,
    /// What the offer is instead of.
    instead_of: Former,
    /// The other end has said Ack since this one asked.
    acknowledged: bool,
    /// The other end says that it has agreed on nothing.
    challenged: bool,
    agreed_at: Option<Duration>,
    /// The device waits for the other end's.
    holding: bool,
    answered: Option<Answered>,
    /// The question that is answered once the device has the key.
    owed: Option<(Nonce, PskId)>,
    due: Duration,
    pause: Duration,
    messages: Allowance,
    offers: Allowance,
    /// The path is gone: everything is destroyed.
    pub(super) over: bool,
    /// What the device should have may be another key than before.
    pub(super) changed: bool,
}

impl Exchange {
    pub(super) fn new(now: Duration, begins: bool, record: Record, salt: [u8; 7]) -> Self {
        let due = match record.agreed {
            Some(_) => now + CHECK_AFTER,
            None => now,
        };
        Self {
            begins,
            salt,
            nonces: 0,
            wanted: record.clone(),
            record,
            saving: false,
            save_after: Duration::ZERO,
            seen: Seen::default(),
            forgotten: None,
            conflict: None,
            busy: false,
            nonce: None,
            offer: None,
            instead_of: Former::default(),
            acknowledged: false,
            challenged: false,
            agreed_at: None,
            holding: false,
            answered: None,
            owed: None,
            due,
            pause: FIRST_PAUSE,
            messages: Allowance::default(),
            offers: Allowance::new(4, Duration::from_secs(2)),
            over: false,
            changed: true,
        }
    }

    /// The key that counts: what a device works with, whatever the disk says; else what is on disk; else what a device has.
    fn current(&self) -> Option<PskId> {
        let live = self.seen.on_device.filter(|id| self.forgotten != Some(*id));
        live.filter(|_| self.seen.fresh).or(self.record.agreed).or(live)
    }

    /// The key that is on disk.
    pub(super) fn agreed(&self) -> Option<PskId> {
        self.record.agreed
    }

    /// The key that the device should have now.
    pub(super) fn key(&self, now: Duration) -> Option<PskId> {
        let id = self.current().filter(|_| !self.over)?;
        let held = self.hold_until().is_some_and(|until| now < until);
        (!held || self.seen.on_device == Some(id)).then_some(id)
    }

    /// Until when the device waits for the other end's.
    fn hold_until(&self) -> Option<Duration> {
        let since = self.agreed_at.filter(|_| self.begins && !self.acknowledged)?;
        Some(since + HOLD)
    }

    /// What the devices show.
    pub(super) fn look(&mut self, now: Duration, seen: Seen, out: &mut Vec<Want>) {
        if self.over {
            // It is there again, with what is on disk by now.
            self.over = false;
            if !self.saving {
                self.wanted = self.record.clone();
            }
            self.renew(now);
        }
        if seen.open && !self.seen.open {
            self.hurry(now);
        } else if self.seen.fresh && !seen.fresh {
            self.hurry(now + CHECK_AFTER);
        }
        self.seen = seen;
        self.pay(out);
    }

    /// The path is gone.
    pub(super) fn end(&mut self) {
        self.over = true;
        self.wanted = Record::default();
        self.answered = None;
        (self.offer, self.nonce, self.owed, self.conflict) = (None, None, None, None);
    }

    /// Whether nothing is left to do for a path that is gone.
    pub(super) fn is_done(&self) -> bool {
        self.over && !self.saving && !self.busy && self.record == self.wanted
    }

    fn hurry(&mut self, now: Duration) {
        self.due = self.due.min(now);
        self.pause = FIRST_PAUSE;
    }

    fn renew(&mut self, now: Duration) {
        (self.nonce, self.offer, self.conflict, self.owed) = (None, None, None, None);
        (self.acknowledged, self.agreed_at, self.answered) = (false, None, None);
        self.changed = true;
        self.hurry(now);
    }

    /// `keyd` says that this key, and no other, is to be forgotten.
    pub(super) fn forget(&mut self, now: Duration, id: PskId) -> bool {
        if self.current() != Some(id) && self.record.agreed != Some(id) {
            return false;
        }
        self.forgotten = Some(id);
        if self.wanted.agreed == Some(id) {
            self.wanted.agreed = None;
        }
        self.renew(now);
        true
    }

    /// A message of the other end.
    pub(super) fn hear(&mut self, now: Duration, message: Message, out: &mut Vec<Want>) -> Heard {
        if !self.begins {
            // Nothing to be said unasked for a while.
            self.due = self.due.max(now + CHECK_AFTER);
        }
        match (self.begins, message) {
            (true, Message::Hello { offered }) => self.hear_hello(now, offered),
            (true, Message::Reply { nonce, answer, id }) if self.awaits(nonce) && !self.busy => {
                if self.wanted.agreed.is_none() && self.current().is_none() {
                    self.busy = true;
                    self.conflict = None;
                    out.push(Want::Finish(nonce, answer, id));
                }
            }
            (true, Message::Ack { nonce, id }) if self.awaits(nonce) && self.current() == Some(id) => {
                self.changed |= !self.acknowledged;
                self.acknowledged = true;
                self.conflict = None;
                self.due = now + LONGEST_PAUSE;
            }
            (true, Message::Other { nonce, id }) if self.awaits(nonce) => {
                let own = self.current();
                if own != id {
                    self.conflict = Some(PskConflict { own, peer: id });
                }
            }
            (
                false,
                Message::Init {
                    nonce,
                    instead_of,
                    offer,
                },
            ) => return self.hear_offer(now, nonce, instead_of, offer, out),
            (false, Message::Confirm { nonce, id }) => self.hear_question(nonce, id, out),
            _ => return Heard::Unexpected,
        }
        Heard::Good
    }

    /// Whether an answer is one to what this end asked.
    fn awaits(&self, nonce: Nonce) -> bool {
        self.nonce == Some(nonce)
    }

    /// The other end has agreed on nothing. What it has offered came of an offer that does not count any more, or the
    /// answer to the one that does is on its way: whichever it is, another offer is made, and from now on that
    /// answer is not taken. So the other end may replace what it has offered by the answer to an offer that names it.
    fn hear_hello(&mut self, now: Duration, offered: Option<PskId>) {
        let former = Former::of(offered);
        if self.current().is_some() {
            self.challenged = true;
        } else if former != self.instead_of && self.wanted.agreed.is_none() {
            (self.nonce, self.offer, self.instead_of) = (None, None, former);
        }
        self.hurry(now);
    }

    fn hear_offer(
        &mut self,
        now: Duration,
        nonce: Nonce,
        instead_of: Former,
        offer: Vec<u8>,
        out: &mut Vec<Want>,
    ) -> Heard {
        if let Some(id) = self.current() {
            // It has lost it, or this is late: it will know by the nonce.
            out.push(Want::Send(Message::Other { nonce, id: Some(id) }));
            return Heard::Good;
        }
        if let Some(known) = self.answered.as_ref().filter(|known| known.nonce == nonce) {
            if self.record.offered == Some(known.id) {
                out.push(Want::Send(known.message()));
            }
            return Heard::Good;
        }
        if self.busy || self.wanted != self.record {
            return Heard::Good;
        }
        if instead_of != Former::of(self.record.offered) {
            let offered = self.record.offered;
            out.push(Want::Send(Message::Hello { offered }));
            return Heard::Good;
        }
        if !self.offers.take(now) {
            return Heard::TooMany;
        }
        self.busy = true;
        out.push(Want::Answer(nonce, offer));
        Heard::Good
    }

    fn hear_question(&mut self, nonce: Nonce, id: PskId, out: &mut Vec<Want>) {
        if self.current().is_none() && self.record.offered == Some(id) {
            self.wanted = Record {
                agreed: Some(id),
                offered: None,
            };
        }
        if self.current() == Some(id) || self.wanted.agreed == Some(id) {
            self.owed = Some((nonce, id));
            self.pay(out);
        } else {
            let id = self.current();
            out.push(Want::Send(Message::Other { nonce, id }));
        }
    }

    /// Says Ack once the device has the key.
    fn pay(&mut self, out: &mut Vec<Want>) {
        if let Some((nonce, id)) = self.owed
            && self.current() == Some(id)
            && self.seen.on_device == Some(id)
        {
            self.owed = None;
            out.push(Want::Send(Message::Ack { nonce, id }));
        }
    }

    /// The device has a key by now.
    pub(super) fn placed(&mut self, id: PskId, out: &mut Vec<Want>) {
        self.seen.on_device = Some(id);
        // Without a handshake since.
        self.seen.fresh = false;
        self.pay(out);
    }

    /// The offer was made, or could not be.
    pub(super) fn begun(&mut self, now: Duration, nonce: Nonce, offer: Option<Vec<u8>>) {
        self.busy = false;
        if self.awaits(nonce) && !self.over {
            match offer {
                Some(offer) => {
                    self.offer = Some(offer);
                    self.hurry(now);
                }
                None => self.nonce = None,
            }
        }
    }

    /// A key and the answer were computed, or could not be: the offer is none.
    pub(super) fn answered(&mut self, nonce: Nonce, answer: Option<(PskId, Vec<u8>)>) {
        self.busy = false;
        let Some((id, answer)) = answer.filter(|_| !self.over && self.wanted.agreed.is_none()) else {
            return;
        };
        self.answered = Some(Answered {
            nonce,
            id,
            answer,
            said: false,
        });
        self.wanted.offered = Some(id);
    }

    /// The key was computed from the answer, or could not be.
    pub(super) fn finished(&mut self, nonce: Nonce, id: Option<PskId>) {
        self.busy = false;
        if !self.awaits(nonce) || self.over || self.current().is_some() {
            return;
        }
        match id {
            Some(id) => self.wanted.agreed = Some(id),
            None => (self.nonce, self.offer) = (None, None),
        }
    }

    /// What was to be written is on disk, or could not be written.
    pub(super) fn saved(&mut self, now: Duration, record: Record, written: bool, out: &mut Vec<Want>) {
        self.saving = false;
        if !written {
            self.save_after = now + WRITE_AGAIN;
            return;
        }
        let before = std::mem::replace(&mut self.record, record);
        if self.record.agreed != before.agreed {
            self.changed = true;
            self.conflict = None;
            if self.record.agreed.is_some() {
                self.answered = None;
                if self.begins {
                    (self.nonce, self.offer) = (None, None);
                    (self.acknowledged, self.agreed_at, self.holding) = (false, Some(now), true);
                    self.hurry(now);
                }
            }
        }
        if let Some(answered) = &mut self.answered
            && self.record.offered == Some(answered.id)
            && !std::mem::replace(&mut answered.said, true)
        {
            out.push(Want::Send(answered.message()));
        }
        self.pay(out);
    }

    /// Whether this end has something to say without being asked.
    fn speaks(&self) -> bool {
        if self.over || self.busy || !self.seen.open {
            return false;
        }
        match (self.begins, self.current()) {
            // Being written.
            (_, None) => self.wanted.agreed.is_none(),
            (true, Some(_)) => {
                let unsure = self.agreed_at.is_some() && !self.acknowledged;
                unsure || self.challenged || !self.seen.fresh
            }
            (false, Some(_)) => false,
        }
    }

    /// What is due.
    pub(super) fn poll(&mut self, now: Duration, out: &mut Vec<Want>) {
        if self.wanted != self.record && !self.saving && now >= self.save_after {
            self.saving = true;
            out.push(Want::Save(self.wanted.clone()));
        }
        if self.holding && self.hold_until().is_none_or(|until| now >= until) {
            self.holding = false;
            self.changed = true;
        }
        if !self.speaks() || now < self.due {
            return;
        }
        let message = match (self.begins, self.current()) {
            (false, _) => Message::Hello {
                offered: self.record.offered,
            },
            (true, Some(id)) => {
                let nonce = self.open_nonce();
                Message::Confirm { nonce, id }
            }
            (true, None) => match (self.nonce, &self.offer) {
                (Some(nonce), Some(offer)) => Message::Init {
                    nonce,
                    instead_of: self.instead_of,
                    offer: offer.clone(),
                },
                _ => {
                    self.nonce = None;
                    self.busy = true;
                    let nonce = self.open_nonce();
                    return out.push(Want::Begin(nonce));
                }
            },
        };
        self.challenged = false;
        out.push(Want::Send(message));
        self.due = now + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    fn open_nonce(&mut self) -> Nonce {
        let (salt, nonces) = (self.salt, &mut self.nonces);
        *self.nonce.get_or_insert_with(|| {
            *nonces += 1;
            Nonce::numbered(salt, *nonces)
        })
    }

    /// When something is due though nothing happens.
    pub(super) fn next(&self) -> Option<Duration> {
        let save = (self.wanted != self.record && !self.saving).then_some(self.save_after);
        let speak = self.speaks().then_some(self.due);
        let hold = self.hold_until().filter(|_| self.holding);
        save.into_iter().chain(speak).chain(hold).min()
    }

    /// Whether the other end may say one more thing.
    pub(super) fn admits(&mut self, now: Duration) -> bool {
        self.messages.take(now)
    }
}

impl Answered {
    fn message(&self) -> Message {
        Message::Reply {
            nonce: self.nonce,
            answer: self.answer.clone(),
            id: self.id,
        }
    }
}
