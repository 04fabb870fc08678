//! What the agent says to the datapath.

use std::{net::IpAddr, path::PathBuf};

use ipnet::IpNet;

/// How programs are attached to a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum AttachMode {
    /// TCX where the kernel has it (6.6 and later), else clsact.
    #[default]
    Auto,
    /// TCX links; an error where the kernel has none.
    Tcx,
    /// Filters of a clsact qdisc.
    Clsact,
}

/// Settings of the datapath.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where maps and links are pinned; must lie on a bpffs. Created when it does not exist.
    pub pin_dir: PathBuf,
    /// The bits of the packet mark that are Warren's; at least 13 of them.
    pub mark_mask: u32,
    /// All addresses that pods may have, both families: the barrier rests on them.
    pub pod_pools: Vec<IpNet>,
    /// How programs are attached.
    pub attach: AttachMode,
    /// `true`: a packet from a remote pod must have come through the tunnel. `false` only where the cluster is
    /// configured to run without encryption.
    pub encryption: bool,
    /// Addresses of services, both families: what goes there is translated, and judged after that.
    pub service_cidrs: Vec<IpNet>,
    /// First and last NodePort of the cluster: what goes there may be translated.
    pub node_ports: (u16, u16),
    /// First and last port of WireGuard on this node: host policy never stands in their way.
    pub wireguard_ports: (u16, u16),
}

/// What a device is, hence which programs it gets. A device has one role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Host end of a pod's veth: `from_pod` at ingress, `to_pod` at egress.
    Pod,
    /// WireGuard device of a slot: `tun_in` at ingress, `tun_eg` at egress.
    Tunnel {
        /// The slot, 0 to 7.
        slot: u8,
    },
    /// Any other device: `barrier_in` at ingress, `barrier_out` at egress.
    Barrier,
}

/// A device that has programs of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attachment {
    /// The device.
    pub ifindex: u32,
    /// The role that it was given.
    pub role: Role,
    /// Both programs are there, those of the role, first at their hooks, and of this version. `false`: attach
    /// again (or detach, when the device is gone).
    pub healthy: bool,
}

/// A pod of this node, by the host end of its veth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Host end of the veth.
    pub ifindex: u32,
    /// Number in the packet mark, 1 to [`MAX_ENDPOINT_INDEX`](crate::MAX_ENDPOINT_INDEX), unique on the node.
    pub index: u16,
    /// MAC address of the pod's end.
    pub mac: [u8; 6],
    /// The pod's addresses, at most [`MAX_ENDPOINT_ADDRESSES`](crate::MAX_ENDPOINT_ADDRESSES) of each family.
    pub addresses: Vec<IpAddr>,
    /// The pod's identity.
    pub identity: u32,
}

/// Who an address belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OwnerKind {
    /// A pod of this node.
    LocalPod,
    /// A pod of another node.
    RemotePod,
    /// This node.
    LocalNode,
    /// Another node.
    RemoteNode,
}

/// Owner of a prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// What the addresses of the prefix are.
    pub kind: OwnerKind,
    /// Number of the owner's node; 0 is this node, and only this node.
    pub node: u16,
    /// Identity of the addresses; 0 where it is not known.
    pub identity: u32,
}

/// How packets reach a node, and come from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Path {
    /// The tunnel device that sends to the node.
    pub ifindex: u32,
    /// Bit N set: packets of the node are accepted from slot N.
    pub receive_slots: u8,
}

/// An address of a mesh node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NodeAddress {
    /// The address.
    pub address: IpAddr,
    /// It is this node's.
    pub own: bool,
}

/// Packets dropped at one place for one reason, since the maps were made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DropCount {
    /// Name of the program that dropped; `stack` for the kernel's own drops.
    pub hook: String,
    /// Stable name in kebab-case; the kernel's start with `stack-`.
    pub reason: String,
    /// Number of packets; a segmentation super-packet counts as one.
    pub packets: u64,
}
