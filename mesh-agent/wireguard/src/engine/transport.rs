//! What the engine asks of a WireGuard protocol implementation: no sockets, no devices, no peers' addresses.
//!
//! Data is sealed and opened where it lies. Other messages are written to the beginning of `out`, and their length is
//! returned; `out` must hold the largest message, and [`LARGEST_HANDSHAKE`] bytes at least. What it held is lost.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use warren_model::{PreSharedKey, PublicKey};

use super::{
    drops::DropReason,
    image::{Damaged, Reader, Writer},
    session::{Receiving, Sealing},
};

/// Bytes in front of the packet in a data message: type, index, counter.
pub(super) const DATA_HEADER: usize = 16;

/// Bytes behind it.
pub(super) const TAG: usize = 16;

/// Bytes that sealing adds to a packet.
pub(super) const OVERHEAD: usize = DATA_HEADER + TAG;

/// Bytes of a handshake initiation, the largest message that is not data.
pub(super) const LARGEST_HANDSHAKE: usize = 148;

/// How messages lie in a buffer, the first at its beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    /// Bytes of each; the last may have fewer.
    pub(super) segment: usize,
    /// Bytes from the beginning of one to that of the next, at least `segment`.
    pub(super) pitch: usize,
}

impl Layout {
    /// One after the other.
    pub(super) fn packed(segment: usize) -> Self {
        Self {
            segment,
            pitch: segment,
        }
    }

    /// How many messages there are in a buffer that ends with the last.
    pub(super) fn count(self, len: usize) -> usize {
        len.div_ceil(self.pitch)
    }

    /// How many there are of full size, also where a gap follows.
    pub(super) fn whole(self, len: usize) -> usize {
        len.checked_sub(self.segment)
            .map_or(0, |rest| rest / self.pitch + 1)
    }

    /// Each message, and where it begins.
    pub(super) fn each(self, messages: &mut [u8]) -> impl Iterator<Item = (usize, &mut [u8])> {
        let chunks = messages.chunks_mut(self.pitch).enumerate();
        chunks.map(move |(number, chunk)| {
            let len = chunk.len().min(self.segment);
            (number * self.pitch, &mut chunk[..len])
        })
    }
}

/// A device's key: decides which messages are looked at, and makes the peers' transports.
pub(super) trait Identity: Send + Sync {
    /// Judges a datagram before any peer is involved. Never costs more than one Diffie-Hellman operation, and
    /// none for messages that do not know this device's public key.
    fn admit(&self, from: SocketAddr, datagram: &[u8], out: &mut [u8], now: Instant) -> Admission;

    /// A transport for a peer. `index` (24 bits) names it in messages: see [`Admission::Index`].
    fn transport(
        &self,
        peer: &PublicKey,
        preshared_key: Option<&PreSharedKey>,
        index: u32,
    ) -> Box<dyn Transport>;

    /// To be called every second or more often.
    fn tick(&self);

    /// Writes for a successor what belongs to no single peer.
    fn write(&self, _out: &mut Writer) {}

    /// Takes what a predecessor of the same implementation wrote.
    fn read(&self, _from: &mut Reader<'_>) -> Result<(), Damaged> {
        Ok(())
    }

    /// A transport as a predecessor of the same implementation had it: see [`Transport::write`].
    fn restore(
        &self,
        _peer: &PublicKey,
        _index: u32,
        _from: &mut Reader<'_>,
    ) -> Result<Box<dyn Transport>, Damaged> {
        Err(Damaged)
    }
}

/// What to do with a datagram.
pub(super) enum Admission {
    /// A handshake of whoever owns this key; not authenticated yet.
    Initiation(PublicKey),
    /// For the transport of this index; not authenticated yet.
    Index(u32),
    /// Data for this session of the transport of this index, to be opened without it; then [`Transport::heard`].
    Session(u32, Arc<Receiving>),
    /// Too many handshakes: send back this many bytes of `out`.
    Cookie(usize),
    /// Nothing.
    Refused(DropReason),
}

/// One peer's handshake and session state.
pub(super) trait Transport: Send {
    /// Whether a packet can be sealed now.
    fn ready(&self, now: Instant) -> bool;

    /// Handshakes completed so far, in either role.
    fn handshakes(&self) -> u64;

    /// What seals `count` packets without the transport; `None` where only [`Self::seal`] does.
    fn reserve(&mut self, _count: u64, _now: Instant) -> Option<Sealing> {
        None
    }

    /// Seals the packet in a message of [`OVERHEAD`] bytes more than it, or a keepalive. Whether there was a session.
    fn seal(&mut self, message: &mut [u8], now: Instant, out: &mut [u8]) -> bool;

    /// Begins a handshake. 0 when one is in progress already and `force` is not given.
    fn initiate(&mut self, force: bool, now: Instant, out: &mut [u8]) -> usize;

    /// Takes a message of the network, at most `out.len()` bytes. A packet is left where it was in the message.
    fn open(&mut self, message: &mut [u8], now: Instant, out: &mut [u8]) -> Result<Opened, DropReason>;

    /// Authentic messages of this session were opened; `data`: they had content. Whether the session is still one of the
    /// transport's.
    fn heard(&mut self, _session: &Arc<Receiving>, _data: bool, _now: Instant) -> bool {
        false
    }

    /// Runs the timers. To be called several times a second.
    fn tick(&mut self, now: Instant, out: &mut [u8]) -> Tick;

    /// Writes sessions, handshakes and timers for a successor. `false` where they cannot be taken out: nothing was
    /// written then. This transport must not be used any more once the successor uses its own.
    fn write(&self, _out: &mut Writer) -> bool {
        false
    }
}

/// What a message of the network was.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Opened {
    /// An authentic packet of this many bytes, [`DATA_HEADER`] bytes into the message. Padding may be part of it.
    Packet(usize),
    /// Authentic, without content.
    Keepalive,
    /// An authentic handshake message; send back this many bytes of `out`.
    Reply(usize),
    /// A cookie for the next handshake. Says nothing about who sent it.
    Cookie,
}

/// What timers ask for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Tick {
    /// Nothing.
    Idle,
    /// Send this many bytes.
    Send(usize),
    /// The peer did not answer for a long time: packets that wait for it are dropped.
    Expired,
}
