//! What `keyd` says of keys, as the commands show it: readable keys, words instead of numbers.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Serialize;
use warren_keyd_api::proto;

/// All nodes' keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Keys {
    /// Nothing is wrong.
    pub(crate) healthy: bool,
    pub(crate) nodes: Vec<NodeKeys>,
    /// The newest first.
    pub(crate) revocations: Vec<Revocation>,
    /// A sentence each.
    pub(crate) problems: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct NodeKeys {
    pub(crate) node: String,
    pub(crate) uid: String,
    /// The generation that is sent with; 0 before the first key.
    pub(crate) active: u64,
    /// The highest generation ever accepted.
    pub(crate) last: u64,
    pub(crate) keys: Vec<Key>,
    /// Its agent has a stream to `keyd`.
    pub(crate) connected: bool,
    /// Of its rotation; empty while nothing changes.
    pub(crate) phase: &'static str,
    /// The node that is waited for, where it is one.
    pub(crate) waiting_for: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Key {
    pub(crate) generation: u64,
    /// Base64.
    pub(crate) public_key: String,
    /// `active`, `next`, `former`.
    pub(crate) state: &'static str,
    /// `None`: not known.
    pub(crate) age_seconds: Option<u64>,
    /// The agent has the private half; `None`: it has not said.
    pub(crate) held: Option<bool>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Revocation {
    pub(crate) node: String,
    pub(crate) uid: String,
    /// The directory that is without the keys; version 0: not published yet.
    pub(crate) epoch: u64,
    pub(crate) version: u64,
    /// Base64.
    pub(crate) public_keys: Vec<String>,
    /// Nodes whose agents have removed them.
    pub(crate) acknowledged: Vec<String>,
    /// The others.
    pub(crate) waiting: Vec<String>,
}

/// A KeyRotation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Rotation {
    pub(crate) name: String,
    pub(crate) reason: String,
    /// `Pending`, `Running`, `Succeeded`, `Failed`, `Aborted`.
    pub(crate) phase: String,
    pub(crate) run: u64,
    /// Unix milliseconds; 0: not yet.
    pub(crate) created_unix_ms: i64,
    pub(crate) started_unix_ms: i64,
    pub(crate) completed_unix_ms: i64,
    pub(crate) counts: Counts,
    pub(crate) waiting_for: String,
    pub(crate) exceptions: Vec<Exception>,
    pub(crate) nodes: Vec<NodeProgress>,
    /// Hours or days between two runs; empty: runs once.
    pub(crate) every: String,
    pub(crate) abort: bool,
    /// What happens, or what is wrong with it.
    pub(crate) message: String,
}

impl Rotation {
    /// Nothing more will happen in this run.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.phase.as_str(), "Succeeded" | "Failed" | "Aborted")
    }

    pub(crate) fn succeeded(&self) -> bool {
        self.phase == "Succeeded"
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Counts {
    pub(crate) total: u32,
    pub(crate) pending: u32,
    pub(crate) preparing: u32,
    pub(crate) verifying: u32,
    pub(crate) switching: u32,
    pub(crate) draining: u32,
    pub(crate) retiring: u32,
    pub(crate) done: u32,
    pub(crate) failed: u32,
    pub(crate) gone: u32,
}

impl Counts {
    /// Those that nodes are in now, in the order in which a node passes through them.
    pub(crate) fn moving(&self) -> impl Iterator<Item = (u32, &'static str)> {
        [
            (self.preparing, "preparing"),
            (self.verifying, "verifying"),
            (self.switching, "switching"),
            (self.draining, "draining"),
            (self.retiring, "retiring"),
        ]
        .into_iter()
        .filter(|(count, _)| *count > 0)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Exception {
    pub(crate) node: String,
    /// `Failed`, `Stalled`, `Aborted`, `Gone`.
    pub(crate) reason: String,
    pub(crate) message: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct NodeProgress {
    pub(crate) node: String,
    pub(crate) phase: &'static str,
    pub(crate) waiting_for: String,
}

/// Two nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Pair {
    pub(crate) nodes: [String; 2],
    pub(crate) agree: bool,
    /// A sentence each; empty where they agree.
    pub(crate) faults: Vec<String>,
    pub(crate) paths: Vec<Path>,
    /// Both ends send by paths that have a pre-shared key.
    pub(crate) pre_shared_key: bool,
}

/// A path by the generations of its two keys, with what either end says; `None` where it says nothing of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Path {
    pub(crate) generations: [u64; 2],
    pub(crate) ends: [Option<End>; 2],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct End {
    pub(crate) verified: bool,
    pub(crate) sending: bool,
    pub(crate) quiet: bool,
}

impl Keys {
    /// Judges at the time `now` in Unix milliseconds.
    pub(crate) fn of(response: proto::ListKeysResponse, now: i64) -> Self {
        let nodes: Vec<NodeKeys> = response
            .nodes
            .into_iter()
            .map(|node| NodeKeys::of(node, now))
            .collect();
        let problems: Vec<String> = nodes.iter().filter_map(NodeKeys::problem).collect();
        Self {
            healthy: problems.is_empty(),
            nodes,
            revocations: response.revocations.into_iter().map(Revocation::from).collect(),
            problems,
        }
    }
}

impl NodeKeys {
    fn of(node: proto::NodeKeysStatus, now: i64) -> Self {
        let phase = phase(node.phase());
        Self {
            node: node.node,
            uid: node.uid,
            active: node.active,
            last: node.last,
            keys: node.keys.into_iter().map(|key| Key::of(&key, now)).collect(),
            connected: node.connected,
            phase,
            waiting_for: node.waiting_for,
        }
    }

    fn problem(&self) -> Option<String> {
        let active = self.keys.iter().find(|key| key.generation == self.active);
        match active {
            None => Some(format!(
                "node {} has no key: has its agent ever connected?",
                self.node
            )),
            Some(key) if key.held == Some(false) => Some(format!(
                "node {} has lost the private half of its active key, generation {}: was its disk replaced?",
                self.node, self.active
            )),
            Some(_) => None,
        }
    }
}

impl Key {
    fn of(key: &proto::KeyStatus, now: i64) -> Self {
        use proto::{KeyHeld, KeyState};
        Self {
            generation: key.generation,
            public_key: STANDARD.encode(&key.public_key),
            state: match key.state() {
                KeyState::Unspecified => "unknown",
                KeyState::Active => "active",
                KeyState::Candidate => "next",
                KeyState::Former => "former",
            },
            age_seconds: (key.accepted_unix_ms > 0)
                .then(|| u64::try_from(now - key.accepted_unix_ms).unwrap_or(0) / 1000),
            held: match key.held() {
                KeyHeld::Unspecified => None,
                KeyHeld::Yes => Some(true),
                KeyHeld::No => Some(false),
            },
        }
    }
}

/// The word for a phase; empty where there is none.
fn phase(phase: proto::NodePhase) -> &'static str {
    use proto::NodePhase;
    match phase {
        NodePhase::Unspecified => "",
        NodePhase::Pending => "pending",
        NodePhase::Preparing => "preparing",
        NodePhase::Verifying => "verifying",
        NodePhase::Switching => "switching",
        NodePhase::Draining => "draining",
        NodePhase::Retiring => "retiring",
        NodePhase::Done => "done",
        NodePhase::Failed => "failed",
        NodePhase::Gone => "gone",
    }
}

impl From<proto::Revocation> for Revocation {
    fn from(revocation: proto::Revocation) -> Self {
        Self {
            node: revocation.node,
            uid: revocation.uid,
            epoch: revocation.epoch,
            version: revocation.version,
            public_keys: revocation
                .public_keys
                .iter()
                .map(|key| STANDARD.encode(key))
                .collect(),
            acknowledged: revocation.acknowledged,
            waiting: revocation.waiting,
        }
    }
}

impl From<proto::RotationStatus> for Rotation {
    fn from(status: proto::RotationStatus) -> Self {
        let counts = status.counts.unwrap_or_default();
        Self {
            name: status.name,
            reason: status.reason,
            phase: status.phase,
            run: status.run,
            created_unix_ms: status.created_unix_ms,
            started_unix_ms: status.started_unix_ms,
            completed_unix_ms: status.completed_unix_ms,
            counts: Counts {
                total: counts.total,
                pending: counts.pending,
                preparing: counts.preparing,
                verifying: counts.verifying,
                switching: counts.switching,
                draining: counts.draining,
                retiring: counts.retiring,
                done: counts.done,
                failed: counts.failed,
                gone: counts.gone,
            },
            waiting_for: status.waiting_for,
            exceptions: status
                .exceptions
                .into_iter()
                .map(|exception| Exception {
                    node: exception.node,
                    reason: exception.reason,
                    message: exception.message,
                })
                .collect(),
            nodes: status
                .nodes
                .into_iter()
                .map(|node| NodeProgress {
                    phase: phase(node.phase()),
                    node: node.node,
                    waiting_for: node.waiting_for,
                })
                .collect(),
            every: status.every,
            abort: status.abort,
            message: status.message,
        }
    }
}

impl From<proto::PairAudit> for Pair {
    fn from(pair: proto::PairAudit) -> Self {
        let end = |state: Option<proto::PathState>| {
            state.map(|state| End {
                verified: state.verified,
                sending: state.sending,
                quiet: state.quiet,
            })
        };
        Self {
            nodes: [pair.a, pair.b],
            agree: pair.agree,
            faults: pair.faults,
            pre_shared_key: pair.pre_shared_key,
            paths: pair
                .paths
                .into_iter()
                .map(|path| Path {
                    generations: [path.a_generation, path.b_generation],
                    ends: [end(path.at_a), end(path.at_b)],
                })
                .collect(),
        }
    }
}
