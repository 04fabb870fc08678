//! Looks at a pod's veth from both sides. Entering the pod's namespace happens on a thread that ends right after;
//! `nix` makes that safe code.

use std::{fs::File, io, thread};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::sched::{CloneFlags, setns};

use crate::error::{CniError, Code};

/// A veth's two ends, as far as the agent needs them.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ends {
    /// Index of the host's end.
    pub(crate) host_ifindex: u32,
    /// MAC address of the pod's end.
    pub(crate) mac: [u8; 6],
}

/// Finds the two ends of the pod's interface. The indexes must point at each other, or it is no veth between the
/// pod and this node.
pub(crate) fn find(netns: &str, ifname: &str) -> Result<Ends, CniError> {
    let inside = links_in(netns)?;
    let pod = inside.iter().find(|link| link.name == ifname).ok_or_else(|| {
        CniError::new(
            Code::UnknownContainer,
            format!("there is no interface {ifname} in the namespace {netns}"),
        )
    })?;
    let no_veth = || {
        let message = format!(
            "{ifname} in {netns} is not a veth with its other end on this node: Warren needs a CNI plugin that \
             connects pods by veth, such as ptp or bridge"
        );
        CniError::new(Code::Config, message)
    };
    let host_ifindex = pod
        .peer
        .filter(|_| pod.veth && pod.peer_elsewhere)
        .ok_or_else(no_veth)?;
    let outside = links()
        .map_err(|error| CniError::new(Code::Io, format!("cannot list this node's devices: {error}")))?;
    let host = outside
        .iter()
        .find(|link| link.ifindex == host_ifindex)
        .ok_or_else(no_veth)?;
    if !host.veth || host.peer != Some(pod.ifindex) {
        return Err(no_veth());
    }
    Ok(Ends {
        host_ifindex,
        mac: pod.mac.ok_or_else(no_veth)?,
    })
}

struct Link {
    ifindex: u32,
    name: String,
    mac: Option<[u8; 6]>,
    veth: bool,
    peer: Option<u32>,
    peer_elsewhere: bool,
}

fn links_in(netns: &str) -> Result<Vec<Link>, CniError> {
    let failed = |code| {
        move |error: io::Error| {
            CniError::new(
                code,
                format!("cannot enter the network namespace {netns}: {error}"),
            )
        }
    };
    let file = File::open(netns).map_err(failed(Code::UnknownContainer))?;
    thread::scope(|scope| {
        let thread = thread::Builder::new().spawn_scoped(scope, || {
            setns(&file, CloneFlags::CLONE_NEWNET)?;
            links()
        });
        let joined = thread.map_err(failed(Code::Io))?.join();
        joined
            .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
            .map_err(failed(Code::Io))
    })
}

/// Every device of this thread's namespace.
fn links() -> io::Result<Vec<Link>> {
    let socket = Socket::new(NETLINK_ROUTE)?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetLink(LinkMessage::default()));
    request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let mut found = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        while !rest.is_empty() {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
            match message.payload {
                NetlinkPayload::Done(_) => return Ok(found),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => found.push(parse(&link)),
                _ => {}
            }
            let length = (message.header.length as usize).next_multiple_of(4);
            rest = rest.get(length.max(1)..).unwrap_or_default();
        }
    }
}

fn parse(message: &LinkMessage) -> Link {
    let mut link = Link {
        ifindex: message.header.index,
        name: String::new(),
        mac: None,
        veth: false,
        peer: None,
        peer_elsewhere: false,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(bytes) => link.mac = bytes.as_slice().try_into().ok(),
            LinkAttribute::Link(index) => link.peer = Some(*index).filter(|index| *index != 0),
            LinkAttribute::LinkNetNsId(id) => link.peer_elsewhere = *id >= 0,
            LinkAttribute::LinkInfo(infos) => link.veth = infos.contains(&LinkInfo::Kind(InfoKind::Veth)),
            _ => {}
        }
    }
    link
}
