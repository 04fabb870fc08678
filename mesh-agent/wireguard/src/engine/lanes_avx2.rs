//! The same for AVX2: 8 messages at once, ChaCha20 with a word of each message in a register, Poly1305 with limbs of 26
//! bits, four messages in a register. There is no secret-dependent branch or address.
#![expect(unsafe_code, reason = "AVX2 intrinsics on pointers")]

use std::arch::x86_64::{
    __m128i, __m256i, _mm_loadu_si128, _mm256_add_epi32, _mm256_add_epi64, _mm256_and_si256,
    _mm256_castsi128_si256, _mm256_castsi256_si128, _mm256_cvtepu32_epi64, _mm256_extracti128_si256,
    _mm256_inserti128_si256, _mm256_loadu_si256, _mm256_mul_epu32, _mm256_or_si256,
    _mm256_permute2x128_si256, _mm256_set1_epi32, _mm256_set1_epi64x, _mm256_setr_epi8, _mm256_setzero_si256,
    _mm256_shuffle_epi8, _mm256_slli_epi32, _mm256_slli_epi64, _mm256_srli_epi32, _mm256_srli_epi64,
    _mm256_storeu_si256, _mm256_unpackhi_epi32, _mm256_unpackhi_epi64, _mm256_unpacklo_epi32,
    _mm256_unpacklo_epi64, _mm256_xor_si256,
};

use zeroize::Zeroize as _;

use super::{Batch, MASK44, SIGMA, TAG, finish};

/// Messages that are done at once.
pub(super) const WIDTH: usize = 8;

const MASK26: i64 = (1 << 26) - 1;

pub(super) fn has_features() -> bool {
    is_x86_feature_detected!("avx2")
}

/// # Safety
/// The CPU has AVX2, and the contents of the batch, of at most [`WIDTH`] messages, can be read and written.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn seal(key: &[u32; 8], batch: Batch, counters: &[u64; WIDTH]) -> [[u8; TAG]; WIDTH] {
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
#[target_feature(enable = "avx2")]
pub(super) unsafe fn open(key: &[u32; 8], batch: Batch, counters: &[u64; WIDTH]) -> [[u8; TAG]; WIDTH] {
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
#[target_feature(enable = "avx2")]
fn initial(key: &[u32; 8], counters: &[u64; WIDTH]) -> [__m256i; 16] {
    let mut state = [_mm256_setzero_si256(); 16];
    for (place, word) in SIGMA.iter().chain(key).enumerate() {
        state[place] = _mm256_set1_epi32(*word as i32);
    }
    let low = counters.map(|counter| counter as u32);
    let high = counters.map(|counter| (counter >> 32) as u32);
    // SAFETY: both arrays have 32 bytes.
    unsafe {
        state[14] = _mm256_loadu_si256(low.as_ptr().cast());
        state[15] = _mm256_loadu_si256(high.as_ptr().cast());
    }
    state
}

#[target_feature(enable = "avx2")]
#[inline]
fn rotate<const LEFT: i32, const RIGHT: i32>(x: __m256i) -> __m256i {
    _mm256_or_si256(_mm256_slli_epi32::<LEFT>(x), _mm256_srli_epi32::<RIGHT>(x))
}

macro_rules! quarter {
    ($x:ident, $by16:ident, $by8:ident, $a:literal, $b:literal, $c:literal, $d:literal) => {
        $x[$a] = _mm256_add_epi32($x[$a], $x[$b]);
        $x[$d] = _mm256_shuffle_epi8(_mm256_xor_si256($x[$d], $x[$a]), $by16);
        $x[$c] = _mm256_add_epi32($x[$c], $x[$d]);
        $x[$b] = rotate::<12, 20>(_mm256_xor_si256($x[$b], $x[$c]));
        $x[$a] = _mm256_add_epi32($x[$a], $x[$b]);
        $x[$d] = _mm256_shuffle_epi8(_mm256_xor_si256($x[$d], $x[$a]), $by8);
        $x[$c] = _mm256_add_epi32($x[$c], $x[$d]);
        $x[$b] = rotate::<7, 25>(_mm256_xor_si256($x[$b], $x[$c]));
    };
}

/// The key stream's next 64 bytes of each message, as 16 words (RFC 8439, section 2.3).
#[target_feature(enable = "avx2")]
#[inline]
fn chacha_block(state: &[__m256i; 16]) -> [__m256i; 16] {
    // Rotations by whole bytes.
    let by16 = _mm256_setr_epi8(
        2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15,
        12, 13,
    );
    let by8 = _mm256_setr_epi8(
        3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14, 3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12,
        13, 14,
    );
    let mut x = *state;
    for _ in 0..10 {
        quarter!(x, by16, by8, 0, 4, 8, 12);
        quarter!(x, by16, by8, 1, 5, 9, 13);
        quarter!(x, by16, by8, 2, 6, 10, 14);
        quarter!(x, by16, by8, 3, 7, 11, 15);
        quarter!(x, by16, by8, 0, 5, 10, 15);
        quarter!(x, by16, by8, 1, 6, 11, 12);
        quarter!(x, by16, by8, 2, 7, 8, 13);
        quarter!(x, by16, by8, 3, 4, 9, 14);
    }
    for (word, before) in x.iter_mut().zip(state) {
        *word = _mm256_add_epi32(*word, *before);
    }
    x
}

/// Eight words of eight messages, from a word per register to a message per register.
#[target_feature(enable = "avx2")]
#[inline]
fn transpose(x: &[__m256i]) -> [__m256i; WIDTH] {
    let zero = _mm256_setzero_si256();
    let (mut pairs, mut quads, mut out) = ([zero; 8], [zero; 8], [zero; 8]);
    for n in 0..4 {
        pairs[2 * n] = _mm256_unpacklo_epi32(x[2 * n], x[2 * n + 1]);
        pairs[2 * n + 1] = _mm256_unpackhi_epi32(x[2 * n], x[2 * n + 1]);
    }
    // quads[4 * n + m]: words 4n..4n+4 of messages m and 4 + m.
    for n in 0..2 {
        let at = 4 * n;
        quads[at] = _mm256_unpacklo_epi64(pairs[at], pairs[at + 2]);
        quads[at + 1] = _mm256_unpackhi_epi64(pairs[at], pairs[at + 2]);
        quads[at + 2] = _mm256_unpacklo_epi64(pairs[at + 1], pairs[at + 3]);
        quads[at + 3] = _mm256_unpackhi_epi64(pairs[at + 1], pairs[at + 3]);
    }
    for m in 0..4 {
        out[m] = _mm256_permute2x128_si256::<0x20>(quads[m], quads[4 + m]);
        out[4 + m] = _mm256_permute2x128_si256::<0x31>(quads[m], quads[4 + m]);
    }
    out
}

/// Adds the key stream, from block 1 on, to the contents.
///
/// # Safety
/// As [`seal`].
#[target_feature(enable = "avx2")]
unsafe fn crypt(state: &mut [__m256i; 16], batch: Batch) {
    let one = _mm256_set1_epi32(1);
    let mut done = 0;
    while done < batch.len {
        state[12] = _mm256_add_epi32(state[12], one);
        let block = chacha_block(state);
        let (first, second) = (transpose(&block[..8]), transpose(&block[8..]));
        let left = (batch.len - done).min(64);
        for lane in 0..batch.count {
            // SAFETY: `done` is below `len`, and the content of this message has `left` more bytes there.
            unsafe {
                let at = batch.base.add(lane * batch.stride + done);
                if left == 64 {
                    for (at, stream) in [(at, first[lane]), (at.add(32), second[lane])] {
                        let content = _mm256_loadu_si256(at.cast());
                        _mm256_storeu_si256(at.cast(), _mm256_xor_si256(content, stream));
                    }
                } else {
                    let mut stream = [0u8; 64];
                    _mm256_storeu_si256(stream.as_mut_ptr().cast(), first[lane]);
                    _mm256_storeu_si256(stream[32..].as_mut_ptr().cast(), second[lane]);
                    let content = std::slice::from_raw_parts_mut(at, left);
                    for (byte, stream) in content.iter_mut().zip(stream) {
                        *byte ^= stream;
                    }
                    stream.zeroize();
                }
            }
        }
        done += 64;
    }
}

/// Poly1305 of 8 messages: five limbs of 26 bits, lanes 0 to 3 and 4 to 7.
struct Poly {
    r: [[__m256i; 5]; 2],
    /// Five times the limbs of `r`: what overflows 2^130 comes back five times.
    s: [[__m256i; 5]; 2],
    h: [[__m256i; 5]; 2],
    /// What is added at the end, as two words of 64 bits.
    pad: [[u64; 2]; WIDTH],
}

impl Poly {
    /// From the first block of the key stream (RFC 8439, section 2.6).
    #[target_feature(enable = "avx2")]
    fn new(block: &[__m256i; 16]) -> Self {
        let zero = _mm256_setzero_si256();
        let word = |place: usize, half: usize| match half {
            0 => _mm256_cvtepu32_epi64(_mm256_castsi256_si128(block[place])),
            _ => _mm256_cvtepu32_epi64(_mm256_extracti128_si256::<1>(block[place])),
        };
        let long = |place: usize, half: usize| {
            _mm256_or_si256(word(place, half), _mm256_slli_epi64::<32>(word(place + 1, half)))
        };
        let mut poly = Self {
            r: [[zero; 5]; 2],
            s: [[zero; 5]; 2],
            h: [[zero; 5]; 2],
            pad: [[0; 2]; WIDTH],
        };
        for half in 0..2 {
            let low = _mm256_and_si256(long(0, half), _mm256_set1_epi64x(0x0fff_fffc_0fff_ffff));
            let high = _mm256_and_si256(long(2, half), _mm256_set1_epi64x(0x0fff_fffc_0fff_fffc));
            poly.r[half] = split(low, high);
            for limb in 0..5 {
                let r = poly.r[half][limb];
                poly.s[half][limb] = _mm256_add_epi64(r, _mm256_slli_epi64::<2>(r));
            }
            let (mut first, mut second) = ([0u64; 4], [0u64; 4]);
            // SAFETY: both arrays have 32 bytes.
            unsafe {
                _mm256_storeu_si256(first.as_mut_ptr().cast(), long(4, half));
                _mm256_storeu_si256(second.as_mut_ptr().cast(), long(6, half));
            }
            for lane in 0..4 {
                poly.pad[half * 4 + lane] = [first[lane], second[lane]];
            }
        }
        poly
    }

    /// The tags of the batch's contents as they are.
    ///
    /// # Safety
    /// As [`seal`].
    #[target_feature(enable = "avx2")]
    unsafe fn absorb(&mut self, batch: Batch) -> [[u8; TAG]; WIDTH] {
        // Lanes without a message read the first: what comes of it is not used.
        let offset = |lane: usize| {
            if lane < batch.count {
                lane * batch.stride
            } else {
                0
            }
        };
        let offsets: [usize; WIDTH] = std::array::from_fn(offset);
        let whole = batch.len / 16 * 16;
        let hibit = _mm256_set1_epi64x(1 << 24);
        let mut done = 0;
        while done < whole {
            for half in 0..2 {
                // SAFETY: every offset is that of a message, whose content has 16 more bytes at `done`.
                let [a, b, c, d] = std::array::from_fn(|lane| unsafe {
                    _mm_loadu_si128(batch.base.add(offsets[half * 4 + lane] + done).cast::<__m128i>())
                });
                let even = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(a), c);
                let odd = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(b), d);
                let (low, high) = (_mm256_unpacklo_epi64(even, odd), _mm256_unpackhi_epi64(even, odd));
                self.block(half, low, high, hibit);
            }
            done += 16;
        }
        if whole < batch.len {
            // SAFETY: the caller's promise.
            unsafe { self.rest(batch, whole) };
        }
        // The lengths: no additional data.
        let len = _mm256_set1_epi64x(batch.len as i64);
        for half in 0..2 {
            self.block(half, _mm256_setzero_si256(), len, hibit);
        }
        self.tags()
    }

    /// The last bytes, filled up with zeroes to a block (RFC 8439, section 2.8).
    ///
    /// # Safety
    /// As [`seal`], and the contents have more than `whole` bytes, fewer than 16 more.
    #[target_feature(enable = "avx2")]
    unsafe fn rest(&mut self, batch: Batch, whole: usize) {
        let (mut low, mut high) = ([0u64; WIDTH], [0u64; WIDTH]);
        for lane in 0..batch.count {
            let mut bytes = [0u8; 16];
            let len = batch.len - whole;
            // SAFETY: the content of this message has `len` more bytes behind the whole blocks.
            let tail =
                unsafe { std::slice::from_raw_parts(batch.base.add(lane * batch.stride + whole), len) };
            bytes[..len].copy_from_slice(tail);
            let number = u128::from_le_bytes(bytes);
            (low[lane], high[lane]) = (number as u64, (number >> 64) as u64);
        }
        for half in 0..2 {
            // SAFETY: four numbers each.
            let (low, high) = unsafe {
                (
                    _mm256_loadu_si256(low[half * 4..].as_ptr().cast()),
                    _mm256_loadu_si256(high[half * 4..].as_ptr().cast()),
                )
            };
            self.block(half, low, high, _mm256_set1_epi64x(1 << 24));
        }
    }

    /// One block of 16 bytes of four messages: h = (h + block) * r. Limbs of `h` are below 2^27, those of `r` below 2^26:
    /// the sums stay below 2^59.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn block(&mut self, half: usize, low: __m256i, high: __m256i, hibit: __m256i) {
        let (r, s) = (&self.r[half], &self.s[half]);
        let mut h = self.h[half];
        for (limb, block) in h.iter_mut().zip(split(low, high)) {
            *limb = _mm256_add_epi64(*limb, block);
        }
        h[4] = _mm256_add_epi64(h[4], hibit);
        let mut d = [_mm256_setzero_si256(); 5];
        for (place, d) in d.iter_mut().enumerate() {
            for (from, h) in h.iter().enumerate() {
                let by = if from <= place {
                    r[place - from]
                } else {
                    s[5 + place - from]
                };
                *d = _mm256_add_epi64(*d, _mm256_mul_epu32(*h, by));
            }
        }
        let mask = _mm256_set1_epi64x(MASK26);
        for place in 0..4 {
            d[place + 1] = _mm256_add_epi64(d[place + 1], _mm256_srli_epi64::<26>(d[place]));
            d[place] = _mm256_and_si256(d[place], mask);
        }
        let carry = _mm256_srli_epi64::<26>(d[4]);
        d[4] = _mm256_and_si256(d[4], mask);
        d[0] = _mm256_add_epi64(d[0], _mm256_add_epi64(carry, _mm256_slli_epi64::<2>(carry)));
        d[1] = _mm256_add_epi64(d[1], _mm256_srli_epi64::<26>(d[0]));
        d[0] = _mm256_and_si256(d[0], mask);
        self.h[half] = d;
    }

    #[target_feature(enable = "avx2")]
    fn tags(&self) -> [[u8; TAG]; WIDTH] {
        let mut tags = [[0; TAG]; WIDTH];
        for half in 0..2 {
            let mut limbs = [[0u64; 4]; 5];
            for (limbs, register) in limbs.iter_mut().zip(&self.h[half]) {
                // SAFETY: the array has 32 bytes.
                unsafe { _mm256_storeu_si256(limbs.as_mut_ptr().cast(), *register) };
            }
            for lane in 0..4 {
                let [a, b, c, d, e] = limbs.map(|limb| limb[lane]);
                // Limbs of 44, 44 and 42 bits.
                let first = a + (b << 26);
                let second = (first >> 44) + (c << 8) + (d << 34);
                let third = (second >> 44) + (e << 16);
                let h = [first & MASK44, second & MASK44, third];
                tags[half * 4 + lane] = finish(h, self.pad[half * 4 + lane]);
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
#[target_feature(enable = "avx2")]
#[inline]
fn split(low: __m256i, high: __m256i) -> [__m256i; 5] {
    let mask = _mm256_set1_epi64x(MASK26);
    let middle = _mm256_or_si256(_mm256_srli_epi64::<52>(low), _mm256_slli_epi64::<12>(high));
    [
        _mm256_and_si256(low, mask),
        _mm256_and_si256(_mm256_srli_epi64::<26>(low), mask),
        _mm256_and_si256(middle, mask),
        _mm256_and_si256(_mm256_srli_epi64::<14>(high), mask),
        _mm256_srli_epi64::<40>(high),
    ]
}
