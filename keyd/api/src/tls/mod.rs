//! TLS between `keyd` and its agents: one CA per cluster, one server name, rustls with aws-lc-rs, TLS 1.3 only.
//!
//! **Time.** A node whose clock is wrong (no battery, before its first NTP answer) must still reach `keyd`, or it
//! would lose its network until somebody sets the clock; and a certificate that has expired must not live on because a clock
//! was set back. So neither end asks the wall clock. An agent verifies the server's certificate at the time of the newest
//! manifest that it has, plus the time since boot; where it has none yet, at the begin of the certificate's own validity. `keyd`
//! verifies clients' certificates at the time that it signs with. All certificates start in 1975: only their end can matter.
//! Revocation does not rest on any of this but on `keyd` alone: a node must exist with the UID of its certificate.

mod authority;
mod client;
mod server;

pub use authority::{Authority, AuthorityError, CertifiedNode, certified_node};
pub use client::{
    ClientIdentity, ConnectError, Enrolment, Trust, client_config, connect, connect_with, enroll,
    generate_client_key,
};
pub use server::{Clock, handshake_acceptor, server_config};

/// The name in keyd's certificate, whatever address it is reached at.
pub const SERVER_NAME: &str = "keyd.warren.internal";

/// The only crypto provider in use.
fn provider() -> std::sync::Arc<rustls::crypto::CryptoProvider> {
    std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

#[cfg(test)]
mod tests;
