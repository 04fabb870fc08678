//! The agent's core: what this node should look like, and the steps that lead there.
//!
//! Events go in ([`Agent`]: the directory, local endpoints, results of actions), the state of the machine as
//! the drivers read it ([`Observed`]) is compared with what is wanted ([`State`]), and out comes a list of
//! [`Action`]s in an order that never leaves a packet of the mesh without cover. Everything is level-triggered:
//! a plan may be executed twice or in part, and the next plan is the difference that is left. Nothing is
//! removed before the first full directory is known.
//!
//! This crate may not do IO, read a clock, draw random numbers, start a task, or know a driver, kube or tokio:
//! time is an argument, inputs are events, outputs are values.

mod action;
mod agent;
mod desired;
mod directory;
mod endpoint;
mod freshness;
mod frozen;
mod index;
mod plan;
pub mod policy;
pub mod psk;
mod retry;
pub mod slots;
mod state;
mod verify;

pub use action::{Action, Gate};
pub use agent::{Agent, Settings};
pub use desired::{TUNNEL_PREFIX, slot_address, slot_device};
pub use directory::{Change, Directory, Entry, EntryKey};
pub use endpoint::{Endpoint, EndpointKey, Endpoints};
pub use freshness::Freshness;
pub use index::NodeIndexes;
pub use plan::plan;
pub use retry::{Failure, Retries};
pub use state::{
    Device, EndpointEntry, Firewall, Link, LinkKind, NodePath, Observed, Owner, Peer, Programs, Route,
    RouteKey, Rule, State, Table, WireGuard, metric,
};
pub use verify::mismatches;
