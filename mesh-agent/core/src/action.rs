//! The steps that a plan consists of.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use ipnet::IpNet;
use warren_model::{PskId, PublicKey};

use crate::{
    desired::slot_device,
    state::{EndpointEntry, Firewall, NodePath, Owner, Programs, Route, RouteKey, Rule, Table},
};

/// One step. Executing it twice is the same as once; removing what is absent succeeds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Give a device its programs, in place of those it has.
    Attach(u32, Programs),
    /// Take all programs off a device.
    Detach(u32),
    /// Write the packet filter's chains, in one transaction.
    SetFirewall(Firewall),
    /// Remove the packet filter's chains.
    RemoveFirewall,
    /// Add or replace a route.
    SetRoute(RouteKey, Route),
    /// Remove a route.
    RemoveRoute(RouteKey, Route),
    /// Add a rule.
    AddRule(Rule),
    /// Remove a rule.
    RemoveRule(Rule),
    /// Tell the barrier a node's address, and whether it is this node's own.
    SetNodeAddress(IpAddr, bool),
    /// Take a node's address from the barrier.
    RemoveNodeAddress(IpAddr),
    /// Create a slot's device, down.
    CreateDevice {
        /// The slot.
        slot: u8,
        /// MTU in bytes.
        mtu: u32,
    },
    /// Attach `tun_eg` and `tun_in`.
    AttachTunnel(u8),
    /// Change a device's MTU.
    SetMtu {
        /// The slot.
        slot: u8,
        /// MTU in bytes.
        mtu: u32,
    },
    /// Give a device its link-scope address.
    SetAddress {
        /// The slot.
        slot: u8,
        /// The address.
        address: IpNet,
    },
    /// Give a device its link-local address, in place of any other.
    SetLink {
        /// The slot.
        slot: u8,
        /// The address.
        address: Ipv6Addr,
    },
    /// Take a device up.
    DeviceUp(u8),
    /// Set a device's own key and port.
    SetKey {
        /// The slot.
        slot: u8,
        /// The public half of the key that is meant.
        public_key: PublicKey,
        /// UDP port.
        port: u16,
    },
    /// Add a peer or change what is named.
    SetPeer {
        /// The slot.
        slot: u8,
        /// The peer's key.
        peer: PublicKey,
        /// The pre-shared key of a peer that is added; `None` for one without, and for a peer that is there: that has it.
        pre_shared: Option<PskId>,
        /// `None` leaves it (roaming).
        endpoint: Option<SocketAddr>,
        /// Seconds, 0 for off.
        keepalive: u16,
    },
    /// Remove a peer.
    RemovePeer {
        /// The slot.
        slot: u8,
        /// The peer's key.
        peer: PublicKey,
    },
    /// Give a prefix to a peer, taking it from any other peer of the device.
    AddAllowedIp {
        /// The slot.
        slot: u8,
        /// The peer's key.
        peer: PublicKey,
        /// The prefix.
        prefix: IpNet,
    },
    /// Take a prefix from a peer.
    RemoveAllowedIp {
        /// The slot.
        slot: u8,
        /// The peer's key.
        peer: PublicKey,
        /// The prefix.
        prefix: IpNet,
    },
    /// Empty a device that is no longer wanted; the device itself stays.
    ClearDevice(u8),
    /// Write an owner.
    SetOwner(IpNet, Owner),
    /// Remove an owner.
    RemoveOwner(IpNet),
    /// Write a node's path.
    SetPath(u16, NodePath),
    /// Receive from a node on more slots; it is sent to as before.
    WidenPath(u16, NodePath),
    /// Receive from a node on fewer slots; it is sent to as before.
    NarrowPath(u16, NodePath),
    /// Remove a node's path.
    RemovePath(u16),
    /// Write a local endpoint.
    SetEndpoint(u32, EndpointEntry),
    /// Remove a local endpoint.
    RemoveEndpoint(u32),
}

/// What later steps of a plan rest on. When a step fails, the steps that need its gate are left for the next plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Gate {
    /// A slot's device exists, has its programs and is up.
    Device(u8),
    /// A slot's device has its key.
    Key(u8),
    /// A peer of a slot.
    Peer(u8, PublicKey),
    /// What is received from a node.
    Receive(u16),
    /// The entry of a local pod.
    Endpoint(u32),
}

impl Action {
    /// The gate that stays shut when this step fails.
    pub fn guards(&self) -> Option<Gate> {
        match self {
            Self::CreateDevice { slot, .. }
            | Self::AttachTunnel(slot)
            | Self::SetAddress { slot, .. }
            | Self::DeviceUp(slot) => Some(Gate::Device(*slot)),
            Self::SetKey { slot, .. } => Some(Gate::Key(*slot)),
            Self::SetPeer { slot, peer, .. } | Self::RemovePeer { slot, peer } => {
                Some(Gate::Peer(*slot, *peer))
            }
            Self::WidenPath(node, _) => Some(Gate::Receive(*node)),
            Self::SetEndpoint(ifindex, _) => Some(Gate::Endpoint(*ifindex)),
            _ => None,
        }
    }

    /// The gates that must be open before this step.
    pub fn needs(&self) -> Vec<Gate> {
        match self {
            Self::AttachTunnel(slot)
            | Self::SetAddress { slot, .. }
            | Self::DeviceUp(slot)
            | Self::SetMtu { slot, .. }
            | Self::SetLink { slot, .. }
            | Self::SetRoute(_, Route::Tunnel { slot, .. })
            | Self::SetKey { slot, .. } => vec![Gate::Device(*slot)],
            Self::SetPath(node, NodePath { slot, .. }) => vec![Gate::Device(*slot), Gate::Receive(*node)],
            Self::SetPeer { slot, peer, .. } | Self::AddAllowedIp { slot, peer, .. } => {
                vec![Gate::Device(*slot), Gate::Key(*slot), Gate::Peer(*slot, *peer)]
            }
            Self::Attach(ifindex, Programs::Pod) => vec![Gate::Endpoint(*ifindex)],
            _ => Vec::new(),
        }
    }

    /// Whether it decides to whom an address belongs, here or on the device.
    pub fn changes_mapping(&self) -> bool {
        matches!(
            self,
            Self::SetOwner(..)
                | Self::RemoveOwner(_)
                | Self::RemovePath(_)
                | Self::RemovePeer { .. }
                | Self::RemoveAllowedIp { .. }
                | Self::RemoveRoute(_, Route::Tunnel { .. })
        )
    }

    /// Whether it changes who an address or an endpoint is.
    pub fn changes_identity(&self) -> bool {
        matches!(
            self,
            Self::SetOwner(..) | Self::RemoveOwner(_) | Self::SetEndpoint(..) | Self::RemoveEndpoint(_)
        )
    }

    /// What the step is about: steps with the same subject share their retries.
    pub fn subject(&self) -> String {
        self.to_string()
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attach(ifindex, Programs::Pod) => {
                write!(f, "attach the pod programs to interface {ifindex}")
            }
            Self::Attach(ifindex, _) => write!(f, "attach the barrier to interface {ifindex}"),
            Self::Detach(ifindex) => write!(f, "take the programs off interface {ifindex}"),
            Self::SetFirewall(_) => f.write_str("write the nftables chains"),
            Self::RemoveFirewall => f.write_str("remove the nftables chains"),
            Self::SetRoute(key, route) => write!(f, "set route {}", RouteText(key, route)),
            Self::RemoveRoute(key, route) => write!(f, "remove route {}", RouteText(key, route)),
            Self::AddRule(rule) => write!(f, "add {}", RuleText(rule)),
            Self::RemoveRule(rule) => write!(f, "remove {}", RuleText(rule)),
            Self::SetNodeAddress(address, _) => write!(f, "tell the barrier node address {address}"),
            Self::RemoveNodeAddress(address) => write!(f, "take node address {address} from the barrier"),
            Self::CreateDevice { slot, .. } => write!(f, "create {}", slot_device(*slot)),
            Self::AttachTunnel(slot) => write!(f, "attach the tunnel programs to {}", slot_device(*slot)),
            Self::SetMtu { slot, .. } => write!(f, "set the MTU of {}", slot_device(*slot)),
            Self::SetAddress { slot, address } => {
                write!(f, "give {} its address {address}", slot_device(*slot))
            }
            Self::SetLink { slot, address } => {
                write!(f, "give {} its link-local address {address}", slot_device(*slot))
            }
            Self::DeviceUp(slot) => write!(f, "take {} up", slot_device(*slot)),
            Self::SetKey { slot, .. } => write!(f, "set key and port of {}", slot_device(*slot)),
            Self::SetPeer { slot, peer, .. } => write!(f, "set peer {peer} of {}", slot_device(*slot)),
            Self::RemovePeer { slot, peer } => write!(f, "remove peer {peer} of {}", slot_device(*slot)),
            Self::AddAllowedIp { slot, peer, prefix } => {
                write!(f, "give {prefix} to peer {peer} of {}", slot_device(*slot))
            }
            Self::RemoveAllowedIp { slot, peer, prefix } => {
                write!(f, "take {prefix} from peer {peer} of {}", slot_device(*slot))
            }
            Self::ClearDevice(slot) => write!(f, "empty {}", slot_device(*slot)),
            Self::SetOwner(prefix, _) => write!(f, "set the owner of {prefix}"),
            Self::RemoveOwner(prefix) => write!(f, "remove the owner of {prefix}"),
            Self::SetPath(node, _) => write!(f, "set the path of node index {node}"),
            Self::WidenPath(node, _) => write!(f, "receive from node index {node} on more devices"),
            Self::NarrowPath(node, _) => write!(f, "receive from node index {node} on fewer devices"),
            Self::RemovePath(node) => write!(f, "remove the path of node index {node}"),
            Self::SetEndpoint(ifindex, _) => write!(f, "set the pod of interface {ifindex}"),
            Self::RemoveEndpoint(ifindex) => write!(f, "remove the pod of interface {ifindex}"),
        }
    }
}

/// A route in words.
pub(crate) struct RouteText<'a>(pub(crate) &'a RouteKey, pub(crate) &'a Route);

impl fmt::Display for RouteText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.1 {
            Route::Tunnel { slot, .. } => write!(f, "{} to {}", self.0.prefix, slot_device(*slot))?,
            Route::Blackhole => write!(f, "blackhole {}", self.0.prefix)?,
            Route::Throw => write!(f, "throw {}", self.0.prefix)?,
        }
        write!(f, " in table {}", table_name(self.0.table))
    }
}

/// A rule in words.
pub(crate) struct RuleText<'a>(pub(crate) &'a Rule);

impl fmt::Display for RuleText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Rule {
            preference,
            ipv6,
            from,
            table,
        } = self.0;
        let family = if *ipv6 { "IPv6" } else { "IPv4" };
        match from {
            Some(from) => write!(
                f,
                "{family} rule {preference} from {from} to table {}",
                table_name(*table)
            ),
            None => write!(f, "{family} rule {preference} to table {}", table_name(*table)),
        }
    }
}

fn table_name(table: Table) -> &'static str {
    match table {
        Table::Pods => "4151",
        Table::Nodes => "4152",
        Table::Main => "main",
    }
}
