//! One peer's handshakes, sessions and timers, without IO: messages and times go in, messages come out.
//!
//! ```text
//!              initiate                 response
//!   (nothing) ----------> pending ------------------> current     (we began)
//!
//!              initiation               first data
//!   (nothing) ----------> next -----------------> current         (the peer began)
//! ```
//!
//! A session that another takes the place of is only received with. Sessions end after 180 s. Both ends may begin at
//! once: both handshakes complete, each end sends with the session that it got last.
//! Source: section 6 of the WireGuard paper.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use warren_model::{PreSharedKey, PublicKey};
use zeroize::Zeroizing;

use super::{
    cookie::{Authenticator, COOKIE_REPLY, TYPE_COOKIE},
    drops::DropReason,
    image::Writer,
    noise::{self, INITIATION, Pair, Pending, RESPONSE, SessionKeys},
    own::{Index, Shared},
    session::{
        REJECT_AFTER_MESSAGES, REJECT_AFTER_TIME, REKEY_AFTER_MESSAGES, REKEY_AFTER_TIME, Receiving, Sealing,
        Sending,
    },
    transport::{OVERHEAD, Opened, Tick, Transport},
};

/// How long an answer to an initiation is waited for, and how much longer at random.
const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
const JITTER_MILLISECONDS: u64 = 334;

/// How long initiations are repeated.
const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(90);

/// How long the peer's data is left without an answer of any kind.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// The shortest time between two initiations of the peer.
const INITIATION_INTERVAL: Duration = Duration::from_millis(20);

/// Sessions that are only received with.
const OLD_SESSIONS: usize = 6;

/// A peer's state.
pub(super) struct Machine {
    shared: Arc<Shared>,
    peer: x25519_dalek::PublicKey,
    /// The peer's index on the device.
    index: u32,
    preshared_key: Option<PreSharedKey>,
    /// Computed at the first handshake: it costs as much as a part of one. `Err` for a key of low order.
    static_static: Option<Result<Zeroizing<[u8; 32]>, noise::Refused>>,
    authenticator: Authenticator,
    attempt: Option<Attempt>,
    current: Option<Session>,
    /// Answered by us, and not yet heard from.
    next: Option<Session>,
    old: VecDeque<Session>,
    handshakes: u64,
    /// When the peer's last initiation was taken.
    last_initiation: Option<Instant>,
    /// Data was sent at this time, and nothing was heard since.
    unanswered: Option<Instant>,
    /// Data was heard at this time, and nothing was sent since.
    unacknowledged: Option<Instant>,
    /// The current session is in use and should have a successor.
    stale: bool,
}

/// An initiation that was sent.
struct Attempt {
    pending: Pending,
    index: Index,
    /// When the first of a series was sent.
    began: Instant,
    again_at: Instant,
    /// Repeated once already because of a cookie.
    hurried: bool,
}

struct Session {
    sending: Arc<Sending>,
    receiving: Arc<Receiving>,
    /// The counter of the next message.
    counter: u64,
    initiator: bool,
    index: Index,
}

impl Session {
    fn new(keys: &SessionKeys, index: Index, receiver: u32, initiator: bool, now: Instant) -> Option<Self> {
        Some(Self {
            sending: Arc::new(Sending::new(&keys.sending, receiver).ok()?),
            receiving: Arc::new(Receiving::new(&keys.receiving, now).ok()?),
            counter: 0,
            initiator,
            index,
        })
    }

    fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.receiving.created)
    }

    fn usable(&self, now: Instant) -> bool {
        self.age(now) < REJECT_AFTER_TIME && self.counter < REJECT_AFTER_MESSAGES
    }

    /// Whether a session that is sent with should have a successor. The one that began it sees to that by time.
    fn is_stale(&self, now: Instant) -> bool {
        self.counter > REKEY_AFTER_MESSAGES || (self.initiator && self.age(now) >= REKEY_AFTER_TIME)
    }
}

/// No pre-shared key is one that is all zero: section 5.4 of the WireGuard paper.
fn or_zero(key: Option<&PreSharedKey>) -> &[u8; 32] {
    key.map_or(&[0; 32], PreSharedKey::expose)
}

impl Machine {
    pub(super) fn new(
        shared: Arc<Shared>,
        peer: &PublicKey,
        preshared_key: Option<&PreSharedKey>,
        index: u32,
    ) -> Self {
        Self {
            shared,
            peer: (*peer.as_bytes()).into(),
            index,
            preshared_key: preshared_key.cloned(),
            static_static: None,
            authenticator: Authenticator::new(peer.as_bytes()),
            attempt: None,
            current: None,
            next: None,
            old: VecDeque::new(),
            handshakes: 0,
            last_initiation: None,
            unanswered: None,
            unacknowledged: None,
            stale: false,
        }
    }

    /// Runs `work` with what both ends know of each other.
    fn with_pair<T>(
        &mut self,
        work: impl FnOnce(&Pair<'_>) -> Result<T, noise::Refused>,
    ) -> Result<T, DropReason> {
        let shared = &*self.shared;
        let secret = self
            .static_static
            .get_or_insert_with(|| noise::static_static(&shared.keys, &self.peer));
        let Ok(static_static) = secret else {
            return Err(DropReason::HandshakeRefused);
        };
        let pair = Pair {
            own: &shared.keys,
            peer: &self.peer,
            static_static,
            preshared_key: or_zero(self.preshared_key.as_ref()),
        };
        work(&pair).map_err(|noise::Refused| DropReason::HandshakeRefused)
    }

    /// Sends an initiation of a series that began at `began`.
    fn attempt(&mut self, began: Instant, hurried: bool, now: Instant, out: &mut [u8]) -> usize {
        let Some(message) = out.first_chunk_mut::<INITIATION>() else {
            return 0;
        };
        let shared = Arc::clone(&self.shared);
        let index = Index::new(&shared, self.index);
        let (ephemeral, timestamp) = (Zeroizing::new(shared.random()), shared.timestamp(now));
        let value = index.value;
        let Ok(pending) =
            self.with_pair(|pair| noise::initiate(pair, value, *ephemeral, &timestamp, message))
        else {
            return 0;
        };
        self.authenticator.sign(message, now);
        let jitter = u64::from(u16::from_ne_bytes(shared.random())) % JITTER_MILLISECONDS;
        self.attempt = Some(Attempt {
            pending,
            index,
            began,
            again_at: now + REKEY_TIMEOUT + Duration::from_millis(jitter),
            hurried,
        });
        self.stale = false;
        self.unanswered = None;
        INITIATION
    }

    fn take_initiation(
        &mut self,
        message: &[u8; INITIATION],
        now: Instant,
        out: &mut [u8],
    ) -> Result<Opened, DropReason> {
        let out = out.first_chunk_mut::<RESPONSE>().ok_or(DropReason::Internal)?;
        let soon = |last| now.saturating_duration_since(last) < INITIATION_INTERVAL;
        if self.last_initiation.is_some_and(soon) {
            return Err(DropReason::HandshakeRefused);
        }
        let initiated = self.with_pair(|pair| noise::open_initiation(pair, message))?;
        if !self.shared.is_later(self.peer.as_bytes(), initiated.timestamp) {
            return Err(DropReason::HandshakeRefused);
        }
        self.last_initiation = Some(now);
        let index = Index::new(&self.shared, self.index);
        let (value, receiver) = (index.value, initiated.sender);
        let ephemeral = Zeroizing::new(self.shared.random());
        let keys = self.with_pair(|pair| noise::respond(pair, initiated, value, *ephemeral, out))?;
        self.authenticator.sign(out, now);
        let session = Session::new(&keys, index, receiver, false, now).ok_or(DropReason::Internal)?;
        self.shared.establish(&session.index, &session.receiving);
        if let Some(unheard) = self.next.replace(session) {
            self.set_aside(unheard);
        }
        self.unanswered = None;
        Ok(Opened::Reply(RESPONSE))
    }

    fn take_response(
        &mut self,
        message: &[u8; RESPONSE],
        now: Instant,
        out: &mut [u8],
    ) -> Result<Opened, DropReason> {
        let attempt = self.attempt.take().ok_or(DropReason::HandshakeRefused)?;
        let finished = match attempt.index.value == noise::index_at(message, 8) {
            true => self.with_pair(|pair| attempt.pending.finish(pair, message)),
            false => Err(DropReason::HandshakeRefused),
        };
        let keys = match finished {
            Ok(keys) => keys,
            Err(reason) => {
                // A forged answer must not end the attempt.
                self.attempt = Some(attempt);
                return Err(reason);
            }
        };
        let receiver = noise::index_at(message, 4);
        let session = Session::new(&keys, attempt.index, receiver, true, now).ok_or(DropReason::Internal)?;
        self.shared.establish(&session.index, &session.receiving);
        if let Some(old) = self.current.replace(session) {
            self.set_aside(old);
        }
        self.handshakes += 1;
        self.unanswered = None;
        self.stale = false;
        // The peer may send once it has heard something.
        match self.keepalive(now, out) {
            0 => Err(DropReason::Internal),
            len => Ok(Opened::Reply(len)),
        }
    }

    fn take_cookie(&mut self, message: &[u8; COOKIE_REPLY], now: Instant) -> Result<Opened, DropReason> {
        let index = noise::index_at(message, 4);
        let attempt = self
            .attempt
            .as_mut()
            .filter(|attempt| attempt.index.value == index);
        // The peer may also want one for our answer: it has to begin again, and then gets one with it.
        let answered = self.next.as_ref().is_some_and(|next| next.index.value == index);
        if (attempt.is_none() && !answered) || !self.authenticator.take(message, now) {
            return Err(DropReason::HandshakeRefused);
        }
        // Once; then at the usual pace.
        if let Some(attempt) = attempt.filter(|attempt| !attempt.hurried) {
            attempt.hurried = true;
            attempt.again_at = now;
        }
        Ok(Opened::Cookie)
    }

    /// Writes a keepalive; 0 where there is no session.
    fn keepalive(&mut self, now: Instant, out: &mut [u8]) -> usize {
        let Some(message) = out.get_mut(..OVERHEAD) else {
            return 0;
        };
        if self.seal(message, now, &mut []) {
            OVERHEAD
        } else {
            0
        }
    }

    fn set_aside(&mut self, session: Session) {
        self.old.push_back(session);
        if self.old.len() > OLD_SESSIONS {
            self.old.pop_front();
        }
    }

    /// Takes counters for messages of the current session.
    fn take_counters(&mut self, count: u64, data: bool, now: Instant) -> Option<Sealing> {
        let session = self.current.as_mut().filter(|session| session.usable(now))?;
        let first = session.counter;
        session.counter += count;
        self.stale |= session.is_stale(now);
        self.unacknowledged = None;
        if data && self.unanswered.is_none() {
            self.unanswered = Some(now);
        }
        Some(Sealing::new(Arc::clone(&session.sending), first))
    }

    fn forget_ended(&mut self, now: Instant) {
        let ended = |session: &Session| session.age(now) >= REJECT_AFTER_TIME;
        self.current.take_if(|session| ended(session));
        self.next.take_if(|session| ended(session));
        self.old.retain(|session| !ended(session));
    }

    /// Repeats an initiation that was not answered.
    fn repeat(&mut self, now: Instant, out: &mut [u8]) -> Tick {
        let Some(attempt) = &self.attempt else {
            return Tick::Idle;
        };
        if now < attempt.again_at {
            return Tick::Idle;
        }
        let (began, hurried) = (attempt.began, attempt.hurried);
        if now.saturating_duration_since(began) >= REKEY_ATTEMPT_TIME {
            self.attempt = None;
            return Tick::Expired;
        }
        match self.attempt(began, hurried, now, out) {
            0 => Tick::Idle,
            len => Tick::Send(len),
        }
    }
}

impl Transport for Machine {
    fn ready(&self, now: Instant) -> bool {
        self.current.as_ref().is_some_and(|session| session.usable(now))
    }

    fn handshakes(&self) -> u64 {
        self.handshakes
    }

    fn reserve(&mut self, count: u64, now: Instant) -> Option<Sealing> {
        self.take_counters(count, true, now)
    }

    fn seal(&mut self, message: &mut [u8], now: Instant, _out: &mut [u8]) -> bool {
        let (len, data) = (message.len(), message.len() > OVERHEAD);
        self.take_counters(1, data, now)
            .is_some_and(|sealing| sealing.seal(message, len))
    }

    fn initiate(&mut self, force: bool, now: Instant, out: &mut [u8]) -> usize {
        // An answer of ours that is under way is as good as an attempt.
        let answered = |session: &Session| session.age(now) < REKEY_TIMEOUT;
        let under_way =
            self.attempt.is_some() || (!self.ready(now) && self.next.as_ref().is_some_and(answered));
        match under_way && !force {
            true => 0,
            false => self.attempt(now, false, now, out),
        }
    }

    fn open(&mut self, message: &mut [u8], now: Instant, out: &mut [u8]) -> Result<Opened, DropReason> {
        let kind = message.first().copied().unwrap_or_default();
        if let (noise::TYPE_INITIATION, Some(message)) = (kind, message.first_chunk()) {
            self.take_initiation(message, now, out)
        } else if let (noise::TYPE_RESPONSE, Some(message)) = (kind, message.first_chunk()) {
            self.take_response(message, now, out)
        } else if let (TYPE_COOKIE, Some(message)) = (kind, message.first_chunk()) {
            self.take_cookie(message, now)
        } else {
            // Data is opened by its session, without us.
            Err(DropReason::Malformed)
        }
    }

    fn heard(&mut self, receiving: &Arc<Receiving>, data: bool, now: Instant) -> bool {
        let is = |session: &Session| Arc::ptr_eq(&session.receiving, receiving);
        if let Some(next) = self.next.take_if(|next| is(next)) {
            self.handshakes += 1;
            if let Some(old) = self.current.replace(next) {
                self.set_aside(old);
            }
        }
        let current = self.current.as_ref().filter(|current| is(current));
        match current {
            // Nothing is sent that would show its age in time for the other end.
            Some(current) => {
                let limit = REJECT_AFTER_TIME - KEEPALIVE_TIMEOUT - REKEY_TIMEOUT;
                self.stale |= current.initiator && current.age(now) >= limit;
            }
            None if !self.old.iter().any(is) => return false,
            None => {}
        }
        self.unanswered = None;
        if data && self.unacknowledged.is_none() {
            self.unacknowledged = Some(now);
        }
        true
    }

    fn tick(&mut self, now: Instant, out: &mut [u8]) -> Tick {
        self.forget_ended(now);
        if self.attempt.is_some() {
            match self.repeat(now, out) {
                Tick::Idle => {}
                tick => return tick,
            }
        } else {
            let since = |at: Option<Instant>| at.map(|at| now.saturating_duration_since(at));
            let silent = since(self.unanswered).is_some_and(|time| time >= KEEPALIVE_TIMEOUT + REKEY_TIMEOUT);
            if (self.stale || silent)
                && let len @ 1.. = self.attempt(now, false, now, out)
            {
                return Tick::Send(len);
            }
        }
        let owed = self
            .unacknowledged
            .is_some_and(|at| now.saturating_duration_since(at) >= KEEPALIVE_TIMEOUT);
        match owed {
            true => {
                self.unacknowledged = None;
                match self.keepalive(now, out) {
                    0 => Tick::Idle,
                    len => Tick::Send(len),
                }
            }
            false => Tick::Idle,
        }
    }

    fn write(&self, out: &mut Writer) -> bool {
        self.write_image(out);
        true
    }
}

#[path = "machine_image.rs"]
mod image;

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
