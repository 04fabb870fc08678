//! Keys on the wire: offers, what agents hold, what they see of their paths.

use std::collections::BTreeMap;

use warren_model::{
    PublicKey, SlotKey,
    keys::{PairReport, PathState, slots_of},
};

use super::{ConvertError, slot_from_parts};
use crate::proto;

/// The offer of a key. `port_of`: the UDP port of a slot; those of neighbours follow each other.
pub fn key_to_offer(
    generation: u64,
    public_key: PublicKey,
    port_of: impl FnOnce(u8) -> u16,
) -> proto::KeyOffer {
    let [slot, _] = slots_of(generation);
    proto::KeyOffer {
        slot: slot.into(),
        port: port_of(slot).into(),
        generation,
        public_key: public_key.as_bytes().to_vec(),
    }
}

/// Parses the offer of a key: both slots that it fills. A slot that is not the first of its generation's half is refused.
pub fn slots_from_offer(offer: &proto::KeyOffer) -> Result<[SlotKey; 2], ConvertError> {
    let first = slot_from_parts(offer.slot, offer.port, offer.generation, &offer.public_key)?;
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
    let path = |path: &PathState| proto::PathState {
        own_generation: path.own,
        peer_generation: path.peer,
        verified: path.verified,
        sending: path.sending,
        quiet: path.quiet,
    };
    let pair = |pair: &PairReport| proto::PairState {
        peer: pair.peer.to_string(),
        peer_uid: pair.uid.to_string(),
        paths: pair.paths.iter().map(path).collect(),
    };
    proto::PathReport {
        pairs: pairs.iter().map(pair).collect(),
    }
}

/// Parses what an agent says of its paths.
pub fn report_from_proto(report: &proto::PathReport) -> Result<Vec<PairReport>, ConvertError> {
    let path = |path: &proto::PathState| PathState {
        own: path.own_generation,
        peer: path.peer_generation,
        verified: path.verified,
        sending: path.sending,
        quiet: path.quiet,
    };
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
                paths: pair.paths.iter().map(path).collect(),
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
        let offer = key_to_offer(6, key, |slot| 51871 + u16::from(slot));
        let [first, second] = slots_from_offer(&offer).unwrap();
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
        };
        let pair = |paths: &[u64]| PairReport {
            peer: "b".into(),
            uid: "u".into(),
            paths: paths.iter().copied().map(path).collect(),
        };
        let pairs = vec![pair(&[1, 3, 5]), pair(&[])];
        assert_eq!(report_from_proto(&report_to_proto(&pairs)), Ok(pairs));
        assert!(report_from_proto(&report_to_proto(&[pair(&[1, 2, 3, 4, 5])])).is_err());
    }
}
