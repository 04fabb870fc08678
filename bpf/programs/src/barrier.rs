//! The barrier: on every device that is neither a pod's nor a tunnel. It rests on the pools that the operator
//! configured and on the mesh nodes' addresses, not on what anybody says who owns what.

use warren_abi::{DropReason, Hook, PEER_FORWARDED};

use crate::{
    Address, Judgement, Link, Maps, Meta, Packet, Scratch, Verdict,
    endpoint::conclude,
    host, ip,
    maps::{is_pod, is_service},
};

/// Egress: mesh traffic never leaves in clear. A pod's traffic with the outside world does, where its policy allows.
#[inline(always)]
pub fn barrier_out<P: Packet, M: Maps>(
    packet: &P,
    maps: &M,
    meta: &Meta,
    scratch: &mut Scratch,
) -> Judgement {
    scratch.begin(Hook::BarrierOut, meta, packet.length(), maps.clock());
    let planned = send(packet, maps, meta, scratch);
    conclude(maps, scratch, planned)
}

/// Ingress: nothing in clear may claim to be a pod, or to be a node that talks to a pod, or to be this node, or a
/// service. A mark from elsewhere says nothing here.
#[inline(always)]
pub fn barrier_in<P: Packet, M: Maps>(packet: &P, maps: &M, meta: &Meta, scratch: &mut Scratch) -> Judgement {
    scratch.begin(Hook::BarrierIn, meta, packet.length(), maps.clock());
    let planned = receive(packet, maps, meta, scratch);
    conclude(maps, scratch, planned)
}

#[inline(never)]
fn send<P: Packet, M: Maps>(packet: &P, maps: &M, meta: &Meta, scratch: &mut Scratch) -> Judgement {
    if !read(packet, maps, meta, scratch)? {
        return Ok(Verdict::Pass { mark: meta.mark });
    }
    let from_pod = is_pod(maps, &scratch.ip.source);
    let to_pod = is_pod(maps, &scratch.ip.destination);
    let mesh = (from_pod && (to_pod || is_node(maps, &scratch.ip.destination)))
        || (to_pod && is_node(maps, &scratch.ip.source));
    if mesh {
        return Err(DropReason::CleartextOut);
    }
    host::leave::<true, P, M>(packet, maps, scratch, 0)?;
    let mark = meta.mark;
    host::note_masquerade(maps, scratch);
    Ok(Verdict::Pass { mark })
}

#[inline(never)]
fn receive<P: Packet, M: Maps>(packet: &P, maps: &M, meta: &Meta, scratch: &mut Scratch) -> Judgement {
    let is_ip = read(packet, maps, meta, scratch)?;
    let pass = Ok(Verdict::Pass {
        mark: meta.mark & !scratch.now.mark_mask,
    });
    if !is_ip {
        return pass;
    }
    if is_pod(maps, &scratch.ip.source) {
        return Err(DropReason::CleartextIn);
    }
    if is_service(maps, &scratch.ip.source) {
        return Err(DropReason::ServiceAddress);
    }
    match maps.node(&scratch.ip.source) {
        Some(node) if node.own != 0 => return Err(DropReason::OwnAddress),
        Some(_) if is_pod(maps, &scratch.ip.destination) => return Err(DropReason::CleartextIn),
        Some(_) | None => {}
    }
    if host::is_own(maps, &scratch.ip.destination) {
        host::enter::<true, P, M>(packet, maps, scratch, PEER_FORWARDED)?;
    }
    pass
}

/// Reads mark and header; `false` where the frame is not IP.
#[inline(always)]
fn read<P: Packet, M: Maps>(
    packet: &P,
    maps: &M,
    meta: &Meta,
    scratch: &mut Scratch,
) -> Result<bool, DropReason> {
    let settings = maps.settings().ok_or(DropReason::NotConfigured)?;
    scratch.provenance(settings, meta);
    let device = maps.device(meta.ifindex).ok_or(DropReason::UnknownDevice)?;
    let link = Link::parse(packet, device.l2_length, meta)?;
    ip::read(packet, scratch, link)
}

#[inline(always)]
fn is_node<M: Maps>(maps: &M, address: &Address) -> bool {
    maps.node(address).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{OVERLAY, POD_MARK, TUNNEL_MARK, UNDERLAY, World, arp, ethernet, run, v4, v6, vlan};

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
            (0x0800, v4(source, destination, 17, &[0; 8])),
            (0x86dd, v6(&v6_of(source), &v6_of(destination), 17, &[0; 8])),
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
            mark: 0x4000 | POD_MARK,
            ..Meta::default()
        }
    }

    fn out(source: [u8; 4], destination: [u8; 4]) -> Judgement {
        everywhere(source, destination, |bytes, ifindex| {
            run(barrier_out, bytes, &World::new(), &meta(ifindex))
        })
    }

    fn enter(source: [u8; 4], destination: [u8; 4]) -> Judgement {
        everywhere(source, destination, |bytes, ifindex| {
            run(barrier_in, bytes, &World::new(), &meta(ifindex))
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
        let pass = Ok(Verdict::Pass {
            mark: 0x4000 | TUNNEL_MARK | POD_MARK,
        });
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
        assert!(run(barrier_in, &frame, &World::new(), &meta(UNDERLAY)).is_ok());
        let frame = ethernet(0x88cc, &[0; 10]);
        assert!(run(barrier_out, &frame, &World::new(), &meta(UNDERLAY)).is_ok());
    }

    #[test]
    fn what_cannot_be_parsed_is_dropped() {
        for packet in [
            ethernet(0x0800, &v4(OWN, NODE, 6, &[])),
            ethernet(0x86dd, &v6("fd00:192::1", "fd00:192::2", 6, &[])),
        ] {
            for length in 0..packet.len() {
                let judged = run(barrier_out, &packet[..length], &World::new(), &meta(UNDERLAY));
                assert_eq!(judged, Err(DropReason::Truncated), "{length}");
                let judged = run(barrier_in, &packet[..length], &World::new(), &meta(UNDERLAY));
                assert_eq!(judged, Err(DropReason::Truncated), "{length}");
            }
        }
        let frame = ethernet(0x0800, &[0x60; 40]);
        assert_eq!(
            run(barrier_out, &frame, &World::new(), &meta(UNDERLAY)),
            Err(DropReason::Malformed)
        );
        let frame = vlan(
            0x8100,
            &vlan(0x8100, &vlan(0x8100, &ethernet(0x0800, &v4(POD, NODE, 6, &[])))),
        );
        assert_eq!(
            run(barrier_out, &frame, &World::new(), &meta(UNDERLAY)),
            Err(DropReason::VlanDepth)
        );
    }

    #[test]
    fn unknown_devices_and_unconfigured_programs_drop() {
        let frame = ethernet(0x0800, &v4(WORLD, OWN, 6, &[]));
        assert_eq!(
            run(barrier_in, &frame, &World::new(), &meta(99)),
            Err(DropReason::UnknownDevice)
        );
        assert_eq!(
            run(barrier_in, &frame, &World::default(), &meta(UNDERLAY)),
            Err(DropReason::NotConfigured)
        );
    }
}
