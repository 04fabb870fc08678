//! KeyRotation objects: what they ask for, what is said of them, and making them. What happens is decided by the core.

mod make;
mod object;
mod progress;
mod statuses;
mod writer;

pub(crate) use make::{Maker, Unmade};
pub(crate) use object::{kind, parse};
pub(crate) use progress::{exception_of, phase_name, progress, waiting_for};
pub(crate) use statuses::Statuses;
pub(crate) use writer::{Wanted, write};
