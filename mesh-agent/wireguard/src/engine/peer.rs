//! One peer: its transport, where it is, and the packets that wait for a handshake.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use warren_model::{PreSharedKey, PublicKey};

use super::{
    drops::{Counters, DropReason},
    session::Receiving,
    transport::{DATA_HEADER, Identity, LARGEST_HANDSHAKE, Layout, OVERHEAD, Opened, TAG, Tick, Transport},
    udp::Sockets,
};

/// Packets that may wait for a handshake.
const QUEUE: usize = 256;

/// Bytes of the largest packet that a device or the network can hand over, with room for what is added to it.
pub(super) const BUFFER: usize = 65_535 + 16 + OVERHEAD;

const _: () = assert!(BUFFER > LARGEST_HANDSHAKE);

/// A buffer for messages that are being made.
pub(super) fn buffer() -> Box<[u8]> {
    vec![0; BUFFER].into_boxed_slice()
}

#[derive(Debug)]
pub(super) struct Peer {
    pub(super) key: PublicKey,
    /// 24 random bits, unique on the device: names the peer in messages to us.
    pub(super) index: u32,
    received: AtomicU64,
    sent: AtomicU64,
    inner: Mutex<Inner>,
}

struct Inner {
    /// `None` while the device has no key, and for ever once the peer was removed.
    transport: Option<Box<dyn Transport>>,
    /// The transport with the pre-shared key before the last change: its sessions live on until they end or the new
    /// key's first is there, as with other implementations.
    previous: Option<Box<dyn Transport>>,
    preshared_key: Option<PreSharedKey>,
    endpoint: Option<SocketAddr>,
    keepalive_seconds: u16,
    /// Messages that are not sealed yet.
    queue: VecDeque<Vec<u8>>,
    /// When the peer was last sent to or authentically heard from.
    last_traffic: Instant,
    last_handshake: Option<SystemTime>,
    handshakes: u64,
}

impl Inner {
    /// What can seal now.
    fn ready(&mut self, now: Instant) -> Option<&mut Box<dyn Transport>> {
        let ready = |transport: &&mut Box<dyn Transport>| transport.ready(now);
        self.transport
            .as_mut()
            .filter(ready)
            .or_else(|| self.previous.as_mut().filter(ready))
    }
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner")
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

/// Where a device's messages go, and what counts them.
#[derive(Clone, Copy)]
pub(super) struct Path<'a> {
    pub(super) sockets: Option<&'a Sockets>,
    pub(super) counters: &'a Counters,
}

/// A peer's settings and figures.
pub(super) struct PeerView {
    pub(super) preshared_key: Option<PreSharedKey>,
    pub(super) endpoint: Option<SocketAddr>,
    pub(super) keepalive_seconds: u16,
    pub(super) last_handshake: Option<SystemTime>,
    pub(super) received: u64,
    pub(super) sent: u64,
}

/// What a configuration request changes of a peer.
#[derive(Default)]
pub(super) struct PeerChange {
    pub(super) preshared_key: Option<Option<PreSharedKey>>,
    pub(super) endpoint: Option<SocketAddr>,
    pub(super) keepalive_seconds: Option<u16>,
}

#[path = "peer_image.rs"]
mod image;

impl Peer {
    pub(super) fn new(key: PublicKey, index: u32, identity: Option<&dyn Identity>) -> Self {
        let inner = Inner {
            transport: identity.map(|identity| identity.transport(&key, None, index)),
            previous: None,
            preshared_key: None,
            endpoint: None,
            keepalive_seconds: 0,
            queue: VecDeque::new(),
            last_traffic: Instant::now(),
            last_handshake: None,
            handshakes: 0,
        };
        Self {
            key,
            index,
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            inner: Mutex::new(inner),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn view(&self) -> PeerView {
        let inner = self.lock();
        PeerView {
            preshared_key: inner.preshared_key.clone(),
            endpoint: inner.endpoint,
            keepalive_seconds: inner.keepalive_seconds,
            last_handshake: inner.last_handshake,
            received: self.received.load(Ordering::Relaxed),
            sent: self.sent.load(Ordering::Relaxed),
        }
    }

    /// Where the peer is.
    pub(super) fn endpoint(&self) -> Option<SocketAddr> {
        self.lock().endpoint
    }

    /// Changes settings. Whether the peer's handshake should begin anew, since it may now be answered.
    pub(super) fn change(&self, change: PeerChange, identity: Option<&dyn Identity>) -> bool {
        let inner = &mut *self.lock();
        let mut anew = false;
        if let Some(preshared_key) = change.preshared_key
            && preshared_key != inner.preshared_key
        {
            inner.preshared_key = preshared_key;
            let now = Instant::now();
            let sessions = inner.transport.take().filter(|transport| transport.ready(now));
            self.renew(inner, identity);
            inner.previous = sessions.or(inner.previous.take());
            anew = true;
        }
        if let Some(endpoint) = change.endpoint {
            anew |= inner.endpoint != Some(endpoint);
            inner.endpoint = Some(endpoint);
        }
        if let Some(seconds) = change.keepalive_seconds {
            inner.keepalive_seconds = seconds;
        }
        anew
    }

    /// Forgets all sessions; new ones are of this identity.
    pub(super) fn set_identity(&self, identity: Option<&dyn Identity>) {
        let inner = &mut *self.lock();
        inner.previous = None;
        self.renew(inner, identity);
    }

    fn renew(&self, inner: &mut Inner, identity: Option<&dyn Identity>) {
        inner.transport =
            identity.map(|identity| identity.transport(&self.key, inner.preshared_key.as_ref(), self.index));
        inner.handshakes = 0;
    }

    /// Ends the peer: whoever still holds it sends and receives nothing with it.
    pub(super) fn retire(&self) {
        let mut inner = self.lock();
        inner.transport = None;
        inner.previous = None;
        inner.preshared_key = None;
        inner.queue.clear();
    }

    /// Begins a handshake where one is wanted: packets wait, or there is a keepalive interval. `anew` does so even
    /// when one is in progress.
    pub(super) fn wake(&self, anew: bool, path: Path<'_>, out: &mut [u8]) {
        let (inner, now) = (&mut *self.lock(), Instant::now());
        let wanted = inner.keepalive_seconds > 0 || !inner.queue.is_empty();
        if wanted
            && inner
                .transport
                .as_ref()
                .is_some_and(|transport| !transport.ready(now))
        {
            self.initiate(inner, anew, now, path, out);
        }
    }

    /// Begins a handshake where there is no session and none is on its way.
    pub(super) fn revive(&self, now: Instant, path: Path<'_>, out: &mut [u8]) {
        let inner = &mut *self.lock();
        if inner.ready(now).is_none() {
            self.initiate(inner, false, now, path, out);
        }
    }

    /// Begins a handshake whether or not there is a session.
    pub(super) fn rekey(&self, path: Path<'_>, out: &mut [u8]) {
        self.initiate(&mut self.lock(), false, Instant::now(), path, out);
    }

    fn initiate(&self, inner: &mut Inner, force: bool, now: Instant, path: Path<'_>, out: &mut [u8]) {
        if inner.endpoint.is_some()
            && let Some(transport) = &mut inner.transport
        {
            let len = transport.initiate(force, now, out);
            self.transmit(inner, &out[..len], now, path);
        }
    }

    /// Seals messages of `segment` bytes (the last may be shorter) that lie one after the other, and says where to send
    /// them; or keeps the packets until there is a session. Packets that wait for one go out first.
    pub(super) fn seal(
        &self,
        messages: &mut [u8],
        segment: usize,
        now: Instant,
        path: Path<'_>,
        out: &mut [u8],
    ) -> Option<SocketAddr> {
        let count = messages.len().div_ceil(segment) as u64;
        let mut inner = self.lock();
        if inner.transport.is_none() {
            path.counters.drop_many(DropReason::NoKey, count);
            return None;
        }
        if inner.endpoint.is_none() {
            path.counters.drop_many(DropReason::NoEndpoint, count);
            return None;
        }
        self.flush(&mut inner, now, path, out);
        if let Some(transport) = inner.ready(now) {
            let sealing = transport.reserve(count, now);
            let in_place = sealing.is_none()
                && messages
                    .chunks_mut(segment)
                    .all(|message| transport.seal(message, now, out));
            inner.last_traffic = now;
            let endpoint = inner.endpoint;
            // The peer is free for other threads while its packets are sealed; the counters are ours.
            drop(inner);
            let sealed = in_place || sealing.is_some_and(|sealing| sealing.seal(messages, segment));
            if !sealed {
                path.counters.drop_many(DropReason::Internal, count);
            }
            return endpoint.filter(|_| sealed);
        }
        for message in messages.chunks(segment) {
            if inner.queue.len() >= QUEUE {
                inner.queue.pop_front();
                path.counters.drop(DropReason::QueueFull);
            }
            inner.queue.push_back(message.to_vec());
        }
        self.initiate(&mut inner, false, now, path, out);
        None
    }

    /// Counts bytes that went out.
    pub(super) fn count_sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Takes messages of the network. Adds to `opened` where in `messages` the packets are.
    #[expect(
        clippy::too_many_arguments,
        reason = "a thread's buffers, and where the messages are from"
    )]
    pub(super) fn receive(
        &self,
        messages: &mut [u8],
        layout: Layout,
        from: SocketAddr,
        now: Instant,
        path: Path<'_>,
        out: &mut [u8],
        opened: &mut Vec<Range<usize>>,
    ) {
        let inner = &mut *self.lock();
        let mut authentic = 0;
        for (start, message) in layout.each(messages) {
            let (at, len) = (start + DATA_HEADER, message.len());
            match Self::open(inner, message, now, out) {
                Err(reason) => path.counters.drop(reason),
                Ok(Opened::Cookie) => {}
                Ok(result) => {
                    authentic += len;
                    // Authentic: this is where the peer is now.
                    inner.endpoint = Some(from);
                    match result {
                        Opened::Packet(len) => opened.push(at..at + len),
                        Opened::Reply(len) => drop(self.transmit(inner, &out[..len], now, path)),
                        Opened::Keepalive | Opened::Cookie => {}
                    }
                }
            }
        }
        if authentic > 0 {
            self.note_authentic(inner, authentic, now, path, out);
        }
    }

    /// Messages of `bytes` bytes of a session were opened without us. Whether the session is still one of the peer's;
    /// otherwise what was in them must be forgotten.
    #[expect(
        clippy::too_many_arguments,
        reason = "a thread's buffer, and where the messages are from"
    )]
    pub(super) fn heard(
        &self,
        session: &Arc<Receiving>,
        bytes: usize,
        data: bool,
        from: SocketAddr,
        now: Instant,
        path: Path<'_>,
        out: &mut [u8],
    ) -> bool {
        let inner = &mut *self.lock();
        let mut transports = inner.transport.iter_mut().chain(&mut inner.previous);
        if !transports.any(|transport| transport.heard(session, data, now)) {
            return false;
        }
        inner.endpoint = Some(from);
        self.note_authentic(inner, bytes, now, path, out);
        true
    }

    fn note_authentic(&self, inner: &mut Inner, bytes: usize, now: Instant, path: Path<'_>, out: &mut [u8]) {
        inner.last_traffic = now;
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
        self.note_handshakes(inner, path);
        self.flush(inner, now, path, out);
    }

    fn open(
        inner: &mut Inner,
        message: &mut [u8],
        now: Instant,
        out: &mut [u8],
    ) -> Result<Opened, DropReason> {
        let transport = inner.transport.as_mut().ok_or(DropReason::NoKey)?;
        let opened = transport.open(message, now, out);
        match (opened, &mut inner.previous) {
            (Err(DropReason::NoSession | DropReason::NotAuthentic), Some(previous)) => {
                previous.open(message, now, out)
            }
            (opened, _) => opened,
        }
    }

    fn note_handshakes(&self, inner: &mut Inner, path: Path<'_>) {
        if let Some(transport) = &inner.transport
            && transport.handshakes() != inner.handshakes
        {
            inner.handshakes = transport.handshakes();
            inner.last_handshake = Some(SystemTime::now());
            path.counters.handshakes.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Sends what waited, in order.
    fn flush(&self, inner: &mut Inner, now: Instant, path: Path<'_>, out: &mut [u8]) {
        while !inner.queue.is_empty() {
            if inner.ready(now).is_none() {
                return;
            }
            let Some(mut message) = inner.queue.pop_front() else {
                return;
            };
            let Some(transport) = inner.ready(now) else { return };
            if transport.seal(&mut message, now, out) && self.transmit(inner, &message, now, path) {
                path.counters.sent(1);
            }
        }
    }

    /// Runs the timers.
    pub(super) fn tick(&self, now: Instant, path: Path<'_>, out: &mut [u8]) {
        let inner = &mut *self.lock();
        let Some(transport) = &mut inner.transport else {
            return;
        };
        match transport.tick(now, out) {
            Tick::Idle => {}
            Tick::Send(len) => {
                if inner.endpoint.is_some() {
                    self.transmit(inner, &out[..len], now, path);
                }
            }
            Tick::Expired => {
                path.counters
                    .drop_many(DropReason::HandshakeTimeout, inner.queue.len() as u64);
                inner.queue.clear();
            }
        }
        let interval = Duration::from_secs(inner.keepalive_seconds.into());
        if !interval.is_zero() && now.saturating_duration_since(inner.last_traffic) >= interval {
            inner.last_traffic = now;
            self.keep_alive(inner, now, path, out);
        }
    }

    fn keep_alive(&self, inner: &mut Inner, now: Instant, path: Path<'_>, out: &mut [u8]) {
        match inner.ready(now) {
            Some(transport) => {
                let mut message = [0; DATA_HEADER + TAG];
                if transport.seal(&mut message, now, out) {
                    self.transmit(inner, &message, now, path);
                }
            }
            None => self.initiate(inner, false, now, path, out),
        }
    }

    /// Sends a message to where the peer is. Whether it left.
    fn transmit(&self, inner: &mut Inner, message: &[u8], now: Instant, path: Path<'_>) -> bool {
        if message.is_empty() {
            return false;
        }
        let (Some(endpoint), Some(sockets)) = (inner.endpoint, path.sockets) else {
            path.counters.drop(DropReason::NoEndpoint);
            return false;
        };
        match sockets.send(message, endpoint) {
            Ok(()) => {
                inner.last_traffic = now;
                self.sent.fetch_add(message.len() as u64, Ordering::Relaxed);
                true
            }
            Err(_) => {
                path.counters.drop(DropReason::SendFailed);
                false
            }
        }
    }
}
