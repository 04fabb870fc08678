//! Policy on `keyd`'s side: which identities each selector means, and which rules agents get.
//!
//! [`SelectorCache`] keeps the members of every selector up to date as identities come and go; a new identity
//! touches only selectors that it matches. [`PolicyRepository`] holds the policy objects, numbers their selectors,
//! resolves groups of prefixes and yields [`PolicyChange`]s, the values that are published to agents.

mod records;
mod repository;
mod selectors;

pub use records::MEMBERS_BLOCK;
pub(crate) use records::touched;
pub use repository::{PolicyChange, PolicyRepository};
pub use selectors::{Members, SelectorCache};
