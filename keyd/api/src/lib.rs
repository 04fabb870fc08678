//! The gRPC contract between `keyd`, its agents and the command line, with what both ends must do alike:
//! proof of possession, signing and checking of snapshots, TLS set-up, join tokens, conversions to
//! `warren-model`.
//!
//! This crate knows neither the controller's index nor the agent's devices, and holds no state but
//! [`snapshot::Directory`].

pub mod admin;
pub mod convert;
pub mod proof;
pub mod snapshot;
pub mod status;
pub mod stream;
pub mod tls;
pub mod token;

/// Generated from `proto/keyd.proto`.
#[expect(missing_docs, clippy::allow_attributes, reason = "generated code")]
pub mod proto {
    tonic::include_proto!("warren.keyd.v1alpha1");
}

/// `Hello.protocol` of this version.
pub const PROTOCOL: u32 = 1;

/// The audience of the projected service-account tokens that agents present.
pub const TOKEN_AUDIENCE: &str = "keyd.warren.dev";

/// The largest gRPC message either side accepts, bytes: a chunk of [`snapshot::CHUNK_BYTES`] plus its frame.
pub const MAX_MESSAGE_BYTES: usize = 4 * 1024 * 1024;
