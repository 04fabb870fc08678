//! WireGuard devices behind one trait: the kernel's ([`Kernel`], netlink), the userspace engine's
//! ([`Userspace`], configuration socket) and a [`Fake`] for tests; and the userspace engine itself
//! ([`engine`]).
//!
//! This crate may not know the directory, routes or eBPF. A change never rebuilds a device from scratch:
//! peers and allowed prefixes are changed one by one.

use std::{future::Future, net::SocketAddr, time::SystemTime};

use aws_lc_rs::digest;
use ipnet::IpNet;
use warren_model::{PreSharedKey, PrivateKey, PskId, PublicKey};

pub mod engine;
mod fake;
mod kernel;
#[cfg(test)]
mod memory_search;
mod uapi;
mod userspace;

pub use fake::{Failure, Fake};
pub use kernel::{Kernel, kernel_available};
pub use userspace::{EngineStats, Offloads, SocketOffloads, TunOffloads, Userspace};

/// What a device has, read from the device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceState {
    /// The device's own key; `None` until one is set.
    pub public_key: Option<PublicKey>,
    /// UDP port; 0 for none.
    pub listen_port: u16,
    /// Peers, sorted by key.
    pub peers: Vec<PeerState>,
}

/// A peer of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerState {
    /// The peer's key.
    pub public_key: PublicKey,
    /// Which pre-shared key it has; never the key itself.
    pub pre_shared_key: Option<PskId>,
    /// Where packets are sent to.
    pub endpoint: Option<SocketAddr>,
    /// Persistent keepalive in seconds; 0 for off.
    pub keepalive_seconds: u16,
    /// Prefixes the peer may use as source, and that are routed to it. Sorted.
    pub allowed_ips: Vec<IpNet>,
    /// When the last handshake was completed.
    pub last_handshake: Option<SystemTime>,
    /// Bytes received from the peer.
    pub received_bytes: u64,
    /// Bytes sent to the peer.
    pub sent_bytes: u64,
}

/// One incremental change of a device. Applying a change twice is the same as once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceChange {
    /// Sets the device's private key and UDP port.
    SetDevice {
        /// The key.
        private_key: PrivateKey,
        /// UDP port to listen on.
        listen_port: u16,
    },
    /// Adds a peer, or changes what is named here of an existing one; allowed prefixes stay.
    SetPeer {
        /// The peer's key.
        public_key: PublicKey,
        /// `None` leaves it as it is. Another one for a peer that is there leaves its sessions as they are: remove the peer
        /// first where these must end.
        pre_shared_key: Option<PreSharedKey>,
        /// Where to send to; `None` leaves it as it is (roaming).
        endpoint: Option<SocketAddr>,
        /// Persistent keepalive in seconds; 0 turns it off.
        keepalive_seconds: u16,
    },
    /// Removes a peer; one that is absent is no error.
    RemovePeer(PublicKey),
    /// Gives a prefix to a peer; it is taken from any other peer of the device at the same moment.
    /// A peer that is absent is not created by this: nothing happens, and the next dump shows it.
    AddAllowedIp {
        /// The peer's key.
        public_key: PublicKey,
        /// The prefix.
        prefix: IpNet,
    },
    /// Takes a prefix from a peer; no error where the peer does not have it.
    RemoveAllowedIp {
        /// The peer's key.
        public_key: PublicKey,
        /// The prefix.
        prefix: IpNet,
    },
    /// Empties the device: no peers, no key. The device itself stays.
    Clear,
}

/// The name of a pre-shared key: the first half of SHA-256 of a label and the key. As a key has 256 random bits, nobody
/// gets from its name to it.
pub fn psk_id(key: &[u8; 32]) -> PskId {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(b"warren-psk-id-v1");
    context.update(key);
    let mut id = [0; 16];
    id.copy_from_slice(&context.finish().as_ref()[..16]);
    PskId(id)
}

/// The name of what a device says of a peer's pre-shared key, where all zero means none.
pub(crate) fn some_psk_id(key: &[u8; 32]) -> Option<PskId> {
    (*key != [0; 32]).then(|| psk_id(key))
}

/// Overwrites the stack below the caller, where a key was computed with: a thread's stack outlives the thread, in the
/// allocator's store of stacks.
#[inline(never)]
pub(crate) fn wipe_stack() {
    let mut below = zeroize::Zeroizing::new([0_u8; 64 * 1024]);
    std::hint::black_box(below.as_mut_slice());
}

/// Why a device could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// No such device, or its tunnel process is not running. Retryable.
    #[error("device {0} is not there")]
    Absent(String),
    /// The device refused the change.
    #[error("device {device} refused: {reason}")]
    Refused {
        /// The device.
        device: String,
        /// The kernel's or engine's error.
        reason: String,
    },
    /// The connection to the kernel or the engine broke. Retryable.
    #[error("device {device}: {source}")]
    Io {
        /// The device.
        device: String,
        /// Why.
        source: std::io::Error,
    },
}

/// A driver for the WireGuard devices of a node, by interface name.
///
/// Implementations write `async fn`; the futures are `Send` so that a spawned task can drive a device.
pub trait WgDevice: Send + Sync {
    /// Reads the device.
    fn dump(&self, device: &str) -> impl Future<Output = Result<DeviceState, DeviceError>> + Send;
    /// Applies changes in order; stops at the first that fails. What came before it may have been applied:
    /// the caller dumps and applies the difference again.
    fn apply(
        &self,
        device: &str,
        changes: &[DeviceChange],
    ) -> impl Future<Output = Result<(), DeviceError>> + Send;
}
