//! The packet mark: 13 logical bits, scattered into the bits of a mask that the operator chooses.

use crate::MAX_ENDPOINT_INDEX;

/// Logical value of "decrypted from the tunnel, owner of the source checked".
pub const TUNNEL_MARK: u16 = 0x1000;
/// Logical value of "the local endpoint of this index sent it, and its egress was judged".
pub const fn judged(index: u16) -> u16 {
    TUNNEL_MARK | (index & MAX_ENDPOINT_INDEX)
}

/// Bits that a logical value needs.
const BITS: u32 = 13;

/// What a mark says about where a packet came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provenance {
    /// Nothing known: the host itself, or outside.
    Unknown,
    /// Decrypted from the tunnel, owner of the source checked.
    Tunnel,
    /// The local endpoint of this index sent it; its egress is not judged yet.
    Endpoint(u16),
    /// The local endpoint of this index sent it; its egress was judged.
    Judged(u16),
}

/// Translates between logical values and marks. The programs never do: they compare and write encoded values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MarkCodec {
    mask: u32,
}

impl MarkCodec {
    /// Uses the lowest 13 bits of a mask; `None` where it has fewer.
    pub const fn new(mask: u32) -> Option<Self> {
        if mask.count_ones() < BITS {
            return None;
        }
        let mut rest = mask;
        let mut used = 0;
        let mut bit = 0;
        while bit < BITS {
            let lowest = rest & rest.wrapping_neg();
            used |= lowest;
            rest ^= lowest;
            bit += 1;
        }
        Some(Self { mask: used })
    }

    /// The 13 bits in use.
    pub const fn mask(self) -> u32 {
        self.mask
    }

    /// Encodes a logical value, from the lowest bit of the mask up. Bits above 13 are ignored.
    pub const fn encode(self, value: u16) -> u32 {
        let mut rest = self.mask;
        let mut mark = 0;
        let mut bit = 0;
        while bit < BITS {
            let lowest = rest & rest.wrapping_neg();
            if (value >> bit) & 1 == 1 {
                mark |= lowest;
            }
            rest ^= lowest;
            bit += 1;
        }
        mark
    }

    /// The logical value of a mark; foreign bits are ignored.
    pub const fn decode(self, mark: u32) -> u16 {
        let mut rest = self.mask;
        let mut value = 0;
        let mut bit = 0;
        while bit < BITS {
            let lowest = rest & rest.wrapping_neg();
            if mark & lowest != 0 {
                value |= 1 << bit;
            }
            rest ^= lowest;
            bit += 1;
        }
        value
    }

    /// What a mark says.
    pub const fn provenance(self, mark: u32) -> Provenance {
        match self.decode(mark) {
            0 => Provenance::Unknown,
            TUNNEL_MARK => Provenance::Tunnel,
            index if index <= MAX_ENDPOINT_INDEX => Provenance::Endpoint(index),
            judged => Provenance::Judged(judged & MAX_ENDPOINT_INDEX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_needs_thirteen_bits() {
        assert_eq!(MarkCodec::new(0xfff), None);
        assert_eq!(MarkCodec::new(0), None);
        assert!(MarkCodec::new(0x1fff).is_some());
        assert_eq!(MarkCodec::new(u32::MAX).map(MarkCodec::mask), Some(0x1fff));
    }

    #[test]
    fn every_value_survives_and_stays_inside_the_mask() {
        for mask in [0x3f7f, 0x1fff, 0xfff8_0000, 0x5555_5555, 0x8000_0fff] {
            let codec = MarkCodec::new(mask).unwrap();
            for value in 0..=0x1fff {
                let mark = codec.encode(value);
                assert_eq!(mark & !mask, 0);
                assert_eq!(codec.decode(mark | !mask), value);
            }
        }
    }

    #[test]
    fn default_mask_leaves_kube_proxy_and_cloud_bits_alone() {
        let codec = MarkCodec::new(0x3f7f).unwrap();
        assert_eq!(codec.encode(TUNNEL_MARK), 0x2000);
        assert_eq!(codec.encode(0x1fff) & (0x4000 | 0x8000 | 0x80), 0);
        assert_eq!(codec.provenance(0x2000 | 0x4000), Provenance::Tunnel);
        assert_eq!(codec.provenance(0x4000), Provenance::Unknown);
        assert_eq!(codec.provenance(0x101), Provenance::Endpoint(0x81));
        assert_eq!(codec.provenance(0x2001), Provenance::Judged(1));
        assert_eq!(
            codec.provenance(codec.encode(judged(0xfff))),
            Provenance::Judged(0xfff)
        );
    }
}
