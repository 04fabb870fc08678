//! Network policy: who reaches whom, told by tables.

mod demo;
mod first;
mod services;
mod stack;
mod suite;
mod town;

pub(crate) use self::{
    demo::three_tiers,
    first::first_packets,
    services::{services_with_iptables, services_with_policy},
    stack::application_stack,
    suite::cyclonus_sample,
};
