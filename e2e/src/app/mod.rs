//! The lab's own applications: one server that every pod runs, and clients that report as JSON.
//!
//! Nothing here depends on tools of the machine, so that a check means the same everywhere.

pub mod ask;
pub mod flood;
pub mod flow;
pub mod hammer;
pub mod load;
mod pace;
pub mod ping;
pub mod probe;
pub mod serve;
pub mod session;
pub mod stamps;
pub mod transfer;
pub mod wire;
