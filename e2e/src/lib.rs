//! The lab: nodes and pods as namespaces of one machine, the real CNI chain, packet capture between the
//! nodes, and the scenarios that run in it.
//!
//! This crate may not know how `keyd` or an agent work: it starts their binaries, reads their documented
//! output and looks at the packets between the nodes. Nothing it builds touches the machine's own network
//! namespace, and nothing it sends can leave the machine.

pub mod app;
pub mod bench;
pub mod capture;
pub mod cluster;
pub mod demo;
pub mod first_packet;
pub mod forge;
pub mod inside;
pub mod kernel;
pub mod lab;
pub mod oracle;
pub mod scenario;
pub mod sim;
