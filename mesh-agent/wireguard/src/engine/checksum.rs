//! The Internet checksum (RFC 1071), over native words: sums are independent of byte order until they are stored.
#![expect(unsafe_code, reason = "calling a function that was compiled for AVX2")]

/// Adds bytes to a sum. Only the last part of a sum may have an odd number of bytes.
pub(super) fn add(sum: u64, bytes: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if bytes.len() >= 256 && std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has what the function was compiled for.
        return unsafe { add_avx2(sum, bytes) };
    }
    add_words(sum, bytes)
}

/// The same, compiled for wider vectors.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn add_avx2(sum: u64, bytes: &[u8]) -> u64 {
    add_words(sum, bytes)
}

#[inline(always)]
fn add_words(sum: u64, bytes: &[u8]) -> u64 {
    // Independent sums of 32-bit words cannot overflow for anything that fits into memory, and become vectors.
    let (blocks, rest) = bytes.as_chunks::<64>();
    let mut lanes = [0u64; 16];
    for block in blocks {
        let (words, _) = block.as_chunks::<4>();
        for number in 0..16 {
            lanes[number] += u64::from(u32::from_ne_bytes(words[number]));
        }
    }
    let mut sum = sum + lanes.iter().sum::<u64>();
    let (words, last) = rest.as_chunks::<2>();
    for word in words {
        sum += u64::from(u16::from_ne_bytes(*word));
    }
    if let [last] = last {
        sum += u64::from(u16::from_ne_bytes([*last, 0]));
    }
    sum
}

/// The sum in 16 bits, not inverted, as the bytes of a packet.
pub(super) fn fold(mut sum: u64) -> [u8; 2] {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (sum as u16).to_ne_bytes()
}

/// The checksum: the inverted sum.
pub(super) fn finish(sum: u64) -> [u8; 2] {
    let [a, b] = fold(sum);
    [!a, !b]
}

/// The sum of the pseudo header of TCP or UDP over IPv4 (RFC 9293) or IPv6 (RFC 8200, section 8.1) with `length` bytes
/// of transport header and payload. `packet` begins with a whole IP header.
pub(super) fn pseudo_header(packet: &[u8], protocol: u8, length: usize) -> u64 {
    let addresses = if packet[0] >> 4 == 4 {
        &packet[12..20]
    } else {
        &packet[8..40]
    };
    let sum = add(0, addresses);
    let sum = add(sum, &[0, protocol]);
    add(sum, &(length as u32).to_be_bytes())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn slow(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    proptest! {
        #[test]
        fn agrees_with_the_definition(bytes in prop::collection::vec(any::<u8>(), 0..3000), cut in 0usize..3000) {
            let cut = cut.min(bytes.len()) & !1;
            let sum = add(add(0, &bytes[..cut]), &bytes[cut..]);
            prop_assert_eq!(u16::from_be_bytes(finish(sum)), slow(&bytes));
        }
    }

    #[test]
    fn no_carry_is_lost() {
        let bytes = vec![0xff; 65_535];
        assert_eq!(u16::from_be_bytes(finish(add(0, &bytes))), slow(&bytes));
    }
}
