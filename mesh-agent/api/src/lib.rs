//! The protocol of the agent's local socket (`/run/warren/agent.sock`, 0600): one JSON object per line as
//! request, one per line as response. Spoken by the CNI plugin, `mesh-agent ... status` and tests.
//!
//! Types and a small blocking client; no server, no tokio.

use std::{
    io::{self, BufRead as _, BufReader, ErrorKind, Write as _},
    net::IpAddr,
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use warren_model::{Datapath, IdentityId, NodeName, PodRef, PublicKey};

/// What a client may ask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// CNI ADD: program the endpoint; answered when traffic may flow.
    CniAdd(Attachment),
    /// CNI DEL. Unknown attachments are no error. The program stays until the veth is gone.
    CniDel(AttachmentKey),
    /// CNI CHECK: is the endpoint programmed as it was at ADD?
    CniCheck(Attachment),
    /// CNI GC: forget every attachment that is not listed.
    CniGc {
        /// The attachments that are still valid.
        valid: Vec<AttachmentKey>,
    },
    /// CNI STATUS: may pods be added now?
    CniStatus,
    /// `mesh-agent encrypt status`.
    EncryptStatus,
    /// `mesh-agent status`.
    Status,
}

/// Identifies a CNI attachment.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AttachmentKey {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_IFNAME`: the interface inside the pod.
    pub ifname: String,
}

/// A pod's attachment as the plugins before ours left it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// Which attachment.
    #[serde(flatten)]
    pub key: AttachmentKey,
    /// From `CNI_ARGS`.
    pub pod: PodRef,
    /// Path of the pod's network namespace.
    pub netns: String,
    /// Interface index of the host's end of the veth, in the node's namespace.
    pub host_ifindex: u32,
    /// MAC address of the pod's end.
    pub mac: [u8; 6],
    /// The pod's addresses.
    pub addresses: Vec<IpAddr>,
}

/// What the agent answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "kebab-case")]
pub enum Response {
    /// Done.
    Done,
    /// Refused or failed: one sentence that says what is wrong and what to do.
    Error {
        /// The sentence.
        message: String,
        /// The same request may succeed later (CNI code 11).
        retry: bool,
    },
    /// Answer to [`Request::EncryptStatus`].
    EncryptStatus(Box<EncryptStatus>),
    /// Answer to [`Request::Status`].
    Status(Box<AgentStatus>),
}

/// What the node's encryption really is, read from the device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EncryptStatus {
    /// The device, its key and peers agree with what is wanted, and every program is attached.
    pub enabled: bool,
    /// Every difference between what is wanted and what is: a sentence each. Empty = good.
    pub mismatches: Vec<String>,
    /// What moves the packets.
    pub datapath: Datapath,
    /// One per slot in use.
    pub interfaces: Vec<InterfaceStatus>,
    /// One per peer and slot.
    pub peers: Vec<PeerStatus>,
    /// What is exempt from the tunnel, a line each.
    pub exemptions: Vec<String>,
    /// Packets dropped, by reason.
    pub drops: Vec<(String, u64)>,
}

/// A WireGuard device of this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InterfaceStatus {
    /// `warren0`.
    pub name: String,
    /// Slot number.
    pub slot: u8,
    /// UDP port.
    pub port: u16,
    /// The device's own key.
    pub public_key: Option<PublicKey>,
    /// Key generation.
    pub generation: u64,
    /// MTU in bytes.
    pub mtu: u32,
}

/// A peer on a device of this node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerStatus {
    /// Which node, where the directory knows the key.
    pub node: Option<NodeName>,
    /// The device.
    pub interface: String,
    /// The peer's key.
    pub public_key: PublicKey,
    /// `address:port`.
    pub endpoint: Option<std::net::SocketAddr>,
    /// Seconds since the last handshake; `None` for never.
    pub last_handshake_seconds: Option<u64>,
    /// Bytes received.
    pub received_bytes: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Prefixes that the peer may use.
    pub allowed_prefixes: Vec<IpNet>,
}

/// State of the agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentStatus {
    /// Everything that is wanted is done and nothing failed.
    pub healthy: bool,
    /// Node name.
    pub node: NodeName,
    /// Version of the agent.
    pub version: String,
    /// Connected to `keyd`, and where.
    pub keyd: Option<String>,
    /// Snapshot applied: epoch and version.
    pub snapshot: Option<(u64, u64)>,
    /// Actions that failed and are tried again: a sentence each.
    pub failing: Vec<String>,
    /// Entries of the directory that this agent refuses, malformed input: a sentence each.
    pub problems: Vec<String>,
    /// Endpoints on this node.
    pub endpoints: Vec<EndpointStatus>,
}

/// A pod on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointStatus {
    /// The pod; `None` for one that was adopted and is not yet known.
    pub pod: Option<PodRef>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Host veth.
    pub host_ifindex: u32,
    /// Its identity.
    pub identity: IdentityId,
    /// Programs and maps are in place.
    pub ready: bool,
}

/// Why the agent could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens: the agent is not running.
    #[error("the agent is not running on this node (cannot connect to {path}: {source})")]
    Connect {
        /// The socket.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The connection broke.
    #[error("the agent did not answer: {0}")]
    Io(#[from] std::io::Error),
    /// Not our protocol.
    #[error("the agent's answer cannot be read: {0}")]
    Protocol(#[from] serde_json::Error),
}

/// Sends one request and waits at most `timeout` for the response.
pub fn call(socket: &Path, request: &Request, timeout: Duration) -> Result<Response, ClientError> {
    let mut stream = UnixStream::connect(socket).map_err(|source| ClientError::Connect {
        path: socket.display().to_string(),
        source,
    })?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = String::new();
    BufReader::new(stream)
        .read_line(&mut answer)
        .map_err(|error| match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => io::Error::new(
                ErrorKind::TimedOut,
                format!("nothing came within {} s", timeout.as_secs_f32()),
            ),
            _ => error,
        })?;
    if !answer.ends_with('\n') {
        let cut = "the connection was closed before the answer was complete";
        return Err(io::Error::new(ErrorKind::UnexpectedEof, cut).into());
    }
    Ok(serde_json::from_str(&answer)?)
}
