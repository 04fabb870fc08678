//! Two ends with a network that loses, doubles and delays, and agents that are killed at any moment.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use warren_model::{PskId, PublicKey, link_address};

use super::{Done, Ends, Exchanges, Nonce, PskUse, Record, Seen, Work, message};

const MILLI: Duration = Duration::from_millis(1);

/// A generator of choices (splitmix64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }
}

fn key(n: u8) -> PublicKey {
    PublicKey::from_bytes([n; 32]).unwrap()
}

struct End {
    ends: Ends,
    exchanges: Exchanges,
    disk: Record,
    device: Option<PskId>,
    /// What it has agreed on, ever.
    agreed: BTreeSet<PskId>,
}

/// What an offer says: who made it, so that the key of an answer is the same at both ends.
fn offer(secret: u64) -> Vec<u8> {
    let mut bytes = vec![0; message::OFFER];
    bytes[..8].copy_from_slice(&secret.to_le_bytes());
    bytes
}

fn number(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

/// The name of the key of an offer and an answer.
fn id(offer: u64, answer: u64) -> PskId {
    PskId((u128::from(offer) << 64 | u128::from(answer)).to_le_bytes())
}

struct World {
    dice: Dice,
    now: Duration,
    ends: [End; 2],
    /// What an end has of its offers.
    secrets: [BTreeMap<Nonce, u64>; 2],
    flying: Vec<(Duration, usize, Vec<u8>)>,
    loss: u64,
    starts: u8,
}

impl World {
    fn new(seed: u64) -> Self {
        let end = |own, peer| End {
            ends: Ends {
                own: key(own),
                peer: key(peer),
            },
            exchanges: Exchanges::default(),
            disk: Record::default(),
            device: None,
            agreed: BTreeSet::new(),
        };
        let mut world = Self {
            dice: Dice(seed),
            now: Duration::from_secs(1),
            ends: [end(3, 4), end(4, 3)],
            secrets: Default::default(),
            flying: vec![],
            loss: 0,
            starts: 0,
        };
        world.start(0);
        world.start(1);
        world
    }

    /// The agent starts, with what is on disk and on the device.
    fn start(&mut self, n: usize) {
        self.starts += 1;
        let end = &mut self.ends[n];
        let disk = BTreeMap::from([(end.ends, end.disk.clone())]);
        end.exchanges = Exchanges::new(disk, [self.starts; 7]);
        self.secrets[n].clear();
        self.look(n);
    }

    /// The devices of both ends have the same key: then there is a handshake.
    fn fresh(&self) -> bool {
        let [a, b] = [self.ends[0].device, self.ends[1].device];
        a.is_some() && a == b
    }

    fn look(&mut self, n: usize) {
        let fresh = self.fresh();
        let end = &mut self.ends[n];
        let seen = Seen {
            open: true,
            on_device: end.device,
            fresh,
        };
        end.exchanges.update(self.now, [(end.ends, 1, seen)]);
        match end.exchanges.psk(self.now, &end.ends) {
            PskUse::With(id) if end.device != Some(id) => {
                end.device = Some(id);
                end.exchanges.placed(&end.ends, id);
            }
            PskUse::Awaited => end.device = None,
            PskUse::With(_) | PskUse::Without => {}
        }
    }

    /// Everything that an end has to do; it is killed before step `crash`.
    fn work(&mut self, n: usize, mut crash: Option<u64>) {
        loop {
            let works = self.ends[n].exchanges.poll(self.now);
            if works.is_empty() {
                return;
            }
            for work in works {
                if crash == Some(0) {
                    return self.start(n);
                }
                crash = crash.map(|left| left - 1);
                self.one(n, work);
            }
            self.look(n);
        }
    }

    fn one(&mut self, n: usize, work: Work) {
        let done = match work {
            Work::Begin { ends, nonce } => {
                let secret = self.dice.below(u64::MAX);
                self.secrets[n] = [(nonce, secret)].into();
                Done::Begun(ends, nonce, Some(offer(secret)))
            }
            Work::Answer { ends, nonce, offer } => {
                let secret = self.dice.below(u64::MAX);
                let mut answer = vec![0; message::ANSWER];
                answer[..8].copy_from_slice(&secret.to_le_bytes());
                Done::Answered(ends, nonce, Some((id(number(&offer), secret), answer)))
            }
            Work::Finish {
                ends,
                nonce,
                answer,
                id: named,
            } => {
                let mine = self.secrets[n].get(&nonce).map(|mine| id(*mine, number(&answer)));
                Done::Finished(ends, nonce, mine.filter(|mine| *mine == named))
            }
            Work::Save { ends, record } => {
                if self.dice.below(20) == 0 {
                    Done::Saved(ends, record, false)
                } else {
                    let end = &mut self.ends[n];
                    end.disk.clone_from(&record);
                    end.agreed.extend(record.agreed);
                    self.judge(n);
                    Done::Saved(ends, record, true)
                }
            }
            Work::Send { bytes, .. } => {
                for _ in 0..1 + u64::from(self.dice.below(10) == 0) {
                    if self.dice.below(100) >= self.loss {
                        let late = if self.dice.below(20) == 0 { 30_000 } else { 400 };
                        let at = self.now + MILLI * self.dice.below(late) as u32;
                        self.flying.push((at, 1 - n, bytes.clone()));
                    }
                }
                return;
            }
        };
        self.ends[n].exchanges.done(self.now, done);
    }

    /// Nobody agrees on what the other end has not got on its disk.
    fn judge(&self, n: usize) {
        let (here, there) = (&self.ends[n].disk, &self.ends[1 - n].disk);
        if let Some(id) = here.agreed {
            assert!(
                there.agreed == Some(id) || there.offered == Some(id),
                "end {n} agrees on what the other end cannot have: {here:?} {there:?}"
            );
        }
    }

    /// One moment: what is due, and what arrives.
    fn step(&mut self, crashes: bool) {
        self.now += MILLI * self.dice.below(60) as u32;
        let now = self.now;
        let (due, later) = self.flying.drain(..).partition(|(at, ..)| *at <= now);
        self.flying = later;
        for (_, to, bytes) in Vec::from_iter::<Vec<(Duration, usize, Vec<u8>)>>(due) {
            let end = &mut self.ends[to];
            end.exchanges
                .received(now, 1, link_address(&end.ends.peer), &bytes);
            self.act(to, crashes);
        }
        let n = self.dice.below(2) as usize;
        self.act(n, crashes);
    }

    fn act(&mut self, n: usize, crashes: bool) {
        let crash = crashes && self.dice.below(12) == 0;
        let crash = crash.then(|| self.dice.below(4));
        self.look(n);
        self.work(n, crash);
    }

    fn is_settled(&self) -> bool {
        let [a, b] = &self.ends;
        a.disk == b.disk && a.disk.agreed.is_some() && a.disk.agreed == a.device && self.fresh()
    }

    fn settle(&mut self, seed: u64) -> PskId {
        for _ in 0..3_000 {
            if self.is_settled() {
                return self.ends[0].device.unwrap();
            }
            self.step(false);
        }
        panic!(
            "seed {seed} does not settle: {:?} {:?}",
            self.ends[0].disk, self.ends[1].disk
        );
    }

    /// What keyd does: it tells both ends what to forget.
    fn keyd(&mut self) -> bool {
        let [begins, other] = &self.ends;
        let (ends, peer) = (begins.ends, other.ends);
        let Some(conflict) = begins.exchanges.conflict(&ends) else {
            return false;
        };
        for (n, ends, id) in [(0, ends, conflict.own), (1, peer, conflict.peer)] {
            if let Some(id) = id {
                self.ends[n].exchanges.forget(self.now, &ends, id);
            }
        }
        true
    }
}

#[test]
fn both_ends_agree_whatever_is_lost_and_whoever_is_killed() {
    for seed in 0..400 {
        let mut world = World::new(seed);
        world.loss = [0, 10, 30, 60][seed as usize % 4];
        for _ in 0..150 {
            world.step(seed % 2 == 1);
        }
        world.loss = world.loss.min(30);
        let id = world.settle(seed);
        // What is agreed on stays, also when agents start anew and when a node boots.
        for n in [0, 1] {
            world.start(n);
            world.settle(seed);
            world.ends[n].device = None;
            world.start(n);
            assert_eq!(world.settle(seed), id, "seed {seed}");
        }
        for end in &world.ends {
            assert_eq!(end.agreed, [id].into(), "seed {seed}");
        }
    }
}

#[test]
fn the_first_exchange_takes_two_and_a_half_round_trips_and_no_waiting() {
    let mut world = World::new(1);
    let mut messages = vec![];
    for _ in 0..20 {
        for n in [0, 1] {
            world.look(n);
            let works = world.ends[n].exchanges.poll(world.now);
            for work in works {
                match work {
                    Work::Send { bytes, .. } => {
                        messages.push(bytes[1]);
                        let to = &mut world.ends[1 - n];
                        to.exchanges
                            .received(world.now, 1, link_address(&to.ends.peer), &bytes);
                    }
                    Work::Save { ends, record } => {
                        world.ends[n].disk.clone_from(&record);
                        world.ends[n]
                            .exchanges
                            .done(world.now, Done::Saved(ends, record, true));
                    }
                    work => world.one(n, work),
                }
            }
        }
    }
    // Hello, Init, Reply, Confirm, Ack: in the same moment.
    assert_eq!(
        messages.into_iter().collect::<BTreeSet<_>>(),
        [1, 2, 3, 4, 5].into()
    );
    assert!(world.is_settled());
    assert_eq!(world.ends[0].exchanges.counters().agreed, 1);
}

#[test]
fn a_lost_key_is_replaced_on_the_word_of_keyd_alone() {
    for seed in 0..200 {
        let mut world = World::new(seed);
        world.loss = [0, 20][seed as usize % 2];
        let first = world.settle(seed);
        let n = seed as usize % 2;
        // The disk was set back, and the node boots.
        world.ends[n].disk = Record::default();
        if seed % 3 == 0 {
            world.ends[n].disk.agreed = Some(PskId([9; 16]));
        }
        world.ends[n].device = None;
        world.start(n);
        for _ in 0..500 {
            world.step(false);
        }
        let there = &world.ends[1 - n];
        assert_eq!(
            (there.disk.agreed, there.device),
            (Some(first), Some(first)),
            "seed {seed}"
        );
        assert!(!world.fresh());
        let known = (0..3_000).any(|_| {
            world.step(false);
            world.keyd()
        });
        assert!(known, "seed {seed}");
        let second = world.settle(seed);
        assert_ne!(first, second);
        // Said again, late, it does no harm.
        for end in &mut world.ends {
            let ends = end.ends;
            end.exchanges.forget(world.now, &ends, first);
        }
        assert_eq!(world.settle(seed), second);
        assert!(!world.keyd());
    }
}

#[test]
fn a_device_that_works_counts_more_than_a_disk_that_was_set_back() {
    let mut world = World::new(5);
    let id = world.settle(5);
    for n in [0, 1] {
        world.ends[n].disk = Record::default();
        world.start(n);
        for _ in 0..200 {
            world.step(true);
        }
        assert_eq!(world.ends[n].device, Some(id));
        world.ends[n].disk.agreed = Some(PskId([9; 16]));
        world.start(n);
        for _ in 0..200 {
            world.step(true);
        }
        assert_eq!(world.ends[n].device, Some(id));
    }
}

#[test]
fn a_path_that_is_gone_takes_its_keys_along() {
    let mut world = World::new(6);
    world.settle(6);
    let end = &mut world.ends[0];
    end.exchanges.update(world.now, []);
    let work = end.exchanges.poll(world.now);
    let record = Record::default();
    let ends = end.ends;
    assert_eq!(
        work,
        [Work::Save {
            ends,
            record: record.clone()
        }]
    );
    end.exchanges.done(world.now, Done::Saved(ends, record, true));
    assert_eq!(end.exchanges.next(), None);
    // What is found on disk and belongs to no path goes as well.
    let found = Record {
        agreed: Some(PskId([1; 16])),
        offered: None,
    };
    let mut exchanges = Exchanges::new([(ends, found)].into(), [1; 7]);
    assert_eq!(
        exchanges.poll(world.now),
        [],
        "nothing before there is a directory"
    );
    exchanges.update(world.now, []);
    assert!(
        matches!(&exchanges.poll(world.now)[..], [Work::Save { record, .. }] if *record == Record::default())
    );
}

#[test]
fn what_a_peer_can_cause_is_bounded() {
    let mut world = World::new(7);
    let from = link_address(&key(3));
    let now = world.now;
    let end = &mut world.ends[1];
    let (mut works, mut bytes) = (0, message::Message::Hello { offered: None }.to_bytes());
    for n in 0..100_000_u32 {
        bytes.resize(16 + message::OFFER, 7);
        bytes[1] = 2;
        bytes[2..6].copy_from_slice(&n.to_le_bytes());
        end.exchanges.received(now, 1, from, &bytes);
        end.exchanges.received(now, 1, link_address(&key(9)), &bytes);
        end.exchanges.received(now, 0, from, &bytes);
        for work in end.exchanges.poll(now) {
            works += 1;
            if let Work::Answer { ends, nonce, .. } = work {
                end.exchanges.done(now, Done::Answered(ends, nonce, None));
            }
        }
    }
    assert!(works < 20, "{works}");
    let counters = end.exchanges.counters();
    assert_eq!(counters.malformed, 200_000);
    assert!(counters.refused > 99_900, "{counters:?}");
}
