//! Paths, keys and reports; how they work together is in the simulation (`cargo xtask sim`).

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use warren_model::{NodeName, PskId, PublicKey, SlotKey};

use super::{
    Keyring, Mover, NodeKeys, Path, QUIET, Reporter, Seen, begins, devices, half, is_verified, keepalive,
    newer, node_path, paths, sending, slot_of, target,
};
use crate::{
    psk::PskUse,
    state::{Device, NodePath, Peer, State, WireGuard},
};

fn key(node: u8, generation: u64) -> PublicKey {
    let mut bytes = [9; 32];
    bytes[0] = node;
    bytes[1] = generation as u8;
    PublicKey::from_bytes(bytes).unwrap()
}

fn keys(node: u8, generations: &[u64], active: u64) -> NodeKeys {
    let mut slots: Vec<_> = generations
        .iter()
        .flat_map(|&generation| {
            [0, 1].map(|twin| SlotKey {
                slot: 2 * half(generation) + twin,
                port: 51871,
                generation,
                public_key: key(node, generation),
                pre_shared_keys: false,
            })
        })
        .collect();
    slots.sort_by_key(|slot| slot.slot);
    NodeKeys {
        uid: format!("uid{node}").as_str().into(),
        slots,
        active,
        last: generations.iter().copied().max().unwrap_or_default(),
    }
}

fn ring(node: u8, generations: &[u64]) -> Keyring {
    Keyring::new(
        generations
            .iter()
            .map(|generation| (*generation, key(node, *generation))),
    )
}

#[test]
fn the_paths_of_a_pair_never_share_a_device_at_either_end() {
    for (a, b) in (1..9).flat_map(|a| (1..9).map(move |b| (a, b))) {
        let (own, other) = (keys(1, &[a, a + 1], a), keys(2, &[b, b + 1], b));
        let here = paths(&own, &ring(1, &[a, a + 1]), &other);
        let there = paths(&other, &ring(2, &[b, b + 1]), &own);
        let slots: BTreeSet<_> = here.iter().map(|path| path.slot).collect();
        assert_eq!((here.len(), slots.len()), (4, 4));
        for path in &here {
            let mirror = there
                .iter()
                .find(|back| (back.own, back.peer) == (path.peer, path.own))
                .unwrap();
            assert_eq!(mirror.slot, slot_of(path.peer, path.own));
            assert_eq!((path.key, mirror.key), (key(2, path.peer), key(1, path.own)));
        }
    }
}

#[test]
fn a_mesh_that_never_rotated_uses_the_first_slot_only() {
    let (own, other) = (keys(1, &[1], 1), keys(2, &[1], 1));
    let found = paths(&own, &ring(1, &[1]), &other);
    assert_eq!(found.iter().map(|path| path.slot).collect::<Vec<_>>(), [0]);
    assert_eq!(devices(&own, &ring(1, &[1]), &found), [Some(1), None, None, None]);
    // Without peers the device of the active key is still there.
    assert_eq!(
        devices(&keys(1, &[2], 2), &ring(1, &[2]), &[]),
        [None, None, Some(2), None]
    );
    assert!(paths(&own, &ring(1, &[]), &other).is_empty());
    assert!(
        paths(&own, &ring(7, &[1]), &other).is_empty(),
        "another key of the same number"
    );
}

#[test]
fn a_path_has_a_pre_shared_key_where_both_keys_were_made_with_them() {
    let with = |mut keys: NodeKeys, generation: u64| {
        let slots = keys.slots.iter_mut();
        for slot in slots.filter(|slot| slot.generation == generation) {
            slot.pre_shared_keys = true;
            slot.port += u16::from(slot.slot);
        }
        keys
    };
    let own = with(keys(1, &[1, 2], 1), 2);
    let ring = ring(1, &[1, 2]);
    for (other, shared) in [(keys(2, &[1], 1), false), (with(keys(2, &[1], 1), 1), true)] {
        let found = paths(&own, &ring, &other);
        let exchanges: Vec<_> = found.iter().map(|path| (path.slot, path.exchange)).collect();
        // The other slot of each half, which no path of the same two keys is on.
        let port = shared.then_some(51871);
        assert_eq!(exchanges, [(0, None), (2, port)]);
        assert_eq!(found[1].exchange_slot(), 3);
        let open = devices(&own, &ring, &found);
        assert_eq!(open, [Some(1), None, Some(2), shared.then_some(2)]);
    }
    // A slot of the key was refused: rather no path than one without.
    let mut other = with(keys(2, &[1], 1), 1);
    other.slots.remove(0);
    let found = paths(&own, &ring, &other);
    assert_eq!(found.iter().map(|path| path.own).collect::<Vec<_>>(), [0_u64; 0]);
}

#[test]
fn a_pair_moves_once_the_new_path_is_ready_and_not_back() {
    let both = ring(1, &[1, 2]);
    let other = keys(2, &[1], 1);
    let verifying = keys(1, &[1, 2], 1);
    let found = paths(&verifying, &both, &other);
    assert_eq!(sending(&verifying, &other, &found, Some(0), 0b101), Some(0));
    let committed = keys(1, &[1, 2], 2);
    assert_eq!(sending(&committed, &other, &found, Some(0), 0b001), Some(0));
    assert_eq!(sending(&committed, &other, &found, Some(0), 0b101), Some(2));
    assert_eq!(sending(&committed, &other, &found, Some(2), 0b001), Some(2));
    assert_eq!(sending(&committed, &other, &found, None, 0), Some(2));
    // The old path is gone from the directory: there is nothing to stay on.
    let retired = keys(1, &[2], 2);
    let found = paths(&retired, &both, &other);
    assert_eq!(sending(&retired, &other, &found, Some(0), 0), Some(2));
    assert_eq!(
        node_path(&found, Some(2)),
        Some(NodePath {
            slot: 2,
            receive: 0b100
        })
    );
    // The active private key is lost: what carries is used.
    let left = paths(&committed, &ring(1, &[1]), &other);
    assert_eq!(sending(&committed, &other, &left, None, 0b001), Some(0));
}

#[test]
fn keepalives_follow_what_a_path_is_for() {
    let other = keys(2, &[1], 1);
    let own = keys(1, &[1, 2], 1);
    let found = paths(&own, &ring(1, &[1, 2]), &other);
    let seconds = |own: &NodeKeys, slot: u8, may| {
        let path = found.iter().find(|path| path.slot == slot).unwrap();
        keepalive(own, &other, &found, path, may, 25)
    };
    assert_eq!(
        (
            seconds(&own, 0, true),
            seconds(&own, 2, true),
            seconds(&own, 2, false)
        ),
        (25, 1, 0)
    );
    let committed = keys(1, &[1, 2], 2);
    assert_eq!(
        (seconds(&committed, 0, true), seconds(&committed, 2, true)),
        (0, 1)
    );
    assert_eq!(target(&committed, &other, &found).map(|path| path.slot), Some(2));
    assert_ne!(begins(key(1, 1), key(2, 1)), begins(key(2, 1), key(1, 1)));
}

#[test]
fn keys_are_destroyed_only_on_evidence() {
    let held = ring(1, &[1, 2, 3]);
    let own = |generations: &[u64], active, last| NodeKeys {
        last,
        ..keys(1, generations, active)
    };
    assert_eq!(
        held.void(&own(&[1], 1, 1)),
        [0_u64; 0],
        "a leader that has not seen 2"
    );
    assert_eq!(held.void(&own(&[1], 1, 2)), [2], "withdrawn");
    assert_eq!(held.void(&own(&[1, 2], 2, 2)), [0_u64; 0]);
    assert_eq!(held.void(&own(&[2], 2, 2)), [1], "retired");
    let wrong = Keyring::new([(2, key(8, 8))]);
    assert_eq!(
        wrong.void(&own(&[1, 2], 1, 2)),
        [2],
        "another key of that number was accepted"
    );
    assert!(!wrong.holds(&own(&[1, 2], 1, 2), 2));
    assert!(held.must_make(4) && !held.must_make(3));
}

#[test]
fn a_record_that_goes_back_is_not_newer() {
    let known = keys(1, &[1, 2], 2);
    assert!(newer(&known, &keys(1, &[2], 2)));
    assert!(!newer(&known, &keys(1, &[1, 2], 1)));
    assert!(!newer(&known, &keys(1, &[1], 1)));
    let reborn = NodeKeys {
        uid: "another".into(),
        ..keys(1, &[1], 1)
    };
    assert!(newer(&known, &reborn));
}

#[test]
fn a_peer_must_be_heard_since_the_path_is_wanted() {
    let peer = NodeName::from("b");
    let path = |generation| Path {
        slot: 2,
        own: 2,
        peer: generation,
        key: key(2, generation),
        port: 1,
        exchange: None,
    };
    let mut mover = Mover::default();
    assert!(!mover.is_heard(&peer, key(1, 2), &path(1), 500));
    assert!(!mover.is_heard(&peer, key(1, 2), &path(1), 500));
    assert!(mover.is_heard(&peer, key(1, 2), &path(1), 532));
    assert!(!mover.is_heard(&peer, key(1, 2), &path(2), 532), "another path");
    assert!(
        !mover.is_heard(&peer, key(1, 2), &path(2), 0),
        "the device was emptied"
    );
    assert!(mover.is_heard(&peer, key(1, 2), &path(2), 32));
    mover.forget(&peer);
    assert!(!mover.is_waiting());
}

#[test]
fn only_what_changed_is_reported_and_quiet_needs_a_second() {
    let (own, other) = (keys(1, &[1, 2], 2), keys(2, &[1], 1));
    let found = paths(&own, &ring(1, &[1, 2]), &other);
    let peer = NodeName::from("b");
    let seen = |received| {
        let seen = Seen {
            verified: true,
            received,
            conflict: None,
        };
        [seen, Seen::default(), seen, Seen::default()]
    };
    let mut reporter = Reporter::default();
    let mut pair = |at, received, slot| {
        let report = reporter.pair(at, &peer, (&own, &other), &found, seen(received), Some(slot));
        report.map(|report| {
            report
                .paths
                .iter()
                .map(|path| (path.sending, path.quiet))
                .collect::<Vec<_>>()
        })
    };
    let zero = Duration::ZERO;
    assert_eq!(pair(zero, 5, 0), Some(vec![(true, false), (false, false)]));
    assert_eq!(pair(zero, 5, 0), None);
    assert_eq!(pair(QUIET / 2, 6, 2), Some(vec![(false, false), (true, false)]));
    assert_eq!(pair(QUIET, 6, 2), None);
    assert_eq!(
        pair(QUIET * 3 / 2, 6, 2),
        Some(vec![(false, true), (true, false)])
    );
    assert_eq!(pair(QUIET * 2, 7, 2), Some(vec![(false, false), (true, false)]));
    let gone = reporter.gone(&peer).unwrap();
    assert!(gone.paths.is_empty() && reporter.gone(&peer).is_none());
}

#[test]
fn verified_means_everything_is_in_place() {
    let path = Path {
        slot: 2,
        own: 2,
        peer: 1,
        key: key(2, 1),
        port: 1,
        exchange: Some(2),
    };
    let prefixes = BTreeSet::from(["10.0.0.0/24".parse().unwrap()]);
    let peer = Peer {
        pre_shared: Some(PskId([7; 16])),
        allowed_ips: prefixes.clone(),
        ..Peer::default()
    };
    let device = Device {
        exists: true,
        up: true,
        programs: true,
        wireguard: WireGuard {
            public_key: Some(key(1, 2)),
            port: 1,
            peers: BTreeMap::from([(path.key, peer)]),
        },
        ..Device::default()
    };
    let mut good = State::default();
    good.devices.insert(2, device);
    good.paths.insert(
        7,
        NodePath {
            slot: 0,
            receive: 0b101,
        },
    );
    let with = |state: &State, psk| is_verified(state, 7, &path, key(1, 2), psk, &prefixes);
    let check = |state: &State| with(state, PskUse::With(PskId([7; 16])));
    assert!(check(&good));
    for psk in [PskUse::Without, PskUse::Awaited, PskUse::With(PskId([8; 16]))] {
        assert!(!with(&good, psk), "{psk:?}");
    }
    let spoil: [fn(&mut State); 7] = [
        |state| state.devices.get_mut(&2).unwrap().up = false,
        |state| state.devices.get_mut(&2).unwrap().programs = false,
        |state| state.devices.get_mut(&2).unwrap().wireguard.public_key = None,
        |state| state.devices.get_mut(&2).unwrap().wireguard.peers.clear(),
        |state| {
            state
                .devices
                .get_mut(&2)
                .unwrap()
                .wireguard
                .peers
                .values_mut()
                .for_each(|p| p.silent = true)
        },
        |state| {
            state
                .devices
                .get_mut(&2)
                .unwrap()
                .wireguard
                .peers
                .values_mut()
                .for_each(|p| p.allowed_ips.clear())
        },
        |state| state.paths.get_mut(&7).unwrap().receive = 0b001,
    ];
    for (number, spoil) in spoil.iter().enumerate() {
        let mut bad = good.clone();
        spoil(&mut bad);
        assert!(!check(&bad), "{number}");
    }
}
