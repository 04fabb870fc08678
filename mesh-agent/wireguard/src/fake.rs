//! WireGuard devices in memory, for tests of whoever drives devices.
//!
//! Behaves as the others do, in particular: a prefix belongs to one peer of a device. Nothing is sent.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use ipnet::IpNet;
use warren_model::{PreSharedKey, PrivateKey, PublicKey};

use crate::{DeviceChange, DeviceError, DeviceState, PeerState, WgDevice, psk_id};

/// How a call to a [`Fake`] fails.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// [`DeviceError::Absent`].
    Absent,
    /// [`DeviceError::Refused`] with this reason.
    Refused(String),
    /// [`DeviceError::Io`] with this kind.
    Io(io::ErrorKind),
}

/// Devices in memory. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Fake {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    devices: BTreeMap<String, FakeDevice>,
    dump_failures: VecDeque<Failure>,
    /// How many changes still succeed before the failure.
    apply_failures: VecDeque<(usize, Failure)>,
    log: Vec<(String, DeviceChange)>,
}

#[derive(Debug, Default)]
struct FakeDevice {
    private_key: Option<PrivateKey>,
    listen_port: u16,
    peers: BTreeMap<PublicKey, FakePeer>,
}

#[derive(Debug, Default)]
struct FakePeer {
    pre_shared_key: Option<PreSharedKey>,
    endpoint: Option<SocketAddr>,
    keepalive_seconds: u16,
    allowed_ips: BTreeSet<IpNet>,
    last_handshake: Option<SystemTime>,
    received_bytes: u64,
    sent_bytes: u64,
}

impl Fake {
    /// No devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an empty device; one of that name stays as it is.
    pub fn add_device(&self, device: &str) {
        self.lock().devices.entry(device.into()).or_default();
    }

    /// Deletes a device with all it holds.
    pub fn remove_device(&self, device: &str) {
        self.lock().devices.remove(device);
    }

    /// Lets the next dump fail. Calls queue up.
    pub fn fail_dump(&self, failure: Failure) {
        self.lock().dump_failures.push_back(failure);
    }

    /// Lets the next apply fail after `changes` of its changes were applied. Calls queue up.
    pub fn fail_apply(&self, changes: usize, failure: Failure) {
        self.lock().apply_failures.push_back((changes, failure));
    }

    /// Reports a handshake with a peer. Nothing happens where the peer is absent.
    pub fn set_handshake(&self, device: &str, peer: &PublicKey, at: SystemTime) {
        self.with_peer(device, peer, |peer| peer.last_handshake = Some(at));
    }

    /// Reports bytes received from and sent to a peer. Nothing happens where the peer is absent.
    pub fn set_transfer(&self, device: &str, peer: &PublicKey, received_bytes: u64, sent_bytes: u64) {
        self.with_peer(device, peer, |peer| {
            peer.received_bytes = received_bytes;
            peer.sent_bytes = sent_bytes;
        });
    }

    /// Moves a peer to another endpoint, as roaming does. Nothing happens where the peer is absent.
    pub fn roam(&self, device: &str, peer: &PublicKey, endpoint: SocketAddr) {
        self.with_peer(device, peer, |peer| peer.endpoint = Some(endpoint));
    }

    /// The private key of a device, to compare with what was wanted.
    pub fn private_key(&self, device: &str) -> Option<PrivateKey> {
        self.lock().devices.get(device)?.private_key.clone()
    }

    /// Every change that was applied since the last call, in order.
    pub fn take_log(&self) -> Vec<(String, DeviceChange)> {
        std::mem::take(&mut self.lock().log)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_peer(&self, device: &str, peer: &PublicKey, change: impl FnOnce(&mut FakePeer)) {
        if let Some(peer) = self
            .lock()
            .devices
            .get_mut(device)
            .and_then(|device| device.peers.get_mut(peer))
        {
            change(peer);
        }
    }
}

impl Failure {
    fn error(self, device: &str) -> DeviceError {
        let device = device.to_owned();
        match self {
            Failure::Absent => DeviceError::Absent(device),
            Failure::Refused(reason) => DeviceError::Refused { device, reason },
            Failure::Io(kind) => DeviceError::Io {
                device,
                source: kind.into(),
            },
        }
    }
}

impl FakeDevice {
    fn state(&self) -> DeviceState {
        let public_key = self.private_key.as_ref().and_then(|key| {
            let secret = x25519_dalek::StaticSecret::from(*key.expose());
            PublicKey::from_bytes(x25519_dalek::PublicKey::from(&secret).to_bytes()).ok()
        });
        let peers = self.peers.iter().map(|(public_key, peer)| PeerState {
            public_key: *public_key,
            pre_shared_key: peer.pre_shared_key.as_ref().map(|key| psk_id(key.expose())),
            endpoint: peer.endpoint,
            keepalive_seconds: peer.keepalive_seconds,
            allowed_ips: peer.allowed_ips.iter().copied().collect(),
            last_handshake: peer.last_handshake,
            received_bytes: peer.received_bytes,
            sent_bytes: peer.sent_bytes,
        });
        DeviceState {
            public_key,
            listen_port: self.listen_port,
            peers: peers.collect(),
        }
    }

    fn apply(&mut self, change: &DeviceChange) {
        match change {
            DeviceChange::SetDevice {
                private_key,
                listen_port,
            } => {
                self.private_key = Some(private_key.clone());
                self.listen_port = *listen_port;
            }
            DeviceChange::SetPeer {
                public_key,
                pre_shared_key,
                endpoint,
                keepalive_seconds,
            } => {
                let peer = self.peers.entry(*public_key).or_default();
                if let Some(key) = pre_shared_key {
                    peer.pre_shared_key = Some(key.clone());
                }
                peer.endpoint = endpoint.or(peer.endpoint);
                peer.keepalive_seconds = *keepalive_seconds;
            }
            DeviceChange::RemovePeer(public_key) => {
                self.peers.remove(public_key);
            }
            DeviceChange::AddAllowedIp { public_key, prefix } => {
                let prefix = prefix.trunc();
                if self.peers.contains_key(public_key) {
                    for (owner, peer) in &mut self.peers {
                        match owner == public_key {
                            true => peer.allowed_ips.insert(prefix),
                            false => peer.allowed_ips.remove(&prefix),
                        };
                    }
                }
            }
            DeviceChange::RemoveAllowedIp { public_key, prefix } => {
                if let Some(peer) = self.peers.get_mut(public_key) {
                    peer.allowed_ips.remove(&prefix.trunc());
                }
            }
            DeviceChange::Clear => {
                self.private_key = None;
                self.peers.clear();
            }
        }
    }
}

impl WgDevice for Fake {
    async fn dump(&self, device: &str) -> Result<DeviceState, DeviceError> {
        let mut inner = self.lock();
        if let Some(failure) = inner.dump_failures.pop_front() {
            return Err(failure.error(device));
        }
        inner
            .devices
            .get(device)
            .map(FakeDevice::state)
            .ok_or_else(|| DeviceError::Absent(device.into()))
    }

    async fn apply(&self, device: &str, changes: &[DeviceChange]) -> Result<(), DeviceError> {
        let inner = &mut *self.lock();
        let failure = inner.apply_failures.pop_front();
        let done = failure
            .as_ref()
            .map_or(changes.len(), |(count, _)| changes.len().min(*count));
        let target = inner
            .devices
            .get_mut(device)
            .ok_or_else(|| DeviceError::Absent(device.into()))?;
        for change in &changes[..done] {
            target.apply(change);
            inner.log.push((device.into(), change.clone()));
        }
        match failure {
            Some((_, failure)) => Err(failure.error(device)),
            None => Ok(()),
        }
    }
}
