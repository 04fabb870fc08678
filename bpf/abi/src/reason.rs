//! Why packets are dropped, and where.

/// Defines a field-less enum that indexes a counter map and has stable names.
macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident => $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum $name { $($(#[$variant_doc])* $variant,)* }

        impl $name {
            /// All values, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];
            /// How many there are.
            pub const COUNT: u32 = Self::ALL.len() as u32;

            /// The stable name, for metrics and status.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }
    };
}

named! {
    /// Where a packet was judged: the program.
    Hook {
        /// Ingress of a pod's host veth.
        FromPod => "from_pod",
        /// Egress of a pod's host veth.
        ToPod => "to_pod",
        /// Ingress of a tunnel device.
        TunIn => "tun_in",
        /// Egress of a tunnel device.
        TunEg => "tun_eg",
        /// Ingress of any other device.
        BarrierIn => "barrier_in",
        /// Egress of any other device.
        BarrierOut => "barrier_out",
        /// Ingress of the host's sockets.
        ToHost => "to_host",
    }
}

named! {
    /// Why a packet was dropped. New reasons go to the end: the numbers index a pinned map.
    DropReason {
        /// The programs have no settings yet.
        NotConfigured => "not-configured",
        /// The device is none that the programs were attached to by the loader.
        UnknownDevice => "unknown-device",
        /// No pod is known at this device.
        UnknownEndpoint => "unknown-endpoint",
        /// The packet ends before its headers do.
        Truncated => "truncated",
        /// A header contradicts itself or the link's.
        Malformed => "malformed",
        /// Neither IPv4, IPv6 nor ARP, or tagged, where only these are allowed.
        BadEthertype => "bad-ethertype",
        /// More VLAN tags than the two that are looked through.
        VlanDepth => "vlan-depth",
        /// More IPv6 extension headers than are looked through.
        ExtensionHeaders => "extension-headers",
        /// A routing header with segments left, or an IPv4 source route: the address is not the destination.
        SourceRoute => "source-route",
        /// A pod used a MAC address that is not its own.
        SpoofedMac => "spoofed-mac",
        /// A pod used an address that is not its own.
        SpoofedAddress => "spoofed-address",
        /// A pod claimed an address or MAC that is not its own in ARP.
        SpoofedArp => "spoofed-arp",
        /// A pod claimed an address or MAC that is not its own in neighbour discovery.
        SpoofedNeighbour => "spoofed-neighbour",
        /// A pod played router (router advertisement, redirect).
        RogueRouter => "rogue-router",
        /// The packet's destination has no owner.
        NoOwner => "no-owner",
        /// The destination belongs to this node: nothing to tunnel.
        LocalDestination => "local-destination",
        /// Multicast or link-local: no peer to send it to.
        NotUnicast => "not-unicast",
        /// The owner's node has no path.
        NoPath => "no-path",
        /// A decrypted packet whose source belongs to no other node.
        BadOwner => "bad-owner",
        /// A decrypted packet from a slot that its source's owner may not use.
        WrongSlot => "wrong-slot",
        /// A packet with a remote pod's address that did not come through the tunnel.
        NotFromTunnel => "not-from-tunnel",
        /// Mesh traffic in clear, about to leave.
        CleartextOut => "cleartext-out",
        /// Mesh traffic in clear, coming in.
        CleartextIn => "cleartext-in",
        /// This node's own address as source of a packet from outside.
        OwnAddress => "own-address",
        /// A rule of policy denies it.
        Policy => "policy",
        /// Policy is default-deny in this direction, and no rule allows it.
        DefaultDeny => "default-deny",
        /// The endpoint's policy is not known yet: it is closed.
        NoPolicy => "no-policy",
        /// A later fragment whose first was not seen: its ports are not known.
        UnknownFragment => "unknown-fragment",
        /// A first fragment that ends before the transport header does.
        TinyFragment => "tiny-fragment",
        /// A later fragment that would overwrite the transport header.
        OverlappingFragment => "overlapping-fragment",
        /// The endpoint has as many flows as it may.
        FlowLimit => "flow-limit",
        /// The flow could not be stored.
        FlowTable => "flow-table",
        /// A service's address as source of a packet from outside.
        ServiceAddress => "service-address",
        /// A decrypted packet from or to an address of the link's scope that is not of the exchange of pre-shared keys.
        LinkScope => "link-scope",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_kebab_case() {
        let names: HashSet<_> = DropReason::ALL.iter().map(|reason| reason.name()).collect();
        assert_eq!(names.len(), DropReason::ALL.len());
        for name in names {
            assert!(
                name.bytes().all(|b| b.is_ascii_lowercase() || b == b'-'),
                "{name}"
            );
        }
    }

    #[test]
    fn numbers_index_all() {
        for (index, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
        }
        for (index, hook) in Hook::ALL.iter().enumerate() {
            assert_eq!(*hook as usize, index);
        }
    }
}
