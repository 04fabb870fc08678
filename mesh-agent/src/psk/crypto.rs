//! The key of an offer and its answer: ML-KEM-768 (FIPS 203) and X25519 (RFC 7748), so that whoever breaks one of them has
//! nothing yet, by HKDF-SHA256 (RFC 5869) over both secrets. It is bound to the WireGuard keys of both ends and to
//! everything that was sent.

use aws_lc_rs::{
    agreement::{self, EphemeralPrivateKey, UnparsedPublicKey, X25519},
    digest,
    error::Unspecified,
    hkdf::{self, HKDF_SHA256},
    kem::{Ciphertext, DecapsulationKey, EncapsulationKey, ML_KEM_768},
    rand::SystemRandom,
};
use warren_agent_core::psk::message::{ANSWER, OFFER};
use warren_model::{PreSharedKey, PublicKey};
use zeroize::Zeroizing;

const LABEL: &[u8] = b"warren-psk-v1";
/// Bytes of an X25519 public key and of either secret.
const X: usize = 32;

/// The WireGuard keys of the two ends.
#[derive(Debug, Clone, Copy)]
pub(super) struct Roles {
    /// Of the end that begins.
    pub(super) begins: PublicKey,
    /// Of the other.
    pub(super) answers: PublicKey,
}

/// The secret parts of an offer, and what was sent of it.
pub(super) struct Offer {
    x25519: EphemeralPrivateKey,
    kem: DecapsulationKey,
    public: Vec<u8>,
}

impl Offer {
    /// A fresh one.
    pub(super) fn new() -> Result<Self, Unspecified> {
        let x25519 = EphemeralPrivateKey::generate(&X25519, &SystemRandom::new())?;
        let kem = DecapsulationKey::generate(&ML_KEM_768)?;
        let mut public = Vec::with_capacity(OFFER);
        public.extend(x25519.compute_public_key()?.as_ref());
        public.extend(kem.encapsulation_key()?.key_bytes()?.as_ref());
        if public.len() != OFFER {
            return Err(Unspecified);
        }
        Ok(Self { x25519, kem, public })
    }

    /// What is sent of it.
    pub(super) fn public(&self) -> &[u8] {
        &self.public
    }

    /// The key, from the answer.
    pub(super) fn finish(self, roles: Roles, answer: &[u8]) -> Result<PreSharedKey, Unspecified> {
        let (x25519, ciphertext) = split(answer, ANSWER)?;
        let kem = self.kem.decapsulate(Ciphertext::from(ciphertext))?;
        agree(self.x25519, x25519, |x25519| {
            derive(roles, &self.public, answer, kem.as_ref(), x25519)
        })
    }
}

/// The key and the answer to an offer.
pub(super) fn answer(roles: Roles, offer: &[u8]) -> Result<(PreSharedKey, Vec<u8>), Unspecified> {
    let (x25519, kem) = split(offer, OFFER)?;
    let own = EphemeralPrivateKey::generate(&X25519, &SystemRandom::new())?;
    let kem = EncapsulationKey::new(&ML_KEM_768, kem).map_err(|_| Unspecified)?;
    let (ciphertext, kem) = kem.encapsulate()?;
    let mut answer = Vec::with_capacity(ANSWER);
    answer.extend(own.compute_public_key()?.as_ref());
    answer.extend(ciphertext.as_ref());
    if answer.len() != ANSWER {
        return Err(Unspecified);
    }
    let key = agree(own, x25519, |x25519| {
        derive(roles, offer, &answer, kem.as_ref(), x25519)
    })?;
    Ok((key, answer))
}

fn split(bytes: &[u8], length: usize) -> Result<(&[u8], &[u8]), Unspecified> {
    match bytes.split_at_checked(X) {
        Some(parts) if bytes.len() == length => Ok(parts),
        _ => Err(Unspecified),
    }
}

/// Refuses public keys that lead to an all-zero secret (RFC 7748 section 6.1).
fn agree(
    own: EphemeralPrivateKey,
    other: &[u8],
    derive: impl FnOnce(&[u8]) -> Result<PreSharedKey, Unspecified>,
) -> Result<PreSharedKey, Unspecified> {
    agreement::agree_ephemeral(
        own,
        UnparsedPublicKey::new(&X25519, other),
        Unspecified,
        |secret| match secret.iter().all(|byte| *byte == 0) {
            true => Err(Unspecified),
            false => derive(secret),
        },
    )
}

fn derive(
    roles: Roles,
    offer: &[u8],
    answer: &[u8],
    kem: &[u8],
    x25519: &[u8],
) -> Result<PreSharedKey, Unspecified> {
    let mut secrets = Zeroizing::new([0; 2 * X]);
    if kem.len() != X || x25519.len() != X {
        return Err(Unspecified);
    }
    secrets[..X].copy_from_slice(kem);
    secrets[X..].copy_from_slice(x25519);
    let mut transcript = digest::Context::new(&digest::SHA256);
    // All of fixed length: no other parts make the same bytes.
    for part in [
        roles.begins.as_bytes().as_slice(),
        roles.answers.as_bytes(),
        offer,
        answer,
    ] {
        transcript.update(part);
    }
    let transcript = transcript.finish();
    let mut key = Zeroizing::new([0; 32]);
    hkdf::Salt::new(HKDF_SHA256, LABEL)
        .extract(secrets.as_slice())
        .expand(&[LABEL, transcript.as_ref()], HKDF_SHA256)?
        .fill(key.as_mut_slice())?;
    PreSharedKey::from_bytes(&key).ok_or(Unspecified)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> PublicKey {
        PublicKey::from_bytes([n; 32]).unwrap()
    }

    fn roles() -> Roles {
        Roles {
            begins: key(2),
            answers: key(3),
        }
    }

    #[test]
    fn both_ends_get_the_same_key_and_never_the_same_twice() {
        let mut keys = vec![];
        for _ in 0..3 {
            let offer = Offer::new().unwrap();
            let (theirs, bytes) = answer(roles(), offer.public()).unwrap();
            let ours = offer.finish(roles(), &bytes).unwrap();
            assert!(ours == theirs);
            assert!(!keys.contains(&ours));
            keys.push(ours);
        }
    }

    #[test]
    fn the_key_depends_on_everything_that_was_sent_and_on_both_ends() {
        let swapped = Roles {
            begins: key(3),
            answers: key(2),
        };
        let other = Roles {
            answers: key(4),
            ..roles()
        };
        for roles_of_begins in [swapped, other] {
            let offer = Offer::new().unwrap();
            let (theirs, bytes) = answer(roles(), offer.public()).unwrap();
            assert!(offer.finish(roles_of_begins, &bytes).unwrap() != theirs);
        }
        // A changed answer gives another key or none.
        for at in [0, 31, 32, ANSWER - 1] {
            let offer = Offer::new().unwrap();
            let (theirs, mut bytes) = answer(roles(), offer.public()).unwrap();
            bytes[at] ^= 1;
            assert!(
                offer
                    .finish(roles(), &bytes)
                    .ok()
                    .is_none_or(|ours| ours != theirs),
                "{at}"
            );
        }
        // Secrets alone do not make it either.
        let one = derive(roles(), &[1; OFFER], &[2; ANSWER], &[3; 32], &[4; 32]).unwrap();
        for key in [
            derive(roles(), &[0; OFFER], &[2; ANSWER], &[3; 32], &[4; 32]),
            derive(roles(), &[1; OFFER], &[0; ANSWER], &[3; 32], &[4; 32]),
            derive(roles(), &[1; OFFER], &[2; ANSWER], &[0; 32], &[4; 32]),
            derive(roles(), &[1; OFFER], &[2; ANSWER], &[3; 32], &[0; 32]),
        ] {
            assert!(key.unwrap() != one);
        }
    }

    #[test]
    fn what_is_no_offer_or_answer_is_refused() {
        let good = Offer::new().unwrap();
        let mut zero = good.public().to_vec();
        zero[..32].fill(0);
        // Coefficients of an ML-KEM key are below 3329 (FIPS 203 section 7.2).
        let mut beyond = good.public().to_vec();
        beyond[32..64].fill(0xff);
        for bad in [&[][..], &good.public()[1..], &zero, &beyond] {
            assert!(answer(roles(), bad).is_err());
        }
        let (_, bytes) = answer(roles(), good.public()).unwrap();
        let mut zero = bytes.clone();
        zero[..32].fill(0);
        assert!(good.finish(roles(), &zero).is_err());
        assert!(Offer::new().unwrap().finish(roles(), &bytes[1..]).is_err());
    }
}
