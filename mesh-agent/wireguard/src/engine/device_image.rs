//! A device as bytes and descriptors for a successor.
//!
//! In two parts, so that packets wait for the second only: what configuration requests change, which may be as much as
//! 100,000 prefixes; and the peers' sessions.

use std::{
    collections::HashMap,
    io,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, RwLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use ipnet::IpNet;
use warren_model::PrivateKey;

use super::{
    super::{
        Implementation,
        drops::Counters,
        image::{Damaged, Reader, Writer},
        peer::Peer,
        readers::Readers,
        tun::Tun,
        udp::Sockets,
    },
    Device, Key, State, USUAL_MTU,
};

impl Device {
    /// Writes the configuration, which must not change from here on, and adds the device's descriptors.
    pub(in super::super) fn write_settings(
        &self,
        out: &mut Writer,
        descriptors: &mut Vec<OwnedFd>,
    ) -> io::Result<()> {
        let state = self.read();
        out.text(&self.name);
        descriptors.push(self.tun.descriptor(out)?);
        out.u64(self.overflows.load(Ordering::Relaxed));
        out.u32(state.fwmark);
        out.option(state.key.as_ref(), |out, key| out.raw(key.private.expose()));
        out.flag(state.sockets.is_some());
        if let Some(sockets) = &state.sockets {
            sockets.descriptors(descriptors, out)?;
        }
        let mut prefixes: HashMap<u32, Vec<IpNet>> = HashMap::new();
        for (prefix, owner) in state.owners.iter() {
            prefixes.entry(owner.index).or_default().push(prefix);
        }
        out.count(state.peers.len());
        for peer in state.peers.values() {
            peer.write_settings(out);
            let prefixes = prefixes.remove(&peer.index).unwrap_or_default();
            out.count(prefixes.len());
            prefixes.into_iter().for_each(|prefix| out.prefix(prefix));
        }
        Ok(())
    }

    /// What [`Self::write_settings`] wrote: a device without sessions whose threads do not run yet.
    pub(in super::super) fn read_settings(
        implementation: Implementation,
        from: &mut Reader<'_>,
        descriptors: &mut impl Iterator<Item = OwnedFd>,
    ) -> io::Result<Self> {
        let name = from.text().map_err(io::Error::other)?;
        let descriptor = descriptors.next().ok_or_else(|| io::Error::other(Damaged))?;
        let tun = Tun::adopt(name, descriptor, from)?;
        let overflows = from.u64().map_err(io::Error::other)?;
        let state = read_state(implementation, from, descriptors).map_err(io::Error::other)?;
        Ok(Self {
            name: name.into(),
            implementation,
            mtu: AtomicUsize::new(tun.mtu().unwrap_or(USUAL_MTU)),
            overflows: AtomicU64::new(overflows),
            tun,
            counters: Counters::default(),
            state: RwLock::new(state),
            readers: Mutex::new(Readers::default()),
            closed: AtomicBool::new(false),
        })
    }

    /// Writes what packets change. None may move any more, unless nobody reads this.
    pub(in super::super) fn write_sessions(&self, out: &mut Writer) {
        let state = self.read();
        self.counters.write(out);
        out.option(state.identity(), |out, identity| {
            out.section(|out| identity.write(out));
        });
        out.count(state.peers.len());
        for peer in state.peers.values() {
            out.u32(peer.index);
            peer.write_sessions(out);
        }
    }

    /// What [`Self::write_sessions`] wrote, by an engine of the same implementation or another. The peers that need new
    /// sessions.
    pub(in super::super) fn read_sessions(
        &self,
        same: bool,
        from: &mut Reader<'_>,
    ) -> Result<Vec<Arc<Peer>>, Damaged> {
        let state = self.read();
        self.counters.read(from)?;
        let shared = from.option(Reader::section)?;
        if let (Some(identity), Some(mut shared)) = (state.identity(), shared)
            && same
        {
            identity.read(&mut shared)?;
        }
        let mut lost = Vec::new();
        for _ in 0..from.count()? {
            let peer = state.indices.get(&from.u32()?).ok_or(Damaged)?;
            if peer.read_sessions(state.identity(), same, from)? {
                lost.push(Arc::clone(peer));
            }
        }
        Ok(lost)
    }

    /// Starts the threads of the sockets.
    pub(in super::super) fn start_readers(self: &Arc<Self>, readers: &mut Readers) -> io::Result<()> {
        let sockets = self.read().sockets.clone();
        if let Some(sockets) = sockets {
            *readers = Readers::start(self, &sockets)?;
        }
        Ok(())
    }
}

fn read_state(
    implementation: Implementation,
    from: &mut Reader<'_>,
    descriptors: &mut impl Iterator<Item = OwnedFd>,
) -> Result<State, Damaged> {
    let mut state = State {
        fwmark: from.u32()?,
        ..State::default()
    };
    let key = from.option(Reader::secret)?;
    state.key = key.map(|key| Key::new(PrivateKey::from_bytes(*key), implementation));
    if let Some(key) = &mut state.key {
        // Nothing is forgotten.
        key.revive_until = None;
    }
    if from.flag()? {
        state.sockets = Some(Arc::new(Sockets::adopt(descriptors, from)?));
    }
    for _ in 0..from.count()? {
        let peer = Arc::new(Peer::read_settings(from)?);
        for _ in 0..from.count()? {
            state.owners.insert(from.prefix()?, Arc::clone(&peer));
        }
        if state.indices.insert(peer.index, Arc::clone(&peer)).is_some() {
            return Err(Damaged);
        }
        state.peers.insert(peer.key, peer);
    }
    Ok(state)
}
