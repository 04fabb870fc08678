//! Types shared between the eBPF programs and user space.
//!
//! This crate may not use `std`, allocate, or hold logic beyond encoding: every byte of every type is written
//! explicitly, and its layout is asserted at compile time. Change [`VERSION`] with any change of a map: maps of
//! another version are never adopted.
#![cfg_attr(not(test), no_std)]

mod flow;
mod map;
mod mark;
mod policy;
mod reason;

pub use flow::*;
pub use map::{
    DeviceValue, EndpointValue, NodeKey, NodeValue, OwnerTag, OwnerValue, POOL_PODS, POOL_SERVICES,
    PathValue, RoleTag, SettingsValue, TraceValue, limits, names,
};
pub use mark::{MarkCodec, Provenance, TUNNEL_MARK, judged};
pub use policy::*;
pub use reason::{DropReason, Hook};

/// Version of the maps. Part of the path that they are pinned under.
pub const VERSION: u32 = 2;
/// UDP port at both ends of the exchange of pre-shared keys between link-local addresses of tunnel devices. Below 1024: only
/// root may have it. Not assigned by IANA.
pub const EXCHANGE_PORT: u16 = 878;
/// Largest endpoint index that the mark can hold.
pub const MAX_ENDPOINT_INDEX: u16 = 0xfff;
/// Most addresses of one family that an endpoint can have.
pub const MAX_ENDPOINT_ADDRESSES: usize = 4;
/// Most tunnel slots that a bitmask of slots can name.
pub const MAX_SLOTS: u8 = 8;
