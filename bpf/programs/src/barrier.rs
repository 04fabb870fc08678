//! The barrier: on every device that is neither a pod's nor a tunnel. It rests on the pools that the operator
//! configured and on the mesh nodes' addresses, not on what anybody says who owns what.

use warren_abi::{DropReason, SettingsValue};

use crate::{Address, Ip, Judgement, Link, Maps, Meta, Packet, Verdict};

/// Egress: mesh traffic never leaves in clear. A pod's traffic with the outside world does.
#[inline(always)]
pub fn barrier_out<P: Packet, M: Maps>(packet: &P, maps: &M, meta: &Meta) -> Judgement {
    let (_, ip) = read(packet, maps, meta)?;
    if let Some(ip) = ip {
        let from_pod = maps.is_pod(&ip.source);
        let to_pod = maps.is_pod(&ip.destination);
        let mesh =
            (from_pod && (to_pod || is_node(maps, &ip.destination))) || (to_pod && is_node(maps, &ip.source));
        if mesh {
            return Err(DropReason::CleartextOut);
        }
    }
    Ok(Verdict::Pass { mark: meta.mark })
}

/// Ingress: nothing in clear may claim to be a pod, or to be a node that talks to a pod, or to be this node. A
/// mark from elsewhere says nothing here.
#[inline(always)]
pub fn barrier_in<P: Packet, M: Maps>(packet: &P, maps: &M, meta: &Meta) -> Judgement {
    let (settings, ip) = read(packet, maps, meta)?;
    if let Some(ip) = ip {
        if maps.is_pod(&ip.source) {
            return Err(DropReason::CleartextIn);
        }
        match maps.node(&ip.source) {
            Some(node) if node.own != 0 => return Err(DropReason::OwnAddress),
            Some(_) if maps.is_pod(&ip.destination) => return Err(DropReason::CleartextIn),
            Some(_) | None => {}
        }
    }
    Ok(Verdict::Pass {
        mark: meta.mark & !settings.mark_mask,
    })
}

#[inline(always)]
fn read<'m, P: Packet, M: Maps>(
    packet: &P,
    maps: &'m M,
    meta: &Meta,
) -> Result<(&'m SettingsValue, Option<Ip>), DropReason> {
    let settings = maps.settings().ok_or(DropReason::NotConfigured)?;
    let device = maps.device(meta.ifindex).ok_or(DropReason::UnknownDevice)?;
    let link = Link::parse(packet, device.l2_length, meta)?;
    Ok((settings, Ip::parse(packet, link)?))
}

#[inline(always)]
fn is_node<M: Maps>(maps: &M, address: &Address) -> bool {
    maps.node(address).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Bytes, OVERLAY, UNDERLAY, World, arp, ethernet, v4, v6, vlan};

    const POD: [u8; 4] = [10, 244, 1, 2];
    const UNKNOWN_POD: [u8; 4] = [10, 244, 200, 2];
    const OWN: [u8; 4] = [192, 168, 0, 1];
    const NODE: [u8; 4] = [192, 168, 0, 2];
    const STRANGER: [u8; 4] = [192, 168, 0, 99];
    const WORLD: [u8; 4] = [8, 8, 8, 8];

    fn v6_of(a: [u8; 4]) -> String {
        match a {
            [10, _, c, d] => format!("fd00:10:244:{c}::{d}"),
            [192, _, _, d] => format!("fd00:192::{d}"),
            _ => "2001:db8::8".into(),
        }
    }

    /// Both families, plain, tagged once and twice, and on a device without link-layer header.
    fn everywhere(
        source: [u8; 4],
        destination: [u8; 4],
        judge: impl Fn(&[u8], u32) -> Judgement,
    ) -> Judgement {
        let packets = [
            (0x0800, v4(source, destination, 6, &[0; 20])),
            (0x86dd, v6(&v6_of(source), &v6_of(destination), 6, &[0; 20])),
        ];
        let mut answers = Vec::new();
        for (ethertype, packet) in packets {
            let frame = ethernet(ethertype, &packet);
            let tagged = vlan(0x8100, &frame);
            answers.push(judge(&vlan(0x88a8, &tagged), UNDERLAY));
            answers.push(judge(&tagged, UNDERLAY));
            answers.push(judge(&frame, UNDERLAY));
            answers.push(judge(&packet, OVERLAY));
        }
        assert!(
            answers.iter().all(|answer| *answer == answers[0]),
            "{source:?} {destination:?} {answers:?}"
        );
        answers[0]
    }

    fn meta(ifindex: u32) -> Meta {
        Meta {
            ifindex,
            mark: 0x4001,
            ..Meta::default()
        }
    }

    fn out(source: [u8; 4], destination: [u8; 4]) -> Judgement {
        everywhere(source, destination, |bytes, ifindex| {
            barrier_out(&Bytes(bytes), &World::new(), &meta(ifindex))
        })
    }

    fn enter(source: [u8; 4], destination: [u8; 4]) -> Judgement {
        everywhere(source, destination, |bytes, ifindex| {
            barrier_in(&Bytes(bytes), &World::new(), &meta(ifindex))
        })
    }

    #[test]
    fn mesh_traffic_does_not_leave_in_clear() {
        let leaks = Err(DropReason::CleartextOut);
        for pod in [POD, UNKNOWN_POD] {
            for member in [POD, UNKNOWN_POD, NODE, OWN] {
                assert_eq!(out(pod, member), leaks);
                assert_eq!(out(member, pod), leaks);
            }
        }
    }

    #[test]
    fn the_rest_leaves() {
        let pass = Ok(Verdict::Pass { mark: 0x4001 });
        for (source, destination) in [
            (POD, WORLD),
            (WORLD, POD),
            (POD, STRANGER),
            (STRANGER, POD),
            (OWN, NODE),
            (OWN, WORLD),
            (NODE, OWN),
        ] {
            assert_eq!(out(source, destination), pass, "{source:?} {destination:?}");
        }
    }

    #[test]
    fn nothing_in_clear_claims_to_be_a_pod() {
        for destination in [POD, OWN, NODE, WORLD] {
            assert_eq!(enter(POD, destination), Err(DropReason::CleartextIn));
            assert_eq!(enter(UNKNOWN_POD, destination), Err(DropReason::CleartextIn));
            assert_eq!(enter(OWN, destination), Err(DropReason::OwnAddress));
        }
        assert_eq!(enter(NODE, POD), Err(DropReason::CleartextIn));
    }

    #[test]
    fn the_rest_comes_in_without_mark() {
        let pass = Ok(Verdict::Pass { mark: 0x4000 });
        for (source, destination) in [
            (WORLD, POD),
            (STRANGER, POD),
            (NODE, OWN),
            (NODE, NODE),
            (WORLD, OWN),
        ] {
            assert_eq!(enter(source, destination), pass, "{source:?} {destination:?}");
        }
    }

    #[test]
    fn other_protocols_pass() {
        let frame = ethernet(0x0806, &arp(1, [2, 0, 0, 0, 0, 1], OWN));
        assert!(barrier_in(&Bytes(&frame), &World::new(), &meta(UNDERLAY)).is_ok());
        let frame = ethernet(0x88cc, &[0; 10]);
        assert!(barrier_out(&Bytes(&frame), &World::new(), &meta(UNDERLAY)).is_ok());
    }

    #[test]
    fn what_cannot_be_parsed_is_dropped() {
        for packet in [
            ethernet(0x0800, &v4(OWN, NODE, 6, &[])),
            ethernet(0x86dd, &v6("fd00:192::1", "fd00:192::2", 6, &[])),
        ] {
            for length in 0..packet.len() {
                let judged = barrier_out(&Bytes(&packet[..length]), &World::new(), &meta(UNDERLAY));
                assert_eq!(judged, Err(DropReason::Truncated), "{length}");
                let judged = barrier_in(&Bytes(&packet[..length]), &World::new(), &meta(UNDERLAY));
                assert_eq!(judged, Err(DropReason::Truncated), "{length}");
            }
        }
        let frame = ethernet(0x0800, &[0x60; 40]);
        assert_eq!(
            barrier_out(&Bytes(&frame), &World::new(), &meta(UNDERLAY)),
            Err(DropReason::Malformed)
        );
        let frame = vlan(
            0x8100,
            &vlan(0x8100, &vlan(0x8100, &ethernet(0x0800, &v4(POD, NODE, 6, &[])))),
        );
        assert_eq!(
            barrier_out(&Bytes(&frame), &World::new(), &meta(UNDERLAY)),
            Err(DropReason::VlanDepth)
        );
    }

    #[test]
    fn unknown_devices_and_unconfigured_programs_drop() {
        let frame = ethernet(0x0800, &v4(WORLD, OWN, 6, &[]));
        assert_eq!(
            barrier_in(&Bytes(&frame), &World::new(), &meta(99)),
            Err(DropReason::UnknownDevice)
        );
        assert_eq!(
            barrier_in(&Bytes(&frame), &World::default(), &meta(UNDERLAY)),
            Err(DropReason::NotConfigured)
        );
    }
}
