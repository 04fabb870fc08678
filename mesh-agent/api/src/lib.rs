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
use warren_model::{Datapath, IdentityId, NodeName, PodRef, PublicKey, policy::Direction};

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
    /// `mesh-agent endpoints`: pods with their policy enforcement.
    Endpoints,
    /// `mesh-agent policy`: the compiled policy of an endpoint, as the maps hold it.
    Policy {
        /// Index of the endpoint, 0 = the host; `None` = all.
        endpoint: Option<u16>,
    },
    /// What the maps and the model answer for a packet, for `warren policy trace`.
    PolicyTrace(Box<TraceRequest>),
    /// `mesh-agent conntrack`.
    Conntrack {
        /// Only flows of this endpoint.
        endpoint: Option<u16>,
        /// At most so many.
        limit: u32,
    },
    /// The last events of the programs, oldest first.
    PolicyEvents {
        /// At most so many.
        limit: u32,
    },
}

/// A packet to ask policy about, as one endpoint of this node sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TraceRequest {
    /// The endpoint, by the address of its pod; `None` = the host.
    pub pod: Option<IpAddr>,
    /// The direction, seen from it.
    pub direction: Direction,
    /// Identity of the other end.
    pub peer: IdentityId,
    /// Address of the other end.
    pub address: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port, or ICMP type.
    pub port: u16,
}

/// One look-up of policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TraceVerdict {
    /// It passes (audit mode aside).
    pub allowed: bool,
    /// It would be dropped, but audit mode is on.
    pub audit: bool,
    /// `default-deny`, `denied`, `no-policy`, `allowed`, `no-rule-applies`.
    pub reason: String,
    /// The rule that decides: object and place, as in `CiliumNetworkPolicy demo/api spec.ingress[0]`.
    pub rule: Option<String>,
}

/// Answer to [`Request::PolicyTrace`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TraceAnswer {
    /// The endpoint that was asked.
    pub endpoint: u16,
    /// What the eBPF maps say.
    pub maps: TraceVerdict,
    /// What the model says.
    pub model: TraceVerdict,
    /// Every statement that covers the packet: object and place, and whether it allows.
    pub statements: Vec<(String, bool)>,
}

/// The policy of one endpoint as the maps hold it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointPolicyStatus {
    /// Index, 0 = the host.
    pub endpoint: u16,
    /// The pod.
    pub pod: Option<PodRef>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its identity.
    pub identity: IdentityId,
    /// Labels of the identity.
    pub labels: Vec<String>,
    /// Nothing written yet: the endpoint is closed.
    pub closed: bool,
    /// Default deny at ingress.
    pub ingress_enforced: bool,
    /// Default deny at egress.
    pub egress_enforced: bool,
    /// Audit mode.
    pub audit: bool,
    /// The entries; empty in the answer to [`Request::Endpoints`].
    pub entries: Vec<PolicyEntryStatus>,
}

/// One entry: who, on which ports, allowed or denied, by which rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyEntryStatus {
    /// The direction.
    pub direction: Direction,
    /// As in `TCP/8080-8095`, `ANY`.
    pub ports: String,
    /// As in `identity 300 (k8s:app=web,...)`, `everybody`, `cidr 10.0.0.0/8 (world)`.
    pub peer: String,
    /// Allowed or denied.
    pub allow: bool,
    /// Object and place; empty where no rule had to decide.
    pub rule: String,
}

/// One tracked flow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowStatus {
    /// Endpoint that it belongs to.
    pub endpoint: u16,
    /// `ingress` or `egress`: who opened it.
    pub direction: Direction,
    /// IP protocol number.
    pub protocol: u8,
    /// The endpoint's address and port.
    pub local: std::net::SocketAddr,
    /// The peer's.
    pub remote: std::net::SocketAddr,
    /// Identity of the peer.
    pub peer: IdentityId,
    /// `new`, `established`, `closing`, `untranslated` (waits to be judged on its final address).
    pub state: String,
    /// Seconds since the last packet.
    pub idle_seconds: u32,
    /// Seconds until it is forgotten.
    pub expires_seconds: u32,
    /// Object and place of the rule that allowed it.
    pub rule: Option<String>,
}

/// One event of the programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EventStatus {
    /// Unix milliseconds.
    pub time_unix_ms: u64,
    /// `allowed`, `dropped`, `audited`.
    pub outcome: String,
    /// Program.
    pub hook: String,
    /// Drop reason where there is one.
    pub reason: Option<String>,
    /// Direction of the policy that was asked, where one was.
    pub direction: Option<Direction>,
    /// Source.
    pub source: Option<std::net::SocketAddr>,
    /// Destination.
    pub destination: Option<std::net::SocketAddr>,
    /// IP protocol number.
    pub protocol: u8,
    /// Identity of the source.
    pub source_identity: IdentityId,
    /// Identity of the destination.
    pub destination_identity: IdentityId,
    /// Object and place of the rule that decided.
    pub rule: Option<String>,
    /// Packets that it stands for.
    pub packets: u32,
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
    /// Answer to [`Request::Endpoints`] and [`Request::Policy`].
    #[serde(with = "listed")]
    Policies(Vec<EndpointPolicyStatus>),
    /// Answer to [`Request::PolicyTrace`].
    Trace(Box<TraceAnswer>),
    /// Answer to [`Request::Conntrack`].
    #[serde(with = "listed")]
    Flows(Vec<FlowStatus>),
    /// Answer to [`Request::PolicyEvents`].
    Events {
        /// The events.
        events: Vec<EventStatus>,
        /// How many were lost since the maps were made.
        lost: u64,
    },
}

/// A list as a member of an object: the tag of the response stands beside it.
mod listed {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    struct Listed<T> {
        list: T,
    }

    pub(super) fn serialize<T: Serialize, S: Serializer>(
        list: &[T],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        Listed { list }.serialize(serializer)
    }

    pub(super) fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<T>, D::Error> {
        Ok(Listed::deserialize(deserializer)?.list)
    }
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
    /// This node's keys, and how far a change of them is.
    #[serde(default)]
    pub keys: KeyStatus,
    /// One per slot in use.
    pub interfaces: Vec<InterfaceStatus>,
    /// One per peer and slot.
    pub peers: Vec<PeerStatus>,
    /// How pairs agree on pre-shared keys.
    #[serde(default)]
    pub exchanges: ExchangeStatus,
    /// What is exempt from the tunnel, a line each.
    pub exemptions: Vec<String>,
    /// Packets dropped, by reason.
    pub drops: Vec<(String, u64)>,
}

/// The exchanges of pre-shared keys since the agent started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExchangeStatus {
    /// Pairs that wait for a key now: nothing is sent to these peers.
    pub awaited: usize,
    /// Offers made and answered.
    pub begun: u64,
    /// Keys that were agreed on.
    pub agreed: u64,
    /// Offers and answers that led to no key, and keys that could not be kept.
    pub failed: u64,
    /// Packets that were no message, nothing that was asked, or more than a peer may send.
    pub dropped: u64,
}

/// The keys of a node and the paths that they make.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KeyStatus {
    /// All that this node has or had published, by generation.
    pub generations: Vec<GenerationStatus>,
    /// How far a change of this node's key is.
    pub phase: KeyPhase,
    /// Peers with a path.
    pub pairs: usize,
    /// Of them, those whose newest path has a fresh handshake.
    pub verified: usize,
    /// Of them, those that are sent to with the active keys of both ends.
    pub switched: usize,
    /// Of them, those whose former path is still received on.
    pub draining: usize,
}

/// A key of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GenerationStatus {
    /// Its number; each new key has a higher one.
    pub generation: u64,
    /// The public half.
    pub public_key: PublicKey,
    /// What it is for.
    pub state: KeyState,
    /// The private half is on this node's disk.
    pub held: bool,
}

/// What a key is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum KeyState {
    /// Made, and not accepted by `keyd` yet.
    Offered,
    /// Published; nobody sends with it yet.
    Next,
    /// The one that is sent with.
    Active,
    /// Still received with.
    Former,
    /// About to be destroyed.
    Void,
}

/// How far a change of a node's key is, as the node itself sees it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum KeyPhase {
    /// No key at all.
    #[default]
    None,
    /// One key, and nothing else.
    Settled,
    /// A new key is made and proved.
    Preparing,
    /// Handshakes with it.
    Verifying,
    /// Pairs move to it.
    Switching,
    /// The former one is only received with.
    Draining,
    /// The former one is destroyed.
    Retiring,
}

impl std::fmt::Display for KeyPhase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "no key yet",
            Self::Settled => "settled",
            Self::Preparing => "preparing a new key",
            Self::Verifying => "verifying the new key",
            Self::Switching => "switching to the new key",
            Self::Draining => "draining the former key",
            Self::Retiring => "retiring the former key",
        })
    }
}

impl std::fmt::Display for KeyState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Offered => "offered",
            Self::Next => "next",
            Self::Active => "active",
            Self::Former => "former",
            Self::Void => "void",
        })
    }
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
    /// What the kernel and the CPU do for the tunnel process, a line; `None` for WireGuard of the kernel.
    #[serde(default)]
    pub offloads: Option<String>,
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
    /// The path has a pre-shared key: post-quantum, agreed on by the two nodes by ML-KEM-768 and X25519.
    #[serde(default)]
    pub pre_shared_key: bool,
    /// Why it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_pre_shared_key: Option<String>,
}

/// The snapshot root that is pinned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RootStatus {
    /// 1 for the cluster's first.
    pub generation: u64,
    /// Its ed25519 public key, base64.
    pub key: String,
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
    /// The root that snapshots must be signed by.
    #[serde(default)]
    pub root: Option<RootStatus>,
    /// For how long the directory's time is over; `None` while it is good.
    #[serde(default)]
    pub expired_seconds: Option<u64>,
    /// What is mounted, or what `keyd` names, is not what this node has pinned.
    #[serde(default)]
    pub trust_fault: Option<String>,
    /// Updates of the directory that were refused: forged, replayed or damaged.
    #[serde(default)]
    pub refused_updates: u64,
    /// Actions that failed and are tried again: a sentence each.
    pub failing: Vec<String>,
    /// Entries of the directory that this agent refuses, malformed input: a sentence each.
    pub problems: Vec<String>,
    /// Endpoints on this node.
    pub endpoints: Vec<EndpointStatus>,
    /// What is known of policy.
    #[serde(default)]
    pub policy: PolicySummary,
}

/// Policy on a node in figures.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicySummary {
    /// Policy objects in force.
    pub policies: usize,
    /// Their statements.
    pub rules: usize,
    /// Revision that new flows are judged under.
    pub revision: u32,
    /// Tracked flows that have seen a reply.
    pub established_flows: u32,
    /// Tracked flows that have not.
    pub new_flows: u32,
    /// Events of the programs that found no room.
    pub events_lost: u64,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_response_survives_the_wire() {
        let flow = FlowStatus {
            endpoint: 1,
            direction: Direction::Egress,
            protocol: 6,
            local: ([10, 0, 0, 1], 1).into(),
            remote: ([10, 0, 0, 2], 2).into(),
            peer: IdentityId(300),
            state: "established".into(),
            idle_seconds: 0,
            expires_seconds: 9,
            rule: None,
        };
        let verdict = TraceVerdict {
            allowed: true,
            audit: false,
            reason: "allowed".into(),
            rule: None,
        };
        let trace = TraceAnswer {
            endpoint: 0,
            maps: verdict.clone(),
            model: verdict,
            statements: vec![("a".into(), true)],
        };
        for response in [
            Response::Done,
            Response::Policies(Vec::new()),
            Response::Flows(vec![flow]),
            Response::Trace(Box::new(trace)),
            Response::Events {
                events: Vec::new(),
                lost: 3,
            },
        ] {
            let text = serde_json::to_string(&response).unwrap();
            assert_eq!(
                serde_json::from_str::<Response>(&text).unwrap(),
                response,
                "{text}"
            );
        }
    }
}
