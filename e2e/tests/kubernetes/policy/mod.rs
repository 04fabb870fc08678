//! Network policy: who reaches whom, told by tables.

mod demo;
mod stack;
mod town;

pub(crate) use self::{demo::three_tiers, stack::application_stack};
