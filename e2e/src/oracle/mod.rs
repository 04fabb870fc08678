//! An independent judge of network policy.
//!
//! [`evaluate`] answers whether a packet may pass by reading the raw objects, slowly and obviously, from the documented
//! semantics alone. It shares no code with the engine: no parser, no selector, no model. [`differential::run`] draws
//! random clusters, policies and packets, sends them through the real pipeline (parser, selector cache, repository,
//! engine, maps, look-up) and compares; what differs is shrunk to a minimal policy and packet. [`loaded::run`] does the same
//! with the eBPF programs as the kernel has loaded them.
//!
//! Nothing here may be used by the product.

mod cluster;
mod dice;
pub mod differential;
mod evaluate;
mod generate;
pub mod loaded;
mod shrink;
mod trip;

pub use cluster::{Cluster, Node, Packet, Party, Pod, Way};
pub use dice::Dice;
pub use evaluate::allowed;

#[cfg(test)]
mod rows;
