//! From the network to the TUN device: messages are opened where they were received, and written from there.

use std::{net::SocketAddr, net::UdpSocket, ops::Range, sync::Arc, time::Instant};

use super::{
    device::Device,
    drops::DropReason,
    merge::{Merger, Write},
    mmsg::Inbox,
    packet,
    peer::{self, Path, Peer},
    session::{Outcome, Receiving},
    transport::Admission,
    virtio::Kind,
};

/// The type of a data message, and bytes that name it and its receiver.
const DATA: u8 = 4;
const NAME: usize = 8;

/// What one thread receives.
pub(super) struct Intake {
    inbox: Inbox,
    work: Work,
}

/// What it takes to open and hand on messages.
struct Work {
    merger: Merger,
    /// Packets of one run, as places in the buffer.
    opened: Vec<Range<usize>>,
    /// For engines that cannot open in place, and for handshakes.
    scratch: Box<[u8]>,
}

/// Messages of one sender to one session, one after the other in a buffer; the last may be shorter than `segment`.
#[derive(Clone, Copy)]
struct Run {
    start: usize,
    end: usize,
    segment: usize,
    from: SocketAddr,
}

impl Intake {
    pub(super) fn new() -> Self {
        Self {
            inbox: Inbox::new(),
            work: Work {
                merger: Merger::default(),
                opened: Vec::new(),
                scratch: peer::buffer(),
            },
        }
    }

    /// Receives what there is and hands it on.
    pub(super) fn receive(&mut self, device: &Device, socket: &UdpSocket) -> std::io::Result<()> {
        self.inbox.receive(socket)?;
        let now = Instant::now();
        let (messages, buffer) = self.inbox.parts();
        for message in messages {
            if message.cut || message.range.is_empty() {
                device.counters.drop(DropReason::Malformed);
                continue;
            }
            let mut start = message.range.start;
            while start < message.range.end {
                let run = Run {
                    start,
                    end: run_end(buffer, start..message.range.end, message.segment),
                    segment: message.segment,
                    from: message.from,
                };
                self.work.run(device, run, buffer, now);
                start = run.end;
            }
        }
        self.work.deliver(device, buffer);
        Ok(())
    }
}

/// Where the messages end that go to the same session as the first.
fn run_end(buffer: &[u8], range: Range<usize>, segment: usize) -> usize {
    let first = (range.start + segment).min(range.end);
    if buffer[range.start] != DATA || first - range.start < NAME {
        return first;
    }
    let name = &buffer[range.start..range.start + NAME];
    let mut end = first;
    while end < range.end {
        let next = (end + segment).min(range.end);
        if next - end < NAME || buffer[end..end + NAME] != *name {
            break;
        }
        end = next;
    }
    end
}

impl Work {
    fn run(&mut self, device: &Device, run: Run, buffer: &mut [u8], now: Instant) {
        let count = (run.end - run.start).div_ceil(run.segment) as u64;
        let (identity, sockets) = {
            let state = device.read();
            let Some(key) = &state.key else {
                return device.counters.drop_many(DropReason::NoKey, count);
            };
            (Arc::clone(&key.identity), state.sockets.clone())
        };
        let first = &buffer[run.start..(run.start + run.segment).min(run.end)];
        self.opened.clear();
        let path = device.path(&sockets);
        let peer = match identity.admit(run.from, first, &mut self.scratch, now) {
            Admission::Session(index, session) => {
                let Some(peer) = device.read().indices.get(&index).cloned() else {
                    return device.counters.drop_many(DropReason::UnknownIndex, count);
                };
                self.open(&peer, &session, run, buffer, now, path);
                return self.accept(device, &peer, run.start, buffer);
            }
            Admission::Initiation(key) => {
                let peer = device.read().peers.get(&key).cloned();
                peer.ok_or(DropReason::UnknownPeer)
            }
            Admission::Index(index) => {
                let peer = device.read().indices.get(&index).cloned();
                peer.ok_or(DropReason::UnknownIndex)
            }
            Admission::Refused(reason) => Err(reason),
            Admission::Cookie(len) => {
                if let Some(sockets) = &sockets {
                    // Lost like any datagram: the other end asks again.
                    let _ = sockets.send(&self.scratch[..len], run.from);
                }
                Err(DropReason::UnderLoad)
            }
        };
        let peer = match peer {
            Ok(peer) => peer,
            Err(reason) => {
                if first[0] == DATA && reason == DropReason::UnknownIndex {
                    device.revive(run.from, now, path, &mut self.scratch);
                }
                return device.counters.drop_many(reason, count);
            }
        };
        let messages = &mut buffer[run.start..run.end];
        peer.receive(
            messages,
            run.segment,
            run.from,
            now,
            path,
            &mut self.scratch,
            &mut self.opened,
        );
        self.accept(device, &peer, run.start, buffer);
    }

    /// Opens messages with their session, without its peer; then the peer hears of it.
    fn open(
        &mut self,
        peer: &Peer,
        session: &Arc<Receiving>,
        run: Run,
        buffer: &mut [u8],
        now: Instant,
        path: Path<'_>,
    ) {
        let messages = &mut buffer[run.start..run.end];
        let outcome = session.open_all(messages, run.segment, now, &mut self.opened, |reason| {
            path.counters.drop(reason);
        });
        if outcome.bytes == 0 {
            return;
        }
        let Outcome { bytes, data } = outcome;
        if !peer.heard(session, bytes, data, run.from, now, path, &mut self.scratch) {
            path.counters
                .drop_many(DropReason::NoSession, self.opened.len() as u64);
            self.opened.clear();
        }
    }

    /// Keeps the packets whose source is the sender's (P3): the most specific owner over all peers of the device, not just
    /// the sender's own prefixes.
    fn accept(&mut self, device: &Device, sender: &Arc<Peer>, start: usize, buffer: &[u8]) {
        let (state, merging) = (device.read(), device.tun.merging());
        let mut last = None;
        for range in &self.opened {
            let range = start + range.start..start + range.end;
            let content = &buffer[range.clone()];
            let Some(len) = packet::whole(content) else {
                device.counters.drop(DropReason::InnerMalformed);
                continue;
            };
            let source = packet::source(content);
            let owned = source.is_some_and(|source| {
                last == Some(source)
                    || state
                        .owners
                        .owner(source)
                        .is_some_and(|owner| Arc::ptr_eq(owner, sender))
            });
            if !owned {
                device.counters.drop(DropReason::SourceNotOwned);
                continue;
            }
            last = source;
            self.merger.push(buffer, range.start..range.start + len, merging);
        }
    }

    /// Writes everything to the device.
    fn deliver(&mut self, device: &Device, buffer: &[u8]) {
        if self.merger.len() == 0 {
            return;
        }
        for write in self.merger.writes(buffer) {
            deliver_one(device, &write);
        }
        self.merger.clear();
    }
}

fn deliver_one(device: &Device, write: &Write<'_>) {
    match device.tun.write(write) {
        Ok(()) => device.counters.received(write.count as u64),
        // The stack does not take these together: each as it came.
        Err(error) if write.kind != Kind::Single && error.raw_os_error() == Some(libc::EINVAL) => {
            for packet in write.packets() {
                match device.tun.write_one(packet) {
                    Ok(()) => device.counters.received(1),
                    Err(_) => device.counters.drop(DropReason::DeviceDown),
                }
            }
        }
        // EIO while the link is down; the reader finds out whether the device is gone.
        Err(_) => device
            .counters
            .drop_many(DropReason::DeviceDown, write.count as u64),
    }
}
