//! Packets of the exchange: a socket on the link-local address of each device that has one, at a port that only root may have,
//! to and from the same port of the peer's.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::{Ipv6Addr, SocketAddr, SocketAddrV6},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{net::UdpSocket, sync::mpsc, task::JoinHandle, time::Instant};
use warren_agent_core::psk::{Allowance, message};
use warren_model::{PublicKey, link_address};

use super::PORT;
use crate::runner::Input;

/// Packets that may wait for the loop.
const MOST_WAITING: usize = 1024;
/// After so many packets in a row that were not let through, what comes is left to the socket's buffer for a while.
const FLOOD: u32 = 64;
const FLOOD_PAUSE: Duration = Duration::from_millis(20);
/// How often a flood is told of.
const TELL_AGAIN: Duration = Duration::from_secs(60);

/// A packet that came.
#[derive(Debug)]
pub(crate) struct Packet {
    pub(crate) slot: u8,
    pub(crate) from: Ipv6Addr,
    pub(crate) bytes: Vec<u8>,
    /// Counts as waiting until it is dropped.
    _waiting: Waiting,
}

#[derive(Debug)]
struct Waiting(Arc<AtomicUsize>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The sockets by slot.
#[derive(Default)]
pub(crate) struct Links {
    links: BTreeMap<u8, Link>,
    /// Slots whose socket could not be opened the last time, and why.
    failing: BTreeMap<u8, String>,
    waiting: Arc<AtomicUsize>,
    refused: Arc<AtomicU64>,
}

struct Link {
    ifindex: u32,
    address: Ipv6Addr,
    socket: Arc<UdpSocket>,
    reader: JoinHandle<()>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Links {
    /// Opens and closes sockets, so that these devices (slot, index, address) have one. What cannot be opened is tried again with the
    /// next call.
    pub(crate) fn sync(
        &mut self,
        wanted: impl IntoIterator<Item = (u8, u32, Ipv6Addr)>,
        inputs: &mpsc::UnboundedSender<Input>,
    ) {
        let wanted: BTreeMap<u8, (u32, Ipv6Addr)> = wanted
            .into_iter()
            .map(|(slot, ifindex, address)| (slot, (ifindex, address)))
            .collect();
        self.links
            .retain(|slot, link| wanted.get(slot) == Some(&(link.ifindex, link.address)));
        self.failing.retain(|slot, _| wanted.contains_key(slot));
        for (slot, (ifindex, address)) in wanted {
            if self.links.contains_key(&slot) {
                continue;
            }
            match self.open(slot, ifindex, address, inputs) {
                Ok(link) => {
                    self.failing.remove(&slot);
                    self.links.insert(slot, link);
                }
                Err(error) => {
                    let fault = fault(&error, address);
                    if self.failing.get(&slot) != Some(&fault) {
                        tracing::warn!(slot, "{fault}: trying again");
                        self.failing.insert(slot, fault);
                    }
                }
            }
        }
    }

    fn open(
        &self,
        slot: u8,
        ifindex: u32,
        address: Ipv6Addr,
        inputs: &mpsc::UnboundedSender<Input>,
    ) -> io::Result<Link> {
        // The scope of a link-local address binds the socket to its device.
        let socket = std::net::UdpSocket::bind(SocketAddrV6::new(address, PORT, 0, ifindex))?;
        socket.set_nonblocking(true)?;
        let socket = Arc::new(UdpSocket::from_std(socket)?);
        let reader = Reader {
            slot,
            socket: Arc::clone(&socket),
            inputs: inputs.clone(),
            waiting: Arc::clone(&self.waiting),
            refused: Arc::clone(&self.refused),
            allowances: HashMap::new(),
            told: None,
        };
        Ok(Link {
            ifindex,
            address,
            socket,
            reader: tokio::spawn(reader.run()),
        })
    }

    /// Sends a packet to a peer. One that cannot be sent is lost, as any may be.
    pub(crate) fn send(&self, slot: u8, peer: &PublicKey, bytes: &[u8]) {
        if let Some(link) = self.links.get(&slot) {
            let to = SocketAddrV6::new(link_address(peer), PORT, 0, link.ifindex);
            if let Err(error) = link.socket.try_send_to(bytes, to.into()) {
                tracing::debug!(slot, %to, %error, "a packet of an exchange is not sent");
            }
        }
    }

    /// Why there are devices without a socket: their peers wait for pre-shared keys in vain.
    pub(crate) fn problems(&self) -> impl Iterator<Item = &String> {
        self.failing.values()
    }

    /// Packets that were not let through, as their senders sent more than they may.
    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

fn fault(error: &io::Error, address: Ipv6Addr) -> String {
    let needs = match error.kind() {
        io::ErrorKind::PermissionDenied => "; the agent needs CAP_NET_BIND_SERVICE",
        _ => "",
    };
    format!("cannot agree on pre-shared keys, no socket at [{address}]:{PORT}: {error}{needs}")
}

struct Reader {
    slot: u8,
    socket: Arc<UdpSocket>,
    inputs: mpsc::UnboundedSender<Input>,
    waiting: Arc<AtomicUsize>,
    refused: Arc<AtomicU64>,
    /// By sender: WireGuard lets through only the addresses of peers.
    allowances: HashMap<Ipv6Addr, Allowance>,
    told: Option<Instant>,
}

impl Reader {
    async fn run(mut self) {
        let started = Instant::now();
        let mut buffer = vec![0; message::LONGEST + 1];
        let mut in_a_row = 0;
        loop {
            let (length, from) = match self.socket.recv_from(&mut buffer).await {
                Ok(received) => received,
                // Of a packet that was sent and not delivered.
                Err(error) => {
                    tracing::debug!(slot = self.slot, %error, "an exchange's socket");
                    tokio::time::sleep(FLOOD_PAUSE).await;
                    continue;
                }
            };
            let bytes = &buffer[..length];
            if self.admit(started.elapsed(), from, bytes) {
                in_a_row = 0;
                continue;
            }
            self.refused.fetch_add(1, Ordering::Relaxed);
            in_a_row += 1;
            if in_a_row >= FLOOD {
                in_a_row = 0;
                self.tell(from);
                tokio::time::sleep(FLOOD_PAUSE).await;
            }
        }
    }

    fn admit(&mut self, now: Duration, from: SocketAddr, bytes: &[u8]) -> bool {
        let SocketAddr::V6(from) = from else { return false };
        if from.port() != PORT || bytes.len() > message::LONGEST {
            return false;
        }
        let allowance = self.allowances.entry(*from.ip()).or_default();
        if !allowance.take(now) || self.waiting.load(Ordering::Relaxed) >= MOST_WAITING {
            return false;
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let packet = Packet {
            slot: self.slot,
            from: *from.ip(),
            bytes: bytes.to_vec(),
            _waiting: Waiting(Arc::clone(&self.waiting)),
        };
        let _ = self.inputs.send(Input::Exchange(packet));
        true
    }

    fn tell(&mut self, from: SocketAddr) {
        if self.told.is_none_or(|told| told.elapsed() >= TELL_AGAIN) {
            self.told = Some(Instant::now());
            tracing::warn!(
                slot = self.slot, %from,
                "a peer sends more than an exchange of pre-shared keys needs: the rest is dropped"
            );
        }
    }
}
