//! Packets through the programs of a node: policy, flows, translation, hostile input.

mod events;
mod flows;
mod hostile;
mod node;
mod packets;
mod property;
mod related;
mod services;
