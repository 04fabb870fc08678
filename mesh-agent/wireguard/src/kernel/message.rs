//! Changes and states as netlink attributes, and back. No IO.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    time::{Duration, UNIX_EPOCH},
};

use ipnet::IpNet;
use netlink_packet_core::Emitable as _;
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAllowedIpFlags,
    WireguardAttribute, WireguardDeviceFlags, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags,
};
use warren_model::PublicKey;

use crate::{DeviceChange, DeviceState, PeerState};

/// Bytes of peers in one message: far below what a nested attribute can hold (65,535).
const PEERS_LIMIT: usize = 16 * 1024;

/// One thing to do, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Send these attributes.
    Set(Vec<WireguardAttribute>),
    /// Take a prefix from a peer of a kernel that cannot do so on request.
    TakeAway { public_key: PublicKey, prefix: IpNet },
}

/// Turns changes into steps, as few as the order allows.
pub(super) fn plan(device: &str, changes: &[DeviceChange], removes_prefixes: bool) -> Vec<Step> {
    let mut plan = Planner {
        device,
        steps: Vec::new(),
        peers: Vec::new(),
        bytes: 0,
    };
    for change in changes {
        match change {
            DeviceChange::SetDevice {
                private_key,
                listen_port,
            } => plan.device(vec![
                WireguardAttribute::PrivateKey(*private_key.expose()),
                WireguardAttribute::ListenPort(*listen_port),
            ]),
            DeviceChange::Clear => plan.device(vec![
                WireguardAttribute::Flags(WireguardDeviceFlags::ReplacePeers),
                WireguardAttribute::PrivateKey([0; 32]),
            ]),
            DeviceChange::SetPeer {
                public_key,
                pre_shared_key,
                endpoint,
                keepalive_seconds,
            } => {
                let mut peer = vec![
                    WireguardPeerAttribute::PublicKey(*public_key.as_bytes()),
                    WireguardPeerAttribute::PersistentKeepalive(*keepalive_seconds),
                ];
                let key = pre_shared_key.as_ref();
                peer.extend(key.map(|key| WireguardPeerAttribute::PresharedKey(*key.expose())));
                peer.extend(endpoint.map(WireguardPeerAttribute::Endpoint));
                plan.peer(WireguardPeer(peer));
            }
            DeviceChange::RemovePeer(public_key) => {
                plan.peer(with_flags(public_key, WireguardPeerFlags::RemoveMe))
            }
            DeviceChange::AddAllowedIp { public_key, prefix } => {
                plan.prefix(public_key, allowed_ip(*prefix, false));
            }
            DeviceChange::RemoveAllowedIp { public_key, prefix } if removes_prefixes => {
                plan.prefix(public_key, allowed_ip(*prefix, true));
            }
            DeviceChange::RemoveAllowedIp { public_key, prefix } => {
                plan.flush();
                plan.steps.push(Step::TakeAway {
                    public_key: *public_key,
                    prefix: prefix.trunc(),
                });
            }
        }
    }
    plan.flush();
    plan.steps
}

struct Planner<'a> {
    device: &'a str,
    steps: Vec<Step>,
    peers: Vec<WireguardPeer>,
    bytes: usize,
}

impl Planner<'_> {
    fn device(&mut self, mut attributes: Vec<WireguardAttribute>) {
        self.flush();
        attributes.insert(0, WireguardAttribute::IfName(self.device.into()));
        self.steps.push(Step::Set(attributes));
    }

    fn peer(&mut self, peer: WireguardPeer) {
        let bytes = peer.buffer_len();
        if self.bytes + bytes > PEERS_LIMIT {
            self.flush();
        }
        self.bytes += bytes;
        self.peers.push(peer);
    }

    /// A prefix of a peer that must exist; joins the same peer's last entry.
    fn prefix(&mut self, public_key: &PublicKey, prefix: WireguardAllowedIp) {
        let bytes = prefix.buffer_len();
        let update = with_flags(public_key, WireguardPeerFlags::UpdateOnly);
        if self.bytes + bytes <= PEERS_LIMIT
            && let Some(WireguardPeer(last)) = self.peers.last_mut()
            && last.starts_with(&update.0)
            && let Some(WireguardPeerAttribute::AllowedIps(prefixes)) = last.last_mut()
        {
            prefixes.push(prefix);
            self.bytes += bytes;
            return;
        }
        let WireguardPeer(mut peer) = update;
        peer.push(WireguardPeerAttribute::AllowedIps(vec![prefix]));
        self.peer(WireguardPeer(peer));
    }

    fn flush(&mut self) {
        if !self.peers.is_empty() {
            let peers = std::mem::take(&mut self.peers);
            self.steps.push(Step::Set(set_peers(self.device, peers)));
            self.bytes = 0;
        }
    }
}

fn set_peers(device: &str, peers: Vec<WireguardPeer>) -> Vec<WireguardAttribute> {
    vec![
        WireguardAttribute::IfName(device.into()),
        WireguardAttribute::Peers(peers),
    ]
}

fn with_flags(public_key: &PublicKey, flags: WireguardPeerFlags) -> WireguardPeer {
    WireguardPeer(vec![
        WireguardPeerAttribute::PublicKey(*public_key.as_bytes()),
        WireguardPeerAttribute::Flags(flags),
    ])
}

/// Takes a prefix away by giving it to a peer that is removed by the same message.
pub(super) fn discard(device: &str, throw_away: PublicKey, prefix: IpNet) -> Vec<WireguardAttribute> {
    let taker = WireguardPeer(vec![
        WireguardPeerAttribute::PublicKey(*throw_away.as_bytes()),
        WireguardPeerAttribute::AllowedIps(vec![allowed_ip(prefix, false)]),
    ]);
    set_peers(
        device,
        vec![taker, with_flags(&throw_away, WireguardPeerFlags::RemoveMe)],
    )
}

fn allowed_ip(prefix: IpNet, remove: bool) -> WireguardAllowedIp {
    let prefix = prefix.trunc();
    let family = match prefix {
        IpNet::V4(_) => WireguardAddressFamily::Ipv4,
        IpNet::V6(_) => WireguardAddressFamily::Ipv6,
    };
    let mut attributes = vec![
        WireguardAllowedIpAttr::Family(family),
        WireguardAllowedIpAttr::IpAddr(prefix.addr()),
        WireguardAllowedIpAttr::Cidr(prefix.prefix_len()),
    ];
    if remove {
        attributes.push(WireguardAllowedIpAttr::Flags(WireguardAllowedIpFlags::RemoveMe));
    }
    WireguardAllowedIp(attributes)
}

/// What a device has, from all the attributes of a dump. A peer that did not fit into one message goes on in
/// the next, where only its key and further prefixes are given.
pub(super) fn state(
    attributes: impl Iterator<Item = WireguardAttribute>,
) -> Result<DeviceState, &'static str> {
    let mut state = DeviceState::default();
    let mut peers: BTreeMap<PublicKey, PeerState> = BTreeMap::new();
    for attribute in attributes {
        match attribute {
            WireguardAttribute::PublicKey(key) => state.public_key = PublicKey::from_bytes(key).ok(),
            WireguardAttribute::ListenPort(port) => state.listen_port = port,
            WireguardAttribute::Peers(list) => {
                for WireguardPeer(peer) in list {
                    merge_peer(&mut peers, peer)?;
                }
            }
            _ => {}
        }
    }
    state.peers = peers.into_values().collect();
    for peer in &mut state.peers {
        peer.allowed_ips.sort();
    }
    Ok(state)
}

fn merge_peer(
    peers: &mut BTreeMap<PublicKey, PeerState>,
    attributes: Vec<WireguardPeerAttribute>,
) -> Result<(), &'static str> {
    let key = attributes.iter().find_map(|attribute| match attribute {
        WireguardPeerAttribute::PublicKey(key) => Some(*key),
        _ => None,
    });
    let public_key =
        PublicKey::from_bytes(key.ok_or("a peer has no key")?).map_err(|_| "a peer's key is refused")?;
    let peer = peers.entry(public_key).or_insert_with(|| PeerState {
        public_key,
        pre_shared_key: None,
        endpoint: None,
        keepalive_seconds: 0,
        allowed_ips: Vec::new(),
        last_handshake: None,
        received_bytes: 0,
        sent_bytes: 0,
    });
    for attribute in attributes {
        match attribute {
            WireguardPeerAttribute::PresharedKey(key) => peer.pre_shared_key = crate::some_psk_id(&key),
            WireguardPeerAttribute::Endpoint(endpoint) => peer.endpoint = Some(endpoint),
            WireguardPeerAttribute::PersistentKeepalive(seconds) => peer.keepalive_seconds = seconds,
            WireguardPeerAttribute::RxBytes(bytes) => peer.received_bytes = bytes,
            WireguardPeerAttribute::TxBytes(bytes) => peer.sent_bytes = bytes,
            WireguardPeerAttribute::LastHandshake(time) => {
                let seconds = u64::try_from(time.seconds).unwrap_or(0);
                let nanos = u32::try_from(time.nano_seconds).unwrap_or(0);
                let since = Duration::new(seconds, nanos);
                peer.last_handshake = (!since.is_zero()).then(|| UNIX_EPOCH + since);
            }
            WireguardPeerAttribute::AllowedIps(prefixes) => {
                for prefix in prefixes {
                    peer.allowed_ips
                        .push(net(&prefix).ok_or("a peer's prefix is malformed")?);
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn net(attributes: &[WireguardAllowedIpAttr]) -> Option<IpNet> {
    let address: IpAddr = attributes.iter().find_map(|attribute| match attribute {
        WireguardAllowedIpAttr::IpAddr(address) => Some(*address),
        _ => None,
    })?;
    let length = attributes.iter().find_map(|attribute| match attribute {
        WireguardAllowedIpAttr::Cidr(length) => Some(*length),
        _ => None,
    })?;
    IpNet::new(address, length).ok()
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
