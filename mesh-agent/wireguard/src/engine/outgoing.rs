//! From the TUN device to the network: packets are copied to where they are sealed and sent from.
//!
//! Packets for one peer that follow each other lie one after the other, each with room for the message around it. What has
//! one size becomes one buffer that the kernel cuts into datagrams. Everything goes out when nothing more is to be read,
//! or when there is no room for more.

use std::{ops::Range, sync::Arc, time::Instant};

use super::{
    device::Device,
    drops::DropReason,
    loops,
    mmsg::{MOST_BYTES, MOST_SEGMENTS, Outgoing},
    packet,
    peer::{self, Peer},
    split::Split,
    transport::{DATA_HEADER, OVERHEAD},
    udp::Refusals,
    virtio::Virtio,
};

/// Bytes that are collected: a few reads of 64 KiB. At least one message of the largest size fits.
const ARENA: usize = 4 * 65_536;

const _: () = assert!(ARENA >= peer::BUFFER);

/// Packets that are collected: more would wait too long for those that follow.
const PACKETS: usize = 512;

/// Buffers that are collected: as many as one system call sends.
const RUNS: usize = 16;

/// What one thread collects.
pub(super) struct Outbox {
    arena: Box<[u8]>,
    used: usize,
    packets: usize,
    runs: Vec<Run>,
    /// For engines that cannot seal in place, and for handshakes.
    scratch: Box<[u8]>,
    refusals: Refusals,
}

/// Messages to one peer, one after the other, of one size but for the last.
struct Run {
    peer: Arc<Peer>,
    range: Range<usize>,
    segment: usize,
    count: usize,
    /// The last message is of full size, and another may follow.
    open: bool,
}

impl Run {
    /// Whether a message of `size` bytes for this peer can follow.
    fn takes(&self, peer: &Arc<Peer>, size: usize) -> bool {
        self.open
            && self.count < MOST_SEGMENTS
            && size <= self.segment
            && self.range.len() + size <= MOST_BYTES
            && Arc::ptr_eq(&self.peer, peer)
    }
}

impl Outbox {
    pub(super) fn new() -> Self {
        Self {
            arena: vec![0; ARENA].into_boxed_slice(),
            used: 0,
            packets: 0,
            runs: Vec::with_capacity(RUNS),
            scratch: peer::buffer(),
            refusals: Refusals::default(),
        }
    }

    /// Takes what was read from the device.
    pub(super) fn take(&mut self, device: &Device, header: Virtio, bytes: &mut [u8]) {
        let Some(destination) = packet::destination(bytes) else {
            return device.counters.drop(DropReason::NotIp);
        };
        let owner = device.read().owners.owner(destination).map(Arc::clone);
        let Ok(split) = Split::new(header, bytes) else {
            return device.counters.drop(DropReason::OffloadMalformed);
        };
        let Some(peer) = owner else {
            return device
                .counters
                .drop_many(DropReason::NoPeer, split.count() as u64);
        };
        if let Some(to) = loops::own(split.first())
            && let Some(by) = peer.endpoint()
            && loops::closes_a_circle(to, (by.ip(), by.port()), Instant::now())
        {
            return device
                .counters
                .drop_many(DropReason::RoutingLoop, split.count() as u64);
        }
        let mtu = device.mtu();
        for number in 0..split.count() {
            let len = split.len(number);
            let padded = packet::padded(len, mtu);
            if !self.fits(&peer, padded + OVERHEAD) {
                self.flush(device);
            }
            let slot = self.slot(&peer, padded + OVERHEAD);
            let content = &mut slot[DATA_HEADER..DATA_HEADER + padded];
            split.write(number, &mut content[..len]);
            content[len..].fill(0);
        }
    }

    fn fits(&self, peer: &Arc<Peer>, size: usize) -> bool {
        self.packets < PACKETS
            && self.used + size <= self.arena.len()
            && (self.runs.len() < RUNS || self.runs.last().is_some_and(|run| run.takes(peer, size)))
    }

    /// Room for a message; there must be some.
    fn slot(&mut self, peer: &Arc<Peer>, size: usize) -> &mut [u8] {
        let range = self.used..self.used + size;
        self.used = range.end;
        self.packets += 1;
        match self.runs.last_mut() {
            Some(run) if run.takes(peer, size) => {
                run.range.end = range.end;
                run.count += 1;
                run.open = size == run.segment;
            }
            _ => self.runs.push(Run {
                peer: Arc::clone(peer),
                range: range.clone(),
                segment: size,
                count: 1,
                open: true,
            }),
        }
        &mut self.arena[range]
    }

    /// Seals and sends everything.
    pub(super) fn flush(&mut self, device: &Device) {
        if self.runs.is_empty() {
            return;
        }
        let sockets = device.read().sockets.clone();
        let (path, now) = (device.path(&sockets), Instant::now());
        let mut endpoints = [None; RUNS];
        for (run, endpoint) in self.runs.iter().zip(&mut endpoints) {
            let messages = &mut self.arena[run.range.clone()];
            *endpoint = run.peer.seal(messages, run.segment, now, path, &mut self.scratch);
        }
        if let Some(sockets) = &sockets {
            let ready = self
                .runs
                .iter()
                .zip(&endpoints)
                .filter_map(|(run, endpoint)| Some((run, (*endpoint)?)));
            let empty = Outgoing {
                bytes: &[],
                segment: 1,
                to: (std::net::Ipv4Addr::UNSPECIFIED, 0).into(),
            };
            let (mut messages, mut owners, mut count) = ([empty; RUNS], [None; RUNS], 0);
            for (run, to) in ready {
                messages[count] = Outgoing {
                    bytes: &self.arena[run.range.clone()],
                    segment: run.segment,
                    to,
                };
                owners[count] = Some(run);
                count += 1;
            }
            sockets.send_all(
                &messages[..count],
                now,
                &mut self.refusals,
                |place, sent, bytes| {
                    let Some(run) = owners[place] else { return };
                    run.peer.count_sent(bytes);
                    device.counters.sent(sent as u64);
                    device
                        .counters
                        .drop_many(DropReason::SendFailed, (run.count - sent) as u64);
                },
            );
        }
        self.runs.clear();
        self.used = 0;
        self.packets = 0;
    }
}
