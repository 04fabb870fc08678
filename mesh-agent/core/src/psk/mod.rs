//! Pre-shared keys: how the two ends of a path agree on one, inside a tunnel of their own.
//!
//! Whether a path has a pre-shared key follows from the directory: where both generations' keys were made with them
//! (`pre_shared_keys` of their slots), always; else never. So both ends agree on that, and turning it on or off is a
//! rotation. `keyd` sees no key, and takes part only where one is lost.
//!
//! # Where
//!
//! A path lies on one device at either end, and the other device of the same half has the same key (`slots`): there
//! the two nodes are peers once more, without a pre-shared key, with their link-local addresses as only allowed prefixes.
//! That tunnel carries the exchange and nothing else, at any time, whatever the path is doing. The peer of the path itself
//! is added only when the key is there, and with it: no session of the path is ever without one, and nothing has to be
//! switched under way. (Exchanging on the path's own device needs the peer to be added again with the key, and then
//! neither end can ask the other whether it has done so.)
//!
//! # Exchange
//!
//! ```text
//!   the end with the lower key begins                       the other end
//!                                   <------ Hello ------    has agreed on nothing
//!   Begin: X25519 and ML-KEM keys   ------- Init ------->   Answer: computes the key
//!                                                           disk: offered
//!   Finish: computes the key        <------ Reply ------
//!   disk: agreed                    ------ Confirm ----->   disk: agreed; device
//!   device                          <------- Ack -------    once the device has it
//! ```
//!
//! Nobody relies on a key that the other end may not have on disk: the other end has it there before it replies, the
//! beginning end before it confirms. What is lost on the way is said again, as often as it takes: the beginning end repeats
//! what it said last, the other one says Hello. Each Init has a nonce of its own, and is the same when it is repeated, so that
//! it is answered by the same key.
//!
//! An agent that is killed forgets its offer, and packets may come late. So the other end replaces a key that it has offered
//! only by one for an Init that names it: who sends such an Init has learned from a Hello that this key was offered, has
//! not agreed on it, and takes no answer to an earlier Init any more. An Init that does not name it is answered by Hello.
//!
//! # A key that is lost
//!
//! A key that is agreed on is never replaced on the word of whoever has the peer's WireGuard key: that is what it protects
//! against. An end that has lost it (its disk was set back) is answered Other: that is known to be so at that moment, by the
//! nonce. The beginning end then reports a conflict to `keyd`, and `keyd` tells both ends which key to forget: see
//! `rotation` in its core. Until then the path carries nothing. As long as a device works with a key, that one counts,
//! whatever the disk says.
//!
//! # Bounds
//!
//! A peer may say anything in its tunnel: packets beyond an allowance per path are dropped before they are parsed, offers
//! cost a computation and a write and have a smaller one, and nothing that it says removes a key.
//!
//! Secrets, randomness, disk and sockets are the binary's: this module names a computation ([`Work`]) and gets back what
//! came of it ([`Done`]), keys are known by their names.

mod allowance;
mod exchange;
mod exchanges;
pub mod message;
#[cfg(test)]
mod tests;

use warren_model::{PskId, PublicKey};

pub use allowance::Allowance;
pub use exchanges::{Counters, Exchanges};
pub use message::Nonce;

/// A path, by the keys of its ends. A generation has one key for ever, so this is never another path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ends {
    /// This node's key.
    pub own: PublicKey,
    /// The peer's key.
    pub peer: PublicKey,
}

/// What is on disk of a path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Record {
    /// The key that both ends have.
    pub agreed: Option<PskId>,
    /// The key that this end has offered, as the one that does not begin: the other one may have agreed on it.
    pub offered: Option<PskId>,
}

/// What the devices show of a path.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// The tunnel of the exchange is in place at this end.
    pub open: bool,
    /// The key that the path's peer has on its device.
    pub on_device: Option<PskId>,
    /// The path's peer has a fresh handshake, which is one with that key.
    pub fresh: bool,
}

/// What a path's peer is to have on its device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PskUse {
    /// No pre-shared key.
    #[default]
    Without,
    /// One that is not agreed on yet: the peer must not be there.
    Awaited,
    /// This one.
    With(PskId),
}

/// Something to do, in order. Each but `Send` is answered by a [`Done`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work {
    /// Make an offer, in place of an older one of this path: keep its secret parts, return the public ones.
    Begin {
        /// The path.
        ends: Ends,
        /// Names the offer.
        nonce: Nonce,
    },
    /// Compute a key from the peer's offer: keep it, return its name and the answer.
    Answer {
        /// The path.
        ends: Ends,
        /// Names the offer.
        nonce: Nonce,
        /// The offer.
        offer: Vec<u8>,
    },
    /// Compute the key from the answer to an offer of this end; it must have the name that the peer says.
    Finish {
        /// The path.
        ends: Ends,
        /// Names the offer.
        nonce: Nonce,
        /// The answer.
        answer: Vec<u8>,
        /// The key's name.
        id: PskId,
    },
    /// Bring the path's keys on disk to this, synced. Keys that it does not name are destroyed, and the secret parts of offers
    /// where it names none.
    Save {
        /// The path.
        ends: Ends,
        /// What is to be there.
        record: Record,
    },
    /// Send a packet to the peer's link-local address.
    Send {
        /// The path.
        ends: Ends,
        /// The slot of the exchange.
        slot: u8,
        /// The packet.
        bytes: Vec<u8>,
    },
}

/// What came of a [`Work`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Done {
    /// Of `Begin`: [`message::OFFER`] bytes, or `None` where there is no randomness.
    Begun(Ends, Nonce, Option<Vec<u8>>),
    /// Of `Answer`: the key's name and [`message::ANSWER`] bytes, or `None` where the offer is none.
    Answered(Ends, Nonce, Option<(PskId, Vec<u8>)>),
    /// Of `Finish`: the key's name, or `None` where it is not the one that was said.
    Finished(Ends, Nonce, Option<PskId>),
    /// Of `Save`: what is on disk, and whether that is so.
    Saved(Ends, Record, bool),
}
