//! The shell around the exchange of pre-shared keys (`psk` in the core): computations, disk, packets. Secrets stay here and in
//! [`crate::keys`]; the core knows their names.

mod crypto;
mod links;
mod table;
mod work;

pub(crate) use links::{Links, Packet};
pub(crate) use table::Table;
pub(crate) use work::Secrets;

/// What tells the messages of this start of the agent from those of others.
pub(crate) fn salt() -> anyhow::Result<[u8; 7]> {
    let mut salt = [0; 7];
    aws_lc_rs::rand::fill(&mut salt).map_err(|_| anyhow::anyhow!("the system gave no random bytes"))?;
    Ok(salt)
}

/// UDP port of the exchange, at both ends: none that a process without privileges may have. Not assigned by IANA.
pub(crate) const PORT: u16 = warren_abi::EXCHANGE_PORT;
