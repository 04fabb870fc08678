//! Both ends of what passes between this node and others: egress policy of who sends, where no program judged it
//! before, and policy of the host, which is endpoint 0.

use warren_abi::{DropReason, FlowState, Hook, MASQUERADED, POLICY_EGRESS_OPEN, POLICY_INGRESS_OPEN};

use crate::{
    Address, Judgement, Link, Maps, Meta, Network, Packet, Scratch, Step, Verdict,
    endpoint::conclude,
    flows::{self, Replies, Task, Way},
    ip,
    maps::{is_pod, is_service},
    policy,
    transport::{UDP, has_ports},
    tuple,
};

/// Number of the host among the endpoints.
const HOST: u16 = 0;
/// The device of packets from this host to itself.
const LOOPBACK: u32 = 1;

/// Plans egress policy of the packet's sender, where it was not judged before: a pod's, or the host's. `receiver`: encoded
/// mark of the pod that it goes to, 0 where it leaves the node. `READ`: the tuple is to be read; the verifier follows a
/// reading also where it was done before.
#[inline(always)]
pub(crate) fn leave<const READ: bool, P: Packet, M: Maps>(
    packet: &P,
    maps: &M,
    scratch: &mut Scratch,
    receiver: u32,
) -> Result<(), DropReason> {
    let mut way = Way {
        endpoint: HOST,
        identity: policy::HOST,
        outbound: true,
        peer_mark: receiver,
        defer: false,
        replies: Replies::Judged,
        task: Task::Judge,
    };
    if scratch.is_from_endpoint() {
        if scratch.now.judged {
            return Ok(());
        }
        let sender = maps.marked(scratch.now.from).ok_or(DropReason::UnknownEndpoint)?;
        way.endpoint = sender.index;
        way.identity = sender.identity;
    } else if scratch.now.from != 0 || is_open(maps) {
        return Ok(());
    }
    if READ {
        tuple::read(packet, maps, scratch)?;
    }
    let exempt = scratch.tuple.discovery || (way.endpoint == HOST && is_wireguard(maps, scratch));
    if !exempt {
        scratch.ways[0] = way;
    }
    Ok(())
}

/// A pod's packet leaves with an address of this node: what answers it, or reports an error about it, comes to that
/// address, where the host's policy is asked. So the flow is noted.
#[inline(always)]
pub(crate) fn note_masquerade<M: Maps>(maps: &M, scratch: &mut Scratch) {
    if scratch.is_from_endpoint() && scratch.tuple.known && is_own(maps, &scratch.ip.source) && !is_open(maps)
    {
        scratch.ways[1] = Way {
            endpoint: MASQUERADED,
            identity: policy::HOST,
            outbound: true,
            peer_mark: 0,
            defer: true,
            replies: Replies::Judged,
            task: Task::Note,
        };
    }
}

/// Plans host policy for what comes to this node's own address and no socket's program sees: protocols without ports.
/// `from`: where it comes from, as a flow keeps it. `READ` as for [`leave`].
#[inline(always)]
pub(crate) fn enter<const READ: bool, P: Packet, M: Maps>(
    packet: &P,
    maps: &M,
    scratch: &mut Scratch,
    from: u32,
) -> Result<(), DropReason> {
    if is_open(maps) {
        return Ok(());
    }
    // Fragments of what has ports are whole where the sockets' program sees them.
    if has_ports(scratch.ip.next) {
        return Ok(());
    }
    if READ {
        tuple::read(packet, maps, scratch)?;
    }
    if has_ports(scratch.tuple.protocol) || scratch.tuple.discovery {
        return Ok(());
    }
    if scratch.ways[0].task == Task::Nothing {
        scratch.ways[0] = Way {
            endpoint: MASQUERADED,
            replies: Replies::Noted,
            ..to_this_host(from, Task::Recognise)
        };
    }
    scratch.ways[1] = to_this_host(from, Task::Judge);
    Ok(())
}

#[inline(always)]
const fn to_this_host(from: u32, task: Task) -> Way {
    Way {
        endpoint: HOST,
        identity: policy::HOST,
        outbound: false,
        peer_mark: from,
        defer: false,
        replies: Replies::Judged,
        task,
    }
}

/// Ingress of the sockets of the node's control group, on the translated address. It sees those of pods as well: only
/// what goes to this node's addresses is the host's.
#[inline(always)]
pub fn to_host<P: Packet, M: Maps>(packet: &P, maps: &M, meta: &Meta, scratch: &mut Scratch) -> Judgement {
    scratch.begin(Hook::ToHost, meta, packet.length(), maps.clock());
    let planned = plan(packet, maps, meta, scratch);
    conclude(maps, scratch, planned)
}

#[inline(never)]
fn plan<P: Packet, M: Maps>(packet: &P, maps: &M, meta: &Meta, scratch: &mut Scratch) -> Judgement {
    let settings = maps.settings().ok_or(DropReason::NotConfigured)?;
    scratch.provenance(settings, meta);
    let pass = Ok(Verdict::Pass { mark: meta.mark });
    let link = Link::parse(packet, 0, meta)?;
    if !matches!(link.network, Network::V4 | Network::V6) || meta.ingress_ifindex == LOOPBACK {
        return pass;
    }
    if !ip::read(packet, scratch, link)? {
        return Err(DropReason::BadEthertype);
    }
    let own = is_own(maps, &scratch.ip.destination);
    let unjudged = scratch.is_from_endpoint() && !scratch.now.judged;
    if !own && !unjudged {
        return pass;
    }
    tuple::read(packet, maps, scratch)?;
    if !has_ports(scratch.tuple.protocol) {
        return pass;
    }
    if !own {
        // An address that nobody named this node's: the pod's policy is asked, but nothing is noted.
        scratch.tuple.step = Step::Answer;
    }
    if unjudged {
        leave::<false, P, M>(packet, maps, scratch, 0)?;
    }
    if own && !is_open(maps) && !is_wireguard(maps, scratch) && !answers_translated(maps, scratch) {
        scratch.ways[1] = to_this_host(scratch.now.from, Task::Judge);
    }
    pass
}

/// Whether the packet answers a connection of this host to an address that its stack translated: the host notes no such
/// tuple, but nobody else can send from there. A pod's judged packet to the host's ports is a reply.
#[inline(always)]
fn answers_translated<M: Maps>(maps: &M, scratch: &Scratch) -> bool {
    if is_service(maps, &scratch.ip.source) {
        return true;
    }
    if is_own(maps, &scratch.ip.source) {
        return scratch.now.judged;
    }
    let marked = scratch.now.judged || scratch.now.from == scratch.now.tunnel_mark;
    marked && !is_pod(maps, &scratch.ip.source) && maps.owner(&scratch.ip.source).is_none()
}

/// Nothing restricts the host.
#[inline(always)]
fn is_open<M: Maps>(maps: &M) -> bool {
    const OPEN: u32 = POLICY_INGRESS_OPEN | POLICY_EGRESS_OPEN;
    match maps.policy(HOST) {
        Some(policy) => policy.flags & OPEN == OPEN,
        None => false,
    }
}

/// The address is this node's.
#[inline(always)]
pub(crate) fn is_own<M: Maps>(maps: &M, address: &Address) -> bool {
    matches!(maps.node(address), Some(node) if node.own != 0)
}

/// The packet is one of this node's tunnels.
#[inline(always)]
fn is_wireguard<M: Maps>(maps: &M, scratch: &Scratch) -> bool {
    let ports = |state: &FlowState| state.wireguard_ports;
    let range = maps.flow_state().map_or(0, ports);
    let own = if scratch.now.hook == Hook::ToHost as u8 {
        scratch.tuple.destination_port
    } else {
        scratch.tuple.source_port
    };
    scratch.tuple.protocol == UDP && flows::in_range(range, own)
}
