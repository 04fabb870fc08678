//! A device's identity for this project's own protocol implementation: its keys, who may have which session index, and
//! what keeps handshakes from costing too much. The state of a peer is in [`super::machine`].

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use warren_model::{PreSharedKey, PrivateKey, PublicKey};

use super::{
    cookie::{COOKIE_REPLY, Gate, TYPE_COOKIE, Verdict},
    drops::DropReason,
    image::{Damaged, Reader, Writer},
    machine::Machine,
    noise::{self, Static, TIMESTAMP},
    session::{Receiving, TYPE_DATA},
    stamp_clock,
    transport::{Admission, Identity, OVERHEAD, Transport},
};

/// Random bytes; tests have their own.
pub(super) type Random = Box<dyn Fn(&mut [u8]) + Send + Sync>;

/// TAI64's label of the Unix epoch, with the leap seconds of today (as boringtun has them, so that a change of engines
/// does not go back in time).
const TAI64_EPOCH: u64 = (1 << 62) + 37;

/// Nanoseconds are rounded down to so many, so that a timestamp says little about the clock.
const TIMESTAMP_GRAIN: u32 = 1 << 24;

/// A device's identity.
pub(super) struct OwnIdentity(Arc<Shared>);

/// What the machines of all peers of a device share.
pub(super) struct Shared {
    pub(super) keys: Static,
    random: Random,
    /// The same moment on both clocks.
    epoch: (Instant, SystemTime),
    gate: Mutex<Gate>,
    indices: RwLock<HashMap<u32, Entry>>,
    stamps: Mutex<Stamps>,
}

/// What a session index stands for.
enum Entry {
    /// A handshake of this peer that is going on.
    Handshake(u32),
    /// A session of this peer.
    Session(u32, Arc<Receiving>),
}

/// Timestamps of initiations: each is later than the one before.
#[derive(Default)]
struct Stamps {
    sent: [u8; TIMESTAMP],
    /// By peer. Kept when a peer is set up anew.
    received: HashMap<[u8; 32], [u8; TIMESTAMP]>,
}

/// A session index that is ours until this is dropped.
pub(super) struct Index {
    shared: Arc<Shared>,
    pub(super) value: u32,
    peer: u32,
}

impl OwnIdentity {
    pub(super) fn new(private: &PrivateKey) -> Self {
        let random: Random = Box::new(|out| {
            // The system's generator fails only where there is none, and without one nothing may go on. The cipher library's
            // gathers noise for its own first, a tenth of a second of CPU time: too long before the first handshake.
            let filled = getrandom::fill(out);
            assert!(filled.is_ok(), "no random numbers");
        });
        Self::with(private, stamp_clock::epoch(), random)
    }

    /// With a clock that began at `epoch`, and these random numbers.
    pub(super) fn with(private: &PrivateKey, epoch: (Instant, SystemTime), random: Random) -> Self {
        let keys = Static::new(*private.expose());
        Self(Arc::new(Shared {
            gate: Mutex::new(Gate::new(keys.public.as_bytes())),
            keys,
            random,
            epoch,
            indices: RwLock::default(),
            stamps: Mutex::default(),
        }))
    }

    #[cfg(test)]
    pub(super) fn machine(
        &self,
        peer: &PublicKey,
        preshared_key: Option<&PreSharedKey>,
        index: u32,
    ) -> Machine {
        Machine::new(Arc::clone(&self.0), peer, preshared_key, index)
    }

    #[cfg(test)]
    pub(super) fn machine_from(
        &self,
        peer: &PublicKey,
        index: u32,
        from: &mut Reader<'_>,
    ) -> Result<Machine, Damaged> {
        Machine::read(&self.0, peer, index, from)
    }

    fn judge(&self, from: SocketAddr, message: &[u8], out: &mut [u8], now: Instant) -> Result<(), Admission> {
        let shared = &*self.0;
        let mut gate = shared.gate();
        match gate.judge(from, message, now, &shared.random) {
            Verdict::Accepted => Ok(()),
            Verdict::Forged => Err(Admission::Refused(DropReason::Malformed)),
            Verdict::TooMany => Err(Admission::Refused(DropReason::UnderLoad)),
            Verdict::AskForCookie => {
                let answered = out
                    .first_chunk_mut::<COOKIE_REPLY>()
                    .is_some_and(|out| gate.reply(from, message, now, &shared.random, out));
                Err(match answered {
                    true => Admission::Cookie(COOKIE_REPLY),
                    false => Admission::Refused(DropReason::Internal),
                })
            }
        }
    }

    fn initiation(&self, message: &[u8; noise::INITIATION]) -> Admission {
        let claimed = noise::claimed_peer(&self.0.keys, message);
        match claimed.map(PublicKey::from_bytes) {
            Ok(Ok(key)) => Admission::Initiation(key),
            _ => Admission::Refused(DropReason::HandshakeRefused),
        }
    }

    fn handshake(&self, index: u32) -> Admission {
        let indices = self.0.indices.read().unwrap_or_else(PoisonError::into_inner);
        match indices.get(&index) {
            Some(Entry::Handshake(peer)) => Admission::Index(*peer),
            Some(Entry::Session(..)) => Admission::Refused(DropReason::HandshakeRefused),
            None => Admission::Refused(DropReason::UnknownIndex),
        }
    }

    /// A cookie answers an initiation, or our answer to one.
    fn cookie(&self, index: u32) -> Admission {
        let indices = self.0.indices.read().unwrap_or_else(PoisonError::into_inner);
        match indices.get(&index) {
            Some(Entry::Handshake(peer) | Entry::Session(peer, _)) => Admission::Index(*peer),
            None => Admission::Refused(DropReason::UnknownIndex),
        }
    }

    fn data(&self, index: u32) -> Admission {
        let indices = self.0.indices.read().unwrap_or_else(PoisonError::into_inner);
        match indices.get(&index) {
            Some(Entry::Session(peer, receiving)) => Admission::Session(*peer, Arc::clone(receiving)),
            Some(Entry::Handshake(_)) => Admission::Refused(DropReason::NoSession),
            None => Admission::Refused(DropReason::UnknownIndex),
        }
    }
}

impl Identity for OwnIdentity {
    fn admit(&self, from: SocketAddr, datagram: &[u8], out: &mut [u8], now: Instant) -> Admission {
        let &[kind, 0, 0, 0, ..] = datagram else {
            return Admission::Refused(DropReason::Malformed);
        };
        let malformed = Admission::Refused(DropReason::Malformed);
        match (kind, datagram.len()) {
            (TYPE_DATA, OVERHEAD..) => self.data(noise::index_at(datagram, 4)),
            (noise::TYPE_INITIATION, noise::INITIATION) => {
                match (self.judge(from, datagram, out, now), datagram.first_chunk()) {
                    (Ok(()), Some(message)) => self.initiation(message),
                    (Err(admission), _) => admission,
                    (Ok(()), None) => malformed,
                }
            }
            (noise::TYPE_RESPONSE, noise::RESPONSE) => {
                // First: an answer to nothing must not count.
                match self.handshake(noise::index_at(datagram, 8)) {
                    Admission::Index(peer) => match self.judge(from, datagram, out, now) {
                        Ok(()) => Admission::Index(peer),
                        Err(admission) => admission,
                    },
                    refused => refused,
                }
            }
            (TYPE_COOKIE, COOKIE_REPLY) => self.cookie(noise::index_at(datagram, 4)),
            _ => malformed,
        }
    }

    fn transport(
        &self,
        peer: &PublicKey,
        preshared_key: Option<&PreSharedKey>,
        index: u32,
    ) -> Box<dyn Transport> {
        Box::new(Machine::new(Arc::clone(&self.0), peer, preshared_key, index))
    }

    fn tick(&self) {}

    fn write(&self, out: &mut Writer) {
        let stamps = self.0.stamps();
        out.raw(&stamps.sent);
        out.count(stamps.received.len());
        for (peer, stamp) in &stamps.received {
            out.raw(peer);
            out.raw(stamp);
        }
    }

    fn read(&self, from: &mut Reader<'_>) -> Result<(), Damaged> {
        let mut stamps = self.0.stamps();
        stamps.sent = from.array()?;
        for _ in 0..from.count()? {
            stamps.received.insert(from.array()?, from.array()?);
        }
        Ok(())
    }

    fn restore(
        &self,
        peer: &PublicKey,
        index: u32,
        from: &mut Reader<'_>,
    ) -> Result<Box<dyn Transport>, Damaged> {
        Ok(Box::new(Machine::read(&self.0, peer, index, from)?))
    }
}

impl Shared {
    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stamps(&self) -> MutexGuard<'_, Stamps> {
        self.stamps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn random<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        (self.random)(&mut bytes);
        bytes
    }

    /// The timestamp of an initiation that is sent now.
    pub(super) fn timestamp(&self, now: Instant) -> [u8; TIMESTAMP] {
        let since = self.epoch.1.duration_since(UNIX_EPOCH).unwrap_or_default();
        let time = since + now.saturating_duration_since(self.epoch.0);
        let grain = time.subsec_nanos() / TIMESTAMP_GRAIN * TIMESTAMP_GRAIN;
        let mut stamps = self.stamps();
        let mut stamp = tai64n(Duration::new(time.as_secs(), grain));
        if stamp <= stamps.sent {
            stamp = successor(stamps.sent);
        }
        stamps.sent = stamp;
        stamp
    }

    /// Notes the timestamp of an authentic initiation. Whether it is later than all before.
    pub(super) fn is_later(&self, peer: &[u8; 32], stamp: [u8; TIMESTAMP]) -> bool {
        let mut stamps = self.stamps();
        let last = stamps.received.entry(*peer).or_default();
        let later = stamp > *last;
        if later {
            *last = stamp;
        }
        later
    }

    /// The entry of an index becomes a session.
    pub(super) fn establish(&self, index: &Index, receiving: &Arc<Receiving>) {
        let mut indices = self.indices.write().unwrap_or_else(PoisonError::into_inner);
        indices.insert(index.value, Entry::Session(index.peer, Arc::clone(receiving)));
    }
}

/// Seconds and nanoseconds, both with the most significant byte first.
fn tai64n(time: Duration) -> [u8; TIMESTAMP] {
    let mut stamp = [0; TIMESTAMP];
    stamp[..8].copy_from_slice(&(TAI64_EPOCH + time.as_secs()).to_be_bytes());
    stamp[8..].copy_from_slice(&time.subsec_nanos().to_be_bytes());
    stamp
}

/// One nanosecond later.
fn successor(stamp: [u8; TIMESTAMP]) -> [u8; TIMESTAMP] {
    let mut number = [0; 16];
    number[4..].copy_from_slice(&stamp);
    let next = (u128::from_be_bytes(number) + 1).to_be_bytes();
    let mut stamp = [0; TIMESTAMP];
    stamp.copy_from_slice(&next[4..]);
    stamp
}

impl Index {
    /// An index that a predecessor had; refused where two have it.
    pub(super) fn restore(shared: &Arc<Shared>, value: u32, peer: u32) -> Result<Self, Damaged> {
        let mut indices = shared.indices.write().unwrap_or_else(PoisonError::into_inner);
        match indices.entry(value) {
            std::collections::hash_map::Entry::Occupied(_) => Err(Damaged),
            std::collections::hash_map::Entry::Vacant(vacant) => {
                vacant.insert(Entry::Handshake(peer));
                drop(indices);
                Ok(Self {
                    shared: Arc::clone(shared),
                    value,
                    peer,
                })
            }
        }
    }

    /// An index that nobody else has, and nobody can guess.
    pub(super) fn new(shared: &Arc<Shared>, peer: u32) -> Self {
        let mut indices = shared.indices.write().unwrap_or_else(PoisonError::into_inner);
        loop {
            let value = u32::from_ne_bytes(shared.random());
            if let std::collections::hash_map::Entry::Vacant(vacant) = indices.entry(value) {
                vacant.insert(Entry::Handshake(peer));
                drop(indices);
                return Self {
                    shared: Arc::clone(shared),
                    value,
                    peer,
                };
            }
        }
    }
}

impl Drop for Index {
    fn drop(&mut self) {
        let mut indices = self
            .shared
            .indices
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        indices.remove(&self.value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_only_go_forward() {
        let now = Instant::now();
        let random: Random = Box::new(|out| out.fill(1));
        let identity = OwnIdentity::with(&PrivateKey::from_bytes([1; 32]), (now, UNIX_EPOCH), random);
        let shared = &identity.0;
        let first = shared.timestamp(now + Duration::from_secs(1));
        assert_eq!(first[..8], (TAI64_EPOCH + 1).to_be_bytes());
        assert_eq!(first[8..], [0; 4]);
        let mut last = first;
        for milliseconds in [1001, 1001, 1000, 900, 1100] {
            let next = shared.timestamp(now + Duration::from_millis(milliseconds));
            assert!(next > last, "{milliseconds}");
            last = next;
        }
        assert!(shared.is_later(&[1; 32], first));
        assert!(!shared.is_later(&[1; 32], first));
        assert!(shared.is_later(&[2; 32], first));
        assert!(shared.is_later(&[1; 32], last));
    }

    /// An initiation with sound authenticators, but of nobody we know.
    fn initiation(sender: &mut super::super::cookie::Authenticator, n: u32, now: Instant) -> [u8; 148] {
        let mut message = [0; noise::INITIATION];
        message[0] = noise::TYPE_INITIATION;
        message[4..8].copy_from_slice(&n.to_le_bytes());
        message[8..40].fill(9);
        sender.sign(&mut message, now);
        message
    }

    /// Handshakes of many sources leave nothing behind, also when the sources are real and bring cookies.
    #[test]
    fn a_flood_of_handshakes_takes_no_memory() {
        let now = Instant::now();
        let random: Random = Box::new(|out| out.fill(1));
        let private = PrivateKey::from_bytes([1; 32]);
        let identity = OwnIdentity::with(&private, (now, UNIX_EPOCH), random);
        let mut sender = super::super::cookie::Authenticator::new(identity.0.keys.public.as_bytes());
        let (mut cookies, mut with_cookie, mut out) = (0, 0, [0; 256]);
        let sources = 2 * super::super::cookie::SOURCES as u32;
        for n in 0..sources {
            let from: SocketAddr = (std::net::Ipv4Addr::from(0xc612_0000 + n), 9).into();
            let message = initiation(&mut sender, n, now);
            match identity.admit(from, &message, &mut out, now) {
                Admission::Cookie(len) => {
                    cookies += 1;
                    assert!(sender.take(out[..len].try_into().unwrap(), now));
                    // This one is looked at: it costs one Diffie-Hellman operation.
                    let again = initiation(&mut sender, n, now);
                    let admitted = identity.admit(from, &again, &mut out, now);
                    with_cookie += u32::from(matches!(
                        admitted,
                        Admission::Refused(DropReason::HandshakeRefused)
                    ));
                    sender = super::super::cookie::Authenticator::new(identity.0.keys.public.as_bytes());
                }
                Admission::Refused(DropReason::HandshakeRefused) => {}
                _ => panic!("an initiation of nobody was admitted"),
            }
        }
        assert_eq!(cookies, sources - 200);
        assert_eq!(with_cookie as usize, super::super::cookie::SOURCES);
        assert_eq!(identity.0.gate().sources(), super::super::cookie::SOURCES);
        assert!(identity.0.indices.read().unwrap().is_empty());
        assert!(identity.0.stamps().received.is_empty());
    }
}
