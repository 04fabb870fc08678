//! The few fields of an IP packet that the engine looks at. Pure functions.

use std::net::IpAddr;

/// The destination of an IP packet (RFC 791, RFC 8200); `None` for anything else.
pub(super) fn destination(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => address::<4>(packet, 16, 20),
        6 => address::<16>(packet, 24, 40),
        _ => None,
    }
}

/// The source of an IP packet; `None` for anything else.
pub(super) fn source(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => address::<4>(packet, 12, 20),
        6 => address::<16>(packet, 8, 40),
        _ => None,
    }
}

fn address<const N: usize>(packet: &[u8], offset: usize, header: usize) -> Option<IpAddr>
where
    IpAddr: From<[u8; N]>,
{
    if packet.len() < header {
        return None;
    }
    let bytes: [u8; N] = packet.get(offset..offset + N)?.try_into().ok()?;
    Some(bytes.into())
}

/// The length of the IP packet that these bytes begin with, which padding may follow; `None` where it is not whole.
pub(super) fn whole(bytes: &[u8]) -> Option<usize> {
    let field = |at: usize| {
        Some(usize::from(u16::from_be_bytes([
            *bytes.get(at)?,
            *bytes.get(at + 1)?,
        ])))
    };
    let (length, least) = match bytes.first()? >> 4 {
        4 => (field(2)?, 20),
        6 => (40 + field(4)?, 40),
        _ => return None,
    };
    (least..=bytes.len()).contains(&length).then_some(length)
}

/// How long a packet of `len` bytes is after padding: to a multiple of 16 bytes, never beyond `mtu`.
/// Source: section 5.4.6 of the WireGuard paper; the limit is what implementations do.
pub(super) fn padded(len: usize, mtu: usize) -> usize {
    len.next_multiple_of(16).min(mtu.max(len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_both_families() {
        let mut v4 = [0; 20];
        v4[0] = 0x45;
        v4[12..16].copy_from_slice(&[10, 0, 0, 1]);
        v4[16..20].copy_from_slice(&[10, 0, 0, 2]);
        assert_eq!(source(&v4), Some([10, 0, 0, 1].into()));
        assert_eq!(destination(&v4), Some([10, 0, 0, 2].into()));
        let mut v6 = [0; 40];
        v6[0] = 0x60;
        v6[8] = 0xfd;
        v6[24] = 0xfe;
        assert_eq!(source(&v6), Some("fd00::".parse().unwrap()));
        assert_eq!(destination(&v6), Some("fe00::".parse().unwrap()));
    }

    #[test]
    fn truncated_and_foreign_packets_have_no_address() {
        let mut v4 = [0; 20];
        v4[0] = 0x45;
        let mut v6 = [0; 40];
        v6[0] = 0x60;
        for packet in [&[][..], &v4[..19], &v6[..39], &[0x00; 64], &[0xff; 64]] {
            assert_eq!((source(packet), destination(packet)), (None, None));
        }
    }

    #[test]
    fn only_whole_packets_have_a_length() {
        let mut v4 = [0; 32];
        v4[0] = 0x45;
        let mut v6 = [0; 64];
        v6[0] = 0x60;
        for (length, expected) in [
            (19, None),
            (20, Some(20)),
            (31, Some(31)),
            (32, Some(32)),
            (33, None),
        ] {
            v4[3] = length;
            assert_eq!(whole(&v4), expected, "{length}");
        }
        for (length, expected) in [(0, Some(40)), (24, Some(64)), (25, None)] {
            v6[5] = length;
            assert_eq!(whole(&v6), expected, "{length}");
        }
        for bytes in [&[][..], &[0x45], &v6[..39], &[0x50; 64]] {
            assert_eq!(whole(bytes), None);
        }
    }

    #[test]
    fn padding_stops_at_the_mtu() {
        for (len, mtu, expected) in [
            (0, 1420, 0),
            (1, 1420, 16),
            (16, 1420, 16),
            (1419, 1420, 1420),
            (1420, 1420, 1420),
            (1500, 1420, 1500),
        ] {
            assert_eq!(padded(len, mtu), expected, "{len} {mtu}");
        }
    }
}
