//! A wrong result would be a tunnel that leaks or is deaf: better a slow one.

use aws_lc_rs::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

use super::{Kind, LANES, Lanes, Layout, OVERHEAD};

const KEY: [u8; 32] = *b"a key that is used for test only";
const SIZES: [usize; 8] = [0, 1, 16, 63, 64, 257, 1420, 1436];

/// Whether known messages are sealed as the other implementation does it, and opened again.
pub(super) fn passes(kind: Kind) -> bool {
    let Ok(key) = UnboundKey::new(&CHACHA20_POLY1305, &KEY) else {
        return false;
    };
    let (key, lanes) = (LessSafeKey::new(key), Lanes::with(&KEY, kind));
    SIZES.into_iter().all(|size| agrees(&key, &lanes, size))
}

fn agrees(key: &LessSafeKey, lanes: &Lanes, size: usize) -> bool {
    let segment = size + OVERHEAD;
    let counters: [u64; LANES] = std::array::from_fn(|lane| (u64::MAX >> 20) + lane as u64);
    let plain: Vec<u8> = (0..segment * LANES).map(|n| ((n * 31) >> 3) as u8).collect();
    let (mut expected, mut sealed) = (plain.clone(), plain.clone());
    for (message, counter) in expected.chunks_exact_mut(segment).zip(counters) {
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&counter.to_le_bytes());
        let (content, tag) = message[16..].split_at_mut(size);
        let nonce = Nonce::assume_unique_for_key(nonce);
        match key.seal_in_place_separate_tag(nonce, Aad::empty(), content) {
            Ok(made) => tag.copy_from_slice(made.as_ref()),
            Err(_) => return false,
        }
    }
    lanes.seal(&mut sealed, segment, &counters);
    if sealed != expected {
        return false;
    }
    // Of one message a bit is changed.
    sealed[3 * segment + segment - 1] ^= 0x80;
    let authentic = lanes.open(&mut sealed, Layout::packed(segment), &counters);
    let contents = |messages: &[u8]| -> Vec<Vec<u8>> {
        let messages = messages.chunks_exact(segment);
        messages.map(|message| message[16..16 + size].to_vec()).collect()
    };
    authentic == std::array::from_fn(|lane| lane != 3) && contents(&sealed) == contents(&plain)
}
