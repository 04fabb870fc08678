//! What agents report of their paths, and what follows from both ends together.

use std::collections::{BTreeMap, BTreeSet};

use warren_model::{
    NodeName, NodeUid,
    keys::{PairReport, PathState},
};

/// After so long without a handshake no session can be alive (WireGuard's reject-after time), milliseconds.
const SESSIONS_END_MS: u64 = 180_000;

#[derive(Debug)]
struct Reported {
    uid: NodeUid,
    paths: Vec<PathState>,
    /// Since when this end has said that no path has a fresh handshake.
    silent_since: Option<u64>,
    /// When the ends were told of a conflict last.
    told: Option<u64>,
}

/// What one agent has reported since it connected.
#[derive(Debug, Default)]
pub(super) struct Reports {
    peers: BTreeMap<NodeName, Reported>,
    /// Of them, those to whom a path has different pre-shared keys at its ends.
    conflicts: BTreeSet<NodeName>,
}

impl Reports {
    pub(super) fn put(&mut self, now: u64, report: PairReport) {
        let PairReport { peer, uid, paths } = report;
        match paths.iter().any(|path| path.conflict.is_some()) {
            true => self.conflicts.insert(peer.clone()),
            false => self.conflicts.remove(&peer),
        };
        if paths.is_empty() {
            self.peers.remove(&peer);
            return;
        }
        let before = self.peers.get(&peer).filter(|before| before.uid == uid);
        let since = before.map_or(Some(now), |before| before.silent_since);
        let silent = !paths.iter().any(|path| path.verified);
        let silent_since = silent.then_some(since.unwrap_or(now));
        // Said again it is not a new one.
        let conflicts = |paths: &[PathState]| -> Vec<_> { paths.iter().map(|path| path.conflict).collect() };
        let same = before.filter(|before| conflicts(&before.paths) == conflicts(&paths));
        let told = same.and_then(|before| before.told);
        let reported = Reported {
            uid,
            paths,
            silent_since,
            told,
        };
        self.peers.insert(peer, reported);
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    fn reported(&self, peer: &NodeName, uid: &NodeUid) -> Option<&Reported> {
        self.peers.get(peer).filter(|reported| reported.uid == *uid)
    }

    /// The paths to this incarnation of a peer; `None` where nothing was reported.
    pub(super) fn of(&self, peer: &NodeName, uid: &NodeUid) -> Option<&[PathState]> {
        self.reported(peer, uid).map(|reported| reported.paths.as_slice())
    }

    /// Peers to whom a path has different pre-shared keys at its ends.
    pub(super) fn conflicts(&self) -> impl Iterator<Item = &NodeName> {
        self.conflicts.iter()
    }

    /// Whether the ends may be told of a conflict (again); notes that they are.
    pub(super) fn may_settle(&mut self, now: u64, pause: u64, peer: &NodeName) -> bool {
        let Some(reported) = self.peers.get_mut(peer) else {
            return false;
        };
        let due = reported.told.is_none_or(|told| now.saturating_sub(told) >= pause);
        if due {
            reported.told = Some(now);
        }
        due
    }

    /// Whether this end has had no path to the peer for so long that no session can be alive. One that has just booted
    /// has none either, but the peer's may be.
    pub(super) fn is_silent(&self, now: u64, peer: &NodeName, uid: &NodeUid) -> bool {
        let since = self
            .reported(peer, uid)
            .and_then(|reported| reported.silent_since);
        since.is_some_and(|since| now.saturating_sub(since) >= SESSIONS_END_MS)
    }
}

/// Whether one end has verified a path.
pub(super) fn verified(paths: Option<&[PathState]>, own: u64, peer: u64) -> bool {
    paths.is_some_and(|paths| {
        paths
            .iter()
            .any(|path| (path.own, path.peer) == (own, peer) && path.verified)
    })
}

/// Whether one end sends on a path with the `active` generation of one node and hears nothing on those with another.
/// `generation` picks that node's generation from a path.
pub(super) fn moved(
    paths: Option<&[PathState]>,
    generation: impl Fn(&PathState) -> u64,
    active: u64,
) -> (bool, bool) {
    let Some(paths) = paths else {
        return (false, false);
    };
    let sends = paths
        .iter()
        .any(|path| path.sending && generation(path) == active);
    let strays = paths
        .iter()
        .any(|path| path.sending && generation(path) != active);
    let quiet = paths.iter().all(|path| generation(path) == active || path.quiet);
    (sends && !strays, quiet)
}
