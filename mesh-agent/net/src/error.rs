//! What can go wrong.

use std::{io, path::PathBuf};

/// Why an operation on the node's network failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The netlink socket cannot be opened.
    #[error("cannot open a route netlink socket: {0}")]
    Open(#[source] io::Error),
    /// The kernel refused a request. Retryable unless it says that the operation is not supported.
    #[error("cannot {what}: {source}")]
    Kernel {
        /// What was asked, with its subject.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The netlink connection is broken or spoke nonsense: open [`crate::Net`] again.
    #[error("cannot {what}: netlink failed: {detail}")]
    Netlink {
        /// What was asked, with its subject.
        what: String,
        /// What happened.
        detail: String,
    },
    /// There is no such device (any more).
    #[error("there is no network device with index {0}")]
    NoSuchLink(u32),
    /// A device has the name we need but is something else.
    #[error("the device {name} is of kind {found}, not {wanted}: remove it or give it another name")]
    WrongKind {
        /// Name of the device.
        name: String,
        /// What it is.
        found: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// A name that cannot be a device's.
    #[error("{0:?} cannot be the name of a network device: 1 to 15 bytes without slash, colon or space")]
    BadName(String),
    /// A TUN device cannot be made.
    #[error("cannot make the TUN device {name}: {what}: {source}")]
    Tun {
        /// Name of the device.
        name: String,
        /// Which step.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A kernel setting cannot be read or written.
    #[error("cannot access the kernel setting {path}: {source}")]
    Sysctl {
        /// Path below `/proc/sys`.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A tool cannot be started.
    #[error("cannot run {tool}: {source}: install it")]
    NoTool {
        /// Name of the tool.
        tool: String,
        /// Why.
        source: io::Error,
    },
    /// A tool reported failure.
    #[error("{tool} failed: {message}")]
    Tool {
        /// Name and arguments of the tool.
        tool: String,
        /// What it wrote, on one line.
        message: String,
    },
    /// A network namespace cannot be entered.
    #[error("cannot enter the network namespace {path}: {source}")]
    Namespace {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn netlink(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Self {
        let what = what.into();
        move |error| match error {
            rtnetlink::Error::NetlinkError(message) => Self::Kernel {
                what,
                source: message.to_io(),
            },
            other => Self::Netlink {
                what,
                detail: other.to_string(),
            },
        }
    }

    /// The kernel's error number, where the kernel refused.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Kernel { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}
