//! Key rotation: the decisions of `keyd`, as a state machine without IO.
//!
//! # Slots
//!
//! A device has one private key, and a prefix belongs to one peer of a device. So two keys of one peer never share a
//! device, at either end: where A changes its key, B needs another device too, with B's unchanged key. A node has
//! four slots; the slot of a pair follows from the two key generations alone:
//!
//! ```text
//!   half(g)    = (g - 1) mod 2                     generations of a node alternate between two halves
//!   slot of A  = 2 * half(gen of A) + half(gen of B)
//!   slot of B  = 2 * half(gen of B) + half(gen of A)
//!
//!             slots 0 1        slots 2 3
//!   node A    key of gen 1     key of gen 2        a key fills both slots of its half
//!   pair (A1,B1): A.0 - B.0    pair (A2,B1): A.2 - B.1
//!   pair (A1,B2): A.1 - B.2    pair (A2,B2): A.3 - B.3
//! ```
//!
//! All four paths of a pair lie on different devices at both ends, so they can exist at once. That is why nodes rotate
//! independently of each other, alone, together or overlapping, and why nothing about a *pair* has to be agreed,
//! numbered or stored: the directory says which generations a node has and which one is active, both ends compute
//! the same paths from it. (With three slots a pair's slot depends on the history of both ends: it would have to
//! be stored per pair, or the whole mesh would have to move for one node.)
//!
//! # Phases of a node
//!
//! ```text
//!             AskKey           key proved         all pairs verified      nobody sends on g,
//!                              write {g,g'} a=g   write a=g'              quiet; write {g'}       g destroyed
//!   Pending ---------> Preparing -----> Verifying ========> Switching -> Draining ------> Retiring ----> Done
//!      |                   |               |        point       |                                |
//!      | abort,            | deadline,     | deadline,  of no   | deadline: both keys go on working
//!      | node gone         | abort         | abort,     return  | (stalled), or the stragglers are
//!      v                   v               v key lost           v revoked or left
//!   Aborted             Failed    write {g}, Failed          finishes by itself, later
//! ```
//!
//! | phase | directory | old slots | new slots | senders |
//! |---|---|---|---|---|
//! | Preparing | {g}, active g | up | - | g |
//! | Verifying | {g, g'}, active g | up | handshakes at both ends | g |
//! | Switching | {g, g'}, active g' | up, receive | up | each moves to g' with one map write, once its own handshake there is fresh; never back |
//! | Draining | {g, g'}, active g' | receive only, no keepalive | up | g' |
//! | Retiring | {g'}, active g' | emptied, key zeroized | up | g' |
//!
//! Agents report per pair and path: `verified` (device, key, peer, prefixes and receive bit are in place and the last
//! handshake is fresh), `sending` (the path map points there), `quiet` (nothing has arrived there for a while).
//!
//! # Invariants
//!
//! 1. *What one end may send, the other accepts.* A path is sent on only if both generations are published and were
//!    active in one published version. The step that makes a generation active needs `verified` from both ends of
//!    every pair, for the path to the other end's active generation. A generation leaves the directory only when
//!    every end of every pair has said that it sends elsewhere; having said so, it never goes back.
//! 2. *Each pair always has a verified path*: by 1, and because the old path stays until the new one carries.
//! 3. *One rotation per node at a time*: a third generation has no half to go to.
//! 4. *Before the point of no return* everything can be taken back without touching a packet: nobody has ever sent on
//!    g'. *After it* nothing is taken back: every pair has proved that g' works.
//! 5. *A deadline leaves the old keys working*: before the point of no return g' is withdrawn; after it both stay.
//!
//! # What is durable
//!
//! [`NodeKeys`] of each node, in its MeshNode: slots, `active`, and `last`, the highest generation ever accepted. It is
//! written **by compare-and-swap** and published only after that, so the decisions about one node are in one order
//! even while two leaders believe in themselves: of a commit and a withdrawal exactly one is written. `active` and
//! `last` never go back. And [`Progress`] of a rotation: which nodes at which generation it began with, and what
//! failed. A phase is computed from these two; reports and timers are in memory, are made again by the agents after a
//! new leader, and start anew, which only makes a rotation longer.
//!
//! An agent destroys a private key when its generation is not listed **and** is below `active` or not above `last`:
//! absence alone proves nothing, the directory may be that of a leader which has not yet seen the key. A peer's
//! `active` generation never goes back at an agent either.
//!
//! # Others
//!
//! * *Stragglers*: peers whose agent is not connected. `Wait`: the deadline decides. `Revoke`: at the deadline their
//!   keys are revoked. `Leave`: a pair counts as settled while its other end has said for 180 s that no path of
//!   it has a fresh handshake: no session is alive, there is no traffic to lose, the straggler gets the directory when it
//!   returns.
//!   A connected peer is never revoked: the fault is between the two.
//! * *Drain*: quiet alone is not enough, a packet may be under way while the last sender moves. The drain time counts from
//!   when all have moved and are quiet, and must be longer than any packet lives in the underlay (1 s at least).
//! * *A node that comes* has to verify like all others; a node that goes is no longer asked.
//! * *The first key* of a node is asked for when its agent connects, and is active at once.
//! * *A key that is lost* (disk replaced) while active: its node is cut off already; the next key becomes active at
//!   once, in the same half.
//! * *Concurrency* counts nodes between Preparing and Retiring, without stalled ones; *jitter* delays each start by a
//!   share that follows from the rotation's and the node's names.

mod conflict;
mod event;
mod flight;
mod look;
mod machine;
mod readiness;
mod run;
mod schedule;
mod spec;
mod status;
#[cfg(test)]
mod tests;

pub use event::{Event, Output};
pub use flight::Phase;
pub use machine::Machine;
pub use schedule::due;
pub use spec::{Concurrency, Pace, RotationSpec, Selection, Stragglers};
pub use status::{Counts, Outcome, Planned, Progress, Reported, RotationPhase, Standing};
pub use warren_model::keys::{KEY_SLOTS, NodeKeys, PairReport, PathState, half, slot_of, slots_of};
