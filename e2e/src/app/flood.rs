//! As many flows as there are ports: one datagram from each.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// The first source port that is used.
const FIRST_PORT: u16 = 1024;

/// What `warren-lab-app flood` takes.
#[derive(Debug, clap::Args)]
pub struct FloodArgs {
    /// Whom.
    #[arg(long)]
    pub to: SocketAddr,
    /// How many flows.
    #[arg(long, default_value_t = 60_000)]
    pub flows: u16,
}

/// What was sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flooded {
    /// Datagrams, each of a flow of its own.
    pub sent: u64,
}

/// Sends them as fast as it can.
pub fn flood(args: &FloodArgs) -> Result<Flooded> {
    ensure!(
        args.flows <= u16::MAX - FIRST_PORT,
        "there are only {} ports",
        u16::MAX - FIRST_PORT
    );
    let any: IpAddr = if args.to.is_ipv4() {
        [0, 0, 0, 0].into()
    } else {
        [0u16; 8].into()
    };
    let mut sent = 0;
    for offset in 0..args.flows {
        // A port that is taken makes no new flow.
        if let Ok(socket) = UdpSocket::bind((any, FIRST_PORT + offset))
            && socket.send_to(b"flood", args.to).is_ok()
        {
            sent += 1;
        }
    }
    Ok(Flooded { sent })
}
