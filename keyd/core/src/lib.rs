//! The sans-IO core of `keyd`: one index that is fed with events of the source (Nodes, Namespaces, Pods) and of
//! the agents (streams, proved keys, endpoints, acknowledgements) and yields values: objects to persist, changes
//! to publish, replies.
//!
//! This crate may not do IO, read a clock, draw random numbers, or know kube, tonic or tokio. Time is an argument
//! (milliseconds of any monotonic clock); proofs of possession and authentication happened before an event
//! arrives here.

mod claims;
mod core;
mod endpoints;
mod event;
mod facts;
mod identities;
mod keys;
mod labels;
mod nodes;
pub mod policy;
mod publish;
pub mod rotation;
mod sessions;
mod stored;
mod timeline;

pub use crate::{
    core::{Core, Counters, Revocation, Settings},
    event::{
        AgentEvent, CatchUp, Change, EndpointError, Event, Mode, Namespace, Node, Output, Pod, Record,
        RecordKey, RotationObject, SessionId, SourceEvent,
    },
    labels::workload_labels,
    policy::MEMBERS_BLOCK,
    stored::{Object, Recovered, Revoked, StoredEndpoint, StoredNode, StoredRotation},
    timeline::Timeline,
};

/// The epoch of a new leadership term: the stored one plus one, at least the Unix time in milliseconds, so that a
/// restored backup cannot reuse one.
pub fn next_epoch(last: u64, unix_ms: u64) -> u64 {
    last.saturating_add(1).max(unix_ms)
}
