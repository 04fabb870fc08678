//! Two ends and a network that loses, repeats, reorders and forges, in virtual time; engines hand over in between.
//!
//! Whatever happens: a packet is received at most once, as it was sent, by whom it was meant for; no counter of a session
//! is used twice; and once the network is good again, packets arrive.

use std::{
    collections::{HashSet, VecDeque},
    net::SocketAddr,
    sync::Mutex,
    time::{Duration, Instant, UNIX_EPOCH},
};

use warren_model::{PreSharedKey, PrivateKey, PublicKey};

use super::{
    super::{
        image::{Reader, Writer},
        machine::Machine,
        own::OwnIdentity,
        transport::{Admission, Identity, LARGEST_HANDSHAKE, Layout, OVERHEAD, Opened, Tick, Transport},
    },
    Features, Numbers, Source,
};

/// The peer's index, of both ends.
const PEER: u32 = 7;

/// Messages under way; more are lost.
const UNDER_WAY: usize = 64;

fn private(n: u8) -> PrivateKey {
    PrivateKey::from_bytes([n; 32])
}

fn public(n: u8) -> PublicKey {
    let secret = x25519_dalek::StaticSecret::from([n; 32]);
    PublicKey::from_bytes(x25519_dalek::PublicKey::from(&secret).to_bytes()).unwrap()
}

struct End {
    own: u8,
    start: Instant,
    identity: OwnIdentity,
    machine: Machine,
    waiting: Vec<Vec<u8>>,
    /// How often it was handed over.
    lives: u64,
}

fn identity(own: u8, start: Instant, life: u64) -> OwnIdentity {
    let numbers = Mutex::new(Numbers(0x5eed_0001 + u64::from(own) + (life << 32)));
    let random = Box::new(move |out: &mut [u8]| numbers.lock().unwrap().fill(out));
    let epoch = (start, UNIX_EPOCH + Duration::from_secs(1_700_000_000));
    OwnIdentity::with(&private(own), epoch, random)
}

impl End {
    fn new(own: u8, peer: u8, preshared: bool, start: Instant) -> Self {
        let identity = identity(own, start, 0);
        let preshared = preshared.then(|| PreSharedKey::from_bytes(&[9; 32])).flatten();
        Self {
            own,
            start,
            machine: identity.machine(&public(peer), preshared.as_ref(), PEER),
            identity,
            waiting: Vec::new(),
            lives: 0,
        }
    }

    fn peer(&self) -> PublicKey {
        public(3 - self.own)
    }

    /// A successor goes on.
    fn hand_over(&mut self, now: Instant) -> usize {
        let mut out = Writer::new(now);
        self.identity.write(&mut out);
        assert!(self.machine.write(&mut out));
        let image = out.finish();
        self.lives += 1;
        let next = identity(self.own, self.start, self.lives);
        let mut from = Reader::new(&image, now);
        next.read(&mut from).unwrap();
        self.machine = match restore(&next, &self.peer(), &mut from) {
            Ok(machine) => machine,
            Err(error) => panic!("a sound image is refused: {error}"),
        };
        self.identity = next;
        from.end().unwrap();
        image.len()
    }
}

fn restore(
    identity: &OwnIdentity,
    peer: &PublicKey,
    from: &mut Reader<'_>,
) -> Result<Machine, super::super::image::Damaged> {
    identity.machine_from(peer, PEER, from)
}

struct World {
    now: Instant,
    ends: [End; 2],
    /// To whom, from where.
    network: VecDeque<(usize, SocketAddr, Vec<u8>)>,
    /// What each end was sent and has not received.
    expected: [HashSet<Vec<u8>>; 2],
    received: [u64; 2],
    counters: HashSet<(usize, [u8; 12])>,
    number: u64,
}

fn address(end: usize) -> SocketAddr {
    ([192, 0, 2, end as u8], 51871).into()
}

impl World {
    fn new(preshared: bool) -> Self {
        let now = Instant::now() + Duration::from_secs(1000);
        Self {
            now,
            ends: [End::new(1, 2, preshared, now), End::new(2, 1, preshared, now)],
            network: VecDeque::new(),
            expected: [HashSet::new(), HashSet::new()],
            received: [0; 2],
            counters: HashSet::new(),
            number: 0,
        }
    }

    /// Puts messages of an end on the network.
    fn emit(&mut self, end: usize, messages: Vec<Vec<u8>>) {
        for message in messages {
            if message[0] == 4 {
                let name = message[4..16].try_into().unwrap();
                assert!(self.counters.insert((end, name)), "a counter is used twice");
            }
            if self.network.len() < UNDER_WAY {
                self.network.push_back((1 - end, address(end), message));
            }
        }
    }

    fn flush(&mut self, number: usize) {
        let end = &mut self.ends[number];
        if !end.machine.ready(self.now) {
            return;
        }
        let mut messages = Vec::new();
        for packet in std::mem::take(&mut end.waiting) {
            let mut message = [&[0; 16][..], &packet, &[0; 16]].concat();
            let len = message.len();
            // Both ways of sealing.
            let sealed = match len % 2 {
                0 => end.machine.seal(&mut message, self.now, &mut []),
                _ => {
                    let sealing = end.machine.reserve(1, self.now);
                    sealing.is_some_and(|sealing| sealing.seal(&mut message, len))
                }
            };
            if sealed {
                messages.push(message);
            }
        }
        self.emit(number, messages);
    }

    fn send(&mut self, number: usize, size: usize) {
        self.number += 1;
        let mut packet = self.number.to_le_bytes().to_vec();
        packet.resize(8 + size, number as u8);
        self.expected[1 - number].insert(packet.clone());
        let end = &mut self.ends[number];
        end.waiting.push(packet);
        if end.waiting.len() > 8 {
            end.waiting.remove(0);
        }
        if end.machine.ready(self.now) {
            return self.flush(number);
        }
        self.initiate(number, false);
    }

    fn initiate(&mut self, number: usize, force: bool) {
        let mut out = [0; LARGEST_HANDSHAKE];
        let len = self.ends[number].machine.initiate(force, self.now, &mut out);
        if len > 0 {
            self.emit(number, vec![out[..len].to_vec()]);
        }
    }

    /// An end takes a datagram.
    fn deliver(&mut self, number: usize, from: SocketAddr, mut message: Vec<u8>, features: &mut Features) {
        let mut out = [0; 256];
        let end = &mut self.ends[number];
        let mut back = Vec::new();
        match end.identity.admit(from, &message, &mut out, self.now) {
            Admission::Session(index, session) => {
                assert_eq!(index, PEER);
                let (mut opened, len) = (Vec::new(), message.len());
                let outcome = session.open_all(
                    &mut message,
                    Layout::packed(len),
                    self.now,
                    &mut opened,
                    |reason| {
                        features.note(1, reason as u8);
                    },
                );
                if outcome.bytes > 0 && end.machine.heard(&session, outcome.data, self.now) {
                    for range in opened {
                        let packet = message[range].to_vec();
                        assert!(
                            self.expected[number].remove(&packet),
                            "received twice, or never sent"
                        );
                        self.received[number] += 1;
                    }
                }
            }
            Admission::Initiation(_) | Admission::Index(_) => {
                match end.machine.open(&mut message, self.now, &mut out) {
                    Ok(Opened::Reply(len)) => back.push(out[..len].to_vec()),
                    Ok(_) => features.note(2, 0u8),
                    Err(reason) => features.note(3, reason as u8),
                }
            }
            Admission::Cookie(len) => back.push(out[..len].to_vec()),
            Admission::Refused(reason) => features.note(4, reason as u8),
        }
        self.emit(number, back);
        self.flush(number);
    }

    fn pass(&mut self, time: Duration) -> bool {
        self.now += time;
        let mut expired = false;
        for number in 0..2 {
            let mut out = [0; LARGEST_HANDSHAKE];
            match self.ends[number].machine.tick(self.now, &mut out) {
                Tick::Idle => {}
                Tick::Send(len) => self.emit(number, vec![out[..len].to_vec()]),
                Tick::Expired => {
                    self.ends[number].waiting.clear();
                    expired = true;
                }
            }
        }
        expired
    }

    /// A message under way, at this place modulo how many there are.
    fn place(&self, source: &mut Source<'_>) -> Option<usize> {
        let place = usize::from(source.byte());
        (!self.network.is_empty()).then(|| place % self.network.len())
    }
}

/// Steps of a script.
pub(super) fn run(input: &[u8], features: &mut Features) {
    let mut source = Source(input);
    let mut world = World::new(source.flag());
    let mut steps = 0;
    while !source.is_empty() && steps < 400 {
        steps += 1;
        step(&mut world, &mut source, features);
    }
    for end in &world.ends {
        features.size(10, end.machine.handshakes() as usize);
        features.size(11, end.lives as usize);
    }
    features.size(12, world.received[0] as usize);
    recover(&mut world, features);
}

fn step(world: &mut World, source: &mut Source<'_>, features: &mut Features) {
    let step = source.byte();
    let end = usize::from(step >> 7);
    let spoofed: SocketAddr = ([198, 51, 100, 1], 9).into();
    match step & 15 {
        0 | 1 => world.send(end, usize::from(source.byte())),
        2..=4 => {
            if let Some((to, from, message)) = world.network.pop_front() {
                world.deliver(to, from, message, features);
            }
        }
        5 => {
            if let Some((to, from, message)) =
                world.place(source).and_then(|place| world.network.remove(place))
            {
                world.deliver(to, from, message, features);
            }
        }
        6 => drop(world.place(source).and_then(|place| world.network.remove(place))),
        // Copies: as it is, from elsewhere, changed, cut, to who sent it.
        7..=11 => {
            let Some(place) = world.place(source) else { return };
            let (mut to, mut from, mut message) = world.network[place].clone();
            match step & 15 {
                7 => {}
                8 => from = spoofed,
                9 => {
                    let bit = source.below(message.len() * 8);
                    message[bit / 8] ^= 1 << (bit % 8);
                }
                10 => message.truncate(source.below(message.len())),
                _ => to = 1 - to,
            }
            world.deliver(to, from, message, features);
        }
        12 => {
            let mut message = source.bytes(usize::from(step >> 4) * 12 + OVERHEAD).to_vec();
            if let Some(kind) = message.first_mut() {
                *kind %= 5;
            }
            world.deliver(end, spoofed, message, features);
        }
        13 => {
            let unit = [1, 100, 1_000, 10_000][usize::from(step >> 4) % 4];
            let time = Duration::from_millis(unit * (1 + u64::from(source.byte()) % 16));
            if world.pass(time) {
                features.note(5, 0u8);
            }
        }
        14 => {
            let now = world.now;
            let len = world.ends[end].hand_over(now);
            features.note(6, (len / 64) as u64);
        }
        _ => world.initiate(end, step & 16 != 0),
    }
}

/// The network is good again: within three minutes and a bit packets arrive at both ends.
fn recover(world: &mut World, features: &mut Features) {
    let before = world.received;
    for second in 0..200 {
        if world.received[0] > before[0] && world.received[1] > before[1] {
            return features.size(13, second);
        }
        for end in 0..2 {
            world.send(end, 1);
        }
        for _ in 0..5 {
            for _ in 0..2 * UNDER_WAY {
                let Some((to, from, message)) = world.network.pop_front() else {
                    break;
                };
                world.deliver(to, from, message, features);
            }
            world.pass(Duration::from_millis(200));
        }
    }
    panic!("no packet arrives, {:?} before", before);
}

/// Any bytes as datagrams, at an end that has a session and one that begins a handshake.
pub(super) fn datagram(input: &[u8], features: &mut Features) {
    let mut world = World::new(false);
    world.send(0, 1);
    world.send(1, 1);
    let mut source = Source(input);
    for _ in 0..source.byte() % 4 {
        if let Some((to, from, message)) = world.network.pop_front() {
            world.deliver(to, from, message, features);
        }
    }
    let mut message = source.bytes(200).to_vec();
    // Most must get past what is looked at first.
    let known = world.network.front().map(|(_, _, message)| message.clone());
    if let (Some(known), true) = (known, source.flag()) {
        let len = message.len().min(known.len());
        let keep = source.below(len + 1);
        message[..keep].copy_from_slice(&known[..keep]);
    }
    features.size(20, message.len());
    world.deliver(source.below(2), address(0), message, features);
    recover(&mut world, features);
}

/// Changed images: refused, or taken without harm.
pub(super) fn image(input: &[u8], features: &mut Features) {
    let mut source = Source(input);
    let mut world = World::new(false);
    for _ in 0..source.byte() % 12 {
        step(&mut world, &mut source, &mut Features::default());
    }
    let end = &world.ends[0];
    let mut out = Writer::new(world.now);
    end.identity.write(&mut out);
    assert!(end.machine.write(&mut out));
    let mut image = out.finish();
    while !source.is_empty() {
        let at = source.below(image.len());
        match source.byte() {
            0 => image.truncate(at.max(1)),
            1 => image.extend_from_slice(&[0; 9]),
            value => image[at] = value,
        }
    }
    let next = identity(1, end.start, 9);
    let mut from = Reader::new(&image, world.now);
    if next.read(&mut from).is_err() {
        return features.note(30, 0u8);
    }
    match restore(&next, &end.peer(), &mut from) {
        Err(_) => features.note(31, (from.left() / 16) as u64),
        Ok(mut machine) => {
            features.note(32, u8::from(from.end().is_ok()));
            let mut out = [0; LARGEST_HANDSHAKE];
            machine.tick(world.now, &mut out);
            machine.initiate(true, world.now, &mut out);
        }
    }
}
