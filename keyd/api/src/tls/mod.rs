//! TLS between `keyd` and its agents: one CA per cluster, one server name, rustls with aws-lc-rs, TLS 1.3 only.
//!
//! **Time.** A node whose clock is wrong (no battery, before its first NTP answer) must still reach `keyd`, or it
//! would lose its network until somebody sets the clock. So an agent verifies chain, name and usage of the
//! server's certificate at a time taken from that certificate's own validity, never at the wall clock's.
//! Nothing is lost by that: revocation does not rest on certificate expiry but on `keyd` alone (a node must
//! exist with the UID of its certificate), and freshness rests on the signed times of the manifests. `keyd`
//! checks client certificates against its own clock; they start in 1975 so that only its expiry can matter.

mod authority;
mod client;
mod server;

pub use authority::{Authority, AuthorityError, CertifiedNode, certified_node};
pub use client::{
    ClientIdentity, ConnectError, Enrolment, Trust, client_config, connect, connect_with, enroll,
    generate_client_key,
};
pub use server::{handshake_acceptor, server_config};

/// The name in keyd's certificate, whatever address it is reached at.
pub const SERVER_NAME: &str = "keyd.warren.internal";

/// The only crypto provider in use.
fn provider() -> std::sync::Arc<rustls::crypto::CryptoProvider> {
    std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

#[cfg(test)]
mod tests;
