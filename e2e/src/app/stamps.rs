//! A receiver that says when each datagram arrived.

use std::{
    io::Write as _,
    net::{SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::time::{ClockId, clock_gettime};

/// What `warren-lab-app stamps` takes.
#[derive(Debug, clap::Args)]
pub struct StampsArgs {
    /// Where.
    #[arg(long)]
    pub listen: SocketAddr,
}

/// Time since an arbitrary moment, the same for every process of the machine.
pub fn now() -> Result<Duration> {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map(Duration::from)
        .context("the clock cannot be read")
}

/// Writes `ready`, a line break, and then for every datagram the nanoseconds of [`now`], 8 bytes, big-endian.
pub fn stamps(args: &StampsArgs) -> Result<()> {
    let socket =
        UdpSocket::bind(args.listen).with_context(|| format!("cannot listen on udp {}", args.listen))?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", crate::inside::READY)?;
    out.flush()?;
    let mut buffer = [0; 2048];
    loop {
        socket.recv_from(&mut buffer).context("cannot receive")?;
        let nanos = u64::try_from(now()?.as_nanos())?;
        out.write_all(&nanos.to_be_bytes())?;
        out.flush()?;
    }
}
