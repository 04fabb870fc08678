//! Packets through the programs of a node: policy, flows, translation, hostile input.

mod flows;
mod packets;
mod services;
