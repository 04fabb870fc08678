//! From the network to the TUN device: messages are opened where they were received, and written from there.

use std::{net::SocketAddr, net::UdpSocket, ops::Range, sync::Arc, time::Instant};

use super::{
    device::Device,
    drops::DropReason,
    merge::{Merger, Write},
    mmsg::{Inbox, Incoming},
    packet,
    peer::{self, Path, Peer},
    session::{Outcome, Receiving},
    transport::{Admission, Layout},
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

/// Messages of one sender to one session.
#[derive(Clone, Copy)]
struct Run {
    start: usize,
    end: usize,
    layout: Layout,
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
        let mut rest = messages;
        while let [message, behind @ ..] = rest {
            rest = behind;
            if message.cut || message.range.is_empty() {
                device.counters.drop(DropReason::Malformed);
                continue;
            }
            if message.range.len() <= message.segment {
                let (run, followers) = singles(buffer, message, rest);
                self.work.run(device, run, buffer, now);
                rest = &rest[followers..];
                continue;
            }
            let mut start = message.range.start;
            while start < message.range.end {
                let run = Run {
                    start,
                    end: run_end(buffer, start..message.range.end, message.segment),
                    layout: Layout::packed(message.segment),
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
    let Some(name) = name(&buffer[range.start..first]) else {
        return first;
    };
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

/// What names a data message's session.
fn name(message: &[u8]) -> Option<&[u8]> {
    message.get(..NAME).filter(|name| name[0] == DATA)
}

/// A datagram that came alone, and how many of those behind it are of one run with it: where the kernel puts none together,
/// those of one sender and session follow each other all the same.
fn singles(buffer: &[u8], first: &Incoming, behind: &[Incoming]) -> (Run, usize) {
    let mut run = Run {
        start: first.range.start,
        end: first.range.end,
        layout: Layout::packed(first.range.len()),
        from: first.from,
    };
    let Some(name) = name(&buffer[first.range.clone()]) else {
        return (run, 0);
    };
    let mut followers = 0;
    for next in behind {
        // As far from the one before as the second is from the first.
        let before = run.start + followers * run.layout.pitch;
        let pitch = next.range.start.saturating_sub(before);
        let follows = !next.cut
            && next.from == run.from
            && next.range.len() <= next.segment.min(run.layout.segment)
            && pitch >= run.layout.segment
            && (followers == 0 || pitch == run.layout.pitch)
            && buffer[next.range.clone()].get(..NAME) == Some(name);
        if !follows {
            break;
        }
        let last = next.range.len() < run.layout.segment;
        run.layout.pitch = pitch;
        run.end = next.range.end;
        followers += 1;
        if last {
            break;
        }
    }
    (run, followers)
}

impl Work {
    fn run(&mut self, device: &Device, run: Run, buffer: &mut [u8], now: Instant) {
        let count = run.layout.count(run.end - run.start) as u64;
        let (identity, sockets) = {
            let state = device.read();
            let Some(key) = &state.key else {
                return device.counters.drop_many(DropReason::NoKey, count);
            };
            (Arc::clone(&key.identity), state.sockets.clone())
        };
        let first = &buffer[run.start..(run.start + run.layout.segment).min(run.end)];
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
            run.layout,
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
        let outcome = session.open_all(messages, run.layout, now, &mut self.opened, |reason| {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Messages of these sizes with these sessions, each `pitch` bytes behind the one before.
    fn received(pitch: usize, messages: &[(u32, usize)]) -> (Vec<u8>, Vec<Incoming>) {
        let mut buffer = vec![0; pitch * messages.len()];
        let list = messages.iter().enumerate().map(|(number, (session, len))| {
            let start = number * pitch;
            buffer[start] = DATA;
            buffer[start + 4..start + 8].copy_from_slice(&session.to_le_bytes());
            Incoming {
                range: start..start + len,
                segment: *len,
                from: ([192, 0, 2, 1], 9).into(),
                cut: false,
            }
        });
        let list = list.collect();
        (buffer, list)
    }

    /// How many messages follow the first, and the run's pitch.
    fn followers(buffer: &[u8], messages: &[Incoming]) -> (usize, usize) {
        let (run, followers) = singles(buffer, &messages[0], &messages[1..]);
        assert_eq!(run.layout.count(run.end - run.start), 1 + followers);
        (followers, run.layout.pitch)
    }

    #[test]
    fn datagrams_of_one_session_follow_each_other() {
        let (buffer, mut messages) = received(100, &[(7, 80), (7, 80), (7, 80), (7, 60), (7, 80)]);
        assert_eq!(
            followers(&buffer, &messages),
            (3, 100),
            "a shorter one is the last"
        );
        assert_eq!(
            followers(&buffer, &messages[3..]),
            (0, 60),
            "a longer one is of the next run"
        );
        messages[2].from = ([192, 0, 2, 2], 9).into();
        assert_eq!(followers(&buffer, &messages), (1, 100), "another sender");
        messages.remove(1);
        messages[1].from = messages[0].from;
        assert_eq!(
            followers(&buffer, &messages),
            (1, 200),
            "one between them was left out"
        );
        let (buffer, mut messages) = received(100, &[(7, 80), (8, 80), (7, 80)]);
        assert_eq!(followers(&buffer, &messages), (0, 80), "another session");
        messages.truncate(1);
        assert_eq!(followers(&buffer, &messages), (0, 80));
        let (mut buffer, messages) = received(100, &[(7, 80), (7, 80)]);
        buffer[0] = 1;
        assert_eq!(followers(&buffer, &messages), (0, 80), "no data");
    }
}
