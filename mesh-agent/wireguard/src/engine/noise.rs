//! The handshake's cryptography: Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s as WireGuard uses it.
//!
//! No clock, no random numbers, no peers: messages in, messages and keys out. Source: sections 5.4.2 to 5.4.5 of the
//! WireGuard paper. Everything secret is wiped when dropped.

use aws_lc_rs::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use blake2::{
    Blake2s256, Blake2sMac, Digest as _,
    digest::{FixedOutput as _, Mac as _, consts::U16},
};
use hmac::SimpleHmac;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::{Zeroize as _, Zeroizing};

use super::image::{Damaged, Reader, Writer};

const CONSTRUCTION: &[u8] = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
const IDENTIFIER: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";

/// Bytes of a handshake initiation and of its answer.
pub(super) const INITIATION: usize = 148;
pub(super) const RESPONSE: usize = 92;

/// Message types, as the first byte; three zeroes follow.
pub(super) const TYPE_INITIATION: u8 = 1;
pub(super) const TYPE_RESPONSE: u8 = 2;

/// Bytes of a TAI64N timestamp.
pub(super) const TIMESTAMP: usize = 12;

const TAG: usize = 16;
const KEY: usize = 32;

/// A message that is not what it should be: forged, damaged, or with a key that cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refused;

/// The device's key pair.
pub(super) struct Static {
    pub(super) secret: StaticSecret,
    pub(super) public: PublicKey,
}

impl Static {
    pub(super) fn new(private: [u8; KEY]) -> Self {
        let secret = StaticSecret::from(private);
        Self {
            public: PublicKey::from(&secret),
            secret,
        }
    }
}

/// What both ends know of each other before a handshake.
pub(super) struct Pair<'a> {
    pub(super) own: &'a Static,
    pub(super) peer: &'a PublicKey,
    /// The Diffie-Hellman result of both static keys; see [`static_static`].
    pub(super) static_static: &'a [u8; KEY],
    /// Zero for none.
    pub(super) preshared_key: &'a [u8; KEY],
}

/// The keys of a session, from the view of one end.
pub(super) struct SessionKeys {
    pub(super) sending: Zeroizing<[u8; KEY]>,
    pub(super) receiving: Zeroizing<[u8; KEY]>,
}

/// An initiation that waits for its answer.
pub(super) struct Pending {
    symmetric: Symmetric,
    ephemeral: StaticSecret,
}

/// An authentic initiation that is to be answered.
#[derive(Debug)]
pub(super) struct Initiated {
    symmetric: Symmetric,
    ephemeral: PublicKey,
    pub(super) timestamp: [u8; TIMESTAMP],
    /// The initiator's session index.
    pub(super) sender: u32,
}

/// The chaining key and the transcript's hash.
#[derive(Clone)]
struct Symmetric {
    chaining: Zeroizing<[u8; KEY]>,
    hash: [u8; KEY],
}

impl std::fmt::Debug for Symmetric {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Symmetric")
    }
}

/// The Diffie-Hellman result of two static keys; refused where the peer's is of low order.
pub(super) fn static_static(own: &Static, peer: &PublicKey) -> Result<Zeroizing<[u8; KEY]>, Refused> {
    diffie_hellman(&own.secret, peer)
}

/// Writes an initiation without its authenticators (the last 32 bytes).
pub(super) fn initiate(
    pair: &Pair<'_>,
    sender: u32,
    ephemeral: [u8; KEY],
    timestamp: &[u8; TIMESTAMP],
    out: &mut [u8; INITIATION],
) -> Result<Pending, Refused> {
    let ephemeral = StaticSecret::from(ephemeral);
    let ephemeral_public = PublicKey::from(&ephemeral);
    let mut symmetric = Symmetric::new(pair.peer);
    out.fill(0);
    out[0] = TYPE_INITIATION;
    out[4..8].copy_from_slice(&sender.to_le_bytes());
    out[8..40].copy_from_slice(ephemeral_public.as_bytes());
    symmetric.ephemeral(&ephemeral_public);
    let key = symmetric.mix(&*diffie_hellman(&ephemeral, pair.peer)?);
    symmetric.seal(&key, pair.own.public.as_bytes(), &mut out[40..88]);
    let key = symmetric.mix(pair.static_static);
    symmetric.seal(&key, timestamp, &mut out[88..116]);
    Ok(Pending { symmetric, ephemeral })
}

/// Who an initiation claims to be from. Costs one Diffie-Hellman operation; proves nothing yet.
pub(super) fn claimed_peer(own: &Static, message: &[u8; INITIATION]) -> Result<[u8; KEY], Refused> {
    open_static(own, message).map(|(_, peer)| peer)
}

fn open_static(own: &Static, message: &[u8; INITIATION]) -> Result<(Symmetric, [u8; KEY]), Refused> {
    let ephemeral = public_at(message, 8);
    let mut symmetric = Symmetric::new(&own.public);
    symmetric.ephemeral(&ephemeral);
    let key = symmetric.mix(&*diffie_hellman(&own.secret, &ephemeral)?);
    let mut peer = [0; KEY];
    symmetric.open(&key, &message[40..88], &mut peer)?;
    Ok((symmetric, peer))
}

/// Opens an initiation of this peer. The authenticators are the caller's business.
pub(super) fn open_initiation(pair: &Pair<'_>, message: &[u8; INITIATION]) -> Result<Initiated, Refused> {
    let (mut symmetric, peer) = open_static(pair.own, message)?;
    if peer != *pair.peer.as_bytes() {
        return Err(Refused);
    }
    let key = symmetric.mix(pair.static_static);
    let mut timestamp = [0; TIMESTAMP];
    symmetric.open(&key, &message[88..116], &mut timestamp)?;
    Ok(Initiated {
        symmetric,
        ephemeral: public_at(message, 8),
        timestamp,
        sender: index_at(message, 4),
    })
}

/// Writes the answer without its authenticators (the last 32 bytes). The keys are the responder's.
pub(super) fn respond(
    pair: &Pair<'_>,
    initiated: Initiated,
    sender: u32,
    ephemeral: [u8; KEY],
    out: &mut [u8; RESPONSE],
) -> Result<SessionKeys, Refused> {
    let Initiated {
        mut symmetric,
        ephemeral: theirs,
        sender: receiver,
        ..
    } = initiated;
    let ephemeral = StaticSecret::from(ephemeral);
    let ephemeral_public = PublicKey::from(&ephemeral);
    out.fill(0);
    out[0] = TYPE_RESPONSE;
    out[4..8].copy_from_slice(&sender.to_le_bytes());
    out[8..12].copy_from_slice(&receiver.to_le_bytes());
    out[12..44].copy_from_slice(ephemeral_public.as_bytes());
    symmetric.ephemeral(&ephemeral_public);
    symmetric.mix(&*diffie_hellman(&ephemeral, &theirs)?);
    symmetric.mix(&*diffie_hellman(&ephemeral, pair.peer)?);
    let key = symmetric.mix_preshared(pair.preshared_key);
    symmetric.seal(&key, &[], &mut out[44..60]);
    let (theirs, ours) = symmetric.split();
    Ok(SessionKeys {
        sending: ours,
        receiving: theirs,
    })
}

impl Pending {
    /// Writes the initiation for a successor.
    pub(super) fn write(&self, out: &mut Writer) {
        out.raw(&*self.symmetric.chaining);
        out.raw(&self.symmetric.hash);
        out.raw(self.ephemeral.as_bytes());
    }

    /// What [`Self::write`] wrote.
    pub(super) fn read(from: &mut Reader<'_>) -> Result<Self, Damaged> {
        Ok(Self {
            symmetric: Symmetric {
                chaining: from.secret()?,
                hash: from.array()?,
            },
            ephemeral: StaticSecret::from(*from.secret()?),
        })
    }

    /// Opens the answer. The keys are the initiator's.
    pub(super) fn finish(&self, pair: &Pair<'_>, message: &[u8; RESPONSE]) -> Result<SessionKeys, Refused> {
        let theirs = public_at(message, 12);
        let mut symmetric = self.symmetric.clone();
        symmetric.ephemeral(&theirs);
        symmetric.mix(&*diffie_hellman(&self.ephemeral, &theirs)?);
        symmetric.mix(&*diffie_hellman(&pair.own.secret, &theirs)?);
        let key = symmetric.mix_preshared(pair.preshared_key);
        symmetric.open(&key, &message[44..60], &mut [])?;
        let (sending, receiving) = symmetric.split();
        Ok(SessionKeys { sending, receiving })
    }
}

impl Symmetric {
    fn new(responder: &PublicKey) -> Self {
        let chaining = hash(&[CONSTRUCTION]);
        let identified = hash(&[&chaining, IDENTIFIER]);
        Self {
            chaining: Zeroizing::new(chaining),
            hash: hash(&[&identified, responder.as_bytes()]),
        }
    }

    fn ephemeral(&mut self, key: &PublicKey) {
        self.hash = hash(&[&self.hash, key.as_bytes()]);
        let [chaining] = derive(&self.chaining, key.as_bytes());
        self.chaining = chaining;
    }

    /// Mixes a secret in; a key that only who knows it has.
    fn mix(&mut self, secret: &[u8; KEY]) -> Zeroizing<[u8; KEY]> {
        let [chaining, key] = derive(&self.chaining, secret);
        self.chaining = chaining;
        key
    }

    fn mix_preshared(&mut self, secret: &[u8; KEY]) -> Zeroizing<[u8; KEY]> {
        let [chaining, hashed, key] = derive(&self.chaining, secret);
        self.chaining = chaining;
        self.hash = hash(&[&self.hash, &*hashed]);
        key
    }

    /// Seals to `out`, which has room for the tag.
    fn seal(&mut self, key: &[u8; KEY], content: &[u8], out: &mut [u8]) {
        let (text, tag) = out.split_at_mut(content.len());
        text.copy_from_slice(content);
        let sealed = cipher(key)
            .and_then(|cipher| {
                cipher
                    .seal_in_place_separate_tag(zero_nonce(), Aad::from(&self.hash), text)
                    .map_err(|_| Refused)
            })
            .map(|made| tag.copy_from_slice(made.as_ref()));
        debug_assert!(sealed.is_ok(), "32-byte keys and short texts are always accepted");
        if sealed.is_err() {
            // Never send what is not sealed.
            out.fill(0);
        }
        self.hash = hash(&[&self.hash, out]);
    }

    fn open(&mut self, key: &[u8; KEY], sealed: &[u8], out: &mut [u8]) -> Result<(), Refused> {
        let mut buffer = [0; KEY + TAG];
        let buffer = &mut buffer[..sealed.len()];
        buffer.copy_from_slice(sealed);
        let opened = cipher(key)?
            .open_in_place(zero_nonce(), Aad::from(&self.hash), buffer)
            .map_err(|_| Refused)?;
        out.copy_from_slice(opened);
        self.hash = hash(&[&self.hash, sealed]);
        Ok(())
    }

    /// The keys of the initiator's and of the responder's messages.
    fn split(self) -> (Zeroizing<[u8; KEY]>, Zeroizing<[u8; KEY]>) {
        let [initiator, responder] = derive(&self.chaining, &[]);
        (initiator, responder)
    }
}

fn cipher(key: &[u8; KEY]) -> Result<LessSafeKey, Refused> {
    let key = UnboundKey::new(&CHACHA20_POLY1305, key).map_err(|_| Refused)?;
    Ok(LessSafeKey::new(key))
}

fn zero_nonce() -> Nonce {
    // Every key of a handshake seals one text.
    Nonce::assume_unique_for_key([0; NONCE_LEN])
}

/// Refused when the result says nothing about our secret: the other key is of low order (RFC 7748, section 6.1).
fn diffie_hellman(secret: &StaticSecret, public: &PublicKey) -> Result<Zeroizing<[u8; KEY]>, Refused> {
    let shared = secret.diffie_hellman(public);
    match shared.was_contributory() {
        true => Ok(Zeroizing::new(shared.to_bytes())),
        false => Err(Refused),
    }
}

/// BLAKE2s of the parts, one after the other.
pub(super) fn hash(parts: &[&[u8]]) -> [u8; KEY] {
    let mut hash = Blake2s256::new();
    for part in parts {
        hash.update(part);
    }
    hash.finalize().into()
}

/// Keyed BLAKE2s of 16 bytes.
pub(super) fn mac(key: &[u8], parts: &[&[u8]]) -> [u8; 16] {
    // A key of at most 32 bytes is always accepted.
    let Ok(mut mac) = Blake2sMac::<U16>::new_from_slice(key) else {
        debug_assert!(false, "key of {} bytes", key.len());
        return [0; 16];
    };
    for part in parts {
        mac.update(part);
    }
    mac.finalize_fixed().into()
}

fn hmac(key: &[u8; KEY], parts: &[&[u8]]) -> Zeroizing<[u8; KEY]> {
    let Ok(mut mac) = SimpleHmac::<Blake2s256>::new_from_slice(key) else {
        debug_assert!(false, "HMAC takes keys of every length");
        return Zeroizing::default();
    };
    for part in parts {
        mac.update(part);
    }
    let mut output = mac.finalize_fixed();
    let result = Zeroizing::new(output.into());
    output.as_mut_slice().zeroize();
    result
}

/// HKDF (RFC 5869) with BLAKE2s: N keys of the chaining key and an input.
fn derive<const N: usize>(chaining: &[u8; KEY], input: &[u8]) -> [Zeroizing<[u8; KEY]>; N] {
    let extracted = hmac(chaining, &[input]);
    let mut last: Zeroizing<[u8; KEY]> = Zeroizing::default();
    std::array::from_fn(|number| {
        let counter = [number as u8 + 1];
        let before: &[u8] = if number == 0 { &[] } else { &*last };
        let next = hmac(&extracted, &[before, &counter]);
        last.copy_from_slice(&*next);
        next
    })
}

fn public_at(message: &[u8], at: usize) -> PublicKey {
    let mut bytes = [0; KEY];
    bytes.copy_from_slice(&message[at..at + KEY]);
    PublicKey::from(bytes)
}

/// The little-endian number at this place, which must be inside.
pub(super) fn index_at(message: &[u8], at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&message[at..at + 4]);
    u32::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct End {
        own: Static,
        peer: PublicKey,
        shared: Zeroizing<[u8; KEY]>,
        preshared_key: [u8; KEY],
    }

    impl End {
        fn pair(&self) -> Pair<'_> {
            Pair {
                own: &self.own,
                peer: &self.peer,
                static_static: &self.shared,
                preshared_key: &self.preshared_key,
            }
        }
    }

    fn ends(preshared: [u8; 2]) -> (End, End) {
        let (a, b) = (Static::new([1; 32]), Static::new([2; 32]));
        let (public_a, public_b) = (a.public, b.public);
        let end = |own: Static, peer: PublicKey, preshared: u8| End {
            shared: static_static(&own, &peer).unwrap(),
            own,
            peer,
            preshared_key: [preshared; 32],
        };
        (end(a, public_b, preshared[0]), end(b, public_a, preshared[1]))
    }

    #[test]
    fn both_ends_get_the_same_keys() {
        let (a, b) = ends([7, 7]);
        let (mut first, mut second) = ([0; INITIATION], [0; RESPONSE]);
        let pending = initiate(&a.pair(), 0x0102_0304, [3; 32], &[9; 12], &mut first).unwrap();
        assert_eq!(claimed_peer(&b.own, &first), Ok(*a.own.public.as_bytes()));
        let initiated = open_initiation(&b.pair(), &first).unwrap();
        assert_eq!((initiated.timestamp, initiated.sender), ([9; 12], 0x0102_0304));
        let theirs = respond(&b.pair(), initiated, 5, [4; 32], &mut second).unwrap();
        assert_eq!((index_at(&second, 4), index_at(&second, 8)), (5, 0x0102_0304));
        let ours = pending.finish(&a.pair(), &second).unwrap();
        assert_eq!(*ours.sending, *theirs.receiving);
        assert_eq!(*ours.receiving, *theirs.sending);
        assert_ne!(*ours.sending, *ours.receiving);
    }

    #[test]
    fn a_changed_bit_anywhere_is_refused() {
        let (a, b) = ends([0, 0]);
        let (mut first, mut second) = ([0; INITIATION], [0; RESPONSE]);
        let pending = initiate(&a.pair(), 1, [3; 32], &[9; 12], &mut first).unwrap();
        for at in 8..116 {
            let mut changed = first;
            changed[at] ^= 0x01;
            assert!(open_initiation(&b.pair(), &changed).is_err(), "byte {at}");
        }
        let initiated = open_initiation(&b.pair(), &first).unwrap();
        respond(&b.pair(), initiated, 5, [4; 32], &mut second).unwrap();
        for at in 12..60 {
            let mut changed = second;
            changed[at] ^= 0x01;
            assert!(pending.finish(&a.pair(), &changed).is_err(), "byte {at}");
        }
        assert!(pending.finish(&a.pair(), &second).is_ok());
    }

    #[test]
    fn another_preshared_key_is_refused_by_the_initiator() {
        let (a, b) = ends([1, 2]);
        let (mut first, mut second) = ([0; INITIATION], [0; RESPONSE]);
        let pending = initiate(&a.pair(), 1, [3; 32], &[9; 12], &mut first).unwrap();
        let initiated = open_initiation(&b.pair(), &first).unwrap();
        respond(&b.pair(), initiated, 5, [4; 32], &mut second).unwrap();
        assert!(pending.finish(&a.pair(), &second).is_err());
    }

    #[test]
    fn keys_of_low_order_emit_nothing() {
        let own = Static::new([1; 32]);
        let mut one = [0; 32];
        one[0] = 1;
        for low in [[0; 32], one] {
            assert!(static_static(&own, &PublicKey::from(low)).is_err());
            let mut message = [0; INITIATION];
            message[8..40].copy_from_slice(&low);
            assert!(claimed_peer(&own, &message).is_err());
        }
    }
}
