//! Proof of possession of a WireGuard key.
//!
//! `keyd` sends a nonce and an ephemeral X25519 key; the agent answers with HMAC-SHA256, keyed with the
//! Diffie-Hellman secret of its private key and the ephemeral one, over the nonce, its node's UID, the public
//! key and the generation, under a label that says whether it agrees on pre-shared keys. Only the holder of the private key can compute it, and only for this challenge,
//! node and generation: no signature scheme is needed for a Diffie-Hellman key.

use aws_lc_rs::{
    hmac,
    rand::{SecureRandom as _, SystemRandom},
};
use warren_model::{NodeUid, PrivateKey, PublicKey, SlotKey};
use x25519_dalek::{PublicKey as DhPublic, StaticSecret};

use crate::proto;

/// Domain separation of the MAC.
const LABEL: &[u8] = b"warren-pop-v1";
/// The same for a key whose holder agrees on pre-shared keys.
const PSK_LABEL: &[u8] = b"warren-pop-psk-v1";

/// Why a proof is refused, or cannot be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProofError {
    /// The challenge's ephemeral key is not 32 bytes, or is a point of small order.
    #[error("the challenge's ephemeral key is not usable")]
    Ephemeral,
    /// The nonce is not 32 bytes.
    #[error("the challenge's nonce has {0} bytes: 32 are expected")]
    Nonce(usize),
    /// The private key does not belong to the challenged public key.
    #[error("the challenge is for another public key")]
    OtherKey,
    /// The secret is all zero: everybody could compute the MAC.
    #[error("the key agrees on an all-zero secret with every peer: it is refused")]
    ZeroSecret,
    /// The nonce is not the one of the open challenge (replayed, or too late).
    #[error("the proof answers a challenge that is not open")]
    Replay,
    /// The key was made without pre-shared keys, and is challenged as one with them.
    #[error("the challenge is for a key with pre-shared keys, which this one was made without")]
    PreSharedKeys,
    /// The MAC is wrong: the sender does not hold the private key, or is another node.
    #[error("the proof is wrong: the sender does not hold the private key")]
    Mac,
    /// No randomness.
    #[error("the system gave no random bytes")]
    Random,
}

/// An open challenge, `keyd`'s side. It is used up by one answer, right or wrong.
pub struct Challenge {
    slot: SlotKey,
    node: NodeUid,
    nonce: [u8; 32],
    ephemeral: StaticSecret,
}

impl std::fmt::Debug for Challenge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Challenge")
            .field("slot", &self.slot)
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}

impl Challenge {
    /// Opens a challenge with fresh randomness for a key that `node` offers.
    pub fn new(node: NodeUid, slot: SlotKey) -> Result<Self, ProofError> {
        let mut nonce = [0; 32];
        let mut ephemeral = [0; 32];
        let random = SystemRandom::new();
        random
            .fill(&mut nonce)
            .and_then(|()| random.fill(&mut ephemeral))
            .map_err(|_| ProofError::Random)?;
        Ok(Self {
            slot,
            node,
            nonce,
            ephemeral: StaticSecret::from(ephemeral),
        })
    }

    /// The offered key.
    pub fn slot(&self) -> &SlotKey {
        &self.slot
    }

    /// What is sent to the agent.
    pub fn message(&self) -> proto::KeyChallenge {
        proto::KeyChallenge {
            public_key: self.slot.public_key.as_bytes().to_vec(),
            nonce: self.nonce.to_vec(),
            ephemeral_key: DhPublic::from(&self.ephemeral).as_bytes().to_vec(),
            pre_shared_keys: self.slot.pre_shared_keys,
        }
    }

    /// Checks the answer. Returns the key, which is now proved.
    pub fn verify(self, answer: &proto::KeyProof) -> Result<SlotKey, ProofError> {
        if answer.public_key != self.slot.public_key.as_bytes() {
            return Err(ProofError::OtherKey);
        }
        if answer.nonce != self.nonce {
            return Err(ProofError::Replay);
        }
        let key = mac_key(&self.ephemeral, &DhPublic::from(*self.slot.public_key.as_bytes()))?;
        let text = mac_text(
            &self.nonce,
            &self.node,
            &self.slot.public_key,
            self.slot.generation,
            self.slot.pre_shared_keys,
        );
        // `hmac::verify` compares in constant time.
        hmac::verify(&key, &text, &answer.mac).map_err(|_| ProofError::Mac)?;
        Ok(self.slot)
    }
}

/// The agent's side: answers a challenge for its own key of that generation. `pre_shared_keys`: it was made with them.
pub fn answer(
    challenge: &proto::KeyChallenge,
    private: &PrivateKey,
    node: &NodeUid,
    generation: u64,
    pre_shared_keys: bool,
) -> Result<proto::KeyProof, ProofError> {
    if challenge.pre_shared_keys && !pre_shared_keys {
        return Err(ProofError::PreSharedKeys);
    }
    let secret = StaticSecret::from(*private.expose());
    let public = DhPublic::from(&secret);
    if challenge.public_key != public.as_bytes() {
        return Err(ProofError::OtherKey);
    }
    let nonce: [u8; 32] = challenge
        .nonce
        .as_slice()
        .try_into()
        .map_err(|_| ProofError::Nonce(challenge.nonce.len()))?;
    let ephemeral =
        PublicKey::try_from(challenge.ephemeral_key.as_slice()).map_err(|_| ProofError::Ephemeral)?;
    let public = PublicKey::from_bytes(public.to_bytes()).map_err(|_| ProofError::ZeroSecret)?;
    let key = mac_key(&secret, &DhPublic::from(*ephemeral.as_bytes()))?;
    let text = mac_text(&nonce, node, &public, generation, challenge.pre_shared_keys);
    let mac = hmac::sign(&key, &text);
    Ok(proto::KeyProof {
        public_key: challenge.public_key.clone(),
        nonce: nonce.to_vec(),
        mac: mac.as_ref().to_vec(),
    })
}

/// The public key of a private key.
pub fn public_key(private: &PrivateKey) -> PublicKey {
    let public = DhPublic::from(&StaticSecret::from(*private.expose()));
    // A clamped scalar times the base point is never of small order (RFC 7748 section 5 and 6.1).
    PublicKey::from_bytes(public.to_bytes()).expect("the public key of a clamped scalar is not of low order")
}

/// Makes a private key from the system's randomness.
pub fn generate_private_key() -> Result<PrivateKey, ProofError> {
    let mut bytes = zeroize::Zeroizing::new([0; 32]);
    SystemRandom::new()
        .fill(bytes.as_mut())
        .map_err(|_| ProofError::Random)?;
    Ok(PrivateKey::from_bytes(*bytes))
}

fn mac_key(own: &StaticSecret, other: &DhPublic) -> Result<hmac::Key, ProofError> {
    let shared = own.diffie_hellman(other);
    // RFC 7748 section 6.1: the all-zero check.
    if !shared.was_contributory() {
        return Err(ProofError::ZeroSecret);
    }
    Ok(hmac::Key::new(hmac::HMAC_SHA256, shared.as_bytes()))
}

fn mac_text(
    nonce: &[u8; 32],
    node: &NodeUid,
    key: &PublicKey,
    generation: u64,
    pre_shared_keys: bool,
) -> Vec<u8> {
    [
        if pre_shared_keys { PSK_LABEL } else { LABEL },
        nonce,
        node.as_str().as_bytes(),
        key.as_bytes(),
        &generation.to_be_bytes(),
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uid() -> NodeUid {
        "uid1".into()
    }

    fn slot(private: &PrivateKey) -> SlotKey {
        SlotKey {
            slot: 0,
            port: 51871,
            generation: 3,
            public_key: public_key(private),
            pre_shared_keys: false,
        }
    }

    fn private(n: u8) -> PrivateKey {
        PrivateKey::from_bytes([n; 32])
    }

    #[test]
    fn the_holder_proves_its_key() {
        let key = private(1);
        let challenge = Challenge::new(uid(), slot(&key)).unwrap();
        let proof = answer(&challenge.message(), &key, &uid(), 3, false).unwrap();
        assert_eq!(challenge.verify(&proof), Ok(slot(&key)));
    }

    #[test]
    fn another_key_node_generation_or_nonce_is_refused() {
        let key = private(1);
        let open = || Challenge::new(uid(), slot(&key)).unwrap();

        let challenge = open();
        let proof = answer(&challenge.message(), &key, &"uid2".into(), 3, false).unwrap();
        assert_eq!(challenge.verify(&proof), Err(ProofError::Mac));

        let challenge = open();
        let proof = answer(&challenge.message(), &key, &uid(), 4, false).unwrap();
        assert_eq!(challenge.verify(&proof), Err(ProofError::Mac));

        let old = open();
        let replayed = answer(&old.message(), &key, &uid(), 3, false).unwrap();
        assert_eq!(open().verify(&replayed), Err(ProofError::Replay));

        let challenge = open();
        assert_eq!(
            answer(&challenge.message(), &private(2), &uid(), 3, false),
            Err(ProofError::OtherKey)
        );

        // A thief who claims the key and answers with his own private one.
        let mut message = challenge.message();
        message.public_key = public_key(&private(2)).as_bytes().to_vec();
        let mut proof = answer(&message, &private(2), &uid(), 3, false).unwrap();
        proof.public_key = slot(&key).public_key.as_bytes().to_vec();
        assert_eq!(challenge.verify(&proof), Err(ProofError::Mac));

        let challenge = open();
        let mut proof = answer(&challenge.message(), &key, &uid(), 3, false).unwrap();
        proof.mac.truncate(16);
        assert_eq!(challenge.verify(&proof), Err(ProofError::Mac));
    }

    #[test]
    fn the_proof_says_whether_there_are_pre_shared_keys() {
        let key = private(1);
        let with = SlotKey {
            pre_shared_keys: true,
            ..slot(&key)
        };
        let open = |slot: &SlotKey| Challenge::new(uid(), slot.clone()).unwrap();
        let challenge = open(&with);
        let proof = answer(&challenge.message(), &key, &uid(), 3, true).unwrap();
        assert_eq!(challenge.verify(&proof), Ok(with.clone()));
        // A keyd that does not know of them publishes the key without.
        let challenge = open(&slot(&key));
        let proof = answer(&challenge.message(), &key, &uid(), 3, true).unwrap();
        assert_eq!(challenge.verify(&proof), Ok(slot(&key)));
        // Nobody on the way adds or takes them.
        let challenge = open(&with);
        assert_eq!(
            answer(&challenge.message(), &key, &uid(), 3, false),
            Err(ProofError::PreSharedKeys)
        );
        let mut message = challenge.message();
        message.pre_shared_keys = false;
        let proof = answer(&message, &key, &uid(), 3, true).unwrap();
        assert_eq!(challenge.verify(&proof), Err(ProofError::Mac));
    }

    #[test]
    fn an_agent_refuses_low_order_challenges() {
        let key = private(1);
        let mut message = Challenge::new(uid(), slot(&key)).unwrap().message();
        message.ephemeral_key = vec![0; 32];
        assert_eq!(
            answer(&message, &key, &uid(), 3, false),
            Err(ProofError::Ephemeral)
        );
        message.ephemeral_key = vec![1; 31];
        assert_eq!(
            answer(&message, &key, &uid(), 3, false),
            Err(ProofError::Ephemeral)
        );
    }
}
