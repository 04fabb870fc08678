//! One node on its way from one key to the next: what to do now, as a function of what is known.

use std::collections::{BTreeMap, BTreeSet};

use warren_model::{
    NodeKeys, NodeName, PublicKey,
    keys::{MAX_GENERATION, PathState},
};

use super::{
    readiness::{self, Reports},
    spec::{Pace, Stragglers},
};

/// Where a node stands (diagram: module comment).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Not begun.
    Pending,
    /// Making a key.
    Preparing,
    /// Handshakes on the new paths.
    Verifying,
    /// Moving to the new paths.
    Switching,
    /// Waiting for the last packets.
    Draining,
    /// Destroying the old key.
    Retiring,
    /// New key only.
    Done,
    /// Kept the old key, or still has both.
    Failed,
    /// The node does not exist any more.
    Gone,
}

/// A node that exists, with or without keys.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) keys: NodeKeys,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) connected: bool,
    /// Keys whose private half the agent has, as it said since it connected.
    pub(super) held: Option<BTreeMap<u64, PublicKey>>,
    pub(super) reports: Reports,
    /// A change of the keys is being written.
    pub(super) writing: bool,
}

impl Member {
    /// Whether others have a path to it.
    pub(super) fn is_published(&self) -> bool {
        !self.keys.slots.is_empty()
    }

    /// Whether the agent says that it has not got the private key of a published generation.
    pub(super) fn lacks(&self, generation: u64) -> bool {
        let key = self.keys.key(generation);
        let has = |held: &BTreeMap<_, _>| key.is_some() && held.get(&generation) == key.as_ref();
        self.connected && self.held.as_ref().is_some_and(|held| !has(held))
    }

    /// Whether it needs a key whatever anybody wishes: it has none, or none that works.
    pub(super) fn needs_key(&self) -> bool {
        self.keys.active == 0 || self.is_cut_off()
    }

    /// Whether the key that others send with is lost.
    pub(super) fn is_cut_off(&self) -> bool {
        self.keys.active > 0 && self.is_published() && self.lacks(self.keys.active)
    }
}

pub(super) type Members = BTreeMap<NodeName, Member>;

/// What is remembered of a node on its way. All of it may be lost.
#[derive(Debug)]
pub(super) struct Flight {
    /// When it begins (the jitter lies before that), and from when the deadline counts.
    pub(super) began: u64,
    /// The active generation it began with.
    pub(super) from: u64,
    pub(super) quiet_since: Option<u64>,
    /// What the agent was asked for in this session.
    pub(super) asked: Option<u64>,
    /// The peer that was missing last.
    pub(super) waiting_for: Option<NodeName>,
    /// Past its deadline and past the point of no return.
    pub(super) stalled: bool,
}

impl Flight {
    pub(super) fn new(began: u64, from: u64) -> Self {
        Self {
            began,
            from,
            quiet_since: None,
            asked: None,
            waiting_for: None,
            stalled: false,
        }
    }

    /// The phase of a node that is on its way.
    pub(super) fn phase(&self, keys: &NodeKeys) -> Phase {
        if keys.candidate().is_some() {
            Phase::Verifying
        } else if keys.former().is_some() {
            match self.quiet_since {
                Some(_) => Phase::Draining,
                None => Phase::Switching,
            }
        } else if keys.active > self.from {
            Phase::Retiring
        } else {
            Phase::Preparing
        }
    }
}

/// What somebody wants of a node on its way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wish {
    /// A rotation wants its key changed; without one what was begun is taken back where that is possible.
    pub(super) rotate: bool,
    pub(super) pace: Pace,
    pub(super) stragglers: Stragglers,
}

impl Wish {
    /// Nobody wants anything: finish in peace.
    pub(super) fn none() -> Self {
        Self {
            rotate: false,
            pace: Pace::default(),
            stragglers: Stragglers::Wait,
        }
    }
}

/// What to do now.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Something else has to happen first.
    Wait,
    /// This peer (or the node itself) is missing.
    WaitFor(NodeName),
    /// The same, and the deadline has passed beyond the point of no return.
    Stall(NodeName),
    /// Ask the agent for a key.
    Ask(u64),
    /// All have moved, but packets still arrive on old paths.
    NotQuiet,
    /// All have moved and are quiet.
    Quiet,
    /// Make the candidate active.
    Commit,
    /// Remove the former generation.
    Retire,
    /// Withdraw the candidate, if there is one: a sentence, or `None` where somebody asked to stop.
    GiveUp(Option<String>),
    /// Revoke this peer's keys.
    Revoke(NodeName),
    /// Nothing is left to do.
    Finished,
}

/// A node with all the others around it.
pub(super) struct View<'a> {
    pub(super) name: &'a NodeName,
    pub(super) member: &'a Member,
    pub(super) members: &'a Members,
    pub(super) wish: Wish,
    pub(super) now: u64,
}

impl View<'_> {
    pub(super) fn step(&self, flight: &Flight) -> Step {
        if self.member.writing || self.now < flight.began {
            return Step::Wait;
        }
        let keys = &self.member.keys;
        match (keys.candidate(), keys.former()) {
            (Some(candidate), _) => self.verify(flight, candidate),
            // Without a deadline: there is nothing to go back to.
            (None, _) if self.member.is_cut_off() => self.ask(flight, keys.replacement()),
            (None, Some(_)) => self.switch_and_drain(flight),
            // The first key of a node needs no rotation.
            (None, None) if keys.active == 0 => self.ask(flight, self.first()),
            (None, None) if keys.active > flight.from => self.confirm_destroyed(flight),
            (None, None) if !self.wish.rotate => Step::Finished,
            (None, None) if self.is_late(flight) => {
                Step::GiveUp(Some(format!("node {} offered no new key in time", self.name)))
            }
            (None, None) => self.ask(flight, keys.next()),
        }
    }

    fn is_late(&self, flight: &Flight) -> bool {
        self.now.saturating_sub(flight.began) >= self.wish.pace.deadline_ms
    }

    fn ask(&self, flight: &Flight, generation: u64) -> Step {
        // What the agent has comes first: which key it needs depends on that.
        match self.member.connected && self.member.held.is_some() && flight.asked != Some(generation) {
            true => Step::Ask(generation),
            false => Step::WaitFor(self.name.clone()),
        }
    }

    /// The first generation of a node of which nothing is stored. Its agent may have keys all the same, and others know them,
    /// where what was stored is lost: generations never go back.
    fn first(&self) -> u64 {
        let keys = &self.member.keys;
        let held = self.member.held.as_ref().and_then(|held| held.last_key_value());
        let known = held.map(|(generation, _)| *generation);
        known
            .filter(|generation| (keys.last + 1..=MAX_GENERATION).contains(generation))
            .unwrap_or_else(|| keys.next())
    }

    fn verify(&self, flight: &Flight, candidate: u64) -> Step {
        if self.member.lacks(candidate) {
            let sentence = format!("node {} lost its new key: its disk was replaced", self.name);
            return Step::GiveUp(Some(sentence));
        }
        if self.member.is_cut_off() {
            // Nobody reaches it on the old key: waiting helps nobody.
            return Step::Commit;
        }
        if !self.wish.rotate {
            return Step::GiveUp(None);
        }
        let missing = self.first_pair(flight, |peer, other| {
            let active = other.keys.active;
            self.is_left(peer, other)
                || readiness::verified(self.own_report(peer, other), candidate, active)
                    && readiness::verified(self.report_of(other), active, candidate)
        });
        match missing {
            None => Step::Commit,
            Some(peer) if !self.is_late(flight) => Step::WaitFor(peer),
            Some(peer) if self.may_revoke(&peer) => Step::Revoke(peer),
            Some(peer) => Step::GiveUp(Some(format!(
                "no handshake with node {peer} on the new key in time: the old key stays"
            ))),
        }
    }

    fn switch_and_drain(&self, flight: &Flight) -> Step {
        let active = self.member.keys.active;
        let ends = |peer: &NodeName, other: &Member| {
            let here = readiness::moved(self.own_report(peer, other), |path| path.own, active);
            let there = readiness::moved(self.report_of(other), |path| path.peer, active);
            (here.0 && there.0, here.1 && there.1)
        };
        let missing = self.first_pair(flight, |peer, other| {
            self.is_left(peer, other) || ends(peer, other).0
        });
        if let Some(peer) = missing {
            return match self.is_late(flight) {
                true if self.may_revoke(&peer) => Step::Revoke(peer),
                true => Step::Stall(peer),
                false => Step::WaitFor(peer),
            };
        }
        let quiet = self
            .others()
            .all(|(peer, other)| self.is_left(peer, other) || ends(peer, other).1);
        match flight.quiet_since {
            _ if !quiet => Step::NotQuiet,
            Some(since) if self.now.saturating_sub(since) >= self.wish.pace.drain_ms => Step::Retire,
            _ => Step::Quiet,
        }
    }

    /// After the old generation left the directory: has its private key been destroyed, and has everybody removed it?
    fn confirm_destroyed(&self, flight: &Flight) -> Step {
        let keys = &self.member.keys;
        let destroyed = self.member.connected
            && self
                .member
                .held
                .as_ref()
                .is_some_and(|held| held.keys().all(|generation| *generation >= keys.active));
        let missing = match destroyed {
            false => Some(self.name.clone()),
            true => self.first_pair(flight, |_, other| {
                !other.connected
                    || self
                        .report_of(other)
                        .is_some_and(|paths| paths.iter().all(|path| path.peer == keys.active))
            }),
        };
        match missing {
            None => Step::Finished,
            Some(peer) if self.is_late(flight) => Step::Stall(peer),
            Some(peer) => Step::WaitFor(peer),
        }
    }

    fn others(&self) -> impl Iterator<Item = (&NodeName, &Member)> {
        self.members
            .iter()
            .filter(|(name, member)| *name != self.name && member.is_published())
    }

    /// The first peer that does not hold; the one that was missing last is asked first.
    fn first_pair(&self, flight: &Flight, holds: impl Fn(&NodeName, &Member) -> bool) -> Option<NodeName> {
        if let Some(last) = &flight.waiting_for
            && let Some(other) = self.members.get(last)
            && last != self.name
            && other.is_published()
            && !holds(last, other)
        {
            return Some(last.clone());
        }
        self.others()
            .find(|(peer, other)| !holds(peer, other))
            .map(|(peer, _)| peer.clone())
    }

    fn own_report(&self, peer: &NodeName, other: &Member) -> Option<&[PathState]> {
        self.member.reports.of(peer, &other.keys.uid)
    }

    fn report_of<'a>(&self, other: &'a Member) -> Option<&'a [PathState]> {
        other.reports.of(self.name, &self.member.keys.uid)
    }

    /// A straggler with whom there is no traffic to lose.
    fn is_left(&self, peer: &NodeName, other: &Member) -> bool {
        self.wish.stragglers == Stragglers::Leave
            && !other.connected
            && self.member.reports.is_silent(self.now, peer, &other.keys.uid)
    }

    fn may_revoke(&self, peer: &NodeName) -> bool {
        self.wish.stragglers == Stragglers::Revoke
            && self.members.get(peer).is_some_and(|member| !member.connected)
    }
}

/// The first peer that is not connected and may not be left, seen from a node that has not begun.
pub(super) fn obstacle(
    name: &NodeName,
    member: &Member,
    members: &Members,
    away: &BTreeSet<NodeName>,
    stragglers: Stragglers,
    now: u64,
) -> Option<NodeName> {
    if !member.connected {
        return Some(name.clone());
    }
    away.iter()
        .filter(|peer| *peer != name)
        .find(|peer| {
            let silent = members
                .get(*peer)
                .is_some_and(|other| member.reports.is_silent(now, peer, &other.keys.uid));
            !(stragglers == Stragglers::Leave && silent)
        })
        .cloned()
}
