//! Loads, attaches and pins the eBPF programs, and gives their maps types.
//!
//! This crate may not know the directory, WireGuard or routes. Nothing is removed at exit: programs and maps
//! keep running with the agent stopped, and the next agent adopts them.
