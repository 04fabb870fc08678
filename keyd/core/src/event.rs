//! What goes in and what comes out.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use warren_model::{
    Datapath, ForgetPsk, IdentityId, Labels, NodeKeys, NodeName, NodeRecord, NodeUid, PodRef, PublicKey,
    SlotKey, WorkloadRecord,
    keys::PairReport,
    policy::{NamedPorts, NodeFacts, PolicyError, PolicyRef, Rule, Selector, SelectorId, Validity},
};

use crate::{
    rotation::{Progress, RotationSpec},
    stored::{Object, StoredNode},
};

/// Where objects come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The Kubernetes API: pods, their nodes and their addresses are the API's word.
    Kubernetes,
    /// A folder of manifests: the agents' reports are the only source of pod addresses.
    StandAlone,
}

/// A Node of the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// `metadata.name`.
    pub name: NodeName,
    /// `metadata.uid`, or a value derived from where the object was found.
    pub uid: NodeUid,
    /// The UID was derived. A derived UID is the same when the object comes back after a deletion; the core then
    /// appends a counter, so that the new node is another one.
    pub uid_derived: bool,
    /// InternalIP addresses, best first.
    pub addresses: Vec<IpAddr>,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Vec<IpNet>,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// The annotation `warren.dev/policy-audit: "true"`.
    pub policy_audit: bool,
}

/// A Namespace of the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
}

/// A Pod of the source.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pod {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`; a manifest may have none.
    pub uid: Option<String>,
    /// `spec.nodeName`; a manifest may leave the place open.
    pub node: Option<NodeName>,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// `spec.serviceAccountName`; empty means `default`.
    pub service_account: String,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// Has the annotation `kubernetes.io/config.mirror`: a kubelet made it, with any labels it liked.
    pub mirror: bool,
    /// Phase Succeeded or Failed: it owns no address any more.
    pub finished: bool,
    /// `status.podIPs`; not used in stand-alone mode.
    pub addresses: Vec<IpAddr>,
    /// Named ports of its containers.
    pub ports: NamedPorts,
    /// The annotation `warren.dev/policy-audit: "true"`.
    pub policy_audit: bool,
}

/// A KeyRotation of the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RotationObject {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`, or the name where there is none.
    pub uid: String,
    /// `metadata.generation`; 0 where there is none.
    pub generation: i64,
    /// Creation time, Unix milliseconds: orders rotations.
    pub created: u64,
    /// For people: why.
    pub reason: String,
    /// For people: when it runs again.
    pub every: String,
    /// What is asked for.
    pub spec: RotationSpec,
}

/// A change in the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceEvent {
    /// A Node appeared or changed.
    NodeUpsert(Node),
    /// A Node is gone.
    NodeDelete(NodeName),
    /// A Namespace appeared or changed.
    NamespaceUpsert(Namespace),
    /// A Namespace is gone.
    NamespaceDelete(String),
    /// A Pod appeared or changed.
    PodUpsert(Pod),
    /// A Pod is gone.
    PodDelete {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// A policy object appeared or changed, as the parser saw it.
    PolicyUpsert {
        /// The object.
        policy: PolicyRef,
        /// Its rules, or what is wrong with it: it then enforces nothing.
        outcome: Result<Vec<Rule>, PolicyError>,
    },
    /// A policy object is gone.
    PolicyDelete(PolicyRef),
    /// A CiliumCIDRGroup appeared or changed.
    CidrGroupUpsert {
        /// Its name.
        name: String,
        /// Its prefixes, or what is wrong with it.
        outcome: Result<Vec<IpNet>, PolicyError>,
    },
    /// A CiliumCIDRGroup is gone.
    CidrGroupDelete(String),
    /// All addresses behind the Service default/kubernetes; not used in stand-alone mode.
    ApiServers(BTreeSet<IpAddr>),
    /// A KeyRotation appeared or changed.
    RotationUpsert(RotationObject),
    /// A KeyRotation is gone.
    RotationDelete(String),
    /// Everything that exists, policies included, has been reported once. Nothing is published, and no recovered object is taken for
    /// deleted, before that.
    Synced,
}

/// One stream of one agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u64);

/// An event of an agent whose name and UID were authenticated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentEvent {
    /// Hello.
    Connected {
        /// The new stream.
        session: SessionId,
        /// Authenticated name.
        node: NodeName,
        /// Authenticated UID.
        uid: NodeUid,
        /// What moves its packets.
        datapath: Option<Datapath>,
        /// (epoch, version) of the directory it has.
        resume: (u64, u64),
    },
    /// The stream is gone.
    Disconnected(SessionId),
    /// The agent has proved possession of a key.
    KeyProved {
        /// Whose stream.
        session: SessionId,
        /// The key in both its slots.
        slots: [SlotKey; 2],
    },
    /// The private keys that the agent has.
    Held {
        /// Whose stream.
        session: SessionId,
        /// Their public halves by generation.
        keys: BTreeMap<u64, PublicKey>,
    },
    /// What the paths to peers are like.
    Paths {
        /// Whose stream.
        session: SessionId,
        /// The pairs that are new or have changed.
        pairs: Vec<PairReport>,
    },
    /// CNI ADD.
    EndpointAdd {
        /// Whose stream.
        session: SessionId,
        /// Comes back in the reply.
        request_id: u64,
        /// The pod.
        pod: PodRef,
        /// Its addresses.
        addresses: Vec<IpAddr>,
    },
    /// CNI DEL.
    EndpointDelete {
        /// Whose stream.
        session: SessionId,
        /// The pod.
        pod: PodRef,
        /// The addresses it gives up; empty means all.
        addresses: Vec<IpAddr>,
    },
    /// Everything up to here is in the node's device and maps.
    Applied {
        /// Whose stream.
        session: SessionId,
        /// Epoch.
        epoch: u64,
        /// Version within it.
        version: u64,
    },
}

/// Any input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// From the source.
    Source(SourceEvent),
    /// From an agent.
    Agent(AgentEvent),
    /// What the store has of a node after [`Output::WriteKeys`], whether that was written or not.
    Stored(Box<StoredNode>),
    /// Somebody else has written the progress of a rotation; that counts.
    Progress {
        /// Its name.
        rotation: String,
        /// Its UID.
        uid: String,
        /// What is stored.
        progress: Progress,
    },
}

/// An entry of the directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// A node.
    Node(NodeRecord),
    /// The labels of an identity.
    Identity(IdentityId, Labels),
    /// The owner of an address.
    Workload(WorkloadRecord),
    /// A selector that rules name.
    Selector(SelectorId, Selector),
    /// Members of a selector in one block of [`MEMBERS_BLOCK`](crate::MEMBERS_BLOCK) identities; never empty.
    Members(SelectorId, u32, BTreeSet<IdentityId>),
    /// All rules of a policy object; never empty.
    Policy(PolicyRef, Vec<Rule<SelectorId>>),
    /// What policy has to know of a node.
    NodeFacts(NodeName, NodeFacts),
}

impl Record {
    /// What names it.
    pub fn key(&self) -> RecordKey {
        match self {
            Self::Node(node) => RecordKey::Node(node.name.clone()),
            Self::Identity(number, _) => RecordKey::Identity(*number),
            Self::Workload(workload) => RecordKey::Workload(workload.ip),
            Self::Selector(id, _) => RecordKey::Selector(*id),
            Self::Members(id, block, _) => RecordKey::Members(*id, *block),
            Self::Policy(policy, _) => RecordKey::Policy(policy.clone()),
            Self::NodeFacts(name, _) => RecordKey::NodeFacts(name.clone()),
        }
    }
}

/// Names an entry of the directory.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RecordKey {
    /// A node.
    Node(NodeName),
    /// An identity.
    Identity(IdentityId),
    /// An address.
    Workload(IpAddr),
    /// A selector.
    Selector(SelectorId),
    /// A block of a selector's members.
    Members(SelectorId, u32),
    /// A policy object.
    Policy(PolicyRef),
    /// Facts of a node.
    NodeFacts(NodeName),
}

/// A change of the directory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Change {
    /// New or changed entries.
    pub upserts: Vec<Record>,
    /// Removed ones.
    pub removes: Vec<RecordKey>,
}

/// How an agent gets from what it has to what is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CatchUp {
    /// Everything.
    Snapshot,
    /// Only this; the agent has the rest.
    Increment(Change),
}

/// Why an endpoint is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointError {
    /// One sentence.
    pub message: String,
    /// The same request may succeed later.
    pub retry: bool,
}

/// What the binary must do, in this order: an object must be persisted before what follows it is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Write this object.
    Persist(Object),
    /// Write a node with changed keys by compare-and-swap, then read the epoch again: where it is not this term's, the term
    /// is over. Answered with [`Event::Stored`] either way; nothing of it is published before. Nothing that follows
    /// waits for it.
    WriteKeys {
        /// The keys that must be there for the write to be made.
        was: NodeKeys,
        /// What to write.
        node: Box<StoredNode>,
    },
    /// Ask an agent for a key.
    AskKey {
        /// Which stream.
        session: SessionId,
        /// The generation.
        generation: u64,
    },
    /// Tell an agent which pre-shared key to forget.
    ForgetPsk {
        /// Which stream.
        session: SessionId,
        /// The key.
        forget: ForgetPsk,
    },
    /// What there is to say of a rotation has changed.
    Rotation(String),
    /// Worth an Event on the Node. Not durable.
    Note {
        /// The node.
        node: NodeName,
        /// In camel case.
        reason: &'static str,
        /// A sentence.
        message: String,
    },
    /// Send to every agent that has been caught up.
    Publish {
        /// The new version.
        version: u64,
        /// The difference to the version before; may be empty (a fresh signature).
        change: Change,
    },
    /// Greet this agent and bring it to the version; it gets every later change.
    CatchUp {
        /// Which stream.
        session: SessionId,
        /// The node's name.
        node: NodeName,
        /// Version after it.
        version: u64,
        /// How.
        from: CatchUp,
    },
    /// Answer to a proved key.
    KeyResult {
        /// Which stream.
        session: SessionId,
        /// Which key.
        public_key: PublicKey,
        /// Accepted, or the reason in one sentence.
        result: Result<(), String>,
    },
    /// Answer to an endpoint.
    EndpointResult {
        /// Which stream.
        session: SessionId,
        /// Which request.
        request_id: u64,
        /// The pod's identity.
        result: Result<IdentityId, EndpointError>,
    },
    /// What is to be said of a policy object has changed. Not for agents, and not durable.
    Validity {
        /// The object.
        policy: PolicyRef,
        /// What to say; `None` where the object is gone.
        validity: Option<Validity>,
    },
    /// End this stream.
    Close {
        /// Which stream.
        session: SessionId,
        /// One sentence.
        reason: String,
        /// Whether coming back at once makes sense.
        retry: bool,
    },
}
