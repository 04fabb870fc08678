//! Configuration requests on a device.

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher as _, Hasher as _, RandomState},
    io,
    sync::Arc,
    time::Instant,
};

use ipnet::IpNet;
use warren_model::{PrivateKey, PublicKey};

use super::{
    Implementation,
    device::{Device, Key, State},
    own::OwnIdentity,
    peer::{self, Peer, PeerChange},
    readers::Readers,
    session::REJECT_AFTER_TIME,
    transport::Identity,
    tunn::TunnIdentity,
    udp::Sockets,
};
use crate::{
    PeerState, psk_id,
    uapi::{AllowedIpChange, DeviceView, SetPeer, SetRequest},
};

/// Everything about the device, for `get=1`.
pub(super) fn view(device: &Device) -> DeviceView {
    view_state(&device.read())
}

pub(super) fn view_state(state: &State) -> DeviceView {
    let mut prefixes: HashMap<u32, Vec<IpNet>> = HashMap::new();
    for (prefix, owner) in state.owners.iter() {
        prefixes.entry(owner.index).or_default().push(prefix);
    }
    let mut peers: Vec<_> = state.peers.values().collect();
    peers.sort_by_key(|peer| peer.key);
    let peers = peers.into_iter().map(|peer| {
        let view = peer.view();
        let state = PeerState {
            public_key: peer.key,
            pre_shared_key: view.preshared_key.as_ref().map(|key| psk_id(key.expose())),
            endpoint: view.endpoint,
            keepalive_seconds: view.keepalive_seconds,
            allowed_ips: prefixes.remove(&peer.index).unwrap_or_default(),
            last_handshake: view.last_handshake,
            received_bytes: view.received,
            sent_bytes: view.sent,
        };
        (state, view.preshared_key)
    });
    DeviceView {
        private_key: state.key.as_ref().map(|key| key.private.clone()),
        listen_port: state.sockets.as_ref().map_or(0, |sockets| sockets.port()),
        fwmark: state.fwmark,
        peers: peers.collect(),
    }
}

/// Applies a whole request, or nothing: what can fail, sockets, comes first.
pub(super) fn set(device: &Arc<Device>, request: SetRequest) -> io::Result<()> {
    let mut readers = device.configure()?;
    let sockets = sockets(device, &request)?;
    let started = sockets
        .as_ref()
        .map(|sockets| Readers::start(device, sockets))
        .transpose()?;
    let woken;
    let replaced = {
        let mut state = device.write();
        let replaced = sockets.map(|sockets| state.sockets.replace(sockets));
        woken = apply(&mut state, request, device.implementation);
        replaced
    };
    if let Some(started) = started {
        // The old sockets' port is free again before the answer.
        std::mem::replace(&mut *readers, started).stop();
        drop(replaced);
    }
    wake(device, woken);
    Ok(())
}

/// Changes everything but sockets. The peers it concerns, and whether their handshakes should begin anew.
pub(super) fn apply(
    state: &mut State,
    request: SetRequest,
    implementation: Implementation,
) -> Vec<(Arc<Peer>, bool)> {
    let mut woken = Vec::new();
    if let Some(fwmark) = request.fwmark {
        state.fwmark = fwmark;
    }
    if let Some(private_key) = request.private_key {
        let all = set_key(state, private_key, implementation);
        woken.extend(all.into_iter().map(|peer| (peer, false)));
    }
    if request.replace_peers {
        for key in state.peers.keys().copied().collect::<Vec<_>>() {
            remove(state, &key);
        }
    }
    for change in request.peers {
        woken.extend(set_peer(state, change));
    }
    woken
}

/// Opens what the request needs: a port that was asked for, or any port for a device that gets its first key.
fn sockets(device: &Device, request: &SetRequest) -> io::Result<Option<Arc<Sockets>>> {
    let (current, fwmark) = {
        let state = device.read();
        (state.sockets.clone(), request.fwmark.unwrap_or(state.fwmark))
    };
    let wanted = match (request.listen_port, &current) {
        (Some(port), Some(current)) if port == current.port() => None,
        (Some(port), _) => Some(port),
        (None, None) if matches!(request.private_key, Some(Some(_))) => Some(0),
        (None, _) => None,
    };
    if let Some(port) = wanted {
        return Sockets::bind(port, fwmark).map(|sockets| Some(Arc::new(sockets)));
    }
    if let (Some(fwmark), Some(current)) = (request.fwmark, current) {
        current.set_fwmark(fwmark)?;
    }
    Ok(None)
}

/// Sets or takes away the private key; the same key again changes nothing. The peers it concerns.
fn set_key(state: &mut State, private: Option<PrivateKey>, implementation: Implementation) -> Vec<Arc<Peer>> {
    if state.key.as_ref().map(|key| &key.private) == private.as_ref() {
        return Vec::new();
    }
    state.key = private.map(|private| Key::new(private, implementation));
    // A device is no peer of itself.
    if let Some(own) = state.key.as_ref().and_then(|key| key.public) {
        remove(state, &own);
    }
    for peer in state.peers.values() {
        peer.set_identity(state.identity());
    }
    state.peers.values().cloned().collect()
}

impl Key {
    pub(super) fn new(private: PrivateKey, implementation: Implementation) -> Self {
        let secret = x25519_dalek::StaticSecret::from(*private.expose());
        let public = PublicKey::from_bytes(x25519_dalek::PublicKey::from(&secret).to_bytes()).ok();
        let identity: Arc<dyn Identity> = match implementation {
            Implementation::Warren => Arc::new(OwnIdentity::new(&private)),
            Implementation::Boringtun => Arc::new(TunnIdentity::new(&private)),
        };
        Self {
            private,
            public,
            identity,
            revive_until: Instant::now().checked_add(REJECT_AFTER_TIME),
        }
    }
}

/// Applies one peer's part. The peer, and whether its handshake should begin anew.
fn set_peer(state: &mut State, change: SetPeer) -> Option<(Arc<Peer>, bool)> {
    let own = state.key.as_ref().and_then(|key| key.public);
    if change.remove || own == Some(change.public_key) {
        remove(state, &change.public_key);
        return None;
    }
    let known = state.peers.get(&change.public_key).cloned();
    let peer = match known {
        Some(peer) => peer,
        None if change.update_only => return None,
        None => add(state, change.public_key),
    };
    let settings = PeerChange {
        preshared_key: change.preshared_key,
        endpoint: change.endpoint,
        keepalive_seconds: change.keepalive_seconds,
    };
    if let Some(endpoint) = settings.endpoint {
        state.note_endpoint(endpoint, peer.index);
    }
    let anew = peer.change(settings, state.identity());
    if change.replace_allowed_ips {
        // What comes back right away is never taken away, so that no packet falls into a gap.
        let kept: HashSet<IpNet> = change
            .allowed_ips
            .iter()
            .filter_map(AllowedIpChange::added)
            .collect();
        let gone: Vec<IpNet> = owned(state, &peer)
            .filter(|prefix| !kept.contains(prefix))
            .collect();
        for prefix in gone {
            state.owners.remove(&prefix);
        }
    }
    for change in change.allowed_ips {
        match change {
            AllowedIpChange::Add(prefix) => state.owners.insert(prefix, Arc::clone(&peer)),
            AllowedIpChange::Remove(prefix) => {
                if state
                    .owners
                    .exact(&prefix)
                    .is_some_and(|owner| Arc::ptr_eq(owner, &peer))
                {
                    state.owners.remove(&prefix);
                }
            }
        }
    }
    Some((peer, anew))
}

fn owned<'a>(state: &'a State, peer: &'a Arc<Peer>) -> impl Iterator<Item = IpNet> + 'a {
    state
        .owners
        .iter()
        .filter(|(_, owner)| Arc::ptr_eq(owner, peer))
        .map(|(prefix, _)| prefix)
}

fn add(state: &mut State, key: PublicKey) -> Arc<Peer> {
    let index = loop {
        // Seeded by the operating system: says nothing about how many peers there are.
        let index = (RandomState::new().build_hasher().finish() & 0x00ff_ffff) as u32;
        if !state.indices.contains_key(&index) {
            break index;
        }
    };
    let peer = Arc::new(Peer::new(key, index, state.identity()));
    state.peers.insert(key, Arc::clone(&peer));
    state.indices.insert(index, Arc::clone(&peer));
    peer
}

fn remove(state: &mut State, key: &PublicKey) {
    if let Some(peer) = state.peers.remove(key) {
        state.indices.remove(&peer.index);
        state.owners.retain(|owner| !Arc::ptr_eq(owner, &peer));
        peer.retire();
    }
}

fn wake(device: &Device, peers: Vec<(Arc<Peer>, bool)>) {
    let sockets = device.read().sockets.clone();
    let mut out = peer::buffer();
    for (peer, anew) in peers {
        peer.wake(anew, device.path(&sockets), &mut out);
    }
}

#[cfg(test)]
#[path = "configure_tests.rs"]
mod tests;
