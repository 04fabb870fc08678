//! A TCP transfer whose every byte is checked at the other end.

use std::{
    io::Write as _,
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result};

use super::wire::{TransferReport, XFER, pattern_block, read_block};

/// What `warren-lab-app transfer` takes.
#[derive(Debug, clap::Args)]
pub struct TransferArgs {
    /// Whom.
    #[arg(long)]
    pub to: SocketAddr,
    /// How many bytes.
    #[arg(long, default_value_t = 16 << 20)]
    pub bytes: u64,
    /// Milliseconds without progress after which to give up.
    #[arg(long, default_value_t = 20_000)]
    pub timeout: u64,
}

/// Sends `bytes` bytes and returns what the other end found.
pub fn transfer(to: SocketAddr, bytes: u64, timeout: Duration) -> Result<TransferReport> {
    let mut stream =
        TcpStream::connect_timeout(&to, timeout).with_context(|| format!("cannot connect to {to}"))?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    stream.write_all(XFER)?;
    stream.write_all(&bytes.to_be_bytes())?;
    let mut sent = 0;
    while sent < bytes {
        let block = pattern_block(
            sent,
            usize::try_from(bytes - sent).unwrap_or(usize::MAX).min(64 << 10),
        );
        stream
            .write_all(&block)
            .with_context(|| format!("the transfer broke off after {sent} bytes"))?;
        sent += block.len() as u64;
    }
    let report = read_block(&mut stream).context("no report")?;
    serde_json::from_slice(&report).context("the report cannot be read")
}
