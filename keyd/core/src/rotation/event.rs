//! What goes into the machine and what comes out.

use std::collections::BTreeMap;

use warren_model::{ForgetPsk, NodeKeys, NodeName, PublicKey, keys::PairReport};

use super::{
    spec::RotationSpec,
    status::{Counts, Progress},
};

/// What the machine is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The durable keys of a node that exists: loaded, seen by a watch, written, or what was found where a write was
    /// refused because somebody else had written.
    Keys {
        /// The node.
        node: NodeName,
        /// Its keys.
        keys: NodeKeys,
    },
    /// Labels of the Node.
    Labels {
        /// The node.
        node: NodeName,
        /// All of them.
        labels: BTreeMap<String, String>,
    },
    /// The Node is gone, or its keys are revoked.
    Gone(NodeName),
    /// A rotation appeared or changed.
    Rotation {
        /// Its name.
        name: String,
        /// Orders rotations: creation time.
        created: u64,
        /// What is asked for.
        spec: RotationSpec,
        /// The durable progress, where it was loaded; `None` leaves what is known.
        progress: Option<Progress>,
    },
    /// A rotation was deleted: as if aborted, without status.
    RotationGone(String),
    /// An agent's stream began. Everything it said before is forgotten.
    Connected(NodeName),
    /// An agent's stream ended.
    Disconnected(NodeName),
    /// The private keys that an agent has. Sent first in a stream and at each change.
    Held {
        /// The node.
        node: NodeName,
        /// Public halves by generation: after a disk was replaced a generation may name another key than was proved.
        keys: BTreeMap<u64, PublicKey>,
    },
    /// The state of an agent's paths: all of them first in a stream, then the pairs that changed.
    Report {
        /// The node.
        node: NodeName,
        /// The pairs.
        pairs: Vec<PairReport>,
    },
}

/// What must be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Ask an agent for a key of this generation. It keeps the key until the directory says that it is void.
    AskKey {
        /// The node.
        node: NodeName,
        /// The generation.
        generation: u64,
    },
    /// Write the keys by compare-and-swap, publish them once they are written, and answer with [`Event::Keys`] either
    /// way. Nothing more is written for the node before that answer.
    Write {
        /// The node.
        node: NodeName,
        /// What must be there for the write to be made.
        was: NodeKeys,
        /// What to write.
        keys: NodeKeys,
    },
    /// Revoke a straggler's keys.
    Revoke(NodeName),
    /// Tell an agent which pre-shared key to forget.
    Forget {
        /// The node that is told.
        node: NodeName,
        /// The key.
        forget: ForgetPsk,
    },
    /// Write the progress of a rotation.
    Status {
        /// Its name.
        rotation: String,
        /// What is durable.
        progress: Progress,
        /// For people.
        counts: Counts,
    },
    /// Something worth an Event on the Node.
    Note {
        /// The node.
        node: NodeName,
        /// In camel case.
        reason: &'static str,
        /// A sentence.
        message: String,
    },
}
