//! The eBPF programs as they are loaded, without a network: on made-up packets (`BPF_PROG_TEST_RUN`), over the real maps, in
//! a namespace that nothing else uses.

#[cfg(test)]
mod exhaustion;
mod frame;
mod node;
mod private;

pub use frame::Frame;
pub use node::{Hook, Node, Seen};
pub use private::private;
