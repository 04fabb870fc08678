//! Changes and states as netlink attributes, and back. No IO. Keys are in buffers that are wiped: requests before they are
//! let go of ([`Attributes`]), answers before they are parsed ([`redact`]).

use std::{
    collections::BTreeMap,
    net::IpAddr,
    time::{Duration, UNIX_EPOCH},
};

use ipnet::IpNet;
use netlink_packet_core::{Emitable as _, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload, NlaBuffer};
use netlink_packet_generic::GenlMessage;
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAllowedIpFlags,
    WireguardAttribute, WireguardCmd, WireguardDeviceFlags, WireguardMessage, WireguardPeer,
    WireguardPeerAttribute, WireguardPeerFlags,
};
use warren_model::{PskId, PublicKey};
use zeroize::{Zeroize as _, Zeroizing};

use crate::{DeviceChange, DeviceState, PeerState};

/// Bytes of peers in one message: far below what a nested attribute can hold (65,535).
const PEERS_LIMIT: usize = 16 * 1024;

/// One thing to do, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Send these attributes.
    Set(Attributes),
    /// Take a prefix from a peer of a kernel that cannot do so on request.
    TakeAway { public_key: PublicKey, prefix: IpNet },
}

/// Attributes of a request. The keys among them are wiped when it is dropped, and stay where they are until then: lists of
/// them must not grow, since a list that grows leaves its content behind.
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) struct Attributes(pub(super) Vec<WireguardAttribute>);

impl std::fmt::Debug for Attributes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} attributes", self.0.len())
    }
}

impl Drop for Attributes {
    fn drop(&mut self) {
        for attribute in &mut self.0 {
            match attribute {
                WireguardAttribute::PrivateKey(key) => key.zeroize(),
                WireguardAttribute::Peers(peers) => {
                    for attribute in peers.iter_mut().flat_map(|WireguardPeer(peer)| peer) {
                        if let WireguardPeerAttribute::PresharedKey(key) = attribute {
                            key.zeroize();
                        }
                    }
                }
                _ => {}
            }
        }
    }
}

/// A request as the kernel reads it.
pub(super) fn request(
    family: u16,
    flags: u16,
    sequence: u32,
    cmd: WireguardCmd,
    mut attributes: Attributes,
) -> Zeroizing<Vec<u8>> {
    let mut request = NetlinkMessage::from(GenlMessage::from_payload(WireguardMessage {
        cmd,
        attributes: std::mem::take(&mut attributes.0),
    }));
    if let NetlinkPayload::InnerMessage(message) = &mut request.payload {
        message.set_resolved_family_id(family);
    }
    request.header.flags = NLM_F_REQUEST | flags;
    request.header.sequence_number = sequence;
    request.finalize();
    let mut bytes = Zeroizing::new(vec![0; request.buffer_len()]);
    request.serialize(&mut bytes);
    if let NetlinkPayload::InnerMessage(message) = request.payload {
        attributes.0 = message.into_parts().1.attributes;
    }
    bytes
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
            } => plan.device([
                WireguardAttribute::ListenPort(*listen_port),
                WireguardAttribute::PrivateKey(*private_key.expose()),
            ]),
            DeviceChange::Clear => plan.device([
                WireguardAttribute::Flags(WireguardDeviceFlags::ReplacePeers),
                WireguardAttribute::PrivateKey([0; 32]),
            ]),
            DeviceChange::SetPeer {
                public_key,
                pre_shared_key,
                endpoint,
                keepalive_seconds,
            } => {
                let mut peer = Vec::with_capacity(4);
                peer.push(WireguardPeerAttribute::PublicKey(*public_key.as_bytes()));
                peer.push(WireguardPeerAttribute::PersistentKeepalive(*keepalive_seconds));
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
    fn device(&mut self, settings: [WireguardAttribute; 2]) {
        self.flush();
        let mut attributes = Vec::with_capacity(1 + settings.len());
        attributes.push(WireguardAttribute::IfName(self.device.into()));
        attributes.extend(settings);
        self.steps.push(Step::Set(Attributes(attributes)));
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

fn set_peers(device: &str, peers: Vec<WireguardPeer>) -> Attributes {
    Attributes(vec![
        WireguardAttribute::IfName(device.into()),
        WireguardAttribute::Peers(peers),
    ])
}

fn with_flags(public_key: &PublicKey, flags: WireguardPeerFlags) -> WireguardPeer {
    WireguardPeer(vec![
        WireguardPeerAttribute::PublicKey(*public_key.as_bytes()),
        WireguardPeerAttribute::Flags(flags),
    ])
}

/// Takes a prefix away by giving it to a peer that is removed by the same message.
pub(super) fn discard(device: &str, throw_away: PublicKey, prefix: IpNet) -> Attributes {
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

/// `WGDEVICE_A_PRIVATE_KEY`, `WGDEVICE_A_PEERS` and `WGPEER_A_PRESHARED_KEY` (Linux, include/uapi/linux/wireguard.h).
const PRIVATE_KEY: u16 = 3;
const PEERS: u16 = 8;
const PRESHARED_KEY: u16 = 2;

/// Takes the keys out of attributes that the kernel sent, before anybody copies them: the private key is overwritten, a
/// pre-shared key becomes its name (16 bytes) and zeros. All zero, no key, stays so.
pub(super) fn redact(attributes: &mut [u8]) {
    each(attributes, &mut |kind, value| match kind {
        PRIVATE_KEY => value.zeroize(),
        PEERS => each(value, &mut |_, peer| {
            each(peer, &mut |kind, value| {
                if kind == PRESHARED_KEY {
                    let id = <&[u8; 32]>::try_from(&*value).ok().and_then(crate::some_psk_id);
                    value.zeroize();
                    if let Some(PskId(id)) = id {
                        value[..id.len()].copy_from_slice(&id);
                    }
                }
            });
        }),
        _ => {}
    });
}

/// Every attribute's type, without its flags, and value. What is malformed ends it: the parser will say so.
fn each(mut attributes: &mut [u8], visit: &mut dyn FnMut(u16, &mut [u8])) {
    while let Ok(mut attribute) = NlaBuffer::new_checked(&mut *attributes) {
        let length = usize::from(attribute.length());
        visit(attribute.kind(), attribute.value_mut());
        let next = length.next_multiple_of(4).min(attributes.len());
        attributes = &mut attributes[next..];
    }
}

/// What a device has, from all the attributes of a dump, [`redact`]ed. A peer that did not fit into one message goes on in
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
            WireguardPeerAttribute::PresharedKey(redacted) => {
                let name = redacted.first_chunk().copied().map(PskId);
                peer.pre_shared_key = name.filter(|_| redacted != [0; 32]);
            }
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
