//! The cipher of many messages at once, bit for bit against the usual one.

use super::{
    super::{
        lanes::{Kind, LANES, Lanes},
        session::{Receiving, Sealing, Sending},
        transport::Layout,
    },
    Features, Source,
};

/// Seals with one half, one by one and all at once, and opens with the other. Which cipher does it depends on how many
/// messages there are.
pub(super) fn run(input: &[u8], features: &mut Features) {
    let mut source = Source(input);
    let key: [u8; 32] = source.array();
    let (count, size) = (1 + source.below(40), source.below(1600));
    let first = u64::from_le_bytes(source.array()) & !(1 << 63);
    let (pattern, damage) = (source.array::<2>(), source.flag().then(|| source.u16()));
    let segment = size + 32;
    let plain: Vec<u8> = (0..count * segment)
        .map(|at| match pattern[0] % 4 {
            0 => 0xff,
            1 => 0,
            2 => [0xff, 0][at / 16 % 2],
            _ => (at as u8).wrapping_mul(pattern[1]) ^ (at >> 8) as u8,
        })
        .collect();
    let now = std::time::Instant::now();
    let sending = std::sync::Arc::new(Sending::new(&key, 7).unwrap());
    let mut together = plain.clone();
    assert!(Sealing::new(sending.clone(), first).seal(&mut together, segment));
    let mut apart = plain.clone();
    for (number, message) in apart.chunks_mut(segment).enumerate() {
        assert!(Sealing::new(sending.clone(), first + number as u64).seal(message, segment));
    }
    assert!(together == apart, "{count} messages of {size} bytes");
    every_kind(&key, &plain, &apart, segment, first);
    let damaged = damage.map(|bit| {
        let bit = usize::from(bit) % (count * (size + 16) * 8);
        let (message, at) = (bit / 8 / (size + 16), bit / 8 % (size + 16));
        together[message * segment + 16 + at] ^= 1 << (bit % 8);
        message
    });
    // As they are, and with gaps between them.
    for gap in [0, 1 + usize::from(pattern[1])] {
        let layout = Layout {
            segment,
            pitch: segment + gap,
        };
        let mut spread = vec![0xdd; (count - 1) * layout.pitch + segment];
        for (to, from) in spread.chunks_mut(layout.pitch).zip(together.chunks(segment)) {
            to[..segment].copy_from_slice(from);
        }
        let receiving = Receiving::new(&key, now).unwrap();
        let (mut opened, mut drops) = (Vec::new(), 0);
        receiving.open_all(&mut spread, layout, now, &mut opened, |_| drops += 1);
        assert_eq!(drops, usize::from(damaged.is_some()));
        if size > 0 {
            let expected = (0..count).filter(|message| Some(*message) != damaged);
            assert_eq!(opened.len(), count - drops);
            for (range, message) in opened.iter().zip(expected) {
                let (start, plain_start) = (message * layout.pitch + 16, message * segment + 16);
                assert_eq!(*range, start..start + size);
                assert!(spread[range.clone()] == plain[plain_start..plain_start + size]);
            }
        }
        let gaps = spread.chunks(layout.pitch).flat_map(|chunk| &chunk[segment..]);
        assert!(
            gaps.into_iter().all(|byte| *byte == 0xdd),
            "written between messages"
        );
    }
    features.size(1, size);
    features.note(2, count as u64);
    features.note(3, (size % 64) as u64);
}

/// Each cipher that does many at once, also those that the engine would not choose here.
fn every_kind(key: &[u8; 32], plain: &[u8], sealed: &[u8], segment: usize, first: u64) {
    for kind in Kind::ALL.into_iter().filter(|kind| kind.is_there()) {
        let lanes = Lanes::with(key, kind);
        let messages = plain.chunks(LANES * segment).zip(sealed.chunks(LANES * segment));
        for (group, (plain, sealed)) in messages.enumerate() {
            let counters = std::array::from_fn(|lane| first + (group * LANES + lane) as u64);
            let mut own = sealed.to_vec();
            for (own, plain) in own.chunks_mut(segment).zip(plain.chunks(segment)) {
                own[16..].copy_from_slice(&plain[16..]);
            }
            lanes.seal(&mut own, segment, &counters);
            assert!(own == sealed, "{kind:?}");
            let authentic = lanes.open(&mut own, Layout::packed(segment), &counters);
            assert!(
                authentic
                    .iter()
                    .take(own.len() / segment)
                    .all(|authentic| *authentic)
            );
            for (own, plain) in own.chunks(segment).zip(plain.chunks(segment)) {
                assert!(own[16..segment - 16] == plain[16..segment - 16], "{kind:?}");
            }
        }
    }
}
