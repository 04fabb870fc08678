//! Two ends on a simulated network in virtual time.

use std::{
    net::SocketAddr,
    sync::Mutex,
    time::{Duration, Instant, UNIX_EPOCH},
};

use boringtun::{
    noise::{Tunn, TunnResult},
    x25519,
};
use proptest::prelude::*;
use warren_model::{PreSharedKey, PrivateKey};

use super::*;
use crate::engine::{
    own::OwnIdentity,
    transport::{Admission, DATA_HEADER, Identity, LARGEST_HANDSHAKE, Layout, TAG},
};

/// A generator that tests can repeat: xorshift64 (Marsaglia, 2003).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

struct End {
    identity: OwnIdentity,
    machine: Machine,
    address: SocketAddr,
    waiting: Vec<Vec<u8>>,
    received: Vec<Vec<u8>>,
    drops: Vec<DropReason>,
    expired: usize,
    /// Types of the messages that were sent.
    sent: Vec<u8>,
}

fn private(n: u8) -> PrivateKey {
    PrivateKey::from_bytes([n; 32])
}

fn public(n: u8) -> PublicKey {
    let secret = x25519_dalek::StaticSecret::from([n; 32]);
    PublicKey::from_bytes(x25519_dalek::PublicKey::from(&secret).to_bytes()).unwrap()
}

impl End {
    fn new(own: u8, peer: u8, preshared: Option<u8>, start: Instant) -> Self {
        let numbers = Mutex::new(Numbers(0x5eed_0000 + u64::from(own)));
        let random = move |out: &mut [u8]| {
            let mut numbers = numbers.lock().unwrap();
            out.iter_mut()
                .for_each(|byte| *byte = (numbers.next() >> 24) as u8);
        };
        let epoch = (start, UNIX_EPOCH + Duration::from_secs(1_700_000_000));
        let identity = OwnIdentity::with(&private(own), epoch, Box::new(random));
        let preshared = preshared.and_then(|byte| PreSharedKey::from_bytes(&[byte; 32]));
        Self {
            machine: identity.machine(&public(peer), preshared.as_ref(), 7),
            identity,
            address: ([192, 0, 2, own], 51871).into(),
            waiting: Vec::new(),
            received: Vec::new(),
            drops: Vec::new(),
            expired: 0,
            sent: Vec::new(),
        }
    }

    /// As a peer does: seals, or keeps the packet and begins a handshake.
    fn send(&mut self, packet: &[u8], now: Instant) -> Vec<Vec<u8>> {
        self.waiting.push(packet.to_vec());
        let mut messages = self.flush(now);
        if messages.is_empty() {
            let mut out = [0; LARGEST_HANDSHAKE];
            let len = self.machine.initiate(false, now, &mut out);
            messages.extend((len > 0).then(|| out[..len].to_vec()));
        }
        self.note(messages)
    }

    fn flush(&mut self, now: Instant) -> Vec<Vec<u8>> {
        if !self.machine.ready(now) {
            return Vec::new();
        }
        let packets = std::mem::take(&mut self.waiting);
        let sealed = packets.iter().map(|packet| {
            let mut message = [&[0; DATA_HEADER][..], packet, &[0; TAG]].concat();
            assert!(self.machine.seal(&mut message, now, &mut []));
            message
        });
        sealed.collect()
    }

    fn note(&mut self, messages: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        self.sent.extend(messages.iter().map(|message| message[0]));
        messages
    }

    /// As a device does. What is sent back.
    fn receive(&mut self, mut message: Vec<u8>, from: SocketAddr, now: Instant) -> Vec<Vec<u8>> {
        let mut out = [0; 256];
        let mut back = Vec::new();
        match self.identity.admit(from, &message, &mut out, now) {
            Admission::Session(index, session) => {
                assert_eq!(index, 7);
                let (mut opened, len) = (Vec::new(), message.len());
                let drops = &mut self.drops;
                let outcome =
                    session.open_all(&mut message, Layout::packed(len), now, &mut opened, |reason| {
                        drops.push(reason)
                    });
                if outcome.bytes > 0 {
                    assert!(self.machine.heard(&session, outcome.data, now));
                }
                self.received
                    .extend(opened.into_iter().map(|range| message[range].to_vec()));
            }
            Admission::Initiation(_) | Admission::Index(_) => {
                match self.machine.open(&mut message, now, &mut out) {
                    Ok(Opened::Reply(len)) => back.push(out[..len].to_vec()),
                    Ok(_) => {}
                    Err(reason) => self.drops.push(reason),
                }
            }
            Admission::Cookie(len) => back.push(out[..len].to_vec()),
            Admission::Refused(reason) => self.drops.push(reason),
        }
        back.extend(self.flush(now));
        self.note(back)
    }

    fn tick(&mut self, now: Instant) -> Vec<Vec<u8>> {
        let mut out = [0; LARGEST_HANDSHAKE];
        let messages = match self.machine.tick(now, &mut out) {
            Tick::Idle => Vec::new(),
            Tick::Send(len) => vec![out[..len].to_vec()],
            Tick::Expired => {
                self.expired += 1;
                self.waiting.clear();
                Vec::new()
            }
        };
        self.note(messages)
    }

    fn count(&self, kind: u8) -> usize {
        self.sent.iter().filter(|sent| **sent == kind).count()
    }
}

/// Two ends and what is under way.
struct Network {
    ends: [End; 2],
    now: Instant,
    start: Instant,
    /// Of 256 messages so many are lost, duplicated and damaged.
    trouble: [u64; 3],
    numbers: Numbers,
}

impl Network {
    fn new(preshared: Option<u8>) -> Self {
        let start = Instant::now();
        Self {
            ends: [End::new(1, 2, preshared, start), End::new(2, 1, preshared, start)],
            now: start,
            start,
            trouble: [0; 3],
            numbers: Numbers(0xfeed),
        }
    }

    /// Delivers messages of an end, and all that follows from them.
    fn deliver(&mut self, from: usize, messages: Vec<Vec<u8>>) {
        let mut under_way: Vec<_> = messages.into_iter().map(|message| (from, message)).collect();
        while !under_way.is_empty() {
            for (from, mut message) in std::mem::take(&mut under_way) {
                let dice: [u64; 3] = std::array::from_fn(|_| self.numbers.next() >> 20 & 0xff);
                if dice[0] < self.trouble[0] {
                    continue;
                }
                let copy = (dice[1] < self.trouble[1]).then(|| message.clone());
                if dice[2] < self.trouble[2] {
                    let bit = self.numbers.next() as usize % (message.len() * 8);
                    message[bit / 8] ^= 1 << (bit % 8);
                }
                let address = self.ends[from].address;
                for message in std::iter::once(message).chain(copy) {
                    let back = self.ends[1 - from].receive(message, address, self.now);
                    under_way.extend(back.into_iter().map(|message| (1 - from, message)));
                }
            }
        }
    }

    fn send(&mut self, from: usize, packet: &[u8]) {
        let messages = self.ends[from].send(packet, self.now);
        self.deliver(from, messages);
    }

    /// Lets time go by in steps of 100 ms.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now += Duration::from_millis(100);
            for from in 0..2 {
                let messages = self.ends[from].tick(self.now);
                self.deliver(from, messages);
            }
        }
    }
}

#[test]
fn packets_wait_for_the_handshake_and_arrive_in_order() {
    for preshared in [None, Some(9)] {
        let mut network = Network::new(preshared);
        network.send(0, b"first");
        network.send(0, b"second");
        network.send(1, b"back");
        assert_eq!(network.ends[1].received, [b"first".to_vec(), b"second".to_vec()]);
        assert_eq!(network.ends[0].received, [b"back".to_vec()]);
        for end in &network.ends {
            assert_eq!((end.machine.handshakes(), end.drops.len()), (1, 0));
        }
    }
}

#[test]
fn an_hour_of_traffic_renews_its_keys_and_loses_nothing() {
    for (forth, back) in [(true, true), (true, false), (false, true)] {
        let mut network = Network::new(None);
        // The first packet decides who begins.
        network.send(0, b"begin");
        let mut sent = [1usize, 0];
        for _ in 0..3600 {
            for (from, flows) in [(0, forth), (1, back)] {
                if flows {
                    network.send(from, b"data");
                    sent[from] += 1;
                }
            }
            network.pass(Duration::from_secs(1));
        }
        let [a, b] = &network.ends;
        assert_eq!(
            (b.received.len(), a.received.len()),
            (sent[0], sent[1]),
            "{forth} {back}"
        );
        assert!(a.drops.is_empty() && b.drops.is_empty());
        // Every two minutes: 30 in an hour, and where only the other end sends, when 165 s are over.
        assert!(
            (20..=31).contains(&a.machine.handshakes()),
            "{} handshakes",
            a.machine.handshakes()
        );
    }
}

#[test]
fn silence_is_answered_with_one_keepalive() {
    let mut network = Network::new(None);
    network.send(0, b"data");
    let keepalives = network.ends[1].count(4);
    network.pass(Duration::from_millis(9_900));
    assert_eq!(network.ends[1].count(4), keepalives);
    network.pass(Duration::from_secs(100));
    assert_eq!(network.ends[1].count(4), keepalives + 1);
    // Nobody uses the session: nothing is renewed, and it ends.
    network.pass(Duration::from_secs(100));
    assert_eq!(network.ends[0].machine.handshakes(), 1);
    assert!(network.ends.iter().all(|end| !end.machine.ready(network.now)));
    assert!(
        network.ends.iter().all(|end| end.machine.current.is_none()),
        "keys are gone"
    );
}

#[test]
fn nobody_there_is_asked_for_ninety_seconds() {
    let mut network = Network::new(None);
    network.trouble[0] = 256;
    network.send(0, b"lost");
    network.pass(Duration::from_secs(89));
    let asked = network.ends[0].count(1);
    assert!((16..=18).contains(&asked), "{asked} initiations");
    assert_eq!(network.ends[0].expired, 0);
    network.pass(Duration::from_secs(100));
    assert_eq!(network.ends[0].expired, 1);
    assert!(network.ends[0].count(1) <= asked + 1);
    network.trouble[0] = 0;
    network.send(0, b"again");
    assert_eq!(network.ends[1].received, [b"again".to_vec()]);
}

#[test]
fn a_peer_that_forgot_its_sessions_is_asked_again_after_fifteen_seconds() {
    let mut network = Network::new(None);
    network.send(0, b"data");
    network.ends[1] = End::new(2, 1, None, network.now);
    network.send(0, b"lost");
    network.pass(Duration::from_secs(16));
    network.send(0, b"heard");
    assert_eq!(network.ends[1].received, [b"heard".to_vec()]);
}

#[test]
fn both_may_begin_at_once() {
    let mut network = Network::new(None);
    let now = network.now;
    let (a, b) = (network.ends[0].send(b"a", now), network.ends[1].send(b"b", now));
    network.deliver(0, a);
    network.deliver(1, b);
    network.send(0, b"a2");
    network.send(1, b"b2");
    assert_eq!(network.ends[1].received, [b"a".to_vec(), b"a2".to_vec()]);
    assert_eq!(network.ends[0].received, [b"b".to_vec(), b"b2".to_vec()]);
}

#[test]
fn an_initiation_is_taken_once() {
    let mut network = Network::new(None);
    let now = network.now;
    let initiation = network.ends[0].send(b"data", now).remove(0);
    let address = network.ends[0].address;
    assert_eq!(network.ends[1].receive(initiation.clone(), address, now)[0][0], 2);
    let later = now + Duration::from_secs(1);
    assert!(
        network.ends[1]
            .receive(initiation.clone(), address, later)
            .is_empty()
    );
    assert_eq!(network.ends[1].drops, [DropReason::HandshakeRefused]);
    // Not even by a machine that was set up anew for the peer.
    network.ends[1].machine = network.ends[1].identity.machine(&public(1), None, 7);
    assert!(network.ends[1].receive(initiation, address, later).is_empty());
}

#[test]
fn a_late_answer_and_a_forged_one_change_nothing() {
    let mut network = Network::new(None);
    let now = network.now;
    let initiation = network.ends[0].send(b"data", now).remove(0);
    let addresses = [network.ends[0].address, network.ends[1].address];
    let answer = network.ends[1].receive(initiation, addresses[0], now).remove(0);
    let mut forged = answer.clone();
    forged[50] ^= 1;
    // With a right first authenticator, as one who knows our public key can compute.
    Authenticator::new(public(1).as_bytes()).sign(&mut forged, now);
    assert!(network.ends[0].receive(forged, addresses[1], now).is_empty());
    assert_eq!(
        network.ends[0].receive(answer.clone(), addresses[1], now).len(),
        2
    );
    assert!(network.ends[0].receive(answer, addresses[1], now).is_empty());
    assert_eq!(network.ends[0].drops, [DropReason::HandshakeRefused; 2]);
    assert_eq!(network.ends[0].machine.handshakes(), 1);
}

#[test]
fn the_limit_of_messages_renews_and_then_rejects() {
    let mut network = Network::new(None);
    network.send(0, b"data");
    let session = network.ends[1].machine.current.as_mut().unwrap();
    assert!(!session.initiator);
    session.counter = REKEY_AFTER_MESSAGES + 1;
    network.send(1, b"more");
    network.pass(Duration::from_millis(100));
    assert_eq!(network.ends[1].machine.handshakes(), 2);
    let now = network.now;
    let machine = &mut network.ends[1].machine;
    machine.current.as_mut().unwrap().counter = REJECT_AFTER_MESSAGES;
    assert!(!machine.ready(now) && machine.reserve(1, now).is_none());
}

#[test]
fn sessions_give_their_indices_back() {
    let mut network = Network::new(None);
    for _ in 0..20 {
        network.send(0, b"data");
        let mut out = [0; LARGEST_HANDSHAKE];
        let len = network.ends[0].machine.initiate(true, network.now, &mut out);
        network.deliver(0, vec![out[..len].to_vec()]);
        network.pass(Duration::from_millis(100));
    }
    for end in &network.ends {
        let kept = end.machine.old.len();
        assert_eq!(kept, OLD_SESSIONS);
    }
    network.pass(Duration::from_secs(200));
    assert!(network.ends.iter().all(|end| end.machine.old.is_empty()));
    let start = network.start;
    assert!(network.now > start);
}

/// With more than two hundred handshakes in the second, ours waits for a cookie and not for a timeout.
#[test]
fn under_load_a_cookie_lets_us_in() {
    let mut network = Network::new(None);
    let (now, mut flood) = (network.now, Authenticator::new(public(2).as_bytes()));
    for _ in 0..250 {
        let mut message = vec![0; INITIATION];
        message[0] = 1;
        flood.sign(&mut message, now);
        network.ends[1].receive(message, ([198, 51, 100, 1], 9).into(), now);
    }
    network.ends[1].sent.clear();
    network.send(0, b"data");
    assert_eq!((network.ends[1].count(3), network.ends[1].received.len()), (1, 0));
    network.pass(Duration::from_millis(100));
    assert_eq!(network.ends[1].received, [b"data".to_vec()]);
}

#[test]
fn a_peer_of_low_order_is_never_spoken_to() {
    let start = Instant::now();
    let mut end = End::new(1, 2, None, start);
    let mut low = [0; 32];
    low[0] = 1;
    end.machine.peer = low.into();
    assert!(end.send(b"data", start).is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Whatever the network does to messages: nothing arrives twice or changed, and when it stops, traffic flows.
    #[test]
    fn trouble_passes(loss in 0u64..200, copies in 0u64..100, damage in 0u64..100, seed in 1u64.., seconds in 1u64..400) {
        let mut network = Network::new(None);
        network.trouble = [loss, copies, damage];
        network.numbers = Numbers(seed);
        let mut sent = [0u64; 2];
        for second in 0..seconds {
            for (from, sent) in sent.iter_mut().enumerate() {
                network.send(from, &sent.to_be_bytes());
                *sent += 1;
            }
            network.pass(Duration::from_millis(100 + second % 7 * 300));
        }
        network.trouble = [0; 3];
        network.pass(Duration::from_secs(25));
        for from in 0..2 {
            network.send(from, b"the last");
            // A session that the other end has lost is noticed after 15 s.
            network.pass(Duration::from_secs(25));
            network.send(from, b"the last");
        }
        for end in &network.ends {
            prop_assert!(end.received.iter().any(|packet| packet == b"the last"));
            let mut numbers: Vec<_> = end.received.iter().filter(|packet| *packet != b"the last").collect();
            let count = numbers.len();
            numbers.sort();
            numbers.dedup();
            prop_assert_eq!(numbers.len(), count, "a packet arrived twice");
            for number in numbers {
                let number = u64::from_be_bytes(number.as_slice().try_into().unwrap());
                prop_assert!(number < sent[0]);
            }
        }
    }

    /// Any bytes at all.
    #[test]
    fn nonsense_never_panics(
        message in prop::collection::vec(any::<u8>(), 0..200), kind in 0u8..6, exact in any::<bool>(), session in any::<bool>(),
    ) {
        let mut network = Network::new(None);
        network.send(0, b"data");
        let mut message = message;
        if exact {
            message.resize([0, 148, 92, 64, 32, 16][usize::from(kind)], 0);
        }
        if message.len() >= 4 {
            message[..4].copy_from_slice(&[kind, 0, 0, 0]);
        }
        if session && message.len() >= 8 {
            let index = network.ends[1].machine.current.as_ref().unwrap().index.value;
            message[4..8].copy_from_slice(&index.to_le_bytes());
        }
        let (address, now) = (network.ends[0].address, network.now);
        network.ends[1].receive(message, address, now);
        prop_assert_eq!(network.ends[1].received.len(), 1);
        network.send(0, b"more");
        prop_assert_eq!(network.ends[1].received.len(), 2);
    }
}

/// `Tunn` at the other end, in either role.
#[test]
fn boringtun_understands_us() {
    for (preshared, ours_first) in [(None, true), (None, false), (Some(3), true), (Some(3), false)] {
        let start = Instant::now();
        let mut ours = End::new(1, 2, preshared, start);
        let theirs = x25519::StaticSecret::from([2; 32]);
        let key = x25519::PublicKey::from(*public(1).as_bytes());
        let mut tunn = Tunn::new(theirs, key, preshared.map(|byte| [byte; 32]), None, 5, None);
        // The smallest IPv4 packets: Tunn looks at lengths.
        let packet = |n: u8| {
            let mut packet = vec![0; 20];
            (packet[0], packet[3], packet[19]) = (0x45, 20, n);
            packet
        };
        let mut out = [0; 2048];
        let (mut to_theirs, mut to_ours) = (Vec::new(), Vec::new());
        match ours_first {
            true => to_theirs = ours.send(&packet(1), start),
            false => match tunn.encapsulate(&packet(2), &mut out) {
                TunnResult::WriteToNetwork(message) => to_ours.push(message.to_vec()),
                other => panic!("{other:?}"),
            },
        }
        let mut received = Vec::new();
        for _ in 0..10 {
            for message in std::mem::take(&mut to_theirs) {
                let mut result = tunn.decapsulate(None, &message, &mut out);
                loop {
                    match result {
                        TunnResult::WriteToNetwork(message) => to_ours.push(message.to_vec()),
                        TunnResult::WriteToTunnelV4(packet, _) => received.push(packet.to_vec()),
                        _ => break,
                    }
                    result = tunn.decapsulate(None, &[], &mut out);
                }
            }
            for message in std::mem::take(&mut to_ours) {
                to_theirs.extend(ours.receive(message, ([192, 0, 2, 2], 1).into(), start));
            }
        }
        match ours_first {
            true => assert_eq!(received, [packet(1)]),
            false => assert_eq!(ours.received, [packet(2)]),
        }
        let message = ours.send(&packet(9), start).remove(0);
        assert!(matches!(
            tunn.decapsulate(None, &message, &mut out),
            TunnResult::WriteToTunnelV4(..)
        ));
        let TunnResult::WriteToNetwork(message) = tunn.encapsulate(&packet(8), &mut out) else {
            panic!("no session")
        };
        let message = message.to_vec();
        ours.receive(message, ([192, 0, 2, 2], 1).into(), start);
        assert_eq!(ours.received.last(), Some(&packet(8)));
        assert_eq!(ours.drops, []);
    }
}
