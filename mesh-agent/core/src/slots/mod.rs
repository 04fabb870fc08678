//! Slots: which key is on which device, which peers are on which device, and which device a peer is sent by, also
//! while keys rotate.
//!
//! The mechanism and its invariants are described in `keyd`'s core (`rotation`). Here is the agent's part, functions
//! of the directory, of the private keys that are there, and of what the devices show:
//!
//! ```text
//!   directory: slots, active, last of every node ([`NodeKeys`]; the newer of two views of a node counts, [`newer`])
//!        |
//!        |   private keys held --- make what keyd asks for, destroy what is void ([`Keyring`])
//!        v        v
//!   [`paths`] of each pair: up to four, each on a device of its own at both ends
//!        |
//!        +--> devices to have, peers on them, receive bits        (all paths)
//!        +--> the one that is sent by ([`sending`])               (moves once, when the new one is verified)
//!        +--> what keyd is told ([`Reporter`]): verified, sending, quiet, of what has changed
//! ```
//!
//! Order when this becomes steps: receive bits before peers, a peer together with its prefixes, peers before the path
//! that uses them, the path before peers that leave, a device emptied before its private key is destroyed, a private
//! key on disk (synced) before it is offered, the directory on disk (synced) before it is applied.

mod keyring;
mod mover;
mod pairs;
mod path;
mod report;
#[cfg(test)]
mod tests;

pub use keyring::Keyring;
pub use mover::Mover;
pub use pairs::{AwaitedPsk, LOOK, PATIENCE, Pair, SLOW_LOOK, Tally};
pub(crate) use pairs::{Pairs, Seeing, prefixes};
pub use path::{
    KEY_SLOTS, NodeKeys, Path, YIELD, begins, devices, half, is_draining, is_verified, keepalive, newer,
    node_path, paths, sending, slot_of, target,
};
pub use report::{PairReport, PathReport, QUIET, Reporter, Seen};
