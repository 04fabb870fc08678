//! What agents report of their paths, and what follows from both ends together.

use std::collections::BTreeMap;

use warren_model::{NodeName, NodeUid};

/// A path of a pair as one end sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathState {
    /// Generation of the reporting node's key.
    pub own: u64,
    /// Generation of the peer's key.
    pub peer: u64,
    /// Everything is in place to receive, and the last handshake is fresh.
    pub verified: bool,
    /// Packets to the peer take this path.
    pub sending: bool,
    /// Nothing has arrived on it for a while.
    pub quiet: bool,
}

/// All paths to one peer; replaces what was reported of that peer before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairReport {
    /// The peer.
    pub peer: NodeName,
    /// Its UID, as the reporting agent knows it.
    pub uid: NodeUid,
    /// The paths.
    pub paths: Vec<PathState>,
}

/// What one agent has reported since it connected.
#[derive(Debug, Default)]
pub(super) struct Reports(BTreeMap<NodeName, (NodeUid, Vec<PathState>)>);

impl Reports {
    pub(super) fn put(&mut self, report: PairReport) {
        if report.paths.is_empty() {
            self.0.remove(&report.peer);
        } else {
            self.0.insert(report.peer, (report.uid, report.paths));
        }
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// The paths to this incarnation of a peer; `None` where nothing was reported.
    pub(super) fn of(&self, peer: &NodeName, uid: &NodeUid) -> Option<&[PathState]> {
        let (reported, paths) = self.0.get(peer)?;
        (reported == uid).then_some(paths.as_slice())
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

/// Whether no path of the pair has a fresh handshake, as one end says.
pub(super) fn silent(paths: Option<&[PathState]>) -> bool {
    paths.is_some_and(|paths| paths.iter().all(|path| !path.verified))
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
