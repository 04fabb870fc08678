//! ARP from a pod (RFC 826): it may speak for itself only.

use warren_abi::{DropReason, EndpointValue};

use crate::{Packet, endpoint::owns_v4};

/// Ethernet, IPv4, six and four bytes.
const HEADER: [u8; 6] = [0, 1, 8, 0, 6, 4];

/// Checks the sender of an ARP packet. A sender address of zero is a probe (RFC 5227).
#[inline(always)]
pub(crate) fn check<P: Packet>(
    packet: &P,
    offset: usize,
    endpoint: &EndpointValue,
) -> Result<(), DropReason> {
    let h = packet.load::<28>(offset).ok_or(DropReason::Truncated)?;
    let [
        h0,
        h1,
        h2,
        h3,
        h4,
        h5,
        _,
        operation,
        m0,
        m1,
        m2,
        m3,
        m4,
        m5,
        a0,
        a1,
        a2,
        a3,
        ..,
    ] = h;
    if [h0, h1, h2, h3, h4, h5] != HEADER || h[6] != 0 || !(operation == 1 || operation == 2) {
        return Err(DropReason::Malformed);
    }
    if [m0, m1, m2, m3, m4, m5] != endpoint.mac {
        return Err(DropReason::SpoofedArp);
    }
    let sender = [a0, a1, a2, a3];
    let probe = operation == 1 && sender == [0; 4];
    if probe || owns_v4(endpoint, sender) {
        Ok(())
    } else {
        Err(DropReason::SpoofedArp)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Bytes, POD_MAC, POD_V4, arp, endpoint};

    #[test]
    fn only_its_own_address_and_mac() {
        let check = |bytes: &[u8]| check(&Bytes(bytes), 0, &endpoint());
        assert_eq!(check(&arp(1, POD_MAC, POD_V4)), Ok(()));
        assert_eq!(check(&arp(2, POD_MAC, POD_V4)), Ok(()));
        assert_eq!(check(&arp(1, POD_MAC, [0; 4])), Ok(()), "probe");
        assert_eq!(check(&arp(2, POD_MAC, [0; 4])), Err(DropReason::SpoofedArp));
        assert_eq!(
            check(&arp(2, POD_MAC, [10, 244, 1, 1])),
            Err(DropReason::SpoofedArp),
            "the gateway's"
        );
        assert_eq!(
            check(&arp(1, [2, 0, 0, 0, 0, 9], POD_V4)),
            Err(DropReason::SpoofedArp)
        );
    }

    #[test]
    fn other_shapes_are_refused() {
        let check = |bytes: &[u8]| check(&Bytes(bytes), 0, &endpoint());
        let good = arp(1, POD_MAC, POD_V4);
        for length in 0..28 {
            assert_eq!(check(&good[..length]), Err(DropReason::Truncated), "{length}");
        }
        for index in 0..7 {
            let mut changed = good.clone();
            changed[index] ^= 0x40;
            assert_eq!(check(&changed), Err(DropReason::Malformed), "{index}");
        }
        assert_eq!(
            check(&arp(3, POD_MAC, POD_V4)),
            Err(DropReason::Malformed),
            "reverse ARP"
        );
    }
}
