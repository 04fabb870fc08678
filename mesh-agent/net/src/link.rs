//! Network devices as the kernel reports them.

use futures::TryStreamExt as _;
use netlink_packet_route::{
    AddressFamily,
    link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
};

use crate::Error;

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkKind {
    /// The loopback device.
    Loopback,
    /// One end of a veth pair.
    Veth {
        /// Index of the other end, in the other end's namespace.
        peer_ifindex: Option<u32>,
        /// The other end's namespace as this one numbers it; `None` where it is in this one.
        peer_netnsid: Option<i32>,
    },
    /// A bridge.
    Bridge,
    /// A TUN or TAP device.
    Tun,
    /// A kernel WireGuard device.
    WireGuard,
    /// A VXLAN overlay device.
    Vxlan,
    /// A device without a kind: hardware, virtual hardware.
    Physical,
    /// Anything else, by the kernel's name for it.
    Other(String),
}

impl LinkKind {
    /// The kernel's name for the kind.
    pub fn name(&self) -> &str {
        match self {
            Self::Loopback => "loopback",
            Self::Veth { .. } => "veth",
            Self::Bridge => "bridge",
            Self::Tun => "tun",
            Self::WireGuard => "wireguard",
            Self::Vxlan => "vxlan",
            Self::Physical => "physical",
            Self::Other(kind) => kind,
        }
    }
}

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its index in this namespace.
    pub ifindex: u32,
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: LinkKind,
    /// Its hardware address, where it has one of 6 bytes.
    pub mac: Option<[u8; 6]>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// Has carrier.
    pub running: bool,
    /// May multicast.
    pub multicast: bool,
    /// Index of the bridge or bond that it belongs to.
    pub master: Option<u32>,
    /// `ARPHRD_*`: 1 Ethernet, 772 loopback, 65534 none.
    pub arphrd: u16,
    /// Length of the transmit queue in packets.
    pub txqueuelen: u32,
}

pub(crate) async fn list(handle: &rtnetlink::Handle) -> Result<Vec<Link>, Error> {
    let mut links = Vec::new();
    let mut messages = Box::pin(handle.link().get().execute());
    while let Some(message) = messages
        .try_next()
        .await
        .map_err(Error::netlink("list the network devices"))?
    {
        links.extend(parse(&message));
    }
    Ok(links)
}

/// `None` for messages about a bridge's port, which are no devices of their own.
pub(crate) fn parse(message: &LinkMessage) -> Option<Link> {
    if message.header.interface_family != AddressFamily::Unspec {
        return None;
    }
    let flags = message.header.flags;
    let mut link = Link {
        ifindex: message.header.index,
        name: String::new(),
        kind: LinkKind::Physical,
        mac: None,
        mtu: 0,
        up: flags.contains(LinkFlags::Up),
        running: flags.contains(LinkFlags::Running),
        multicast: flags.contains(LinkFlags::Multicast),
        master: None,
        arphrd: message.header.link_layer_type.into(),
        txqueuelen: 0,
    };
    let (mut peer_ifindex, mut peer_netnsid, mut kind) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(bytes) => link.mac = bytes.as_slice().try_into().ok(),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Controller(index) => link.master = Some(*index).filter(|index| *index != 0),
            LinkAttribute::TxQueueLen(length) => link.txqueuelen = *length,
            LinkAttribute::Link(index) => peer_ifindex = Some(*index).filter(|index| *index != 0),
            LinkAttribute::LinkNetNsId(id) => peer_netnsid = Some(*id).filter(|id| *id >= 0),
            LinkAttribute::LinkInfo(infos) => {
                kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.clone()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    link.kind = match kind {
        Some(InfoKind::Veth) => LinkKind::Veth {
            peer_ifindex,
            peer_netnsid,
        },
        Some(InfoKind::Bridge) => LinkKind::Bridge,
        Some(InfoKind::Tun) => LinkKind::Tun,
        Some(InfoKind::Wireguard) => LinkKind::WireGuard,
        Some(InfoKind::Vxlan) => LinkKind::Vxlan,
        Some(other) => LinkKind::Other(other.to_string()),
        None if flags.contains(LinkFlags::Loopback) => LinkKind::Loopback,
        None => LinkKind::Physical,
    };
    Some(link)
}
