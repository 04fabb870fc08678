//! The gRPC contract between `keyd`, its agents and the command line, with what both ends must do alike:
//! proof of possession, signing and checking of snapshots, TLS set-up, conversions to `warren-model`.
//!
//! This crate knows neither the controller's index nor the agent's devices.

/// Generated from `proto/keyd.proto`.
#[expect(missing_docs, clippy::all, unreachable_pub, reason = "generated code")]
pub mod proto {
    tonic::include_proto!("warren.keyd.v1alpha1");
}
