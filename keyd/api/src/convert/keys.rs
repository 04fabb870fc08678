//! Keys on the wire: offers, what agents hold, what they see of their paths.

use std::collections::BTreeMap;

use warren_model::{
    ForgetPsk, PskConflict, PskId, PublicKey, SlotKey,
    keys::{PairReport, PathState, slots_of},
};

use super::{ConvertError, slot_from_parts};
use crate::proto;

/// The offer of a key. `port_of`: the UDP port of a slot; those of neighbours follow each other.
pub fn key_to_offer(
    generation: u64,
    public_key: PublicKey,
    pre_shared_keys: bool,
    port_of: impl FnOnce(u8) -> u16,
) -> proto::KeyOffer {
    let [slot, _] = slots_of(generation);
    proto::KeyOffer {
        slot: slot.into(),
        port: port_of(slot).into(),
        generation,
        public_key: public_key.as_bytes().to_vec(),
        pre_shared_keys,
    }
}

/// Parses the offer of a key: both slots that it fills. A slot that is not the first of its generation's half is refused.
pub fn slots_from_offer(offer: &proto::KeyOffer) -> Result<[SlotKey; 2], ConvertError> {
    let first = SlotKey {
        pre_shared_keys: offer.pre_shared_keys,
        ..slot_from_parts(offer.slot, offer.port, offer.generation, &offer.public_key)?
    };
    let [slot, next] = slots_of(offer.generation);
    if first.slot != slot {
        return Err(ConvertError::Range {
            field: "slot",
            value: offer.slot.into(),
        });
    }
    let port = first.port.checked_add(1).ok_or(ConvertError::Range {
        field: "port",
        value: offer.port.into(),
    })?;
    let second = SlotKey {
        slot: next,
        port,
        ..first.clone()
    };
    Ok([first, second])
}

/// The private keys that an agent holds, on the wire.
pub fn held_to_proto(held: &BTreeMap<u64, PublicKey>) -> proto::Held {
    let bytes = |(generation, key): (&u64, &PublicKey)| (*generation, key.as_bytes().to_vec());
    proto::Held {
        public_keys: held.iter().map(bytes).collect(),
    }
}

/// Parses what an agent holds.
pub fn held_from_proto(held: &proto::Held) -> Result<BTreeMap<u64, PublicKey>, ConvertError> {
    let key = |(generation, key): (&u64, &Vec<u8>)| {
        let [slot, _] = slots_of(*generation);
        let key = PublicKey::try_from(key.as_slice()).map_err(|error| ConvertError::Key {
            slot: slot.into(),
            error,
        });
        Ok((*generation, key?))
    };
    held.public_keys.iter().map(key).collect()
}

/// What an agent says of its paths, on the wire.
pub fn report_to_proto(pairs: &[PairReport]) -> proto::PathReport {
    let pair = |pair: &PairReport| proto::PairState {
        peer: pair.peer.to_string(),
        peer_uid: pair.uid.to_string(),
        paths: pair.paths.iter().map(path_to_proto).collect(),
    };
    proto::PathReport {
        pairs: pairs.iter().map(pair).collect(),
    }
}

/// A path as one end sees it, on the wire.
pub fn path_to_proto(path: &PathState) -> proto::PathState {
    let id = |id: Option<PskId>| id.map_or_else(Vec::new, |id| id.0.to_vec());
    proto::PathState {
        own_generation: path.own,
        peer_generation: path.peer,
        verified: path.verified,
        sending: path.sending,
        quiet: path.quiet,
        conflict: path.conflict.map(|conflict| proto::PskConflict {
            own: id(conflict.own),
            peer: id(conflict.peer),
        }),
    }
}

fn path_from_proto(path: &proto::PathState) -> Result<PathState, ConvertError> {
    let conflict = |conflict: &proto::PskConflict| {
        Ok(PskConflict {
            own: some_psk_id(&conflict.own)?,
            peer: some_psk_id(&conflict.peer)?,
        })
    };
    Ok(PathState {
        own: path.own_generation,
        peer: path.peer_generation,
        verified: path.verified,
        sending: path.sending,
        quiet: path.quiet,
        conflict: path.conflict.as_ref().map(conflict).transpose()?,
    })
}

fn some_psk_id(bytes: &[u8]) -> Result<Option<PskId>, ConvertError> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let id = bytes.try_into().map_err(|_| ConvertError::Range {
        field: "bytes of a pre-shared key's name",
        value: bytes.len() as u64,
    })?;
    Ok(Some(PskId(id)))
}

/// The word that a pre-shared key is to be forgotten, on the wire.
pub fn forget_to_proto(forget: &ForgetPsk) -> proto::ForgetPsk {
    proto::ForgetPsk {
        peer: forget.peer.to_string(),
        own_generation: forget.own,
        peer_generation: forget.other,
        id: forget.id.0.to_vec(),
    }
}

/// Parses the word that a pre-shared key is to be forgotten.
pub fn forget_from_proto(forget: &proto::ForgetPsk) -> Result<ForgetPsk, ConvertError> {
    Ok(ForgetPsk {
        peer: forget.peer.as_str().into(),
        own: forget.own_generation,
        other: forget.peer_generation,
        id: some_psk_id(&forget.id)?.ok_or(ConvertError::Empty("name of a pre-shared key"))?,
    })
}

/// Parses what an agent says of its paths.
pub fn report_from_proto(report: &proto::PathReport) -> Result<Vec<PairReport>, ConvertError> {
    let pair = |pair: &proto::PairState| {
        let paths = pair.paths.len();
        match pair.peer.as_str() {
            "" => Err(ConvertError::Empty("peer of a path")),
            _ if paths > MAX_PATHS => Err(ConvertError::Range {
                field: "number of paths",
                value: paths as u64,
            }),
            peer => Ok(PairReport {
                peer: peer.into(),
                uid: pair.peer_uid.as_str().into(),
                paths: pair.paths.iter().map(path_from_proto).collect::<Result<_, _>>()?,
            }),
        }
    };
    report.pairs.iter().map(pair).collect()
}

/// Two generations at either end.
const MAX_PATHS: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_fills_both_slots_of_its_half() {
        let key = PublicKey::from_bytes([9; 32]).unwrap();
        let offer = key_to_offer(6, key, true, |slot| 51871 + u16::from(slot));
        let [first, second] = slots_from_offer(&offer).unwrap();
        assert!(first.pre_shared_keys && second.pre_shared_keys);
        assert_eq!((first.slot, first.port, first.generation), (2, 51873, 6));
        assert_eq!((second.slot, second.port, second.public_key), (3, 51874, key));
        for bad in [
            proto::KeyOffer {
                slot: 0,
                ..offer.clone()
            },
            proto::KeyOffer {
                generation: 7,
                ..offer.clone()
            },
            proto::KeyOffer {
                generation: 0,
                ..offer.clone()
            },
            proto::KeyOffer {
                port: 65535,
                ..offer.clone()
            },
        ] {
            assert!(slots_from_offer(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_agents_hold_and_see_survives_the_wire() {
        let key = PublicKey::from_bytes([9; 32]).unwrap();
        let held = [(1, key), (2, key)].into();
        assert_eq!(held_from_proto(&held_to_proto(&held)), Ok(held));
        let bad = proto::Held {
            public_keys: [(1, vec![0; 32])].into(),
        };
        assert!(held_from_proto(&bad).is_err());
        let path = |own| PathState {
            own,
            peer: 2,
            verified: own == 1,
            sending: own == 3,
            quiet: own == 5,
            conflict: (own == 3).then_some(PskConflict {
                own: None,
                peer: Some(PskId([7; 16])),
            }),
        };
        let pair = |paths: &[u64]| PairReport {
            peer: "b".into(),
            uid: "u".into(),
            paths: paths.iter().copied().map(path).collect(),
        };
        let pairs = vec![pair(&[1, 3, 5]), pair(&[])];
        assert_eq!(report_from_proto(&report_to_proto(&pairs)), Ok(pairs.clone()));
        assert!(report_from_proto(&report_to_proto(&[pair(&[1, 2, 3, 4, 5])])).is_err());
        let mut bad = report_to_proto(&pairs);
        bad.pairs[0].paths[1].conflict.as_mut().unwrap().peer.pop();
        assert!(report_from_proto(&bad).is_err());
        let forget = ForgetPsk {
            peer: "b".into(),
            own: 1,
            other: 2,
            id: PskId([7; 16]),
        };
        let wire = forget_to_proto(&forget);
        assert_eq!(forget_from_proto(&wire), Ok(forget));
        assert!(forget_from_proto(&proto::ForgetPsk { id: vec![], ..wire }).is_err());
    }
}
