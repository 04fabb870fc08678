//! The two ends of a WireGuard device.

use warren_abi::{DropReason, EXCHANGE_PORT, Hook, OwnerTag};

use crate::{
    Judgement, Link, Maps, Meta, Packet, Scratch, Verdict, endpoint::conclude, host, ip, transport::UDP,
};

/// Egress of a tunnel device: destination, its owner's node, the device that sends to it now. All traffic to
/// other nodes is routed to one device; which one sends is read here, as only here pass host, forwarded and
/// translated packets alike. Egress policy of who was not judged before is asked here.
#[inline(always)]
pub fn tun_eg<P: Packet, M: Maps>(packet: &P, maps: &M, meta: &Meta, scratch: &mut Scratch) -> Judgement {
    scratch.begin(Hook::TunEg, meta, packet.length(), maps.clock());
    let planned = send(packet, maps, meta, scratch);
    conclude(maps, scratch, planned)
}

/// Ingress of a tunnel device: the source's most specific owner must be another node, and that node must be one
/// that sends by this slot. (Within a slot the device itself binds sources to peers.)
#[inline(always)]
pub fn tun_in<P: Packet, M: Maps>(packet: &P, maps: &M, meta: &Meta, scratch: &mut Scratch) -> Judgement {
    scratch.begin(Hook::TunIn, meta, packet.length(), maps.clock());
    let planned = receive(packet, maps, meta, scratch);
    conclude(maps, scratch, planned)
}

#[inline(never)]
fn send<P: Packet, M: Maps>(packet: &P, maps: &M, meta: &Meta, scratch: &mut Scratch) -> Judgement {
    let settings = maps.settings().ok_or(DropReason::NotConfigured)?;
    scratch.provenance(settings, meta);
    let device = maps.device(meta.ifindex).ok_or(DropReason::UnknownDevice)?;
    let link = Link::parse(packet, device.l2_length, meta)?;
    if !ip::read(packet, scratch, link)? {
        return Err(DropReason::BadEthertype);
    }
    if scratch.ip.destination.is_link_scoped() {
        // The agent's own: made on this host, and on the device where it is. No pod's, and nothing that is forwarded.
        return match scratch.now.from == 0 && is_exchange(packet, scratch)? {
            true => Ok(Verdict::Pass { mark: meta.mark }),
            false => Err(DropReason::NotUnicast),
        };
    }
    let owner = maps.owner(&scratch.ip.destination).ok_or(DropReason::NoOwner)?;
    let node = match OwnerTag::parse(owner.tag) {
        Some(OwnerTag::RemotePod | OwnerTag::RemoteNode) => owner.node,
        Some(OwnerTag::LocalPod | OwnerTag::LocalNode) => return Err(DropReason::LocalDestination),
        None => return Err(DropReason::NoOwner),
    };
    host::leave::<true, P, M>(packet, maps, scratch, 0)?;
    let mark = meta.mark;
    match maps.path(node) {
        Some(path) if path.ifindex == meta.ifindex => Ok(Verdict::Pass { mark }),
        Some(path) if path.ifindex != 0 => Ok(Verdict::Redirect {
            ifindex: path.ifindex,
            mark,
        }),
        Some(_) | None => Err(DropReason::NoPath),
    }
}

#[inline(never)]
fn receive<P: Packet, M: Maps>(packet: &P, maps: &M, meta: &Meta, scratch: &mut Scratch) -> Judgement {
    let settings = maps.settings().ok_or(DropReason::NotConfigured)?;
    scratch.provenance(settings, meta);
    let device = maps.device(meta.ifindex).ok_or(DropReason::UnknownDevice)?;
    let link = Link::parse(packet, device.l2_length, meta)?;
    if !ip::read(packet, scratch, link)? {
        return Err(DropReason::BadEthertype);
    }
    let tunnelled = Verdict::Pass {
        mark: (meta.mark & !settings.mark_mask) | settings.tunnel_mark,
    };
    if scratch.ip.source.is_link_scoped() || scratch.ip.destination.is_link_scoped() {
        // From whom it is, the device itself knows by the source; it stays here.
        let owner = maps.owner(&scratch.ip.destination).map(|owner| owner.tag);
        let here = owner == Some(OwnerTag::LocalNode as u8);
        return match here && is_exchange(packet, scratch)? {
            true => Ok(tunnelled),
            false => Err(DropReason::LinkScope),
        };
    }
    let owner = maps.owner(&scratch.ip.source).ok_or(DropReason::BadOwner)?;
    let node = match OwnerTag::parse(owner.tag) {
        Some(OwnerTag::RemotePod | OwnerTag::RemoteNode) => owner.node,
        Some(OwnerTag::LocalPod | OwnerTag::LocalNode) | None => return Err(DropReason::BadOwner),
    };
    match maps.path(node) {
        Some(path) if path.receive_slots & device.slot_bit != 0 => {}
        Some(_) | None => return Err(DropReason::WrongSlot),
    }
    if host::is_own(maps, &scratch.ip.destination) {
        host::enter::<true, P, M>(packet, maps, scratch, settings.tunnel_mark)?;
    }
    Ok(tunnelled)
}

/// Whether a packet is one of the exchange of pre-shared keys: between link-local addresses, UDP without anything before
/// it, whole, and at the port of the exchange at both ends, which only root may have.
#[inline(always)]
fn is_exchange<P: Packet>(packet: &P, scratch: &Scratch) -> Result<bool, DropReason> {
    let ip = &scratch.ip;
    if !ip.source.is_link_local_v6() || !ip.destination.is_link_local_v6() || ip.next != UDP {
        return Ok(false);
    }
    let ports = ip.load::<4, P>(packet, ip.payload)?;
    let [high, low] = EXCHANGE_PORT.to_be_bytes();
    Ok(ports == [high, low, high, low])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{
        MARK_MASK, POD_MARK, POD_V4, POD_V6, TUNNEL_MARK, TUNNEL0, TUNNEL1, World, ethernet, run, v4, v6,
    };

    const JUDGED: u32 = TUNNEL_MARK | POD_MARK;

    fn out(packet: &[u8], ifindex: u32) -> Judgement {
        run(
            tun_eg,
            packet,
            &World::new(),
            &Meta {
                ifindex,
                mark: POD_MARK,
                ..Meta::default()
            },
        )
    }

    fn enter(packet: &[u8], ifindex: u32) -> Judgement {
        run(
            tun_in,
            packet,
            &World::new(),
            &Meta {
                ifindex,
                mark: 0xffff_ffff,
                ..Meta::default()
            },
        )
    }

    fn to4(destination: [u8; 4]) -> Vec<u8> {
        v4(POD_V4, destination, 17, &[0; 8])
    }

    fn from4(source: [u8; 4]) -> Vec<u8> {
        v4(source, POD_V4, 17, &[0; 8])
    }

    #[test]
    fn the_path_decides_the_device() {
        // Node 2 sends by slot 0, node 3 by slot 1.
        assert_eq!(
            out(&to4([10, 244, 2, 9]), TUNNEL0),
            Ok(Verdict::Pass { mark: JUDGED })
        );
        assert_eq!(
            out(&to4([10, 244, 3, 9]), TUNNEL0),
            Ok(Verdict::Redirect {
                ifindex: TUNNEL1,
                mark: JUDGED
            })
        );
        assert_eq!(
            out(&to4([10, 244, 3, 9]), TUNNEL1),
            Ok(Verdict::Pass { mark: JUDGED })
        );
        assert_eq!(
            out(&to4([192, 168, 0, 2]), TUNNEL0),
            Ok(Verdict::Pass { mark: JUDGED }),
            "a node"
        );
        let packet = v6(POD_V6, "fd00:10:244:3::9", 17, &[0; 8]);
        assert_eq!(
            out(&packet, TUNNEL0),
            Ok(Verdict::Redirect {
                ifindex: TUNNEL1,
                mark: JUDGED
            })
        );
    }

    #[test]
    fn no_way_to_the_destination() {
        assert_eq!(out(&to4([10, 244, 9, 9]), TUNNEL0), Err(DropReason::NoOwner));
        assert_eq!(
            out(&to4([10, 244, 4, 9]), TUNNEL0),
            Err(DropReason::NoPath),
            "node without path"
        );
        assert_eq!(out(&to4(POD_V4), TUNNEL0), Err(DropReason::LocalDestination));
        assert_eq!(
            out(&to4([192, 168, 0, 1]), TUNNEL0),
            Err(DropReason::LocalDestination)
        );
        assert_eq!(
            out(&v6("fe80::1", "ff02::16", 58, &[0; 8]), TUNNEL0),
            Err(DropReason::NotUnicast)
        );
        assert_eq!(out(&to4([10, 244, 2, 9]), 99), Err(DropReason::UnknownDevice));
    }

    #[test]
    fn the_most_specific_owner_of_the_source_must_be_a_peer_of_the_slot() {
        let accepted = Ok(Verdict::Pass {
            mark: !MARK_MASK | TUNNEL_MARK,
        });
        assert_eq!(enter(&from4([10, 244, 2, 9]), TUNNEL0), accepted);
        assert_eq!(
            enter(&from4([192, 168, 0, 2]), TUNNEL0),
            accepted,
            "a remote node"
        );
        assert_eq!(
            enter(&v6("fd00:10:244:2::9", POD_V6, 17, &[0; 8]), TUNNEL0),
            accepted
        );
        assert_eq!(
            enter(&from4([10, 244, 2, 9]), TUNNEL1),
            Err(DropReason::WrongSlot)
        );
        assert_eq!(
            enter(&from4([10, 244, 2, 77]), TUNNEL0),
            Err(DropReason::WrongSlot),
            "moved to node 3"
        );
        assert_eq!(enter(&from4([10, 244, 2, 77]), TUNNEL1), accepted);
        assert_eq!(
            enter(&from4([10, 244, 4, 9]), TUNNEL0),
            Err(DropReason::WrongSlot),
            "node without path"
        );
    }

    #[test]
    fn sources_that_no_peer_may_use() {
        assert_eq!(
            enter(&from4([8, 8, 8, 8]), TUNNEL0),
            Err(DropReason::BadOwner),
            "the world"
        );
        assert_eq!(
            enter(&from4(POD_V4), TUNNEL0),
            Err(DropReason::BadOwner),
            "a local pod"
        );
        assert_eq!(
            enter(&from4([192, 168, 0, 1]), TUNNEL0),
            Err(DropReason::BadOwner),
            "this node"
        );
        assert_eq!(
            enter(&v6("::", POD_V6, 17, &[0; 8]), TUNNEL0),
            Err(DropReason::BadOwner)
        );
    }

    /// This device's link-local address, which its owner map knows, and a peer's.
    const LINK: &str = "fe80::1";
    const PEER_LINK: &str = "fe80::2";

    fn exchange(source: &str, destination: &str, protocol: u8, ports: (u16, u16)) -> Vec<u8> {
        let [source_port, destination_port] = [ports.0, ports.1].map(u16::to_be_bytes);
        let payload = [&source_port[..], &destination_port, &[0; 24]].concat();
        v6(source, destination, protocol, &payload)
    }

    const PORTS: (u16, u16) = (EXCHANGE_PORT, EXCHANGE_PORT);

    #[test]
    fn pre_shared_keys_are_agreed_on_between_link_local_addresses() {
        let made_here = |packet: &[u8], mark, ingress_ifindex| {
            let meta = Meta {
                ifindex: TUNNEL1,
                mark,
                ingress_ifindex,
                ..Meta::default()
            };
            run(tun_eg, packet, &World::new(), &meta)
        };
        let packet = exchange(LINK, PEER_LINK, 17, PORTS);
        assert_eq!(
            made_here(&packet, 0, 0),
            Ok(Verdict::Pass { mark: 0 }),
            "by no path"
        );
        let foreign = Ok(Verdict::Pass { mark: !MARK_MASK });
        assert_eq!(
            made_here(&packet, !MARK_MASK, 0),
            foreign,
            "another's bits of the mark"
        );
        let refused = Err(DropReason::NotUnicast);
        for (mark, ingress) in [
            (POD_MARK, 0),
            (TUNNEL_MARK, 0),
            (TUNNEL_MARK | POD_MARK, 0),
            (0, 3),
        ] {
            assert_eq!(
                made_here(&packet, mark, ingress),
                refused,
                "a pod's, or forwarded"
            );
        }
        let inward = exchange(PEER_LINK, LINK, 17, PORTS);
        let accepted = Ok(Verdict::Pass {
            mark: !MARK_MASK | TUNNEL_MARK,
        });
        assert_eq!(enter(&inward, TUNNEL0), accepted);
        let strange = Err(DropReason::LinkScope);
        for (source, destination, protocol, ports) in [
            // Ports that others may have; other protocols; extension headers.
            (PEER_LINK, LINK, 17, (EXCHANGE_PORT, 53)),
            (PEER_LINK, LINK, 17, (50_000, EXCHANGE_PORT)),
            (PEER_LINK, LINK, 6, PORTS),
            (PEER_LINK, LINK, 58, PORTS),
            (PEER_LINK, LINK, 0, PORTS),
            (PEER_LINK, LINK, 44, PORTS),
            // Not this node's, multicast, or not link-local at both ends.
            (PEER_LINK, "fe80::3", 17, PORTS),
            (PEER_LINK, "ff02::1", 17, PORTS),
            (PEER_LINK, POD_V6, 17, PORTS),
            (PEER_LINK, "fd00:192::1", 17, PORTS),
            ("fd00:10:244:2::9", LINK, 17, PORTS),
            ("fd00:192::2", LINK, 17, PORTS),
            ("::", LINK, 17, PORTS),
            ("ff02::1", LINK, 17, PORTS),
        ] {
            let packet = exchange(source, destination, protocol, ports);
            assert_eq!(
                enter(&packet, TUNNEL0),
                strange,
                "{source} {destination} {protocol} {ports:?}"
            );
        }
        for (protocol, ports) in [
            (17, (EXCHANGE_PORT, 53)),
            (17, (50_000, EXCHANGE_PORT)),
            (58, PORTS),
            (0, PORTS),
        ] {
            let packet = exchange(LINK, PEER_LINK, protocol, ports);
            assert_eq!(made_here(&packet, 0, 0), refused, "{protocol} {ports:?}");
        }
        assert_eq!(
            made_here(&exchange("fd00:192::1", PEER_LINK, 17, PORTS), 0, 0),
            refused
        );
        assert_eq!(enter(&from4([169, 254, 41, 52]), TUNNEL0), strange);
        for length in 40..44 {
            assert_eq!(enter(&inward[..length], TUNNEL0), Err(DropReason::Truncated));
        }
    }

    #[test]
    fn what_cannot_be_parsed_is_dropped() {
        let packet = from4([10, 244, 2, 9]);
        for length in 0..packet.len() {
            assert_eq!(
                enter(&packet[..length], TUNNEL0),
                Err(DropReason::Truncated),
                "{length}"
            );
            assert_eq!(
                out(&packet[..length], TUNNEL0),
                Err(DropReason::Truncated),
                "{length}"
            );
        }
        assert_eq!(enter(&[0; 40], TUNNEL0), Err(DropReason::BadEthertype));
        assert_eq!(
            enter(&ethernet(0x0800, &packet), TUNNEL0),
            Err(DropReason::BadEthertype)
        );
        let meta = Meta {
            ifindex: TUNNEL0,
            ..Meta::default()
        };
        assert_eq!(
            run(tun_in, &packet, &World::default(), &meta),
            Err(DropReason::NotConfigured)
        );
        assert_eq!(
            run(tun_eg, &packet, &World::default(), &meta),
            Err(DropReason::NotConfigured)
        );
    }
}
