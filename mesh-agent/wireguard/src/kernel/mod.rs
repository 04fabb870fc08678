//! Driver for the kernel's WireGuard: the generic netlink family `wireguard` (Linux, include/uapi/linux/wireguard.h).

mod message;
mod socket;

use std::{io, sync::Arc};

use genetlink::{GenetlinkError, GenetlinkHandle};
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP};
use netlink_packet_wireguard::{WireguardAttribute, WireguardCmd, WireguardMessage};
use tokio::sync::Mutex;
use warren_model::PublicKey;

use self::{
    message::{Attributes, Step, plan},
    socket::Socket,
};
use crate::{DeviceChange, DeviceError, DeviceState, WgDevice};

/// Drives WireGuard devices of the kernel. The devices themselves (`ip link add type wireguard`) are made by
/// whoever owns links.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// Asks for the family's number, nothing else.
    handle: GenetlinkHandle,
    socket: Arc<Mutex<Socket>>,
    /// Whether the kernel takes a single prefix away on request (`WGALLOWEDIP_F_REMOVE_ME`).
    removes_prefixes: bool,
    _connection: Arc<Connection>,
}

/// The task that moves netlink messages; ends with the last driver.
#[derive(Debug)]
struct Connection(tokio::task::JoinHandle<()>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Kernel {
    /// Opens netlink sockets in the calling thread's network namespace. Must run within a tokio runtime.
    pub fn connect() -> io::Result<Self> {
        let (connection, handle, _) = genetlink::new_connection()?;
        let connection = Arc::new(Connection(tokio::spawn(connection)));
        let release = nix::sys::utsname::uname()?
            .release()
            .to_string_lossy()
            .into_owned();
        Ok(Self {
            handle,
            socket: Arc::new(Mutex::new(Socket::open()?)),
            removes_prefixes: removes_prefixes(&release),
            _connection: connection,
        })
    }

    /// Sends one request and collects what it is answered with.
    async fn exchange(
        &self,
        device: &str,
        flags: u16,
        command: WireguardCmd,
        attributes: Attributes,
    ) -> Result<Vec<WireguardAttribute>, DeviceError> {
        let family = self.handle.resolve_family::<WireguardMessage>().await;
        let family = family.map_err(|error| family_error(device, error))?;
        let answer = self
            .socket
            .lock()
            .await
            .exchange(family.id, flags, command, attributes)
            .await;
        answer.map_err(|error| kernel_error(device, error))
    }

    async fn set(&self, device: &str, attributes: Attributes) -> Result<(), DeviceError> {
        self.exchange(device, NLM_F_ACK, WireguardCmd::SetDevice, attributes)
            .await
            .map(drop)
    }
}

impl WgDevice for Kernel {
    async fn dump(&self, device: &str) -> Result<DeviceState, DeviceError> {
        let name = Attributes(vec![WireguardAttribute::IfName(device.into())]);
        let attributes = self
            .exchange(device, NLM_F_DUMP, WireguardCmd::GetDevice, name)
            .await?;
        message::state(attributes.into_iter())
            .map_err(|reason| io_error(device, io::Error::new(io::ErrorKind::InvalidData, reason)))
    }

    async fn apply(&self, device: &str, changes: &[DeviceChange]) -> Result<(), DeviceError> {
        let steps = plan(device, changes, self.removes_prefixes);
        crate::wipe_stack();
        for step in steps {
            match step {
                Step::Set(attributes) => self.set(device, attributes).await?,
                Step::TakeAway { public_key, prefix } => {
                    // Moving a prefix takes it from whoever has it: look first.
                    let state = self.dump(device).await?;
                    let owner = state.peers.iter().find(|peer| peer.allowed_ips.contains(&prefix));
                    if owner.is_some_and(|owner| owner.public_key == public_key) {
                        self.set(device, message::discard(device, random_key(device)?, prefix))
                            .await?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Whether this kernel has WireGuard, loaded or loadable. Changes nothing: it asks for the generic netlink family,
/// which makes the kernel load the module of that name.
pub async fn kernel_available() -> bool {
    let Ok(kernel) = Kernel::connect() else {
        return false;
    };
    kernel.handle.resolve_family::<WireguardMessage>().await.is_ok()
}

/// Linux 6.16 was the first with `WGALLOWEDIP_F_REMOVE_ME`. Older ones refuse the whole message.
fn removes_prefixes(release: &str) -> bool {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|part| part.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (6, 16)
}

/// A key that nobody has the private part of: for a peer that lives for one message.
fn random_key(device: &str) -> Result<PublicKey, DeviceError> {
    let mut bytes = [0; 32];
    let read = std::fs::File::open("/dev/urandom")
        .and_then(|mut file| io::Read::read_exact(&mut file, &mut bytes))
        .map_err(|source| io_error(device, source));
    read.and_then(|()| {
        PublicKey::from_bytes(bytes)
            .map_err(|error| io_error(device, io::Error::new(io::ErrorKind::InvalidData, error)))
    })
}

fn io_error(device: &str, source: io::Error) -> DeviceError {
    DeviceError::Io {
        device: device.into(),
        source,
    }
}

fn family_error(device: &str, error: GenetlinkError) -> DeviceError {
    match error {
        GenetlinkError::NetlinkError(error) if error.raw_os_error() == Some(libc::ENOENT) => {
            DeviceError::Refused {
                device: device.into(),
                reason: "this kernel has no WireGuard; use the userspace engine".into(),
            }
        }
        GenetlinkError::NetlinkError(error) => io_error(device, error),
        error => io_error(device, io::Error::other(error.to_string())),
    }
}

fn kernel_error(device: &str, error: io::Error) -> DeviceError {
    let refused = |reason: &str| DeviceError::Refused {
        device: device.into(),
        reason: reason.into(),
    };
    match error.raw_os_error() {
        Some(libc::ENODEV) => DeviceError::Absent(device.into()),
        Some(libc::EOPNOTSUPP) => refused("it is not a WireGuard device"),
        Some(libc::EADDRINUSE) => refused("the UDP port is in use by another program; choose another"),
        Some(libc::EPERM) => refused("not permitted: CAP_NET_ADMIN is needed"),
        _ => refused(&error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_that_take_single_prefixes_away() {
        for (release, expected) in [
            ("6.16.0", true),
            ("6.18.44-fc", true),
            ("7.0-rc1", true),
            ("6.15.9", false),
            ("6.1.0-18-cloud-amd64", false),
            ("5.19", false),
            ("", false),
        ] {
            assert_eq!(removes_prefixes(release), expected, "{release}");
        }
    }
}
