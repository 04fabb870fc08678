//! The two ends of a pod's veth.

use warren_abi::{DropReason, EndpointValue, Hook, OwnerTag, SettingsValue};

use crate::{
    Address, Ip, Judgement, Link, Maps, Meta, Network, Packet, Scratch, Transport, Verdict, arp, events,
    flows::{Replies, Task, Way, carry_out},
    host, ip,
    link::ETHERNET,
    maps::is_pod,
    neighbour,
    transport::has_ports,
    tuple,
};

/// Ingress of a pod's host veth: what a pod sends must be its own, and is marked as its own. What cannot be translated
/// any more is judged at once.
#[inline(always)]
pub fn from_pod<P: Packet, M: Maps>(packet: &P, maps: &M, meta: &Meta, scratch: &mut Scratch) -> Judgement {
    scratch.begin(Hook::FromPod, meta, packet.length(), maps.clock());
    let planned = send(packet, maps, meta, scratch);
    conclude(maps, scratch, planned)
}

/// Egress of a pod's host veth: the only place that sees what a pod receives, by whatever way, on its final
/// address. So ingress policy is asked here, and what comes from another node must have come through the tunnel.
#[inline(always)]
pub fn to_pod<P: Packet, M: Maps>(packet: &P, maps: &M, meta: &Meta, scratch: &mut Scratch) -> Judgement {
    scratch.begin(Hook::ToPod, meta, packet.length(), maps.clock());
    let planned = receive(packet, maps, meta, scratch);
    conclude(maps, scratch, planned)
}

/// The end of every program: what was planned is carried out, and a drop is told of.
#[inline(always)]
pub(crate) fn conclude<M: Maps>(maps: &M, scratch: &mut Scratch, planned: Judgement) -> Judgement {
    let judgement = match planned {
        Ok(verdict) => carry_out(maps, scratch).map(|judged| {
            // The first plan of a packet with a pod's mark is the pod's egress.
            let sender = scratch.ways[0].outbound && scratch.ways[0].endpoint != 0;
            if judged && sender {
                verdict.marked(scratch.now.tunnel_mark)
            } else {
                verdict
            }
        }),
        Err(reason) => Err(reason),
    };
    if let Err(reason) = judgement {
        events::report_drop(maps, scratch, reason);
    }
    judgement
}

#[inline(never)]
fn send<P: Packet, M: Maps>(packet: &P, maps: &M, meta: &Meta, scratch: &mut Scratch) -> Judgement {
    let settings = maps.settings().ok_or(DropReason::NotConfigured)?;
    scratch.provenance(settings, meta);
    let endpoint = maps.endpoint(meta.ifindex).ok_or(DropReason::UnknownEndpoint)?;
    let source = packet.load::<6>(6).ok_or(DropReason::Truncated)?;
    if source != endpoint.mac {
        return Err(DropReason::SpoofedMac);
    }
    let link = untagged(packet, meta)?;
    let mark = (meta.mark & !settings.mark_mask) | endpoint.mark;
    if !ip::read(packet, scratch, link)? {
        arp::check(packet, link.offset, endpoint)?;
        return Ok(Verdict::Pass { mark });
    }
    tuple::read(packet, maps, scratch)?;
    check_source(packet, &scratch.ip, &scratch.transport, endpoint)?;
    if scratch.tuple.discovery {
        return Ok(Verdict::Pass { mark });
    }
    let node = maps.node(&scratch.ip.destination).map(|node| node.own != 0);
    // The stack does not translate a pod's address, nor this node's for a protocol without ports. Any other may be a
    // service's, also that of another node.
    let is_final = match node {
        Some(own) => own && !has_ports(scratch.tuple.protocol),
        None => is_pod(maps, &scratch.ip.destination),
    };
    scratch.ways[0] = Way {
        endpoint: endpoint.index,
        identity: endpoint.identity,
        outbound: true,
        peer_mark: 0,
        defer: !is_final,
        replies: Replies::Judged,
        task: Task::Judge,
    };
    if node == Some(true) {
        host::enter::<false, P, M>(packet, maps, scratch, endpoint.mark)?;
    }
    Ok(Verdict::Pass { mark })
}

#[inline(never)]
fn receive<P: Packet, M: Maps>(packet: &P, maps: &M, meta: &Meta, scratch: &mut Scratch) -> Judgement {
    let settings = maps.settings().ok_or(DropReason::NotConfigured)?;
    scratch.provenance(settings, meta);
    let endpoint = maps.endpoint(meta.ifindex).ok_or(DropReason::UnknownEndpoint)?;
    let link = untagged(packet, meta)?;
    if !ip::read(packet, scratch, link)? {
        return Ok(Verdict::Pass { mark: meta.mark });
    }
    check_tunnelled(maps, settings, meta, &scratch.ip.source)?;
    tuple::read(packet, maps, scratch)?;
    if scratch.tuple.discovery {
        return Ok(Verdict::Pass { mark: meta.mark });
    }
    host::leave::<false, P, M>(packet, maps, scratch, endpoint.mark)?;
    scratch.ways[1] = Way {
        endpoint: endpoint.index,
        identity: endpoint.identity,
        outbound: false,
        peer_mark: scratch.now.from,
        defer: false,
        replies: Replies::Translated,
        task: Task::Judge,
    };
    Ok(Verdict::Pass { mark: meta.mark })
}

/// IPv4, IPv6 or ARP right behind the Ethernet header. Tags are for trunks; a pod could hide behind one.
#[inline(always)]
fn untagged<P: Packet>(packet: &P, meta: &Meta) -> Result<Link, DropReason> {
    let link = Link::ethernet(packet)?;
    if meta.tagged || link.offset != ETHERNET {
        return Err(DropReason::BadEthertype);
    }
    match link.network {
        Network::V4 | Network::V6 | Network::Arp => Ok(link),
        Network::Other => Err(DropReason::BadEthertype),
    }
}

#[inline(always)]
fn check_source<P: Packet>(
    packet: &P,
    ip: &Ip,
    transport: &Transport,
    endpoint: &EndpointValue,
) -> Result<(), DropReason> {
    match &ip.source {
        Address::V4(source) if owns_v4(endpoint, *source) => Ok(()),
        Address::V4(_) => Err(DropReason::SpoofedAddress),
        Address::V6(source) => neighbour::check(packet, ip, source, transport, endpoint),
    }
}

/// A remote pod's address without the tunnel's mark came in clear, or was made up here.
#[inline(always)]
fn check_tunnelled<M: Maps>(
    maps: &M,
    settings: &SettingsValue,
    meta: &Meta,
    source: &Address,
) -> Result<(), DropReason> {
    if settings.encryption == 0 || meta.mark & settings.mark_mask == settings.tunnel_mark {
        return Ok(());
    }
    match maps.owner(source).map(|owner| OwnerTag::parse(owner.tag)) {
        None | Some(Some(OwnerTag::LocalPod | OwnerTag::LocalNode | OwnerTag::RemoteNode)) => Ok(()),
        Some(Some(OwnerTag::RemotePod) | None) => Err(DropReason::NotFromTunnel),
    }
}

/// The address is one of the endpoint's. Zero is what unused places hold, and nobody's.
#[inline(always)]
pub(crate) fn owns_v4(endpoint: &EndpointValue, address: [u8; 4]) -> bool {
    let address = u32::from_ne_bytes(address);
    let mut owns = false;
    for own in endpoint.v4 {
        owns |= u32::from_ne_bytes(own) == address;
    }
    owns && address != 0
}

/// As [`owns_v4`].
#[inline(always)]
pub(crate) fn owns_v6(endpoint: &EndpointValue, address: &[u8; 16]) -> bool {
    let address = u128::from_ne_bytes(*address);
    let mut owns = false;
    for own in &endpoint.v6 {
        owns |= u128::from_ne_bytes(*own) == address;
    }
    owns && address != 0
}

/// fe80::/10.
#[inline(always)]
pub(crate) fn is_link_local(address: &[u8; 16]) -> bool {
    address[0] == 0xfe && address[1] & 0xc0 == 0x80
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{
        MARK_MASK, POD_IFINDEX, POD_MAC, POD_MARK, POD_V4, POD_V6, TUNNEL_MARK, World, arp, ethernet_from,
        icmp6, octets, run, v4, v6, vlan,
    };

    const REMOTE: [u8; 4] = [10, 244, 2, 9];
    const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

    fn out(frame: &[u8]) -> Judgement {
        let meta = Meta {
            ifindex: POD_IFINDEX,
            mark: 0xffff_ffff,
            ..Meta::default()
        };
        run(from_pod, frame, &World::new(), &meta)
    }

    fn enter(frame: &[u8], mark: u32) -> Judgement {
        run(
            to_pod,
            frame,
            &World::new(),
            &Meta {
                ifindex: POD_IFINDEX,
                mark,
                ..Meta::default()
            },
        )
    }

    fn frame4(from: [u8; 4]) -> Vec<u8> {
        ethernet_from(POD_MAC, 0x0800, &v4(from, REMOTE, 17, &[0; 8]))
    }

    fn frame6(from: &str) -> Vec<u8> {
        ethernet_from(POD_MAC, 0x86dd, &v6(from, "fd00:10:244:2::9", 17, &[0; 8]))
    }

    #[test]
    fn a_pod_is_marked_whatever_it_claims() {
        let marked = |mark| {
            Ok(Verdict::Pass {
                mark: !MARK_MASK | mark,
            })
        };
        let judged = marked(TUNNEL_MARK | POD_MARK);
        assert_eq!(out(&frame4(POD_V4)), judged);
        assert_eq!(out(&frame6(POD_V6)), judged);
        let world = ethernet_from(POD_MAC, 0x0800, &v4(POD_V4, [8, 8, 8, 8], 17, &[0; 8]));
        assert_eq!(out(&world), marked(POD_MARK), "to be judged where it leaves");
        let arp = ethernet_from(POD_MAC, 0x0806, &arp(1, POD_MAC, POD_V4));
        assert_eq!(out(&arp), marked(POD_MARK));
        let solicitation = icmp6("fe80::2", 135, 255, &octets(POD_V6), None);
        assert_eq!(
            out(&ethernet_from(POD_MAC, 0x86dd, &solicitation)),
            marked(POD_MARK)
        );
    }

    #[test]
    fn spoofing_is_refused() {
        assert_eq!(out(&frame4([10, 244, 1, 3])), Err(DropReason::SpoofedAddress));
        assert_eq!(out(&frame4([0; 4])), Err(DropReason::SpoofedAddress));
        assert_eq!(out(&frame6("fd00:10:244:1::3")), Err(DropReason::SpoofedAddress));
        assert_eq!(
            out(&frame6("::ffff:10.244.1.2")),
            Err(DropReason::SpoofedAddress),
            "IPv4 in disguise"
        );
        let frame = ethernet_from(OTHER_MAC, 0x0800, &v4(POD_V4, REMOTE, 17, &[0; 8]));
        assert_eq!(out(&frame), Err(DropReason::SpoofedMac));
        let frame = ethernet_from(POD_MAC, 0x0806, &arp(1, OTHER_MAC, POD_V4));
        assert_eq!(out(&frame), Err(DropReason::SpoofedArp));
    }

    #[test]
    fn only_ip_and_arp_without_tag() {
        let frame = frame4(POD_V4);
        assert_eq!(out(&vlan(0x8100, &frame)), Err(DropReason::BadEthertype));
        assert_eq!(
            out(&ethernet_from(POD_MAC, 0x8847, &[0; 64])),
            Err(DropReason::BadEthertype)
        );
        assert_eq!(
            out(&ethernet_from(POD_MAC, 0x0026, &[0; 64])),
            Err(DropReason::BadEthertype),
            "802.3"
        );
        let meta = Meta {
            ifindex: POD_IFINDEX,
            tagged: true,
            ..Meta::default()
        };
        assert_eq!(
            run(from_pod, &frame, &World::new(), &meta),
            Err(DropReason::BadEthertype)
        );
        assert_eq!(
            out(&ethernet_from(POD_MAC, 0x86dd, &v4(POD_V4, REMOTE, 17, &[]))),
            Err(DropReason::Truncated)
        );
    }

    #[test]
    fn every_truncation_is_dropped() {
        for frame in [frame4(POD_V4), frame6(POD_V6)] {
            for length in 0..frame.len() {
                assert_eq!(out(&frame[..length]), Err(DropReason::Truncated), "{length}");
                assert!(enter(&frame[..length], TUNNEL_MARK).is_err());
            }
        }
    }

    #[test]
    fn unknown_pods_and_unconfigured_programs_drop() {
        let frame = frame4(POD_V4);
        let meta = Meta {
            ifindex: 99,
            ..Meta::default()
        };
        assert_eq!(
            run(from_pod, &frame, &World::new(), &meta),
            Err(DropReason::UnknownEndpoint)
        );
        assert_eq!(
            run(to_pod, &frame, &World::new(), &meta),
            Err(DropReason::UnknownEndpoint)
        );
        assert_eq!(
            run(from_pod, &frame, &World::default(), &meta),
            Err(DropReason::NotConfigured)
        );
        assert_eq!(
            run(to_pod, &frame, &World::default(), &meta),
            Err(DropReason::NotConfigured)
        );
    }

    #[test]
    fn a_remote_pod_must_come_through_the_tunnel() {
        let v4 = ethernet_from(OTHER_MAC, 0x0800, &v4(REMOTE, POD_V4, 17, &[0; 8]));
        let v6 = ethernet_from(OTHER_MAC, 0x86dd, &v6("fd00:10:244:2::9", POD_V6, 17, &[0; 8]));
        for frame in [v4, v6] {
            assert_eq!(
                enter(&frame, TUNNEL_MARK),
                Ok(Verdict::Pass { mark: TUNNEL_MARK })
            );
            assert_eq!(
                enter(&frame, TUNNEL_MARK | 0x4000),
                Ok(Verdict::Pass {
                    mark: TUNNEL_MARK | 0x4000
                })
            );
            assert_eq!(enter(&frame, 0), Err(DropReason::NotFromTunnel));
            assert_eq!(enter(&frame, POD_MARK), Err(DropReason::NotFromTunnel));
            let mut world = World::new();
            world.settings.as_mut().unwrap().encryption = 0;
            let meta = Meta {
                ifindex: POD_IFINDEX,
                ..Meta::default()
            };
            assert_eq!(run(to_pod, &frame, &world, &meta), Ok(Verdict::Pass { mark: 0 }));
        }
    }

    #[test]
    fn services_the_host_and_the_world_may_enter() {
        for from in [
            [10, 96, 0, 10],
            [192, 168, 0, 1],
            [192, 168, 0, 2],
            [8, 8, 8, 8],
            [10, 244, 1, 3],
        ] {
            let frame = ethernet_from(OTHER_MAC, 0x0800, &v4(from, POD_V4, 17, &[0; 8]));
            assert_eq!(enter(&frame, 0), Ok(Verdict::Pass { mark: 0 }), "{from:?}");
        }
        let frame = ethernet_from(OTHER_MAC, 0x0806, &arp(1, OTHER_MAC, [10, 244, 1, 1]));
        assert_eq!(enter(&frame, 0), Ok(Verdict::Pass { mark: 0 }));
        let frame = ethernet_from(OTHER_MAC, 0x88cc, &[0; 64]);
        assert_eq!(enter(&frame, 0), Err(DropReason::BadEthertype));
    }
}
