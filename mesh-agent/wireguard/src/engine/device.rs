//! One device: its peers, keys and sockets, and the way of a packet through it.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};

use warren_model::{PrivateKey, PublicKey};

use crate::Offloads;

use super::{
    Implementation,
    drops::{Counters, DropReason},
    lanes::{Kind, Lanes},
    peer::{self, Path, Peer},
    readers::Readers,
    table::Table,
    transport::Identity,
    tun::Tun,
    udp::Sockets,
};

/// The MTU to pad to until the link's is known: what WireGuard devices are created with.
const USUAL_MTU: usize = 1420;

pub(super) struct Device {
    pub(super) name: String,
    pub(super) implementation: Implementation,
    pub(super) tun: Tun,
    pub(super) counters: Counters,
    mtu: AtomicUsize,
    /// What the kernel had dropped in front of the device when it was last asked.
    overflows: AtomicU64,
    state: RwLock<State>,
    /// Held through a whole configuration request, so that requests do not mix; and the threads of the sockets.
    readers: Mutex<Readers>,
    /// Let go of: nothing is configured any more.
    closed: AtomicBool,
}

/// What configuration requests change. Held only for a moment: packets wait for it.
#[derive(Default)]
pub(super) struct State {
    pub(super) key: Option<Key>,
    pub(super) fwmark: u32,
    pub(super) sockets: Option<Arc<Sockets>>,
    pub(super) peers: HashMap<PublicKey, Arc<Peer>>,
    /// By [`Peer::index`].
    pub(super) indices: HashMap<u32, Arc<Peer>>,
    pub(super) owners: Table<Arc<Peer>>,
    /// Where peers were configured to be, as [`Peer::index`]; as long as it matters for [`Device::revive`].
    pub(super) endpoints: HashMap<SocketAddr, u32>,
}

#[path = "device_image.rs"]
mod image;

/// The device's private key and what works with it.
pub(super) struct Key {
    pub(super) private: PrivateKey,
    pub(super) public: Option<PublicKey>,
    pub(super) identity: Arc<dyn Identity>,
    /// Until when peers may have sessions that an engine before us has forgotten.
    pub(super) revive_until: Option<Instant>,
}

impl State {
    /// Notes where a peer was configured to be.
    pub(super) fn note_endpoint(&mut self, endpoint: SocketAddr, index: u32) {
        let over = |key: &Key| key.revive_until.is_none_or(|until| until <= Instant::now());
        match self.key.as_ref().is_some_and(over) {
            true => self.endpoints = HashMap::new(),
            false => drop(self.endpoints.insert(endpoint, index)),
        }
    }

    pub(super) fn identity(&self) -> Option<&dyn Identity> {
        self.key.as_ref().map(|key| key.identity.as_ref())
    }
}

impl Device {
    pub(super) fn open(name: &str, implementation: Implementation) -> io::Result<Self> {
        let tun = Tun::open(name)?;
        Ok(Self {
            name: name.into(),
            implementation,
            mtu: AtomicUsize::new(tun.mtu().unwrap_or(USUAL_MTU)),
            overflows: AtomicU64::new(tun.overflows().unwrap_or(0)),
            tun,
            counters: Counters::default(),
            state: RwLock::default(),
            readers: Mutex::default(),
            closed: AtomicBool::new(false),
        })
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The right to change the configuration; `ENODEV` once the device was let go of.
    pub(super) fn configure(&self) -> io::Result<MutexGuard<'_, Readers>> {
        let readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        match self.closed.load(Ordering::Relaxed) {
            false => Ok(readers),
            true => Err(io::Error::from_raw_os_error(libc::ENODEV)),
        }
    }

    /// Whether the device was let go of.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Forgets keys and peers, which a successor has now. The threads of the sockets have ended.
    pub(super) fn give_up(&self) {
        self.closed.store(true, Ordering::Relaxed);
        let mut state = self.write();
        for peer in state.peers.values() {
            peer.retire();
        }
        drop(std::mem::take(&mut *state));
    }

    /// Forgets keys and peers and ends the threads of the sockets.
    pub(super) fn close(&self) {
        let Ok(mut readers) = self.configure() else { return };
        self.closed.store(true, Ordering::Relaxed);
        let old = {
            let mut state = self.write();
            for peer in state.peers.values() {
                peer.retire();
            }
            std::mem::take(&mut *state)
        };
        std::mem::take(&mut *readers).stop();
        drop(old);
    }

    pub(super) fn path<'a>(&'a self, sockets: &'a Option<Arc<Sockets>>) -> Path<'a> {
        Path {
            sockets: sockets.as_deref(),
            counters: &self.counters,
        }
    }

    /// The link's MTU in bytes.
    pub(super) fn mtu(&self) -> usize {
        self.mtu.load(Ordering::Relaxed)
    }

    /// What the kernel and the CPU do for the device.
    pub(super) fn offloads(&self) -> Offloads {
        let sockets = self.read().sockets.clone();
        let lanes = match self.implementation {
            Implementation::Warren => Lanes::available().map_or(1, Kind::width),
            Implementation::Boringtun => 1,
        };
        Offloads {
            engine: self.implementation.to_string(),
            cipher_lanes: lanes as u32,
            tun: self.tun.offloads(),
            sockets: sockets.iter().flat_map(|sockets| sockets.offloads()).collect(),
        }
    }

    /// Runs the timers of all peers.
    pub(super) fn tick(&self, now: Instant, out: &mut [u8]) {
        let (peers, sockets) = {
            let state = self.read();
            if let Some(identity) = state.identity() {
                identity.tick();
            }
            (
                state.peers.values().cloned().collect::<Vec<_>>(),
                state.sockets.clone(),
            )
        };
        for peer in peers {
            peer.tick(now, self.path(&sockets), out);
        }
    }

    /// Follows the link's MTU and what the kernel drops in front of the engine.
    pub(super) fn refresh(&self) {
        if let Ok(mtu) = self.tun.mtu() {
            self.mtu.store(mtu, Ordering::Relaxed);
        }
        if let Ok(total) = self.tun.overflows() {
            let new = total - self.overflows.swap(total, Ordering::Relaxed).min(total);
            self.counters.drop_many(DropReason::DeviceQueueFull, new);
        }
        let sockets = self.read().sockets.clone();
        if let Some(sockets) = sockets {
            self.counters
                .drop_many(DropReason::SocketQueueFull, sockets.new_overflows());
        }
    }

    /// Data came for a session that nobody knows. An engine that was killed has left its peers with sessions, which they
    /// use for up to 15 seconds more before they begin new ones. So a peer that is where it was configured to be, and that we
    /// have no session with, is sent an initiation; only as long as such sessions live. One is on its way at most.
    pub(super) fn revive(&self, from: SocketAddr, now: Instant, path: Path<'_>, out: &mut [u8]) {
        let peer = {
            let state = self.read();
            let forgotten = |key: &Key| key.revive_until.is_some_and(|until| now < until);
            match state.key.as_ref().is_some_and(forgotten) {
                true => state
                    .endpoints
                    .get(&from)
                    .and_then(|index| state.indices.get(index))
                    .cloned(),
                false => None,
            }
        };
        if let Some(peer) = peer {
            peer.revive(now, path, out);
        }
    }

    pub(super) fn peers(&self) -> Vec<Arc<Peer>> {
        self.read().peers.values().cloned().collect()
    }

    /// Begins a handshake with those of the peers whose endpoint is known.
    pub(super) fn rekey(&self, peers: Vec<Arc<Peer>>) {
        let sockets = self.read().sockets.clone();
        let mut out = peer::buffer();
        for peer in peers {
            peer.rekey(self.path(&sockets), &mut out);
        }
    }
}
