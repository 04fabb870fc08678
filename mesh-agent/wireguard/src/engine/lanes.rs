//! ChaCha20-Poly1305 (RFC 8439) of up to 16 messages of one size at once, one message in each lane of AVX-512 registers; or
//! of 8 with AVX2 (`avx2`).
//!
//! A stream of a tunnel is many messages of the same size under one key, which differ in their counters only. Doing all
//! of them at once keeps the vector unit busy in both halves: ChaCha20's state is one register per word, with a message
//! in each of its 16 lanes; Poly1305's accumulators are three limbs of 44 bits in two registers of eight lanes.
//!
//! There is no secret-dependent branch or address. Used only where [`Lanes::available`] has found the CPU's features and
//! agreed with the other implementation on known messages.
#![expect(unsafe_code, reason = "AVX-512 intrinsics on pointers")]

use std::{
    arch::x86_64::{
        __m512i, _mm512_add_epi32, _mm512_add_epi64, _mm512_and_si512, _mm512_castsi512_si256,
        _mm512_cvtepu32_epi64, _mm512_extracti64x4_epi64, _mm512_i64gather_epi64, _mm512_loadu_si512,
        _mm512_madd52hi_epu64, _mm512_madd52lo_epu64, _mm512_mask_storeu_epi8, _mm512_maskz_loadu_epi8,
        _mm512_or_si512, _mm512_rol_epi32, _mm512_set1_epi32, _mm512_set1_epi64, _mm512_setzero_si512,
        _mm512_shuffle_i32x4, _mm512_slli_epi64, _mm512_srli_epi64, _mm512_storeu_si512,
        _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
        _mm512_xor_si512,
    },
    sync::OnceLock,
};

use zeroize::{Zeroize as _, Zeroizing};

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
            Self::Avx512 => has_features(),
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
                (Kind::Avx512, Some(counters), _) if sealing => tags = seal(&self.key, batch, counters),
                (Kind::Avx512, Some(counters), _) => tags = open(&self.key, batch, counters),
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

fn has_features() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512ifma")
}

/// # Safety
/// The CPU has the features, and the batch's contents can be read and written.
#[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
unsafe fn seal(key: &[u32; 8], batch: Batch, counters: &[u64; LANES]) -> [[u8; TAG]; LANES] {
    let mut state = initial(key, counters);
    let mut poly = Poly::new(&chacha_block(&state));
    // SAFETY: the caller's promise.
    unsafe {
        crypt(&mut state, batch);
        poly.absorb(batch)
    }
}

/// # Safety
/// As [`seal`].
#[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
unsafe fn open(key: &[u32; 8], batch: Batch, counters: &[u64; LANES]) -> [[u8; TAG]; LANES] {
    let mut state = initial(key, counters);
    let mut poly = Poly::new(&chacha_block(&state));
    // SAFETY: the caller's promise.
    unsafe {
        let tags = poly.absorb(batch);
        crypt(&mut state, batch);
        tags
    }
}

/// ChaCha20's state before block 0: word by word, a message in each lane.
#[target_feature(enable = "avx512f")]
fn initial(key: &[u32; 8], counters: &[u64; LANES]) -> [__m512i; 16] {
    let mut state = [_mm512_setzero_si512(); 16];
    for (place, word) in SIGMA.iter().chain(key).enumerate() {
        state[place] = _mm512_set1_epi32(*word as i32);
    }
    let (mut low, mut high) = ([0i32; LANES], [0i32; LANES]);
    for (lane, counter) in counters.iter().enumerate() {
        low[lane] = *counter as u32 as i32;
        high[lane] = (*counter >> 32) as u32 as i32;
    }
    // SAFETY: both arrays have 64 bytes.
    unsafe {
        state[14] = _mm512_loadu_si512(low.as_ptr().cast());
        state[15] = _mm512_loadu_si512(high.as_ptr().cast());
    }
    state
}

macro_rules! quarter {
    ($x:ident, $a:literal, $b:literal, $c:literal, $d:literal) => {
        $x[$a] = _mm512_add_epi32($x[$a], $x[$b]);
        $x[$d] = _mm512_rol_epi32::<16>(_mm512_xor_si512($x[$d], $x[$a]));
        $x[$c] = _mm512_add_epi32($x[$c], $x[$d]);
        $x[$b] = _mm512_rol_epi32::<12>(_mm512_xor_si512($x[$b], $x[$c]));
        $x[$a] = _mm512_add_epi32($x[$a], $x[$b]);
        $x[$d] = _mm512_rol_epi32::<8>(_mm512_xor_si512($x[$d], $x[$a]));
        $x[$c] = _mm512_add_epi32($x[$c], $x[$d]);
        $x[$b] = _mm512_rol_epi32::<7>(_mm512_xor_si512($x[$b], $x[$c]));
    };
}

/// The key stream's next 64 bytes of each message, as 16 words (RFC 8439, section 2.3).
#[target_feature(enable = "avx512f")]
fn chacha_block(state: &[__m512i; 16]) -> [__m512i; 16] {
    let mut x = *state;
    for _ in 0..10 {
        quarter!(x, 0, 4, 8, 12);
        quarter!(x, 1, 5, 9, 13);
        quarter!(x, 2, 6, 10, 14);
        quarter!(x, 3, 7, 11, 15);
        quarter!(x, 0, 5, 10, 15);
        quarter!(x, 1, 6, 11, 12);
        quarter!(x, 2, 7, 8, 13);
        quarter!(x, 3, 4, 9, 14);
    }
    for (word, before) in x.iter_mut().zip(state) {
        *word = _mm512_add_epi32(*word, *before);
    }
    x
}

/// From a word per register to a message per register.
#[target_feature(enable = "avx512f")]
fn transpose(x: [__m512i; 16]) -> [__m512i; 16] {
    let zero = _mm512_setzero_si512();
    let (mut pairs, mut quads) = ([zero; 16], [zero; 16]);
    for n in 0..8 {
        pairs[2 * n] = _mm512_unpacklo_epi32(x[2 * n], x[2 * n + 1]);
        pairs[2 * n + 1] = _mm512_unpackhi_epi32(x[2 * n], x[2 * n + 1]);
    }
    // quads[4 * n + m]: words 4n..4n+4 of messages m, 4 + m, 8 + m, 12 + m.
    for n in 0..4 {
        let at = 4 * n;
        quads[at] = _mm512_unpacklo_epi64(pairs[at], pairs[at + 2]);
        quads[at + 1] = _mm512_unpackhi_epi64(pairs[at], pairs[at + 2]);
        quads[at + 2] = _mm512_unpacklo_epi64(pairs[at + 1], pairs[at + 3]);
        quads[at + 3] = _mm512_unpackhi_epi64(pairs[at + 1], pairs[at + 3]);
    }
    let mut out = [zero; 16];
    for m in 0..4 {
        let (a, b, c, d) = (quads[m], quads[4 + m], quads[8 + m], quads[12 + m]);
        // Of four messages the first halves of two words-of-four each, then the second halves.
        let low_ab = _mm512_shuffle_i32x4::<0x88>(a, b);
        let high_ab = _mm512_shuffle_i32x4::<0xdd>(a, b);
        let low_cd = _mm512_shuffle_i32x4::<0x88>(c, d);
        let high_cd = _mm512_shuffle_i32x4::<0xdd>(c, d);
        out[m] = _mm512_shuffle_i32x4::<0x88>(low_ab, low_cd);
        out[8 + m] = _mm512_shuffle_i32x4::<0xdd>(low_ab, low_cd);
        out[4 + m] = _mm512_shuffle_i32x4::<0x88>(high_ab, high_cd);
        out[12 + m] = _mm512_shuffle_i32x4::<0xdd>(high_ab, high_cd);
    }
    out
}

/// Adds the key stream, from block 1 on, to the contents.
///
/// # Safety
/// As [`seal`].
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn crypt(state: &mut [__m512i; 16], batch: Batch) {
    let one = _mm512_set1_epi32(1);
    let mut done = 0;
    while done < batch.len {
        state[12] = _mm512_add_epi32(state[12], one);
        let stream = transpose(chacha_block(state));
        let left = batch.len - done;
        for (lane, stream) in stream.iter().enumerate().take(batch.count) {
            // SAFETY: `done` is below `len`, and the content of this message has `len` bytes; the mask leaves out what is
            // behind them.
            unsafe {
                let at = batch.base.add(lane * batch.stride + done);
                if left >= 64 {
                    let content = _mm512_loadu_si512(at.cast());
                    _mm512_storeu_si512(at.cast(), _mm512_xor_si512(content, *stream));
                } else {
                    let mask = (1u64 << left) - 1;
                    let content = _mm512_maskz_loadu_epi8(mask, at.cast());
                    _mm512_mask_storeu_epi8(at.cast(), mask, _mm512_xor_si512(content, *stream));
                }
            }
        }
        done += 64;
    }
}

/// Poly1305 of 16 messages: limbs of 44, 44 and 42 bits, lanes 0 to 7 and 8 to 15.
struct Poly {
    r: [[__m512i; 3]; 2],
    /// 20 times the upper two limbs of `r`: what overflows 2^130 comes back five times, from limbs of 44 bits.
    s: [[__m512i; 2]; 2],
    h: [[__m512i; 3]; 2],
    /// What is added at the end, as two words of 64 bits.
    pad: [[u64; 2]; LANES],
}

impl Poly {
    /// From the first block of the key stream (RFC 8439, section 2.6).
    #[target_feature(enable = "avx512f,avx512ifma")]
    fn new(block: &[__m512i; 16]) -> Self {
        let zero = _mm512_setzero_si512();
        let word = |place: usize, half: usize| match half {
            0 => _mm512_cvtepu32_epi64(_mm512_castsi512_si256(block[place])),
            _ => _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64::<1>(block[place])),
        };
        let long = |place: usize, half: usize| {
            _mm512_or_si512(word(place, half), _mm512_slli_epi64::<32>(word(place + 1, half)))
        };
        let mut poly = Self {
            r: [[zero; 3]; 2],
            s: [[zero; 2]; 2],
            h: [[zero; 3]; 2],
            pad: [[0; 2]; LANES],
        };
        for half in 0..2 {
            let low = _mm512_and_si512(long(0, half), _mm512_set1_epi64(0x0fff_fffc_0fff_ffff));
            let high = _mm512_and_si512(long(2, half), _mm512_set1_epi64(0x0fff_fffc_0fff_fffc));
            let r = split(low, high);
            poly.r[half] = r;
            let twenty = |limb| _mm512_add_epi64(_mm512_slli_epi64::<4>(limb), _mm512_slli_epi64::<2>(limb));
            poly.s[half] = [twenty(r[1]), twenty(r[2])];
            let (mut first, mut second) = ([0u64; 8], [0u64; 8]);
            // SAFETY: both arrays have 64 bytes.
            unsafe {
                _mm512_storeu_si512(first.as_mut_ptr().cast(), long(4, half));
                _mm512_storeu_si512(second.as_mut_ptr().cast(), long(6, half));
            }
            for lane in 0..8 {
                poly.pad[half * 8 + lane] = [first[lane], second[lane]];
            }
        }
        poly
    }

    /// The tags of the batch's contents as they are.
    ///
    /// # Safety
    /// As [`seal`].
    #[target_feature(enable = "avx512f,avx512ifma")]
    unsafe fn absorb(&mut self, batch: Batch) -> [[u8; TAG]; LANES] {
        // Lanes without a message read the first: what comes of it is not used.
        let mut offsets = [0i64; LANES];
        for (lane, offset) in offsets.iter_mut().enumerate().take(batch.count) {
            *offset = (lane * batch.stride) as i64;
        }
        let whole = batch.len / 16 * 16;
        let rest = batch.len - whole;
        let hibit = _mm512_set1_epi64(1 << 40);
        // SAFETY: every offset is that of a message, whose content has 16 more bytes at `done`.
        unsafe {
            let offsets = [
                _mm512_loadu_si512(offsets.as_ptr().cast()),
                _mm512_loadu_si512(offsets[8..].as_ptr().cast()),
            ];
            let mut done = 0;
            while done < whole {
                let at = batch.base.add(done);
                for (half, offsets) in offsets.iter().enumerate() {
                    let low = _mm512_i64gather_epi64::<1>(*offsets, at.cast());
                    let high = _mm512_i64gather_epi64::<1>(*offsets, at.add(8).cast());
                    self.block(half, low, high, hibit);
                }
                done += 16;
            }
        }
        if rest > 0 {
            let (mut low, mut high) = ([0u64; LANES], [0u64; LANES]);
            for lane in 0..batch.count {
                let mut bytes = [0u8; 16];
                // SAFETY: the content of this message has `rest` more bytes behind the whole blocks.
                let tail =
                    unsafe { std::slice::from_raw_parts(batch.base.add(lane * batch.stride + whole), rest) };
                bytes[..rest].copy_from_slice(tail);
                let number = u128::from_le_bytes(bytes);
                (low[lane], high[lane]) = (number as u64, (number >> 64) as u64);
            }
            for half in 0..2 {
                // SAFETY: eight numbers each.
                let (low, high) = unsafe {
                    (
                        _mm512_loadu_si512(low[half * 8..].as_ptr().cast()),
                        _mm512_loadu_si512(high[half * 8..].as_ptr().cast()),
                    )
                };
                self.block(half, low, high, hibit);
            }
        }
        // The lengths: no additional data.
        let len = _mm512_set1_epi64(batch.len as i64);
        for half in 0..2 {
            self.block(half, _mm512_setzero_si512(), len, hibit);
        }
        self.tags()
    }

    /// One block of 16 bytes of eight messages: h = (h + block) * r.
    #[target_feature(enable = "avx512f,avx512ifma")]
    #[inline]
    fn block(&mut self, half: usize, low: __m512i, high: __m512i, hibit: __m512i) {
        let zero = _mm512_setzero_si512();
        let block = split(low, high);
        let [r0, r1, r2] = self.r[half];
        let [s1, s2] = self.s[half];
        let h = self.h[half];
        let h0 = _mm512_add_epi64(h[0], block[0]);
        let h1 = _mm512_add_epi64(h[1], block[1]);
        let h2 = _mm512_add_epi64(h[2], _mm512_or_si512(block[2], hibit));
        let terms = [
            [(h0, r0), (h1, s2), (h2, s1)],
            [(h0, r1), (h1, r0), (h2, s2)],
            [(h0, r2), (h1, r1), (h2, r0)],
        ];
        let (mut lows, mut highs) = ([zero; 3], [zero; 3]);
        for (place, terms) in terms.iter().enumerate() {
            for (a, b) in terms {
                lows[place] = _mm512_madd52lo_epu64(lows[place], *a, *b);
                highs[place] = _mm512_madd52hi_epu64(highs[place], *a, *b);
            }
        }
        // A product's upper half counts 2^52; limbs hold 44 bits, the last 42.
        let (mask44, mask42) = (_mm512_set1_epi64(MASK44 as i64), _mm512_set1_epi64(MASK42 as i64));
        let carry = _mm512_add_epi64(_mm512_srli_epi64::<44>(lows[0]), _mm512_slli_epi64::<8>(highs[0]));
        let h0 = _mm512_and_si512(lows[0], mask44);
        let d1 = _mm512_add_epi64(lows[1], carry);
        let carry = _mm512_add_epi64(_mm512_srli_epi64::<44>(d1), _mm512_slli_epi64::<8>(highs[1]));
        let h1 = _mm512_and_si512(d1, mask44);
        let d2 = _mm512_add_epi64(lows[2], carry);
        let carry = _mm512_add_epi64(_mm512_srli_epi64::<42>(d2), _mm512_slli_epi64::<10>(highs[2]));
        let h2 = _mm512_and_si512(d2, mask42);
        let h0 = _mm512_add_epi64(h0, _mm512_add_epi64(carry, _mm512_slli_epi64::<2>(carry)));
        let h1 = _mm512_add_epi64(h1, _mm512_srli_epi64::<44>(h0));
        self.h[half] = [_mm512_and_si512(h0, mask44), h1, h2];
    }

    fn tags(&self) -> [[u8; TAG]; LANES] {
        let mut tags = [[0; TAG]; LANES];
        for half in 0..2 {
            let mut limbs = [[0u64; 8]; 3];
            for (limbs, register) in limbs.iter_mut().zip(&self.h[half]) {
                // SAFETY: a register and eight numbers have 64 bytes each, and every bit pattern is a number.
                *limbs = unsafe { std::mem::transmute::<__m512i, [u64; 8]>(*register) };
            }
            for lane in 0..8 {
                let h = [limbs[0][lane], limbs[1][lane], limbs[2][lane]];
                tags[half * 8 + lane] = finish(h, self.pad[half * 8 + lane]);
            }
        }
        tags
    }
}

impl Drop for Poly {
    fn drop(&mut self) {
        // The one-time keys; registers and the stack keep copies that no language can reach.
        self.pad.as_flattened_mut().zeroize();
    }
}

/// A number of 128 bits as limbs.
#[target_feature(enable = "avx512f")]
#[inline]
fn split(low: __m512i, high: __m512i) -> [__m512i; 3] {
    let mask44 = _mm512_set1_epi64(MASK44 as i64);
    let middle = _mm512_or_si512(_mm512_srli_epi64::<44>(low), _mm512_slli_epi64::<20>(high));
    [
        _mm512_and_si512(low, mask44),
        _mm512_and_si512(middle, mask44),
        _mm512_srli_epi64::<24>(high),
    ]
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

#[path = "lanes_self_test.rs"]
mod self_test;

#[cfg(test)]
#[path = "lanes_tests.rs"]
mod tests;
