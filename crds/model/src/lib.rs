//! The vocabulary of Warren: node, key, prefix, identity, workload, cluster configuration, and the
//! directory rules that `keyd` applies before it publishes and every agent applies again before it
//! touches a device.
//!
//! This crate may not do IO, read a clock, draw random numbers, or depend on kube or tokio.

pub mod config;
pub mod directory;
pub mod identity;
pub mod key;
pub mod keys;
pub mod node;
pub mod policy;
pub mod workload;

pub use config::{ClusterConfig, DatapathChoice, PrefixSource};
pub use identity::{IdentityId, Labels};
pub use key::{KeyError, PreSharedKey, PrivateKey, PskId, PublicKey};
pub use keys::{ForgetPsk, KEY_SLOTS, NodeKeys, PskConflict, link_address};
pub use node::{Datapath, NodeName, NodeRecord, NodeUid, SlotKey};
pub use workload::{PodRef, WorkloadRecord};
