//! The WireGuard cross-platform configuration protocol: text of requests and answers, without IO.
//!
//! Source: <https://www.wireguard.com/xplatform/>. `allowed_ip=-PREFIX` takes a prefix from a peer (newer
//! WireGuard tools). Text that holds keys is kept in buffers that are wiped when dropped.

use std::{
    fmt::Write as _,
    net::{Ipv6Addr, SocketAddr, SocketAddrV6},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use ipnet::IpNet;
use warren_model::{PreSharedKey, PrivateKey, PublicKey};
use zeroize::Zeroizing;

use crate::{DeviceChange, DeviceState, PeerState};

/// Why a request is not one: the number of its line, from 1, and what is wrong. Never the text: it may be a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub(crate) struct Malformed {
    pub(crate) line: usize,
    pub(crate) reason: &'static str,
}

/// What a client asks for.
pub(crate) enum Request {
    Get,
    Set(Box<SetRequest>),
}

/// A whole `set=1`: parsed and checked before anything is changed.
#[derive(Default)]
pub(crate) struct SetRequest {
    /// `Some(None)` takes the key away.
    pub(crate) private_key: Option<Option<PrivateKey>>,
    /// 0 asks for any free port.
    pub(crate) listen_port: Option<u16>,
    /// 0 turns it off.
    pub(crate) fwmark: Option<u32>,
    /// Whether all peers go before `peers` are applied.
    pub(crate) replace_peers: bool,
    pub(crate) peers: Vec<SetPeer>,
}

/// One peer's part of a `set=1`.
pub(crate) struct SetPeer {
    pub(crate) public_key: PublicKey,
    pub(crate) remove: bool,
    pub(crate) update_only: bool,
    /// `Some(None)` takes the key away.
    pub(crate) preshared_key: Option<Option<PreSharedKey>>,
    pub(crate) endpoint: Option<SocketAddr>,
    pub(crate) keepalive_seconds: Option<u16>,
    pub(crate) replace_allowed_ips: bool,
    /// In the order of the request.
    pub(crate) allowed_ips: Vec<AllowedIpChange>,
}

/// A prefix given to a peer or taken from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AllowedIpChange {
    Add(IpNet),
    Remove(IpNet),
}

impl AllowedIpChange {
    /// The prefix, if it is given.
    pub(crate) fn added(&self) -> Option<IpNet> {
        match self {
            Self::Add(prefix) => Some(*prefix),
            Self::Remove(_) => None,
        }
    }
}

impl SetPeer {
    pub(crate) fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            remove: false,
            update_only: false,
            preshared_key: None,
            endpoint: None,
            keepalive_seconds: None,
            replace_allowed_ips: false,
            allowed_ips: Vec::new(),
        }
    }
}

/// Parses the lines of one request, without the empty line that ends it.
pub(crate) fn parse_request(text: &str) -> Result<Request, Malformed> {
    let mut lines = text.lines().enumerate().map(|(number, line)| (number + 1, line));
    match lines.next() {
        Some((_, "get=1")) => match lines.next() {
            None => Ok(Request::Get),
            Some((line, _)) => Err(Malformed {
                line,
                reason: "nothing may follow get=1",
            }),
        },
        Some((_, "set=1")) => {
            let mut request = SetRequest::default();
            for (line, text) in lines {
                request.line(text).map_err(|reason| Malformed { line, reason })?;
            }
            Ok(Request::Set(Box::new(request)))
        }
        _ => Err(Malformed {
            line: 1,
            reason: "a request begins with get=1 or set=1",
        }),
    }
}

impl SetRequest {
    fn line(&mut self, text: &str) -> Result<(), &'static str> {
        let (key, value) = text.split_once('=').ok_or("expected key=value")?;
        if key == "public_key" {
            let bytes = hex_key(value)?;
            let key =
                PublicKey::from_bytes(*bytes).map_err(|_| "the zero key and low-order keys are refused")?;
            self.peers.push(SetPeer::new(key));
            return Ok(());
        }
        match self.peers.last_mut() {
            Some(peer) => peer.line(key, value),
            None => self.device_line(key, value),
        }
    }

    fn device_line(&mut self, key: &str, value: &str) -> Result<(), &'static str> {
        match key {
            "private_key" => {
                let bytes = hex_key(value)?;
                self.private_key = Some((*bytes != [0; 32]).then(|| PrivateKey::from_bytes(*bytes)));
            }
            "listen_port" => self.listen_port = Some(number(value).ok_or("listen_port is 0 to 65535")?),
            "fwmark" => self.fwmark = Some(number(value).ok_or("fwmark is a 32-bit number")?),
            "replace_peers" => self.replace_peers = only_true(value)?,
            _ => return Err("unknown device key"),
        }
        Ok(())
    }
}

impl SetPeer {
    fn line(&mut self, key: &str, value: &str) -> Result<(), &'static str> {
        match key {
            "remove" => self.remove = only_true(value)?,
            "update_only" => self.update_only = only_true(value)?,
            "preshared_key" => {
                self.preshared_key = Some(PreSharedKey::from_bytes(&*hex_key(value)?));
            }
            "endpoint" => self.endpoint = Some(parse_endpoint(value).ok_or("endpoint is ADDRESS:PORT")?),
            "persistent_keepalive_interval" => {
                self.keepalive_seconds = Some(number(value).ok_or("keepalive is 0 to 65535 seconds")?);
            }
            "replace_allowed_ips" => self.replace_allowed_ips = only_true(value)?,
            "allowed_ip" => {
                let (prefix, remove) = match value.strip_prefix('-') {
                    Some(prefix) => (prefix, true),
                    None => (value, false),
                };
                let prefix = prefix
                    .parse::<IpNet>()
                    .map_err(|_| "allowed_ip is ADDRESS/LENGTH")?
                    .trunc();
                self.allowed_ips.push(match remove {
                    true => AllowedIpChange::Remove(prefix),
                    false => AllowedIpChange::Add(prefix),
                });
            }
            "protocol_version" if value == "1" => {}
            "protocol_version" => return Err("only protocol_version 1 is spoken"),
            _ => return Err("unknown peer key"),
        }
        Ok(())
    }
}

fn only_true(value: &str) -> Result<bool, &'static str> {
    (value == "true").then_some(true).ok_or("the only value is true")
}

/// Decimal digits only: `FromStr` of integers also takes a plus sign.
fn number<T: std::str::FromStr>(value: &str) -> Option<T> {
    value
        .bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| value.parse().ok())
        .flatten()
}

fn hex_key(value: &str) -> Result<Zeroizing<[u8; 32]>, &'static str> {
    let mut bytes = Zeroizing::new([0; 32]);
    hex::decode_to_slice(value, bytes.as_mut()).map_err(|_| "a key is 64 hexadecimal digits")?;
    Ok(bytes)
}

/// `192.0.2.1:51871`, `[2001:db8::1]:51871`, `[fe80::1%eth0]:51871`, `[fe80::1%2]:51871`. Port 0 is refused.
fn parse_endpoint(value: &str) -> Option<SocketAddr> {
    let endpoint = match value.parse::<SocketAddr>() {
        Ok(endpoint) => endpoint,
        Err(_) => {
            let (address, port) = value.strip_prefix('[')?.rsplit_once("]:")?;
            let (address, zone) = address.split_once('%')?;
            let scope = nix::net::if_::if_nametoindex(zone).ok()?;
            SocketAddrV6::new(address.parse::<Ipv6Addr>().ok()?, number(port)?, 0, scope).into()
        }
    };
    (endpoint.port() != 0).then_some(endpoint)
}

/// What a device answers to `get=1`, with its secrets.
pub(crate) struct DeviceView {
    pub(crate) private_key: Option<PrivateKey>,
    pub(crate) listen_port: u16,
    pub(crate) fwmark: u32,
    pub(crate) peers: Vec<(PeerState, Option<PreSharedKey>)>,
}

/// The answer to `get=1`, without the line `errno=0` and the empty line after it.
pub(crate) fn format_view(view: &DeviceView) -> Zeroizing<String> {
    // Room enough that the text is not copied, which would leave keys behind in freed memory.
    let prefixes: usize = view.peers.iter().map(|(peer, _)| peer.allowed_ips.len()).sum();
    let mut text = Zeroizing::new(String::with_capacity(
        256 + 512 * view.peers.len() + 64 * prefixes,
    ));
    let out: &mut String = &mut text;
    if let Some(key) = &view.private_key {
        put_key(out, "private_key", key.expose());
    }
    put(out, "listen_port", view.listen_port);
    if view.fwmark != 0 {
        put(out, "fwmark", view.fwmark);
    }
    for (peer, preshared_key) in &view.peers {
        put_key(out, "public_key", peer.public_key.as_bytes());
        if let Some(key) = preshared_key {
            put_key(out, "preshared_key", key.expose());
        }
        put(out, "protocol_version", 1);
        if let Some(endpoint) = peer.endpoint {
            put(out, "endpoint", endpoint);
        }
        let handshake = peer
            .last_handshake
            .and_then(|time| time.duration_since(UNIX_EPOCH).ok())
            .unwrap_or_default();
        put(out, "last_handshake_time_sec", handshake.as_secs());
        put(out, "last_handshake_time_nsec", handshake.subsec_nanos());
        put(out, "tx_bytes", peer.sent_bytes);
        put(out, "rx_bytes", peer.received_bytes);
        put(out, "persistent_keepalive_interval", peer.keepalive_seconds);
        for prefix in &peer.allowed_ips {
            put(out, "allowed_ip", prefix);
        }
    }
    text
}

fn put(out: &mut String, key: &str, value: impl std::fmt::Display) {
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{key}={value}");
}

fn put_key(out: &mut String, key: &str, bytes: &[u8; 32]) {
    let mut digits = Zeroizing::new([0; 64]);
    if hex::encode_to_slice(bytes, digits.as_mut()).is_ok() {
        out.push_str(key);
        out.push('=');
        out.extend(digits.iter().copied().map(char::from));
        out.push('\n');
    }
}

/// Parses an answer to `get=1`, up to and without its `errno` line.
pub(crate) fn parse_view(text: &str) -> Result<DeviceState, Malformed> {
    let mut state = DeviceState::default();
    let mut handshake = Duration::ZERO;
    for (number, line) in text.lines().enumerate() {
        let (key, value) = line.split_once('=').ok_or(Malformed {
            line: number + 1,
            reason: "expected key=value",
        })?;
        view_line(&mut state, &mut handshake, key, value).map_err(|reason| Malformed {
            line: number + 1,
            reason,
        })?;
    }
    for peer in &mut state.peers {
        peer.allowed_ips.sort();
    }
    state.peers.sort_by_key(|peer| peer.public_key);
    Ok(state)
}

fn view_line(
    state: &mut DeviceState,
    handshake: &mut Duration,
    key: &str,
    value: &str,
) -> Result<(), &'static str> {
    const BAD: &str = "a value is out of range";
    if key == "public_key" {
        let public_key = PublicKey::from_bytes(*hex_key(value)?).map_err(|_| "a peer's key is refused")?;
        state.peers.push(empty_peer(public_key));
        return Ok(());
    }
    let Some(peer) = state.peers.last_mut() else {
        match key {
            "private_key" => {
                let secret = x25519_dalek::StaticSecret::from(*hex_key(value)?);
                state.public_key =
                    PublicKey::from_bytes(x25519_dalek::PublicKey::from(&secret).to_bytes()).ok();
            }
            "listen_port" => state.listen_port = number(value).ok_or(BAD)?,
            _ => {}
        }
        return Ok(());
    };
    match key {
        "preshared_key" => peer.pre_shared_key = crate::some_psk_id(&*hex_key(value)?),
        "endpoint" => peer.endpoint = Some(parse_endpoint(value).ok_or("a peer's endpoint is malformed")?),
        "last_handshake_time_sec" => *handshake = Duration::from_secs(number(value).ok_or(BAD)?),
        "last_handshake_time_nsec" => {
            let time = *handshake + Duration::from_nanos(number(value).ok_or(BAD)?);
            peer.last_handshake = (time != Duration::ZERO).then(|| UNIX_EPOCH + time);
        }
        "tx_bytes" => peer.sent_bytes = number(value).ok_or(BAD)?,
        "rx_bytes" => peer.received_bytes = number(value).ok_or(BAD)?,
        "persistent_keepalive_interval" => peer.keepalive_seconds = number(value).ok_or(BAD)?,
        "allowed_ip" => peer
            .allowed_ips
            .push(value.parse().map_err(|_| "a peer's prefix is malformed")?),
        _ => {}
    }
    Ok(())
}

fn empty_peer(public_key: PublicKey) -> PeerState {
    PeerState {
        public_key,
        pre_shared_key: None,
        endpoint: None,
        keepalive_seconds: 0,
        allowed_ips: Vec::new(),
        last_handshake: None::<SystemTime>,
        received_bytes: 0,
        sent_bytes: 0,
    }
}

/// Requests that apply `changes` in order, none (but for a single change) longer than `limit` bytes.
///
/// Allowed prefixes are only ever added and taken away one by one: `replace_peers` appears in
/// [`DeviceChange::Clear`] alone, `replace_allowed_ips` never.
pub(crate) fn format_changes(changes: &[DeviceChange], limit: usize) -> Vec<Zeroizing<String>> {
    let mut requests: Vec<Zeroizing<String>> = Vec::new();
    let mut open = false;
    for change in changes {
        let text = format_change(change);
        // Device lines must precede every peer of a request, so such a change begins a request.
        let device = matches!(change, DeviceChange::SetDevice { .. } | DeviceChange::Clear);
        match requests.last_mut() {
            Some(request) if open && !device && request.len() + text.len() <= limit => {
                request.push_str(&text)
            }
            _ => {
                let mut request = Zeroizing::new(String::with_capacity(limit.max(text.len()) + 16));
                request.push_str("set=1\n");
                request.push_str(&text);
                requests.push(request);
            }
        }
        // A device line that fails must not take the peers after it with it.
        open = !device;
    }
    for request in &mut requests {
        request.push('\n');
    }
    requests
}

fn format_change(change: &DeviceChange) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(512));
    let out: &mut String = &mut text;
    match change {
        DeviceChange::SetDevice {
            private_key,
            listen_port,
        } => {
            put_key(out, "private_key", private_key.expose());
            put(out, "listen_port", listen_port);
        }
        DeviceChange::SetPeer {
            public_key,
            pre_shared_key,
            endpoint,
            keepalive_seconds,
        } => {
            put_key(out, "public_key", public_key.as_bytes());
            if let Some(key) = pre_shared_key {
                put_key(out, "preshared_key", key.expose());
            }
            if let Some(endpoint) = endpoint {
                put(out, "endpoint", endpoint);
            }
            put(out, "persistent_keepalive_interval", keepalive_seconds);
        }
        DeviceChange::RemovePeer(public_key) => {
            put_key(out, "public_key", public_key.as_bytes());
            put(out, "remove", true);
        }
        DeviceChange::AddAllowedIp { public_key, prefix } => {
            put_key(out, "public_key", public_key.as_bytes());
            put(out, "update_only", true);
            put(out, "allowed_ip", prefix);
        }
        DeviceChange::RemoveAllowedIp { public_key, prefix } => {
            put_key(out, "public_key", public_key.as_bytes());
            put(out, "update_only", true);
            put(out, "allowed_ip", format_args!("-{prefix}"));
        }
        DeviceChange::Clear => {
            put_key(out, "private_key", &[0; 32]);
            put(out, "replace_peers", true);
        }
    }
    text
}

#[cfg(test)]
#[path = "uapi_tests.rs"]
mod tests;
