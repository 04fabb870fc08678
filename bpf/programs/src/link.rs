//! Link layer: which network protocol, and where it starts.

use warren_abi::DropReason;

use crate::{Meta, Packet};

/// Bytes of an Ethernet header.
pub(crate) const ETHERNET: usize = 14;
pub(crate) const IPV4: u16 = 0x0800;
pub(crate) const IPV6: u16 = 0x86dd;
const ARP: u16 = 0x0806;
/// Tags that are looked through: 802.1Q, 802.1ad, and what QinQ was before it.
const TAGS: [u16; 3] = [0x8100, 0x88a8, 0x9100];

/// Network protocol of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
    /// ARP.
    Arp,
    /// Anything else.
    Other,
}

/// Where the network header starts, and what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Network protocol, by the bytes; the kernel only repeats what the sender claimed.
    pub network: Network,
    /// Offset of its header.
    pub offset: usize,
}

impl Link {
    /// Reads an Ethernet header (`l2_length` 14) and up to two VLAN tags, or none (0).
    #[inline(always)]
    pub fn parse<P: Packet>(packet: &P, l2_length: u8, meta: &Meta) -> Result<Self, DropReason> {
        match l2_length {
            0 => Self::bare(packet, meta.protocol),
            14 => Self::ethernet(packet),
            _ => Err(DropReason::UnknownDevice),
        }
    }

    /// Reads an Ethernet header and up to two VLAN tags.
    #[inline(always)]
    pub(crate) fn ethernet<P: Packet>(packet: &P) -> Result<Self, DropReason> {
        let mut offset = ETHERNET;
        // One more round than tags allowed: the last one only looks.
        for _ in 0..3 {
            let ethertype = packet.load::<2>(offset - 2).ok_or(DropReason::Truncated)?;
            let ethertype = u16::from_be_bytes(ethertype);
            if !is_tag(ethertype) {
                return Ok(Self {
                    network: Network::of(ethertype),
                    offset,
                });
            }
            offset += 4;
        }
        Err(DropReason::VlanDepth)
    }

    /// A device without link-layer header: the version tells, and must not contradict the claim.
    #[inline(always)]
    fn bare<P: Packet>(packet: &P, claimed: u16) -> Result<Self, DropReason> {
        let [first] = packet.load::<1>(0).ok_or(DropReason::Truncated)?;
        let network = match first >> 4 {
            4 if claimed != IPV6 => Network::V4,
            6 if claimed != IPV4 => Network::V6,
            _ if claimed == IPV4 || claimed == IPV6 => return Err(DropReason::Malformed),
            _ => Network::Other,
        };
        Ok(Self { network, offset: 0 })
    }
}

impl Network {
    #[inline(always)]
    const fn of(ethertype: u16) -> Self {
        match ethertype {
            IPV4 => Self::V4,
            IPV6 => Self::V6,
            ARP => Self::Arp,
            _ => Self::Other,
        }
    }
}

#[inline(always)]
const fn is_tag(ethertype: u16) -> bool {
    ethertype == TAGS[0] || ethertype == TAGS[1] || ethertype == TAGS[2]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Bytes, ethernet, vlan};

    fn parse(frame: &[u8]) -> Result<Link, DropReason> {
        Link::parse(&Bytes(frame), 14, &Meta::default())
    }

    #[test]
    fn ethernet_with_up_to_two_tags() {
        let plain = ethernet(IPV4, &[0x45]);
        assert_eq!(
            parse(&plain),
            Ok(Link {
                network: Network::V4,
                offset: 14
            })
        );
        let one = vlan(0x8100, &plain);
        assert_eq!(
            parse(&one),
            Ok(Link {
                network: Network::V4,
                offset: 18
            })
        );
        let two = vlan(0x88a8, &one);
        assert_eq!(
            parse(&two),
            Ok(Link {
                network: Network::V4,
                offset: 22
            })
        );
        assert_eq!(parse(&vlan(0x9100, &two)), Err(DropReason::VlanDepth));
    }

    #[test]
    fn every_truncation_of_a_header_is_an_error() {
        let frame = vlan(0x88a8, &vlan(0x8100, &ethernet(IPV6, &[])));
        for length in 0..frame.len() {
            assert_eq!(parse(&frame[..length]), Err(DropReason::Truncated), "{length}");
        }
        assert_eq!(parse(&frame).map(|link| link.network), Ok(Network::V6));
    }

    #[test]
    fn bare_packets_tell_their_version() {
        let bare = |bytes: &[u8], protocol| {
            Link::parse(
                &Bytes(bytes),
                0,
                &Meta {
                    protocol,
                    ..Meta::default()
                },
            )
            .map(|link| link.network)
        };
        assert_eq!(bare(&[0x45], IPV4), Ok(Network::V4));
        assert_eq!(bare(&[0x60], IPV6), Ok(Network::V6));
        assert_eq!(
            bare(&[0x60], 0),
            Ok(Network::V6),
            "a claim of nothing hides nothing"
        );
        assert_eq!(bare(&[0x60], IPV4), Err(DropReason::Malformed));
        assert_eq!(bare(&[0x45], IPV6), Err(DropReason::Malformed));
        assert_eq!(bare(&[0x10], IPV4), Err(DropReason::Malformed));
        assert_eq!(bare(&[0x10], 0x8847), Ok(Network::Other));
        assert_eq!(bare(&[], IPV4), Err(DropReason::Truncated));
    }

    #[test]
    fn other_lengths_of_a_link_header_are_refused() {
        assert_eq!(
            Link::parse(&Bytes(&[0; 64]), 4, &Meta::default()),
            Err(DropReason::UnknownDevice)
        );
    }
}
