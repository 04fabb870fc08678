use aws_lc_rs::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use proptest::prelude::*;

use super::*;

/// What this CPU has: the tests mean nothing for the rest, which the engine does without there.
fn kinds() -> impl Iterator<Item = Kind> {
    Kind::ALL.into_iter().filter(|kind| kind.is_there())
}

/// Each message by itself, by the other implementation.
fn reference(key: &[u8; 32], messages: &mut [u8], segment: usize, counters: &[u64; LANES]) {
    let key = LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, key).unwrap());
    for (message, counter) in messages.chunks_exact_mut(segment).zip(counters) {
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&counter.to_le_bytes());
        let (content, tag) = message[DATA_HEADER..].split_at_mut(segment - OVERHEAD);
        let made = key
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::empty(), content)
            .unwrap();
        tag.copy_from_slice(made.as_ref());
    }
}

/// Contents that carries like: all ones, all zeroes, and anything.
fn content(seed: u64, at: usize) -> u8 {
    match seed % 4 {
        0 => 0xff,
        1 => 0,
        2 => [0xff, 0][at / 16 % 2],
        _ => (seed.wrapping_mul(at as u64 * 2 + 1) >> 29) as u8,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Bit for bit.
    #[test]
    fn agrees_with_the_other_implementation(
        key in any::<[u8; 32]>(), size in 0usize..1600, count in 1usize..=LANES, seed in any::<u64>(),
        first in any::<u64>(), damage in prop::option::of(any::<usize>()),
    ) {
        for kind in kinds() {
        let lanes = Lanes::with(&key, kind);
        let segment = size + OVERHEAD;
        let counters: [u64; LANES] = std::array::from_fn(|lane| first.wrapping_add(lane as u64 * (seed % 3 + 1)));
        let plain: Vec<u8> = (0..segment * count).map(|at| content(seed, at)).collect();
        let (mut expected, mut sealed) = (plain.clone(), plain.clone());
        reference(&key, &mut expected, segment, &counters);
        lanes.seal(&mut sealed, segment, &counters);
        prop_assert_eq!(&sealed, &expected);
        let damaged = damage.map(|bit| {
            // Not in a header: that is not authenticated.
            let place = bit % (count * (size + TAG));
            let (message, at) = (place / (size + TAG), place % (size + TAG));
            sealed[message * segment + DATA_HEADER + at] ^= 1 << (bit % 8);
            message
        });
        let authentic = lanes.open(&mut sealed, Layout::packed(segment), &counters);
        for (message, authentic) in authentic.into_iter().enumerate().take(count) {
            prop_assert_eq!(authentic, damaged != Some(message));
            if authentic {
                let content = message * segment + DATA_HEADER..message * segment + DATA_HEADER + size;
                prop_assert_eq!(&sealed[content.clone()], &plain[content]);
            }
        }
        }
    }
}

#[test]
fn long_messages() {
    let (key, segment) = ([7; 32], 65_000 / 16 * 16 + 5);
    let counters = std::array::from_fn(|lane| lane as u64);
    for seed in 0..4 {
        let plain: Vec<u8> = (0..segment * 3).map(|at| content(seed, at)).collect();
        let mut expected = plain.clone();
        reference(&key, &mut expected, segment, &counters);
        for kind in kinds() {
            let mut sealed = plain.clone();
            Lanes::with(&key, kind).seal(&mut sealed, segment, &counters);
            assert!(sealed == expected, "{kind:?}, seed {seed}");
        }
    }
}

#[test]
fn the_last_reduction_at_its_edges() {
    // 2^130 - 5 in limbs, and numbers around it.
    let prime = [MASK44 - 4, MASK44, MASK42];
    for (h, expected) in [
        ([0, 0, 0], 0u128),
        ([prime[0] - 1, prime[1], prime[2]], u128::MAX - 5),
        (prime, 0),
        ([prime[0] + 1, prime[1], prime[2]], 1),
        ([MASK44, MASK44, MASK42], 4),
        // Limbs that were not carried: 2^44 in the first, the prime and 2^130 in all.
        ([1 << 44, 0, 0], 1 << 44),
        ([prime[0] + 5, prime[1], prime[2]], 5),
        ([3, 0, 1 << 42], 8),
    ] {
        assert_eq!(finish(h, [0, 0]), expected.to_le_bytes(), "{h:x?}");
        let sum = expected.wrapping_add(u128::MAX - 2);
        assert_eq!(finish(h, [u64::MAX - 2, u64::MAX]), sum.to_le_bytes(), "{h:x?}");
    }
}

#[test]
fn this_cpu_passes_its_test() {
    assert_eq!(Lanes::available(), kinds().next());
    assert!(kinds().all(self_test::passes));
}

/// Which is faster is for `cargo xtask bench tunnel` to say; here they only have to agree that they sealed something.
#[test]
fn every_cipher_can_be_measured() {
    for size in [64, 256, 576, 1000, 1420] {
        let measured = crate::engine::sealing_alone(size, std::time::Duration::from_millis(20));
        println!("{size} {measured:?}");
        assert_eq!(measured.len(), 1 + kinds().count());
        assert!(measured.iter().all(|(_, count, _)| *count > 0));
    }
}
