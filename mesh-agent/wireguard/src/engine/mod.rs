//! The userspace WireGuard engine: one process that serves several TUN devices.
//!
//! The engine may not know the directory, routes, eBPF or the agent. It holds no state on disk: whoever
//! configures it (the agent, `wg`) does so again after a restart. It attaches to *persistent* TUN devices
//! that somebody else created with [`TUN_FLAGS`], and creates a device that is absent. When the process dies
//! the devices stay, and packets die in them: nothing leaves in clear.
//!
//! Packets move in bulk: a read from the TUN device is up to 64 KiB of one flow, which is cut, sealed where it will be sent
//! from, and sent in buffers that the kernel cuts into datagrams; what arrives is opened where it was received, put
//! together per flow, and written from there. Every offload is asked for and done without where the kernel refuses it.
//!
//! Threads: per device one that reads the TUN device and one per UDP socket (IPv4, IPv6), each running a packet
//! to completion; one for timers; one that accepts per UNIX socket, and one per connection to it; one for signals;
//! the main one attaches and lets go of devices. A panic in any of them ends the process, so that whoever supervises
//! it starts it anew.
//!
//! The protocol is spoken by one of two implementations behind one trait (`transport`): our own (`noise`, `cookie`,
//! `machine`: handshakes and timers without IO; `session`: two halves that seal and open in place, each used by its own
//! thread; `lanes`: a cipher for many messages at once), or boringtun's `Tunn`.
//!
//! Locks, in this order: the engine's devices, a device's configuration, a device's state (held for a lookup), a
//! peer (held while counters are taken and the peer hears of messages; with boringtun while it seals and opens), the table of
//! session indices. Taken per buffer of packets, not per packet. Order is kept: one thread sends what the device hands over,
//! and what waited for a handshake goes out under the peer's lock before it.

mod checksum;
mod configure;
mod control;
mod cookie;
mod device;
mod drops;
#[cfg(test)]
mod fuzz;
mod image;
mod incoming;
#[cfg(target_arch = "x86_64")]
mod lanes;
#[cfg(not(target_arch = "x86_64"))]
#[path = "lanes_none.rs"]
mod lanes;
mod loops;
mod machine;
mod merge;
mod mmsg;
mod noise;
mod outgoing;
mod own;
mod packet;
mod passing;
mod peer;
mod readers;
mod session;
mod split;
mod stamp_clock;
mod supervisor;
mod table;
#[cfg(test)]
mod testing;
mod transport;
mod tun;
mod tunn;
mod udp;
mod virtio;
mod window;

use std::path::PathBuf;

pub use self::{drops::DropReason, supervisor::run};

/// Seals messages with `bytes` bytes of content in memory for about that long: what the ciphers alone could do on one CPU.
/// The name of each (`usual` for one message after the other, `avx512`, `avx2`), how many, and how long it took.
pub fn sealing_alone(
    bytes: usize,
    time: std::time::Duration,
) -> Vec<(&'static str, u64, std::time::Duration)> {
    session::sealing_alone(bytes, time)
}

/// The flags of a TUN device for its creator: `IFF_TUN | IFF_NO_PI`, one queue (no `IFF_MULTI_QUEUE`).
///
/// The engine adds the virtio header (`IFF_VNET_HDR`) and offloads when it attaches, where the kernel has them. The creator opens `/dev/net/tun`, calls
/// `TUNSETIFF` with these flags, then `TUNSETPERSIST` 1, and closes its descriptor: while it is open the engine
/// gets `EBUSY`. Source: Documentation/networking/tuntap.rst.
pub const TUN_FLAGS: libc::c_int = libc::IFF_TUN | libc::IFF_NO_PI;

/// The devices that an engine attaches to on its own when they exist.
pub const DEFAULT_DEVICES: [&str; 4] = ["warren0", "warren1", "warren2", "warren3"];

/// The name of the engine's own control socket in its run directory. (`wg` takes every `*.sock` for a device.)
///
/// One request per line, one JSON object per line back, `{"error": "..."}` when refused:
/// `ping` | `list` | `attach NAME` | `detach NAME` | `stats NAME` | `rekey NAME`.
pub const ENGINE_SOCKET: &str = "warren-engine.control";

/// Who speaks the WireGuard protocol.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Implementation {
    /// This project's own: sessions that two threads use at once, in place.
    #[default]
    Warren,
    /// `boringtun::noise::Tunn`.
    Boringtun,
}

impl std::fmt::Display for Implementation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Warren => f.write_str("warren"),
            Self::Boringtun => f.write_str("boringtun"),
        }
    }
}

impl std::str::FromStr for Implementation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "warren" => Ok(Self::Warren),
            "boringtun" => Ok(Self::Boringtun),
            _ => Err(format!("unknown engine {text:?}; there are warren and boringtun")),
        }
    }
}

/// How the engine is run.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Where the sockets are: `<device>.sock` (configuration protocol, for `wg`) and [`ENGINE_SOCKET`].
    /// `/run/wireguard` for `wg` to find them.
    pub run_dir: PathBuf,
    /// Devices to attach to as soon as they exist; others by the control request `attach NAME`.
    pub devices: Vec<String>,
    /// Who speaks the protocol.
    pub implementation: Implementation,
    /// Whether an engine that has handed over to a successor stays until it is told to end. For supervisors that would
    /// start it again, which would take everything back.
    pub linger: bool,
    /// Keeps, over restarts and boots, what the timestamps of handshakes have reached: they must not go back, or peers refuse
    /// them. None: a process that starts with a clock that was set back waits for its peers to begin.
    pub clock_file: Option<PathBuf>,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            run_dir: "/run/wireguard".into(),
            devices: DEFAULT_DEVICES.map(String::from).to_vec(),
            implementation: Implementation::default(),
            linger: false,
            clock_file: None,
        }
    }
}

/// Why an engine could not start.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The run directory or a socket in it could not be made.
    #[error("{path}: {source}")]
    Path {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Another engine serves the run directory and does not let a successor take over. It goes on.
    #[error("another tunnel engine serves {run_dir} and does not hand over ({reason}); stop it first")]
    NotHandedOver {
        /// The run directory.
        run_dir: PathBuf,
        /// What it said.
        reason: String,
    },
    /// Another engine holds the run directory, and does not answer.
    #[error("another tunnel engine serves {0}; stop it first")]
    AlreadyRunning(PathBuf),
    /// A thread could not be started, or signals not be blocked.
    #[error("the engine cannot start: {0}")]
    Start(std::io::Error),
}
