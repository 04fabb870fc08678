//! All pairs of this node at one moment: which paths to have, which one sends, what keyd is told.
//!
//! Made anew from directory, keys and devices each time; what it remembers (who was heard, who yields, what was
//! reported) may be lost at any moment and only makes a rotation longer.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use ipnet::IpNet;
use warren_model::{NodeKeys, NodeName, NodeRecord, PublicKey, link_address};

use super::{
    keyring::Keyring,
    mover::Mover,
    path::{
        KEY_SLOTS, Path, YIELD, begins, devices, is_draining, is_verified, keepalive, paths, sending, target,
    },
    report::{PairReport, Reporter, Seen},
};
use crate::{
    psk::{self, Ends, Exchanges, PskUse},
    state::{Peer, State},
};

/// How soon to look again while pairs are about to change.
pub const LOOK: Duration = Duration::from_millis(200);
/// The same where nothing has changed for [`PATIENCE`].
pub const SLOW_LOOK: Duration = Duration::from_secs(1);
/// How long this end waits to be sent something, and then how long it is silent itself, in turns.
const TURN: Duration = Duration::from_secs(2);
/// How long changes follow each other quickly.
pub const PATIENCE: Duration = Duration::from_secs(15);

/// A pair.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pair {
    /// Its paths, sorted by slot.
    pub paths: Vec<Path>,
    /// Persistent keepalive of each, seconds.
    pub keepalives: Vec<u16>,
    /// The pre-shared key of each.
    pub psks: Vec<PskUse>,
    /// The slot that should send.
    pub sending: Option<u8>,
}

/// Where this node's pairs are, in figures.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Peers with a path.
    pub pairs: usize,
    /// Of them, those whose path of the newest generations of both ends is verified at this end.
    pub verified: usize,
    /// Of them, those that send on the path of the active generations.
    pub switched: usize,
    /// Of them, those with a path that is on its way out.
    pub draining: usize,
}

/// A peer that is not sent to before there is a pre-shared key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AwaitedPsk {
    /// The peer.
    pub node: NodeName,
    /// Since when.
    pub since: Duration,
    /// The peer's UDP port where it is agreed on.
    pub port: u16,
    /// One end is known to have lost it.
    pub conflict: bool,
}

/// What pairs are made from, besides directory and time.
pub(crate) struct Seeing<'a> {
    /// This node's keys; `None` while the directory has no record of it.
    pub(crate) own: Option<&'a NodeKeys>,
    /// The private keys that are on disk.
    pub(crate) keyring: &'a Keyring,
    /// The devices and maps as they are.
    pub(crate) state: &'a State,
    /// Keepalive where nothing rotates, seconds.
    pub(crate) keepalive: u16,
}

/// All pairs.
#[derive(Debug, Default)]
pub(crate) struct Pairs {
    pairs: BTreeMap<NodeName, Pair>,
    open: [Option<u64>; KEY_SLOTS as usize],
    mover: Mover,
    /// Since when a pair has been about to move.
    waiting: BTreeMap<NodeName, Duration>,
    /// Since when a peer has been wanted on a device.
    since: BTreeMap<(u8, PublicKey), Duration>,
    reporter: Reporter,
    /// Something about the paths changed.
    changed: Duration,
    look: Option<Duration>,
    /// A path waits for the tunnel of its exchange.
    opening: bool,
}

impl Pairs {
    /// Computes all pairs from what is there now.
    pub(crate) fn update<'a>(
        &mut self,
        now: Duration,
        seeing: &Seeing<'_>,
        exchanges: &mut Exchanges,
        peers: impl Iterator<Item = (u16, &'a NodeRecord)>,
    ) {
        self.opening = false;
        let before = std::mem::take(&mut self.pairs);
        let mut wanted = BTreeSet::new();
        let mut look: Option<Duration> = None;
        let (Some(own), ring) = (seeing.own, seeing.live_keyring()) else {
            self.open = Default::default();
            self.settle(now, &before, &wanted, None);
            return;
        };
        let peers: Vec<_> = peers
            .map(|(index, node)| {
                let other = node.keys();
                let found = paths(own, &ring, &other);
                (index, node, other, found)
            })
            .collect();
        let shared = peers.iter().flat_map(|(.., found)| found);
        let shared: Vec<_> = shared.filter_map(|path| seeing.exchange(own, path)).collect();
        let mut moving = false;
        for (ends, slot, seen) in &shared {
            let place = (*slot, ends.peer);
            wanted.insert(place);
            let since = *self.since.entry(place).or_insert(now);
            self.opening |= !seen.open && seen.on_device.is_none();
            moving |= !seen.open && now < since + PATIENCE;
        }
        exchanges.update(now, shared);
        for (index, node, other, found) in peers {
            if found.is_empty() {
                self.mover.forget(&node.name);
                continue;
            }
            let psks: Vec<PskUse> = found
                .iter()
                .map(|path| psk_of(now, own, path, exchanges))
                .collect();
            // What a peer may not be there without is waited for elsewhere.
            let placed = |psk: &PskUse| *psk != PskUse::Awaited;
            for (path, _) in found.iter().zip(&psks).filter(|(_, psk)| placed(psk)) {
                wanted.insert((path.slot, path.key));
                self.since.entry((path.slot, path.key)).or_insert(now);
            }
            let current = seeing.state.paths.get(&index).map(|path| path.slot);
            let silent = self.silent_turn(now, own, &other, &node.name, current, &found);
            let ready = self.ready(seeing, own, &other, index, node, current, (&found, &psks));
            let mut pair = Pair {
                sending: sending(own, &other, &found, current, ready),
                keepalives: Vec::with_capacity(found.len()),
                psks,
                paths: found,
            };
            for (path, psk) in pair.paths.iter().zip(&pair.psks) {
                if !placed(psk) {
                    pair.keepalives.push(0);
                    continue;
                }
                let since = self.since.get(&(path.slot, path.key)).copied().unwrap_or(now);
                let fresh = seeing.peer(path).is_some_and(|peer| !peer.silent);
                moving |= !fresh && now < since + PATIENCE;
                let begins = own.key(path.own).is_some_and(|key| begins(key, path.key));
                let may_begin = begins || fresh || now >= since + YIELD;
                if !may_begin {
                    look = Some(look.map_or(since + YIELD, |look| look.min(since + YIELD)));
                }
                let seconds = match fresh && silent == Some(path.slot) {
                    true => 0,
                    false => keepalive(own, &other, &pair.paths, path, may_begin, seeing.keepalive),
                };
                pair.keepalives.push(seconds);
            }
            moving |= pair.sending != current || pair.paths.len() > 1;
            self.pairs.insert(node.name.clone(), pair);
        }
        self.open = devices(own, &ring, self.pairs.values().flat_map(|pair| &pair.paths));
        moving |= self.mover.is_waiting() || self.reporter.is_waiting();
        moving |= !seeing.keyring.void(own).is_empty();
        if moving {
            let pause = match now.saturating_sub(self.changed) < PATIENCE {
                true => LOOK,
                false => SLOW_LOOK,
            };
            look = Some(look.map_or(now + pause, |look| look.min(now + pause)));
        }
        self.settle(now, &before, &wanted, look);
    }

    fn settle(
        &mut self,
        now: Duration,
        before: &BTreeMap<NodeName, Pair>,
        wanted: &BTreeSet<(u8, PublicKey)>,
        look: Option<Duration>,
    ) {
        self.since.retain(|place, _| wanted.contains(place));
        let pairs = &self.pairs;
        self.waiting.retain(|node, _| pairs.contains_key(node));
        if *before != self.pairs {
            self.changed = now;
        }
        // Whoever plans often must not put off the next look again and again.
        self.look = match (self.look.filter(|before| *before > now), look) {
            (Some(before), Some(look)) => Some(before.min(look)),
            (_, look) => look,
        };
    }

    /// The path to move to, while it is this end's turn to be silent there. Whatever arrives puts off the keepalive of
    /// the end that receives it (WireGuard's timers count either direction), so of two ends with the same interval
    /// one may never send. It is heard when the other is silent for a while, and has then moved, or is in its turn.
    fn silent_turn(
        &mut self,
        now: Duration,
        own: &NodeKeys,
        other: &NodeKeys,
        node: &NodeName,
        current: Option<u8>,
        paths: &[Path],
    ) -> Option<u8> {
        let moves =
            target(own, other, paths).filter(|path| current.is_some_and(|current| path.slot != current));
        let Some(path) = moves else {
            self.waiting.remove(node);
            return None;
        };
        let since = *self.waiting.entry(node.clone()).or_insert(now);
        let turns = now.saturating_sub(since).as_millis() / TURN.as_millis();
        (turns % 2 == 1).then_some(path.slot)
    }

    /// The bit of the path to move to, once it is ready.
    #[expect(clippy::too_many_arguments, reason = "both ends of a pair, and the machine")]
    fn ready(
        &mut self,
        seeing: &Seeing<'_>,
        own: &NodeKeys,
        other: &NodeKeys,
        index: u16,
        node: &NodeRecord,
        current: Option<u8>,
        (paths, psks): (&[Path], &[PskUse]),
    ) -> u8 {
        let moves = target(own, other, paths).filter(|path| Some(path.slot) != current);
        let (Some(path), true) = (moves, current.is_some()) else {
            self.mover.forget(&node.name);
            return 0;
        };
        let Some(own_key) = own
            .key(path.own)
            .filter(|key| seeing.device_key(path.slot) == Some(*key))
        else {
            return 0;
        };
        let received = seeing.peer(path).map_or(0, |peer| peer.received);
        let heard = self.mover.is_heard(&node.name, own_key, path, received);
        let psk = psk_in(paths, psks, path);
        let verified = is_verified(seeing.state, index, path, own_key, psk, &prefixes(node));
        u8::from(heard && verified) << path.slot
    }

    /// The pair with a node; `None` without a path.
    pub(crate) fn get(&self, node: &NodeName) -> Option<&Pair> {
        self.pairs.get(node)
    }

    /// The generation of the key that each device should have.
    pub(crate) fn open(&self) -> [Option<u64>; KEY_SLOTS as usize] {
        self.open
    }

    /// The path of the active keys to a node, where it waits for its pre-shared key.
    pub(crate) fn awaited(
        &self,
        own: &NodeKeys,
        node: &NodeRecord,
        exchanges: &Exchanges,
    ) -> Option<AwaitedPsk> {
        let pair = self.pairs.get(&node.name)?;
        let path = target(own, &node.keys(), &pair.paths)?;
        let port = path.exchange?;
        let since = self.since.get(&(path.exchange_slot(), path.key)).copied()?;
        let conflict = ends(own, path).and_then(|ends| exchanges.conflict(&ends));
        let awaited = psk_in(&pair.paths, &pair.psks, path) == PskUse::Awaited;
        (awaited || conflict.is_some()).then(|| AwaitedPsk {
            node: node.name.clone(),
            since,
            port,
            conflict: conflict.is_some(),
        })
    }

    /// Whether a path without its pre-shared key waits for the tunnel where that is agreed on.
    pub(crate) fn is_opening(&self) -> bool {
        self.opening
    }

    /// When to look again though nothing happens.
    pub(crate) fn next_look(&self) -> Option<Duration> {
        self.look
    }

    /// A new stream: keyd has forgotten what it was told.
    pub(crate) fn begin_reports(&mut self) {
        self.reporter = Reporter::default();
    }

    /// What has changed since the last call, for keyd.
    pub(crate) fn reports<'a>(
        &mut self,
        now: Duration,
        seeing: &Seeing<'_>,
        exchanges: &Exchanges,
        peers: impl Iterator<Item = (u16, &'a NodeRecord)>,
    ) -> Vec<PairReport> {
        let Some(own) = seeing.own else { return Vec::new() };
        let mut reports = Vec::new();
        let mut present = BTreeSet::new();
        for (index, node) in peers {
            present.insert(&node.name);
            let pair = self.pairs.get(&node.name);
            let paths = pair.map_or(&[][..], |pair| &pair.paths);
            let prefixes = prefixes(node);
            let mut seen = [Seen::default(); KEY_SLOTS as usize];
            for path in paths {
                let psk = pair.map_or(PskUse::Awaited, |pair| psk_in(paths, &pair.psks, path));
                let verified = own
                    .key(path.own)
                    .is_some_and(|key| is_verified(seeing.state, index, path, key, psk, &prefixes));
                let conflict = ends(own, path).and_then(|ends| exchanges.conflict(&ends));
                let received = seeing.peer(path).map_or(0, |peer| peer.received);
                if let Some(seen) = seen.get_mut(usize::from(path.slot)) {
                    *seen = Seen {
                        verified,
                        received,
                        conflict,
                    };
                }
            }
            let sending = seeing.state.paths.get(&index).map(|path| path.slot);
            let keys = (own, &node.keys());
            reports.extend(self.reporter.pair(now, &node.name, keys, paths, seen, sending));
        }
        reports.extend(self.reporter.left(|name| present.contains(name)));
        if !reports.is_empty() {
            self.changed = now;
        }
        reports
    }

    /// Where the pairs are.
    pub(crate) fn tally<'a>(
        &self,
        seeing: &Seeing<'_>,
        peers: impl Iterator<Item = (u16, &'a NodeRecord)>,
    ) -> Tally {
        let mut tally = Tally::default();
        let Some(own) = seeing.own else { return tally };
        for (index, node) in peers {
            let Some(pair) = self.pairs.get(&node.name) else {
                continue;
            };
            let other = node.keys();
            let newest = pair.paths.iter().max_by_key(|path| (path.own, path.peer));
            let verified = newest.is_some_and(|path| {
                let psk = psk_in(&pair.paths, &pair.psks, path);
                own.key(path.own)
                    .is_some_and(|key| is_verified(seeing.state, index, path, key, psk, &prefixes(node)))
            });
            let sends = seeing.state.paths.get(&index).map(|path| path.slot);
            let active = target(own, &other, &pair.paths).map(|path| path.slot);
            tally.pairs += 1;
            tally.verified += usize::from(verified);
            tally.switched += usize::from(sends.is_some() && sends == active);
            tally.draining += usize::from(pair.paths.iter().any(|path| is_draining(own, &other, path)));
        }
        tally
    }
}

impl Seeing<'_> {
    /// The keys on disk, and those that are lost there but still on a device: such a device goes on working.
    fn live_keyring(&self) -> Keyring {
        let mut ring = self.keyring.clone();
        for slot in self.own.iter().flat_map(|own| &own.slots) {
            if ring.held().get(&slot.generation) != Some(&slot.public_key)
                && (0..KEY_SLOTS).any(|device| self.device_key(device) == Some(slot.public_key))
            {
                ring.add(slot.generation, slot.public_key);
            }
        }
        ring
    }

    fn device_key(&self, slot: u8) -> Option<PublicKey> {
        self.state.devices.get(&slot)?.wireguard.public_key
    }

    fn peer(&self, path: &Path) -> Option<&Peer> {
        self.state.devices.get(&path.slot)?.wireguard.peers.get(&path.key)
    }

    /// What the devices show of the pre-shared key of a path that has one.
    fn exchange(&self, own: &NodeKeys, path: &Path) -> Option<(Ends, u8, psk::Seen)> {
        path.exchange?;
        let ends = ends(own, path)?;
        let slot = path.exchange_slot();
        let link = IpAddr::from(link_address(&ends.peer)).into();
        let open = self.state.devices.get(&slot).is_some_and(|device| {
            device.up
                && device.wireguard.public_key == Some(ends.own)
                && device.link == Some(link_address(&ends.own))
                && device
                    .wireguard
                    .peers
                    .get(&ends.peer)
                    .is_some_and(|peer| peer.allowed_ips.contains(&link))
        });
        let there = self.device_key(path.slot) == Some(ends.own);
        let peer = self.peer(path).filter(|_| there);
        let seen = psk::Seen {
            open,
            on_device: peer.and_then(|peer| peer.pre_shared),
            fresh: peer.is_some_and(|peer| !peer.silent),
        };
        Some((ends, slot, seen))
    }
}

/// The keys of both ends of a path.
fn ends(own: &NodeKeys, path: &Path) -> Option<Ends> {
    let own = own.key(path.own)?;
    Some(Ends { own, peer: path.key })
}

fn psk_of(now: Duration, own: &NodeKeys, path: &Path, exchanges: &Exchanges) -> PskUse {
    match (path.exchange, ends(own, path)) {
        (None, _) => PskUse::Without,
        (Some(_), Some(ends)) => exchanges.psk(now, &ends),
        (Some(_), None) => PskUse::Awaited,
    }
}

fn psk_in(paths: &[Path], psks: &[PskUse], wanted: &Path) -> PskUse {
    let found = paths.iter().zip(psks).find(|(path, _)| path.slot == wanted.slot);
    found.map_or(PskUse::Awaited, |(_, psk)| *psk)
}

/// Everything that is a node's: what a peer of it may use as source.
pub(crate) fn prefixes(node: &NodeRecord) -> BTreeSet<IpNet> {
    let hosts = node.addresses.iter().map(|&address| address.into());
    node.prefixes.iter().copied().chain(hosts).collect()
}
