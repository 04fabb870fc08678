//! Loads, attaches and pins the eBPF programs, and gives their maps types.
//!
//! This crate may not know the directory, WireGuard or routes. Nothing is removed at exit: programs and maps
//! keep running with the agent stopped, and the next agent adopts them.

mod attach;
mod btf;
mod clsact;
mod convert;
mod datapath;
mod error;
mod events;
mod flows;
mod host;
mod maps;
mod netlink;
mod policy;
mod programs;
mod sys;
pub mod testing;
mod trace;
mod types;
mod usage;

pub use datapath::Datapath;
pub use error::Error;
pub use events::{Event, Events, Outcome};
pub use flows::{Flow, FlowPhase, FlowReport};
pub use policy::{
    PolicyAnswer, PolicyContents, PolicyDirection, PolicyEndpoint, PolicyOutcome, PolicyPeerKind, PolicyPort,
    PolicyPortKey, PolicyQuestion, PolicyVerdict, PolicyVerdictKey, Usage,
};
pub use sys::monotonic_time;
pub use types::{
    AttachMode, Attachment, Config, DropCount, Endpoint, NodeAddress, Owner, OwnerKind, Path, Role,
};
pub use warren_abi::{MAX_ENDPOINT_ADDRESSES, MAX_ENDPOINT_INDEX};

#[cfg(test)]
mod tests;
