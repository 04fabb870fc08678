//! The protocol by `boringtun::noise::Tunn` (0.7.1).
//!
//! What it does not do is done around it: packets that wait for a session are queued by the peer, not by
//! `Tunn`. Its own queue is flushed by calls that, on the responder's side before the first packet has
//! confirmed the session, begin another handshake and reorder the queue (with both ends beginning at once, as
//! at every boot of a mesh, the handshakes then chase each other for seconds). It cannot change a pre-shared
//! key or keepalive interval: the first needs a new `Tunn`, the second is timed by the peer. It does not rekey
//! by message count: 2^60 messages do not fit into the 180 s that a session lives.
//!
//! Sessions are kept in a ring of 8 by their index; an index is the peer's 24 bits and 8 bits that count.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use boringtun::{
    noise::{
        Packet, Tunn, TunnResult, errors::WireGuardError, handshake::parse_handshake_anon,
        rate_limiter::RateLimiter,
    },
    x25519,
};
use warren_model::{PreSharedKey, PrivateKey, PublicKey};

use super::{
    drops::DropReason,
    transport::{Admission, DATA_HEADER, Identity, Opened, TAG, Tick, Transport},
};

/// Handshakes per second and device from which on a cookie is asked for.
const HANDSHAKES_PER_SECOND: u64 = 200;

/// Bytes of a cookie reply.
const COOKIE_REPLY: usize = 64;

const INITIATION: u8 = 1;
const RESPONSE: u8 = 2;
const COOKIE: u8 = 3;
const DATA: u8 = 4;

/// A device's key pair for `Tunn`.
pub(super) struct TunnIdentity {
    secret: x25519::StaticSecret,
    public: x25519::PublicKey,
    /// Counts the handshakes of all peers together.
    limiter: RateLimiter,
    /// Every `Tunn` checks messages again; what was admitted must not be counted twice.
    unlimited: Arc<RateLimiter>,
}

impl TunnIdentity {
    pub(super) fn new(key: &PrivateKey) -> Self {
        let secret = x25519::StaticSecret::from(*key.expose());
        let public = x25519::PublicKey::from(&secret);
        Self {
            limiter: RateLimiter::new(&public, HANDSHAKES_PER_SECOND),
            unlimited: Arc::new(RateLimiter::new(&public, u64::MAX)),
            secret,
            public,
        }
    }
}

impl Identity for TunnIdentity {
    fn admit(&self, from: SocketAddr, datagram: &[u8], out: &mut [u8], _now: Instant) -> Admission {
        let mut cookie = [0; COOKIE_REPLY];
        match self.limiter.verify_packet(Some(from.ip()), datagram, &mut cookie) {
            Ok(Packet::HandshakeInit(message)) => {
                let half = parse_handshake_anon(&self.secret, &self.public, &message);
                match half.map(|half| PublicKey::from_bytes(half.peer_static_public)) {
                    Ok(Ok(key)) => Admission::Initiation(key),
                    _ => Admission::Refused(DropReason::HandshakeRefused),
                }
            }
            Ok(Packet::HandshakeResponse(message)) => Admission::Index(message.receiver_idx >> 8),
            Ok(Packet::PacketCookieReply(message)) => Admission::Index(message.receiver_idx >> 8),
            Ok(Packet::PacketData(message)) => Admission::Index(message.receiver_idx >> 8),
            Err(TunnResult::WriteToNetwork(cookie)) => {
                out[..cookie.len()].copy_from_slice(cookie);
                Admission::Cookie(cookie.len())
            }
            Err(_) => Admission::Refused(DropReason::Malformed),
        }
    }

    fn transport(
        &self,
        peer: &PublicKey,
        preshared_key: Option<&PreSharedKey>,
        index: u32,
    ) -> Box<dyn Transport> {
        let peer = x25519::PublicKey::from(*peer.as_bytes());
        let preshared_key = preshared_key.map(|key| *key.expose());
        let limiter = Some(Arc::clone(&self.unlimited));
        Box::new(TunnTransport {
            tunn: Tunn::new(self.secret.clone(), peer, preshared_key, None, index, limiter),
            ready: false,
            unconfirmed: None,
            handshakes: 0,
        })
    }

    fn tick(&self) {
        self.limiter.reset_count();
    }
}

struct TunnTransport {
    tunn: Tunn,
    /// Whether `tunn` has a current session; it has no cheap way to ask.
    ready: bool,
    /// The index of a session that we answered for, until the first data shows that the answer arrived.
    unconfirmed: Option<u32>,
    handshakes: u64,
}

impl TunnTransport {
    fn refresh(&mut self) {
        self.ready = self.tunn.time_since_last_handshake().is_some();
    }

    /// Data was authentic: a session of ours may have become the current one.
    fn confirm(&mut self, datagram: &[u8]) {
        if self.unconfirmed.is_some() && self.unconfirmed == index_at(datagram, 4) {
            self.unconfirmed = None;
            self.handshakes += 1;
        }
        if !self.ready {
            self.refresh();
        }
    }
}

impl Transport for TunnTransport {
    fn ready(&self, _now: Instant) -> bool {
        self.ready
    }

    fn handshakes(&self) -> u64 {
        self.handshakes
    }

    /// `Tunn` copies, and wants room for a handshake in any case.
    fn seal(&mut self, message: &mut [u8], _now: Instant, out: &mut [u8]) -> bool {
        if !self.ready {
            return false;
        }
        let content = &message[DATA_HEADER..message.len() - TAG];
        match self.tunn.encapsulate(content, out) {
            TunnResult::WriteToNetwork(sealed) if sealed.len() == message.len() => {
                message.copy_from_slice(sealed);
                true
            }
            _ => false,
        }
    }

    fn initiate(&mut self, force: bool, _now: Instant, out: &mut [u8]) -> usize {
        match self.tunn.format_handshake_initiation(out, force) {
            TunnResult::WriteToNetwork(message) => message.len(),
            _ => 0,
        }
    }

    fn open(&mut self, datagram: &mut [u8], _now: Instant, out: &mut [u8]) -> Result<Opened, DropReason> {
        let kind = datagram.first().copied().unwrap_or(0);
        // An empty datagram would mean "flush the queue".
        if !(INITIATION..=DATA).contains(&kind) {
            return Err(DropReason::Malformed);
        }
        let opened = match self
            .tunn
            .decapsulate(Some(Ipv4Addr::UNSPECIFIED.into()), datagram, out)
        {
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                datagram[DATA_HEADER..DATA_HEADER + packet.len()].copy_from_slice(packet);
                Opened::Packet(packet.len())
            }
            TunnResult::Done if kind == COOKIE => Opened::Cookie,
            TunnResult::Done => Opened::Keepalive,
            TunnResult::WriteToNetwork(message) => {
                if kind == INITIATION {
                    self.unconfirmed = index_at(message, 4);
                }
                Opened::Reply(message.len())
            }
            TunnResult::Err(error) => return Err(reason(&error, kind)),
        };
        match kind {
            DATA => self.confirm(datagram),
            RESPONSE => {
                self.handshakes += 1;
                self.refresh();
            }
            _ => self.refresh(),
        }
        Ok(opened)
    }

    fn tick(&mut self, _now: Instant, out: &mut [u8]) -> Tick {
        let tick = match self.tunn.update_timers(out) {
            TunnResult::WriteToNetwork(message) => Tick::Send(message.len()),
            TunnResult::Err(WireGuardError::ConnectionExpired) => Tick::Expired,
            _ => Tick::Idle,
        };
        self.refresh();
        tick
    }
}

fn index_at(message: &[u8], offset: usize) -> Option<u32> {
    let bytes = message.get(offset..offset + 4)?.try_into().ok()?;
    Some(u32::from_le_bytes(bytes))
}

fn reason(error: &WireGuardError, kind: u8) -> DropReason {
    match error {
        WireGuardError::InvalidAeadTag if kind == DATA => DropReason::NotAuthentic,
        WireGuardError::InvalidCounter | WireGuardError::DuplicateCounter => DropReason::Replayed,
        WireGuardError::NoCurrentSession | WireGuardError::WrongIndex if kind == DATA => {
            DropReason::NoSession
        }
        WireGuardError::InvalidPacket if kind == DATA => DropReason::InnerMalformed,
        WireGuardError::InvalidMac
        | WireGuardError::InvalidPacket
        | WireGuardError::IncorrectPacketLength
        | WireGuardError::WrongPacketType => DropReason::Malformed,
        WireGuardError::UnderLoad => DropReason::UnderLoad,
        WireGuardError::DestinationBufferTooSmall | WireGuardError::LockFailed => DropReason::Internal,
        _ => DropReason::HandshakeRefused,
    }
}
