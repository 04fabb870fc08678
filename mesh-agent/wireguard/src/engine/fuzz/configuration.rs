//! The configuration socket: any bytes, and requests against a simple model of a device.

use std::{collections::BTreeMap, net::SocketAddr};

use ipnet::IpNet;
use warren_model::PublicKey;

use super::{
    super::{Implementation, configure, control, device::State},
    Features, Source,
};
use crate::uapi::{self, AllowedIpChange, Request, SetRequest};

/// What a peer should be.
#[derive(Debug, Default, PartialEq, Eq)]
struct Peer {
    endpoint: Option<SocketAddr>,
    keepalive: u16,
    preshared: bool,
}

#[derive(Default)]
struct Model {
    own: Option<PublicKey>,
    peers: BTreeMap<PublicKey, Peer>,
    /// At most one owner each.
    prefixes: BTreeMap<IpNet, PublicKey>,
}

impl Model {
    fn remove(&mut self, key: &PublicKey) {
        self.peers.remove(key);
        self.prefixes.retain(|_, owner| owner != key);
    }

    fn apply(&mut self, request: &SetRequest) {
        if let Some(private) = &request.private_key {
            self.own = private.as_ref().and_then(|private| {
                let secret = x25519_dalek::StaticSecret::from(*private.expose());
                PublicKey::from_bytes(x25519_dalek::PublicKey::from(&secret).to_bytes()).ok()
            });
            if let Some(own) = self.own {
                self.remove(&own);
            }
        }
        if request.replace_peers {
            self.peers.clear();
            self.prefixes.clear();
        }
        for change in &request.peers {
            let key = change.public_key;
            if change.remove || self.own == Some(key) {
                self.remove(&key);
                continue;
            }
            if change.update_only && !self.peers.contains_key(&key) {
                continue;
            }
            let peer = self.peers.entry(key).or_default();
            if let Some(preshared) = &change.preshared_key {
                peer.preshared = preshared.is_some();
            }
            peer.endpoint = change.endpoint.or(peer.endpoint);
            peer.keepalive = change.keepalive_seconds.unwrap_or(peer.keepalive);
            if change.replace_allowed_ips {
                self.prefixes.retain(|_, owner| *owner != key);
            }
            for prefix in &change.allowed_ips {
                match prefix {
                    AllowedIpChange::Add(prefix) => drop(self.prefixes.insert(*prefix, key)),
                    AllowedIpChange::Remove(prefix) => {
                        self.prefixes
                            .retain(|other, owner| other != prefix || *owner != key);
                    }
                }
            }
        }
    }
}

/// Lines that mean something, and some that do not.
fn line(source: &mut Source<'_>, out: &mut Vec<u8>) {
    let step = source.byte();
    let key = |n: u8| hex::encode([n % 6 + 1; 32]);
    let text = match step % 16 {
        0 => format!("private_key={}", key(source.byte())),
        1 => format!("private_key={}", "0".repeat(64)),
        2 => format!("listen_port={}", source.u16()),
        3 => format!("fwmark={}", source.u16()),
        4 => "replace_peers=true".into(),
        5 | 6 => format!("public_key={}", key(source.byte())),
        7 => format!("endpoint=192.0.2.{}:{}", source.byte(), source.u16()),
        8 => format!("endpoint=[2001:db8::{:x}]:{}", source.byte(), source.u16()),
        9 => format!("persistent_keepalive_interval={}", source.u16()),
        10 => format!("preshared_key={}", key(source.byte())),
        11 => [
            "remove=true",
            "update_only=true",
            "replace_allowed_ips=true",
            "protocol_version=1",
        ][source.below(4)]
        .into(),
        12 => format!("allowed_ip=10.{}.0.0/{}", source.byte() % 4, source.byte() % 34),
        13 => format!("allowed_ip=-10.{}.0.0/16", source.byte() % 4),
        14 => format!(
            "allowed_ip=fd00:{:x}::/{}",
            source.byte() % 4,
            source.byte() % 130
        ),
        _ => {
            let len = usize::from(source.byte() % 40);
            out.extend_from_slice(source.bytes(len));
            String::new()
        }
    };
    out.extend_from_slice(text.as_bytes());
    out.push(b'\n');
}

/// As a connection does: requests are cut out of the stream, parsed, and applied whole or not at all.
pub(super) fn run(input: &[u8], features: &mut Features) {
    let mut source = Source(input);
    let mut stream = Vec::new();
    while !source.is_empty() {
        match source.byte() {
            0 => stream.extend_from_slice(b"get=1\n\n"),
            1..=15 => stream.extend_from_slice(source.bytes(50)),
            lines => {
                stream.extend_from_slice(b"set=1\n");
                (0..lines % 16).for_each(|_| line(&mut source, &mut stream));
                stream.push(b'\n');
            }
        }
    }
    let (mut state, mut model, mut rest) = (State::default(), Model::default(), &stream[..]);
    loop {
        let request = match control::read_request(&mut rest) {
            Ok(Some(request)) => request,
            Ok(None) => break,
            Err(_) => return features.note(1, 0u8),
        };
        match uapi::parse_request(&request) {
            Ok(Request::Get) => features.note(2, 0u8),
            Ok(Request::Set(request)) => {
                features.size(3, request.peers.len());
                model.apply(&request);
                configure::apply(&mut state, *request, Implementation::Warren);
            }
            // Where it stands and why, never what: that may be a key.
            Err(error) => features.note(4, error.reason.len() as u64),
        }
        compare(&state, &model, features);
    }
}

fn compare(state: &State, model: &Model, features: &mut Features) {
    let text = uapi::format_view(&configure::view_state(state));
    let seen = uapi::parse_view(&text).expect("what the engine says can be read");
    assert_eq!(seen.public_key, model.own);
    assert_eq!(seen.peers.len(), model.peers.len());
    for (peer, (key, expected)) in seen.peers.iter().zip(&model.peers) {
        assert_eq!(peer.public_key, *key);
        let preshared = text.contains("preshared_key=");
        assert!(preshared == model.peers.values().any(|peer| peer.preshared));
        let found = Peer {
            endpoint: peer.endpoint,
            keepalive: peer.keepalive_seconds,
            preshared: expected.preshared,
        };
        assert_eq!(found, *expected);
        let prefixes = model.prefixes.iter().filter(|(_, owner)| *owner == key);
        let mut prefixes: Vec<IpNet> = prefixes.map(|(prefix, _)| *prefix).collect();
        prefixes.sort();
        assert_eq!(peer.allowed_ips, prefixes);
        features.size(5, prefixes.len());
    }
    // Nobody owns what nobody was given, and every index is somebody's.
    assert_eq!(state.owners.iter().count(), model.prefixes.len());
    assert_eq!(state.indices.len(), state.peers.len());
    for address in model.prefixes.keys() {
        let address = address.network();
        let best = model
            .prefixes
            .iter()
            .filter(|(prefix, _)| prefix.contains(&address));
        let best = best
            .max_by_key(|(prefix, _)| prefix.prefix_len())
            .map(|(_, owner)| *owner);
        assert_eq!(state.owners.owner(address).map(|peer| peer.key), best);
    }
    features.note(6, (model.prefixes.len() * 8 + model.peers.len()) as u64);
    let described = model.peers.values().map(|peer| {
        u64::from(peer.preshared) << 2
            | u64::from(peer.keepalive > 0) << 1
            | u64::from(peer.endpoint.is_some())
    });
    described.for_each(|peer| features.note(7, peer));
}
