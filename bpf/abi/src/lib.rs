//! Types shared between the eBPF programs and user space.
//!
//! This crate may not use `std`, allocate, or hold logic beyond encoding: every byte of every type is written
//! explicitly, and its layout is asserted at compile time.
#![cfg_attr(not(test), no_std)]

/// Largest endpoint index that the mark can hold.
pub const MAX_ENDPOINT_INDEX: u16 = 0xfff;
/// Most addresses of one family that an endpoint can have.
pub const MAX_ENDPOINT_ADDRESSES: usize = 4;
