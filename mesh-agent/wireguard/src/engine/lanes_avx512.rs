//! With AVX-512: 16 messages at once, ChaCha20 with a word of each message in a register, Poly1305 with limbs of 44, 44 and 42
//! bits, eight messages in a register. There is no secret-dependent branch or address.
#![expect(unsafe_code, reason = "AVX-512 intrinsics on pointers")]

use std::arch::x86_64::{
    __m512i, _mm_loadu_si128, _mm512_add_epi32, _mm512_add_epi64, _mm512_and_si512, _mm512_castsi128_si512,
    _mm512_castsi512_si256, _mm512_cvtepu32_epi64, _mm512_extracti64x4_epi64, _mm512_inserti32x4,
    _mm512_loadu_si512, _mm512_madd52hi_epu64, _mm512_madd52lo_epu64, _mm512_mask_storeu_epi8,
    _mm512_maskz_loadu_epi8, _mm512_or_si512, _mm512_rol_epi32, _mm512_set1_epi32, _mm512_set1_epi64,
    _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_slli_epi64, _mm512_srli_epi64, _mm512_storeu_si512,
    _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
    _mm512_xor_si512,
};

use zeroize::Zeroize as _;

use super::{Batch, LANES, MASK42, MASK44, SIGMA, TAG, finish};

pub(super) fn has_features() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512ifma")
}

/// # Safety
/// The CPU has the features, and the batch's contents can be read and written.
#[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
pub(super) unsafe fn seal(key: &[u32; 8], batch: Batch, counters: &[u64; LANES]) -> [[u8; TAG]; LANES] {
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
pub(super) unsafe fn open(key: &[u32; 8], batch: Batch, counters: &[u64; LANES]) -> [[u8; TAG]; LANES] {
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

/// A number to multiply by, of eight messages.
#[derive(Clone, Copy)]
struct Factor {
    limbs: [__m512i; 3],
    /// 20 times the upper two limbs: what overflows 2^130 comes back five times, from limbs of 44 bits.
    twenty: [__m512i; 2],
}

impl Factor {
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn new(limbs: [__m512i; 3]) -> Self {
        let twenty = |limb| _mm512_add_epi64(_mm512_slli_epi64::<4>(limb), _mm512_slli_epi64::<2>(limb));
        Self {
            limbs,
            twenty: [twenty(limbs[1]), twenty(limbs[2])],
        }
    }
}

/// Sums of products that are not carried yet: a product's lower 52 bits, and what is above them.
#[derive(Clone, Copy)]
struct Sums {
    lows: [__m512i; 3],
    highs: [__m512i; 3],
}

impl Sums {
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn new() -> Self {
        let zero = _mm512_setzero_si512();
        Self {
            lows: [zero; 3],
            highs: [zero; 3],
        }
    }

    /// Adds a product. Limbs of `a` are below 2^46; two products fit.
    #[target_feature(enable = "avx512f,avx512ifma")]
    #[inline]
    fn add(&mut self, a: [__m512i; 3], by: &Factor) {
        let [r0, r1, r2] = by.limbs;
        let [s1, s2] = by.twenty;
        let terms = [
            [(a[0], r0), (a[1], s2), (a[2], s1)],
            [(a[0], r1), (a[1], r0), (a[2], s2)],
            [(a[0], r2), (a[1], r1), (a[2], r0)],
        ];
        for (place, terms) in terms.iter().enumerate() {
            for (a, b) in terms {
                self.lows[place] = _mm512_madd52lo_epu64(self.lows[place], *a, *b);
                self.highs[place] = _mm512_madd52hi_epu64(self.highs[place], *a, *b);
            }
        }
    }

    /// The sum in limbs, the middle one of which may be a little above 44 bits.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn carried(self) -> [__m512i; 3] {
        let Self { lows, highs } = self;
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
        [_mm512_and_si512(h0, mask44), h1, h2]
    }
}

/// Poly1305 of 16 messages: limbs of 44, 44 and 42 bits, lanes 0 to 7 and 8 to 15.
struct Poly {
    r: [Factor; 2],
    /// The square: two blocks are carried at once.
    square: [Factor; 2],
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
        let nothing = Factor::new([zero; 3]);
        let mut poly = Self {
            r: [nothing; 2],
            square: [nothing; 2],
            h: [[zero; 3]; 2],
            pad: [[0; 2]; LANES],
        };
        for half in 0..2 {
            let low = _mm512_and_si512(long(0, half), _mm512_set1_epi64(0x0fff_fffc_0fff_ffff));
            let high = _mm512_and_si512(long(2, half), _mm512_set1_epi64(0x0fff_fffc_0fff_fffc));
            poly.r[half] = Factor::new(split(low, high));
            let mut square = Sums::new();
            square.add(poly.r[half].limbs, &poly.r[half]);
            poly.square[half] = Factor::new(square.carried());
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
        let mut offsets = [0; LANES];
        for (lane, offset) in offsets.iter_mut().enumerate().take(batch.count) {
            *offset = lane * batch.stride;
        }
        let whole = batch.len / 16 * 16;
        let rest = batch.len - whole;
        let mut done = 0;
        while done + 32 <= whole {
            for (half, offsets) in offsets.as_chunks::<8>().0.iter().enumerate() {
                // SAFETY: every offset is that of a message, whose content has 32 more bytes at `done`.
                let (first, second) = unsafe {
                    let at = batch.base.add(done);
                    (load(at, offsets), load(at.add(16), offsets))
                };
                self.two_blocks(half, first, second);
            }
            done += 32;
        }
        if done < whole {
            for (half, offsets) in offsets.as_chunks::<8>().0.iter().enumerate() {
                // SAFETY: as above, with 16 more bytes.
                let block = unsafe { load(batch.base.add(done), offsets) };
                self.block(half, block);
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
                self.block(half, [low, high]);
            }
        }
        // The lengths: no additional data.
        let len = _mm512_set1_epi64(batch.len as i64);
        for half in 0..2 {
            self.block(half, [_mm512_setzero_si512(), len]);
        }
        self.tags()
    }

    /// One block of 16 bytes of eight messages: h = (h + block) * r.
    #[target_feature(enable = "avx512f,avx512ifma")]
    #[inline]
    fn block(&mut self, half: usize, block: [__m512i; 2]) {
        let mut sums = Sums::new();
        sums.add(plus(self.h[half], whole(block)), &self.r[half]);
        self.h[half] = sums.carried();
    }

    /// Two of them: h = ((h + first) * r + second) * r, with one carry.
    #[target_feature(enable = "avx512f,avx512ifma")]
    #[inline]
    fn two_blocks(&mut self, half: usize, first: [__m512i; 2], second: [__m512i; 2]) {
        let mut sums = Sums::new();
        sums.add(plus(self.h[half], whole(first)), &self.square[half]);
        sums.add(whole(second), &self.r[half]);
        self.h[half] = sums.carried();
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

/// 16 bytes of each of eight messages: the first eight of each, and the last.
///
/// # Safety
/// Each has 16 bytes at its offset from `at`.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn load(at: *const u8, offsets: &[usize; 8]) -> [__m512i; 2] {
    // SAFETY: the caller's promise.
    let block = |lane: usize| unsafe { _mm_loadu_si128(at.add(offsets[lane]).cast()) };
    let four = |first: usize| {
        let blocks = _mm512_castsi128_si512(block(first));
        let blocks = _mm512_inserti32x4::<1>(blocks, block(first + 2));
        let blocks = _mm512_inserti32x4::<2>(blocks, block(first + 4));
        _mm512_inserti32x4::<3>(blocks, block(first + 6))
    };
    let (even, odd) = (four(0), four(1));
    [_mm512_unpacklo_epi64(even, odd), _mm512_unpackhi_epi64(even, odd)]
}

/// A whole block as a number: its bytes, and a one behind them.
#[target_feature(enable = "avx512f")]
#[inline]
fn whole([low, high]: [__m512i; 2]) -> [__m512i; 3] {
    let [a, b, c] = split(low, high);
    [a, b, _mm512_or_si512(c, _mm512_set1_epi64(1 << 40))]
}

#[target_feature(enable = "avx512f")]
#[inline]
fn plus(a: [__m512i; 3], b: [__m512i; 3]) -> [__m512i; 3] {
    [
        _mm512_add_epi64(a[0], b[0]),
        _mm512_add_epi64(a[1], b[1]),
        _mm512_add_epi64(a[2], b[2]),
    ]
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
