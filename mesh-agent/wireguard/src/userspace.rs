//! Driver for devices of a userspace engine: the configuration protocol over `<run-dir>/<device>.sock`.
//!
//! Works with the engine of this crate and, but for the requests to the engine itself, with any other that
//! speaks the protocol (taking a prefix away needs `allowed_ip=-PREFIX`).

use std::{collections::BTreeMap, io, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
};
use zeroize::Zeroizing;

use crate::{DeviceChange, DeviceError, DeviceState, WgDevice, engine::ENGINE_SOCKET, uapi};

/// Bytes of one request. A peer takes about 200, so some 300 peers.
const REQUEST_LIMIT: usize = 64 * 1024;

/// How long an answer may take. The engine answers in milliseconds; one that hangs is as good as absent.
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// Drives devices of a userspace engine through its sockets.
#[derive(Debug, Clone)]
pub struct Userspace {
    run_dir: PathBuf,
}

/// What an engine counts per device, by `stats NAME` on its control socket.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct EngineStats {
    /// Handshakes completed with all peers, in either role.
    pub handshakes: u64,
    /// Packets sealed and handed to the network.
    pub sent_packets: u64,
    /// Packets opened, checked and written to the device.
    pub received_packets: u64,
    /// Packets that were dropped, by reason (P9). The names are in [`crate::engine::DropReason`].
    pub drops: BTreeMap<String, u64>,
    /// What the kernel and the CPU do for the engine.
    #[serde(default)]
    pub offloads: Offloads,
}

/// What the kernel and the CPU do for a device of the engine, as it was found out when the device was attached to and its
/// sockets were opened. [`std::fmt::Display`] is one line for people.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offloads {
    /// Who speaks the protocol: `warren` or `boringtun`.
    pub engine: String,
    /// Messages that the cipher does at once: 1 is the usual one.
    pub cipher_lanes: u32,
    /// What the stack leaves to the engine, so that one read or write is many packets.
    pub tun: TunOffloads,
    /// One per address family; none as long as there is no port.
    pub sockets: Vec<SocketOffloads>,
}

/// Offloads of a TUN device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunOffloads {
    /// Checksums, which anything more needs.
    pub checksum: bool,
    /// TCP segmentation.
    pub tso: bool,
    /// UDP segmentation (Linux 6.2).
    pub uso: bool,
}

/// Offloads of a UDP socket.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketOffloads {
    /// `ipv4` or `ipv6`.
    pub family: String,
    /// The kernel cuts buffers into datagrams. For destinations where it refuses, single ones are sent all the same.
    pub gso: bool,
    /// The kernel puts datagrams together.
    pub gro: bool,
}

impl std::fmt::Display for Offloads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let on = |on: bool| if on { "on" } else { "off" };
        let TunOffloads { checksum, tso, uso } = self.tun;
        write!(f, "engine {}, cipher lanes {}", self.engine, self.cipher_lanes)?;
        write!(
            f,
            "; TUN checksum {}, TSO {}, USO {}",
            on(checksum),
            on(tso),
            on(uso)
        )?;
        for SocketOffloads { family, gso, gro } in &self.sockets {
            write!(f, "; UDP {family} GSO {}, GRO {}", on(*gso), on(*gro))?;
        }
        Ok(())
    }
}

/// What the engine's control socket answers.
#[derive(Deserialize)]
struct Answer {
    error: Option<String>,
    #[serde(default)]
    devices: Vec<String>,
    #[serde(flatten)]
    rest: serde_json::Value,
}

impl Userspace {
    /// Talks to the sockets in `run_dir` (`/run/wireguard` by default).
    pub fn new(run_dir: impl Into<PathBuf>) -> Self {
        Self {
            run_dir: run_dir.into(),
        }
    }

    /// Whether an engine answers.
    pub async fn ping(&self) -> Result<(), DeviceError> {
        self.control("ping", "").await.map(drop)
    }

    /// The devices that the engine serves, sorted.
    pub async fn devices(&self) -> Result<Vec<String>, DeviceError> {
        Ok(self.control("list", "").await?.devices)
    }

    /// Has the engine serve a device, which it creates when absent. No error where it serves it already.
    pub async fn attach(&self, device: &str) -> Result<(), DeviceError> {
        self.control("attach", device).await.map(drop)
    }

    /// Has the engine let go of a device: peers and keys are forgotten, the TUN device stays.
    /// No error where it does not serve it.
    pub async fn detach(&self, device: &str) -> Result<(), DeviceError> {
        self.control("detach", device).await.map(drop)
    }

    /// Starts a new handshake with every peer that has an endpoint, as the timers do every two minutes.
    pub async fn rekey(&self, device: &str) -> Result<(), DeviceError> {
        self.control("rekey", device).await.map(drop)
    }

    /// What the engine counted for a device since it attached to it.
    pub async fn stats(&self, device: &str) -> Result<EngineStats, DeviceError> {
        let answer = self.control("stats", device).await?;
        serde_json::from_value(answer.rest)
            .map_err(|error| io_error(device, io::ErrorKind::InvalidData, error))
    }

    async fn control(&self, verb: &str, device: &str) -> Result<Answer, DeviceError> {
        let request = Zeroizing::new(format!("{verb} {device}\n"));
        let subject = if device.is_empty() { ENGINE_SOCKET } else { device };
        let mut stream = self.connect(ENGINE_SOCKET, subject).await?;
        let line = timely(subject, async {
            stream.write_all(request.as_bytes()).await?;
            let mut line = String::new();
            BufReader::new(&mut stream).read_line(&mut line).await?;
            Ok(line)
        })
        .await?;
        let answer: Answer = serde_json::from_str(&line)
            .map_err(|error| io_error(subject, io::ErrorKind::InvalidData, error))?;
        match answer.error {
            Some(reason) => Err(DeviceError::Refused {
                device: subject.into(),
                reason,
            }),
            None => Ok(answer),
        }
    }

    async fn connect(&self, socket: &str, device: &str) -> Result<UnixStream, DeviceError> {
        UnixStream::connect(self.run_dir.join(socket))
            .await
            .map_err(|source| match source.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    DeviceError::Absent(device.into())
                }
                _ => DeviceError::Io {
                    device: device.into(),
                    source,
                },
            })
    }

    /// Sends one request and reads the answer up to its `errno` line.
    async fn request(&self, device: &str, request: &str) -> Result<Zeroizing<String>, DeviceError> {
        let stream = self.connect(&format!("{device}.sock"), device).await?;
        timely(device, exchange(stream, request)).await
    }
}

async fn timely<T>(device: &str, work: impl Future<Output = io::Result<T>>) -> Result<T, DeviceError> {
    let result = tokio::time::timeout(ANSWER_TIME, work).await;
    let result = result.unwrap_or_else(|_| {
        Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the engine does not answer",
        ))
    });
    result.map_err(|source| match source.kind() {
        // The engine let go of the device, or ended, while it was asked.
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            DeviceError::Absent(device.into())
        }
        _ => DeviceError::Io {
            device: device.into(),
            source,
        },
    })
}

/// The lines of the answer without its `errno=0`; the `errno` otherwise. The answer holds private keys: no copy of it is
/// left behind in a buffer.
async fn exchange(mut stream: UnixStream, request: &str) -> io::Result<Zeroizing<String>> {
    stream.write_all(request.as_bytes()).await?;
    let mut bytes = Zeroizing::new(Vec::with_capacity(REQUEST_LIMIT));
    let mut chunk = Zeroizing::new(vec![0; 8192]);
    let mut searched = 0;
    loop {
        let length = stream.read(&mut chunk).await?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        append(&mut bytes, &chunk[..length]);
        let Some((end, number)) = errno(&bytes, searched) else {
            searched = bytes.len().saturating_sub(ERRNO_LINE);
            continue;
        };
        return match number? {
            0 => {
                bytes.truncate(end);
                // Moves the bytes, without a copy.
                match String::from_utf8(std::mem::take(&mut *bytes)) {
                    Ok(text) => Ok(Zeroizing::new(text)),
                    Err(error) => {
                        drop(Zeroizing::new(error.into_bytes()));
                        Err(io::ErrorKind::InvalidData.into())
                    }
                }
            }
            // Engines differ in the sign.
            number => Err(io::Error::from_raw_os_error(number.saturating_abs())),
        };
    }
}

/// Bytes of the longest `errno` line, with the end of the line before it.
const ERRNO_LINE: usize = 32;

/// Grown by hand, so that no copy of a key is left behind when the bytes move.
fn append(bytes: &mut Zeroizing<Vec<u8>>, more: &[u8]) {
    if bytes.capacity() - bytes.len() < more.len() {
        let mut larger = Zeroizing::new(Vec::with_capacity((bytes.capacity() + more.len()) * 2));
        larger.extend_from_slice(bytes);
        *bytes = larger;
    }
    bytes.extend_from_slice(more);
}

/// Where the `errno` line begins, once it is complete, and its number. Everything before `from` was searched already.
fn errno(bytes: &[u8], from: usize) -> Option<(usize, io::Result<i32>)> {
    const WORD: &[u8] = b"errno=";
    let begins = |at: &usize| (*at == 0 || bytes[at - 1] == b'\n') && bytes[*at..].starts_with(WORD);
    let start = (from..bytes.len()).find(begins)?;
    let value = &bytes[start + WORD.len()..];
    let value = &value[..value.iter().position(|byte| *byte == b'\n')?];
    let number = std::str::from_utf8(value)
        .ok()
        .and_then(|text| text.trim().parse().ok());
    Some((start, number.ok_or(io::ErrorKind::InvalidData.into())))
}

fn io_error(
    device: &str,
    kind: io::ErrorKind,
    error: impl std::error::Error + Send + Sync + 'static,
) -> DeviceError {
    DeviceError::Io {
        device: device.into(),
        source: io::Error::new(kind, error),
    }
}

impl WgDevice for Userspace {
    async fn dump(&self, device: &str) -> Result<DeviceState, DeviceError> {
        let text = self.request(device, "get=1\n\n").await?;
        uapi::parse_view(&text).map_err(|error| io_error(device, io::ErrorKind::InvalidData, error))
    }

    async fn apply(&self, device: &str, changes: &[DeviceChange]) -> Result<(), DeviceError> {
        for request in uapi::format_changes(changes, REQUEST_LIMIT) {
            self.request(device, &request)
                .await
                .map_err(|error| refused(device, error))?;
        }
        Ok(())
    }
}

/// Turns an `errno` of an answer to `set=1` into what it means.
fn refused(device: &str, error: DeviceError) -> DeviceError {
    match error {
        DeviceError::Io { source, .. } if source.raw_os_error().is_some() => {
            let reason = match source.raw_os_error() {
                Some(libc::EADDRINUSE) => "the UDP port is in use by another program; choose another".into(),
                Some(libc::EINVAL) => "the engine did not understand the request".into(),
                _ => source.to_string(),
            };
            DeviceError::Refused {
                device: device.into(),
                reason,
            }
        }
        error => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn answered(parts: &'static [&'static str]) -> io::Result<Zeroizing<String>> {
        let (ours, mut theirs) = UnixStream::pair()?;
        let server = tokio::spawn(async move {
            let _ = theirs.read(&mut [0; 64]).await;
            for part in parts {
                // Nobody may be listening any more: what follows the number is not waited for.
                let _ = theirs.write_all(part.as_bytes()).await;
                tokio::task::yield_now().await;
            }
        });
        let answer = exchange(ours, "get=1\n\n").await;
        server.await.map_err(io::Error::other)?;
        answer
    }

    #[tokio::test]
    async fn answers_are_read_in_any_pieces() {
        for parts in [
            &["listen_port=1\nerrno=0\n\n"][..],
            &["listen_port=1\ner", "rno", "=0", "\n", "\n"],
            &["listen_port=1", "\nerrno=0\n"],
        ] {
            assert_eq!(answered(parts).await.unwrap().as_str(), "listen_port=1\n");
        }
        assert_eq!(answered(&["errno=0\n\n"]).await.unwrap().as_str(), "");
        for number in [&["errno=-22\n\n"][..], &["a=1\nerrno=22\n\n"]] {
            let error = answered(number).await.unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        }
        let error = answered(&["x_errno=1\nerrno=many\n\n"]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        let error = answered(&["listen_port=1\n"]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn what_is_appended_stays_in_order() {
        let mut bytes = Zeroizing::new(Vec::with_capacity(4));
        for number in 0..100_u8 {
            append(&mut bytes, &[number; 3]);
        }
        assert!(
            bytes
                .iter()
                .zip(0..)
                .all(|(byte, at)| usize::from(*byte) == at / 3)
        );
    }
}
