//! The engine in network namespaces: one program of all of them, since most of each test is waiting for others.

mod configuration;
mod driver;
mod handover;
mod hostile;
mod impairment;
mod interop;
mod owners;
mod scenarios;
#[path = "../support/mod.rs"]
mod support;
mod tunnel;
