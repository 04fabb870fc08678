//! Why the datapath refused.

use std::{io, path::PathBuf};

/// Why the datapath could not be opened or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The pin directory is not on a bpffs.
    #[error(
        "{0} is not on a bpffs: mount one (mount -t bpf bpf /sys/fs/bpf) or name another --bpffs directory"
    )]
    NotBpffs(PathBuf),
    /// A file or directory could not be used.
    #[error("{path}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel refused the programs or maps.
    #[error("cannot load the eBPF programs: {0}")]
    Load(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The kernel refused an operation.
    #[error("{operation} failed: {source}")]
    Kernel {
        /// What was tried, with its object.
        operation: String,
        /// Why.
        source: io::Error,
    },
    /// No such device (any more). Retryable only when it appears.
    #[error("device {0} does not exist")]
    NoDevice(u32),
    /// Packets of such a device cannot be parsed, so no program can judge them.
    #[error("device {ifindex} has link type {link_type}, which the programs cannot parse")]
    UnsupportedDevice {
        /// The device.
        ifindex: u32,
        /// ARPHRD number.
        link_type: u16,
    },
    /// A value lies outside what the maps can hold.
    #[error("{0}")]
    Invalid(String),
    /// A map holds as much as it can.
    #[error("map {map} is full ({limit} entries)")]
    Full {
        /// Name of the map.
        map: &'static str,
        /// Its limit.
        limit: u32,
    },
}
