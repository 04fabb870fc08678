//! Why packets were dropped, and how many (P9).

use std::sync::atomic::{AtomicU64, Ordering};

use super::image::{Damaged, Reader, Writer};

macro_rules! reasons {
    ($($(#[$doc:meta])+ $variant:ident => $name:literal,)+) => {
        /// Why the engine dropped a packet or refused a message. The name is what statistics print.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum DropReason {
            $($(#[$doc])+ $variant,)+
        }

        impl DropReason {
            /// Every reason.
            pub const ALL: &[DropReason] = &[$(DropReason::$variant,)+];

            /// The name in statistics.
            pub fn name(self) -> &'static str {
                match self {
                    $(DropReason::$variant => $name,)+
                }
            }
        }
    };
}

reasons! {
    /// Outgoing: the engine did not read the device in time. Counted by the kernel, looked up every second.
    DeviceQueueFull => "device-queue-full",
    /// Incoming: the engine did not read its sockets in time. Counted by the kernel, looked up every second.
    SocketQueueFull => "socket-queue-full",
    /// Outgoing: not an IPv4 or IPv6 packet.
    NotIp => "not-ip",
    /// Outgoing: the device's header does not fit the packet behind it, or asks for what was not offered.
    OffloadMalformed => "offload-malformed",
    /// Outgoing: no peer owns the destination.
    NoPeer => "no-peer",
    /// Outgoing: the device has no private key, or the peer was removed meanwhile.
    NoKey => "no-key",
    /// Outgoing: the peer's address is not known.
    NoEndpoint => "no-endpoint",
    /// Outgoing: a datagram of this process that came back, and would come back again: it is routed into its own tunnel.
    RoutingLoop => "routing-loop",
    /// Outgoing: too many packets wait for a handshake; the oldest is dropped.
    QueueFull => "queue-full",
    /// Outgoing: packets waited for a handshake that never came.
    HandshakeTimeout => "handshake-timeout",
    /// Outgoing: the network refused the datagram.
    SendFailed => "send-failed",
    /// Incoming: not a WireGuard message, or its first authenticator is wrong.
    Malformed => "malformed",
    /// Incoming: a handshake from a key that is no peer of this device.
    UnknownPeer => "unknown-peer",
    /// Incoming: a message for no peer of this device.
    UnknownIndex => "unknown-index",
    /// Incoming: data for a session that has ended.
    NoSession => "no-session",
    /// Incoming: a handshake message that is replayed, not expected or not authentic.
    HandshakeRefused => "handshake-refused",
    /// Incoming: a handshake answered with a cookie because of too many.
    UnderLoad => "under-load",
    /// Incoming: data that does not authenticate.
    NotAuthentic => "not-authentic",
    /// Incoming: data seen before, or too old to tell.
    Replayed => "replayed",
    /// Incoming: the decrypted content is not one whole IPv4 or IPv6 packet.
    InnerMalformed => "inner-malformed",
    /// Incoming: the most specific owner of the inner source is not the peer that sent it (P3).
    SourceNotOwned => "source-not-owned",
    /// Incoming: the device took no packet; its link is down.
    DeviceDown => "device-down",
    /// A defect of the engine.
    Internal => "internal",
}

/// What a device counts.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) handshakes: AtomicU64,
    pub(super) sent: AtomicU64,
    pub(super) received: AtomicU64,
    drops: [AtomicU64; DropReason::ALL.len()],
}

impl Counters {
    pub(super) fn drop(&self, reason: DropReason) {
        self.drop_many(reason, 1);
    }

    pub(super) fn drop_many(&self, reason: DropReason, count: u64) {
        self.drops[reason as usize].fetch_add(count, Ordering::Relaxed);
    }

    pub(super) fn sent(&self, count: u64) {
        self.sent.fetch_add(count, Ordering::Relaxed);
    }

    pub(super) fn received(&self, count: u64) {
        self.received.fetch_add(count, Ordering::Relaxed);
    }

    /// Writes what was counted for a successor.
    pub(super) fn write(&self, out: &mut Writer) {
        for counter in [&self.handshakes, &self.sent, &self.received] {
            out.u64(counter.load(Ordering::Relaxed));
        }
        out.count(DropReason::ALL.len());
        for (name, count) in self.drops() {
            out.text(name);
            out.u64(count);
        }
    }

    /// Goes on counting where a predecessor stopped. Its reasons need not be ours.
    pub(super) fn read(&self, from: &mut Reader<'_>) -> Result<(), Damaged> {
        for counter in [&self.handshakes, &self.sent, &self.received] {
            counter.store(from.u64()?, Ordering::Relaxed);
        }
        for _ in 0..from.count()? {
            let (name, count) = (from.text()?, from.u64()?);
            if let Some(reason) = DropReason::ALL.iter().find(|reason| reason.name() == name) {
                self.drop_many(*reason, count);
            }
        }
        Ok(())
    }

    /// Names and counts of every reason.
    pub(super) fn drops(&self) -> impl Iterator<Item = (&'static str, u64)> {
        DropReason::ALL.iter().map(|reason| {
            (
                reason.name(),
                self.drops[*reason as usize].load(Ordering::Relaxed),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_counter_and_a_name_of_its_own() {
        let counters = Counters::default();
        for (place, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, place);
            counters.drop(*reason);
        }
        let names: std::collections::BTreeSet<_> = counters.drops().map(|(name, _)| name).collect();
        assert_eq!(names.len(), DropReason::ALL.len());
        assert!(counters.drops().all(|(_, count)| count == 1));
    }
}
