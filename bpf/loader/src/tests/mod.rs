//! Tests with the real kernel. They need root, and fail without.

mod budget;
mod contents;
mod driver;
mod flows;
mod frames;
mod host;
mod isolation;
mod packets;
mod stack;
mod tunnel;
mod verdicts;

use std::{net::IpAddr, path::Path as FilePath};

use ipnet::IpNet;

use self::isolation::{Peer, ip as ip_command};
use crate::{AttachMode, Config, Datapath, Endpoint, Owner, OwnerKind};

pub(crate) const POD_MAC: [u8; 6] = [0x0a, 0x58, 0x0a, 0xf4, 1, 2];
pub(crate) const POD_INDEX: u16 = 5;

pub(crate) fn config(pins: &FilePath) -> Config {
    Config {
        pin_dir: pins.join("warren"),
        mark_mask: 0x3f7f,
        pod_pools: vec![net("10.244.0.0/16"), net("fd00:10:244::/48")],
        attach: AttachMode::Auto,
        encryption: true,
        service_cidrs: vec![net("10.96.0.0/16"), net("fd00:10:96::/112")],
        node_ports: (30_000, 32_767),
        wireguard_ports: (51_871, 51_873),
    }
}

pub(crate) fn net(text: &str) -> IpNet {
    text.parse().expect("is a prefix")
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().expect("is an address")
}

pub(crate) fn pod(ifindex: u32) -> Endpoint {
    Endpoint {
        ifindex,
        index: POD_INDEX,
        mac: POD_MAC,
        addresses: vec![ip("10.244.1.2"), ip("fd00:10:244:1::2")],
        identity: 256,
    }
}

/// Lets everything pass to and from the pod and the host.
pub(crate) fn open_policies(datapath: &mut Datapath) {
    for index in [0, POD_INDEX] {
        let policy = crate::PolicyEndpoint {
            policy: 1,
            cidr_table: 1,
            audit: false,
            ingress_open: true,
            egress_open: true,
        };
        datapath
            .set_policy_endpoint(index, policy)
            .expect("opens an endpoint");
    }
}

/// Node 1 with its prefixes and nodes 2 and 3.
pub(crate) fn set_owners(datapath: &mut Datapath) {
    let local = |kind| Owner {
        kind,
        node: 0,
        identity: 1,
    };
    let remote = |kind, node| Owner {
        kind,
        node,
        identity: 300,
    };
    for (prefix, owner) in [
        ("10.244.1.0/24", local(OwnerKind::LocalPod)),
        ("fd00:10:244:1::/64", local(OwnerKind::LocalPod)),
        ("192.168.0.1/32", local(OwnerKind::LocalNode)),
        ("10.244.2.0/24", remote(OwnerKind::RemotePod, 2)),
        ("fd00:10:244:2::/64", remote(OwnerKind::RemotePod, 2)),
        ("192.168.0.2/32", remote(OwnerKind::RemoteNode, 2)),
        ("10.244.3.0/24", remote(OwnerKind::RemotePod, 65_535)),
        ("fd00:10:244:3::/64", remote(OwnerKind::RemotePod, 65_535)),
    ] {
        datapath.set_owner(net(prefix), owner).expect("sets an owner");
    }
}

/// A pod with its veth, addresses and routes; the host's end is `pod0`. One of its addresses is not its own.
pub(crate) fn connect_pod() -> Peer {
    let peer = Peer::new();
    ip_command(&format!(
        "link add pod0 type veth peer name eth0 netns {}",
        peer.thread
    ));
    ip_command("link set pod0 up");
    ip_command("addr add 10.244.1.1/24 dev pod0");
    ip_command("-6 addr add fd00:10:244:1::1/64 dev pod0 nodad");
    peer.run(|| {
        let mac = POD_MAC.map(|byte| format!("{byte:02x}")).join(":");
        ip_command(&format!("link set eth0 address {mac}"));
        ip_command("addr add 10.244.1.2/24 dev eth0");
        ip_command("-6 addr add fd00:10:244:1::2/64 dev eth0 nodad");
        ip_command("addr add 10.244.1.66/24 dev eth0");
        ip_command("link set eth0 up");
        ip_command("route add default via 10.244.1.1");
        ip_command("-6 route add default via fd00:10:244:1::1");
    });
    peer
}

/// Packets dropped for a reason.
pub(crate) fn dropped(datapath: &Datapath, reason: &str) -> u64 {
    let drops = datapath.drops().expect("reads the counters");
    drops
        .into_iter()
        .find(|(name, _)| name == reason)
        .map_or(0, |(_, packets)| packets)
}

#[test]
fn a_datapath_may_move_between_threads() {
    fn is_send<T: Send>() {}
    is_send::<Datapath>();
}
