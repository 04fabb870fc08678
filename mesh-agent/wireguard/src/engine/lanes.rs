//! ChaCha20-Poly1305 (RFC 8439) of up to 16 messages of one size at once, one message in each lane of AVX-512 registers; or
//! of 8 with AVX2 (`avx2`).
//!
//! A stream of a tunnel is many messages of the same size under one key, which differ in their counters only. Doing all
//! of them at once keeps the vector unit busy in both halves: ChaCha20's state is one register per word, with a message
//! in each of its 16 lanes; Poly1305's accumulators are three limbs of 44 bits in two registers of eight lanes.
//!
//! There is no secret-dependent branch or address. Used only where [`Lanes::available`] has found the CPU's features and
//! agreed with the other implementation on known messages.
#![expect(unsafe_code, reason = "vector intrinsics on pointers")]

use std::sync::OnceLock;

use zeroize::Zeroizing;

use super::transport::{DATA_HEADER, Layout, OVERHEAD, TAG};

/// Messages that are done at once, at most.
pub(super) const LANES: usize = 16;

/// Bytes of content up to which AVX2 gains something (measured on a Zen 5: 1.5 times as fast with 64, 1.3 with 256, slower
/// with 576).
const SHORT: usize = 320;

const SIGMA: [u32; 4] = [0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574];

const MASK44: u64 = (1 << 44) - 1;
const MASK42: u64 = (1 << 42) - 1;

/// A key, and how it is used.
pub(super) struct Lanes {
    key: Zeroizing<[u32; 8]>,
    kind: Kind,
}

/// What the CPU has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// AVX-512 (F, BW, IFMA): 16 messages at once.
    Avx512,
    /// 8 messages at once.
    Avx2,
}

impl Kind {
    /// The better one first.
    pub(super) const ALL: [Self; 2] = [Self::Avx512, Self::Avx2];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
        }
    }

    /// Whether this CPU has it.
    pub(super) fn is_there(self) -> bool {
        match self {
            Self::Avx512 => avx512::has_features(),
            Self::Avx2 => avx2::has_features(),
        }
    }

    /// Messages that are done at once.
    pub(super) fn width(self) -> usize {
        match self {
            Self::Avx512 => LANES,
            Self::Avx2 => avx2::WIDTH,
        }
    }
}

/// Messages in one buffer: where the first content begins, how far they are apart, how many bytes each content has.
#[derive(Clone, Copy)]
struct Batch {
    base: *mut u8,
    stride: usize,
    len: usize,
    count: usize,
}

impl Lanes {
    /// `None` where the CPU cannot, or where it did not agree with the other implementation.
    pub(super) fn new(key: &[u8; 32]) -> Option<Self> {
        Self::available().map(|kind| Self::with(key, kind))
    }

    /// The CPU must have what `kind` needs.
    pub(super) fn with(key: &[u8; 32], kind: Kind) -> Self {
        assert!(kind.is_there(), "this CPU has no {}", kind.name());
        let mut words = Zeroizing::new([0; 8]);
        for (word, bytes) in words.iter_mut().zip(key.chunks_exact(4)) {
            *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        Self { key: words, kind }
    }

    /// What this CPU has; found out, and tested, once.
    pub(super) fn available() -> Option<Kind> {
        static AVAILABLE: OnceLock<Option<Kind>> = OnceLock::new();
        *AVAILABLE.get_or_init(|| {
            let mut kinds = Kind::ALL.into_iter();
            kinds.find(|kind| kind.is_there() && self_test::passes(*kind))
        })
    }

    /// Messages that are done at once.
    pub(super) fn width(&self) -> usize {
        self.kind.width()
    }

    /// With fewer messages of `segment` bytes the usual way is faster.
    pub(super) fn worthwhile(&self, segment: usize) -> usize {
        match self.kind {
            Kind::Avx512 => 7,
            // The usual way has AVX2 as well, for the blocks of one message: it pays for short ones, where those are few.
            Kind::Avx2 if segment <= SHORT + OVERHEAD => 6,
            Kind::Avx2 => usize::MAX,
        }
    }

    /// Seals the contents of up to 16 messages of `segment` bytes in place, and writes their tags. Headers are the caller's.
    pub(super) fn seal(&self, messages: &mut [u8], segment: usize, counters: &[u64; LANES]) {
        let width = self.width();
        for (messages, counters) in messages.chunks_mut(width * segment).zip(counters.chunks(width)) {
            let tags = self.tags(messages, Layout::packed(segment), counters, true);
            for (message, tag) in messages.chunks_exact_mut(segment).zip(tags) {
                message[segment - TAG..].copy_from_slice(&tag);
            }
        }
    }

    /// Encrypts or decrypts as many messages as are done at once, and computes their tags.
    fn tags(
        &self,
        messages: &mut [u8],
        layout: Layout,
        counters: &[u64],
        sealing: bool,
    ) -> [[u8; TAG]; LANES] {
        let batch = batch(messages, layout, self.width());
        let mut tags = [[0; TAG]; LANES];
        // SAFETY: `Self` exists only where the features do; the batch lies within `messages`.
        unsafe {
            match (self.kind, counters.first_chunk(), counters.first_chunk()) {
                (Kind::Avx512, Some(counters), _) if sealing => {
                    tags = avx512::seal(&self.key, batch, counters)
                }
                (Kind::Avx512, Some(counters), _) => tags = avx512::open(&self.key, batch, counters),
                (Kind::Avx2, _, Some(counters)) => {
                    let made = match sealing {
                        true => avx2::seal(&self.key, batch, counters),
                        false => avx2::open(&self.key, batch, counters),
                    };
                    tags[..avx2::WIDTH].copy_from_slice(&made);
                }
                _ => debug_assert!(false, "too few counters"),
            }
        }
        tags
    }

    /// Opens the contents of up to 16 messages of full size in place. Which are authentic; the content of others is left
    /// without meaning.
    pub(super) fn open(&self, messages: &mut [u8], layout: Layout, counters: &[u64; LANES]) -> [bool; LANES] {
        let (width, Layout { segment, pitch }) = (self.width(), layout);
        let mut authentic = [false; LANES];
        let batches = messages.chunks_mut(width * pitch).zip(counters.chunks(width));
        for ((messages, counters), authentic) in batches.zip(authentic.chunks_mut(width)) {
            let tags = self.tags(messages, layout, counters, false);
            for ((message, tag), authentic) in messages.chunks(pitch).zip(tags).zip(authentic) {
                let sent = &message[segment - TAG..segment];
                *authentic = aws_lc_rs::constant_time::verify_slices_are_equal(sent, &tag).is_ok();
            }
        }
        authentic
    }
}

fn batch(messages: &mut [u8], layout: Layout, width: usize) -> Batch {
    let Layout { segment, pitch } = layout;
    assert!(segment >= OVERHEAD && pitch >= segment);
    let count = layout.whole(messages.len());
    // None is cut short: the last one begins and ends within the buffer, and so do those before it.
    assert!((1..=width).contains(&count) && layout.count(messages.len()) == count);
    Batch {
        // Of the first message, which has this many bytes.
        base: messages[DATA_HEADER..].as_mut_ptr(),
        stride: pitch,
        len: segment - OVERHEAD,
        count,
    }
}

/// Reduces modulo 2^130 - 5 and adds the pad modulo 2^128, without branches.
fn finish(h: [u64; 3], pad: [u64; 2]) -> [u8; TAG] {
    let [mut h0, mut h1, mut h2] = h;
    // Twice around brings every carry home.
    for _ in 0..2 {
        h1 += h0 >> 44;
        h0 &= MASK44;
        h2 += h1 >> 44;
        h1 &= MASK44;
        h0 += (h2 >> 42) * 5;
        h2 &= MASK42;
    }
    h1 += h0 >> 44;
    h0 &= MASK44;
    h2 += h1 >> 44;
    h1 &= MASK44;
    // h + 5 - 2^130: taken where it is not negative.
    let g0 = h0 + 5;
    let g1 = h1 + (g0 >> 44);
    let g2 = (h2 + (g1 >> 44)).wrapping_sub(1 << 42);
    let keep = (g2 >> 63).wrapping_neg();
    let pick = |h: u64, g: u64| (h & keep) | (g & !keep);
    let (h0, h1, h2) = (
        pick(h0, g0 & MASK44),
        pick(h1, g1 & MASK44),
        pick(h2, g2 & MASK42),
    );
    let number = u128::from(h0) | u128::from(h1) << 44 | u128::from(h2) << 88;
    let pad = u128::from(pad[0]) | u128::from(pad[1]) << 64;
    number.wrapping_add(pad).to_le_bytes()
}

#[path = "lanes_avx2.rs"]
mod avx2;
#[path = "lanes_avx512.rs"]
mod avx512;

#[path = "lanes_self_test.rs"]
mod self_test;

#[cfg(test)]
#[path = "lanes_tests.rs"]
mod tests;
