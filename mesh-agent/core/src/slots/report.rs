//! What `keyd` is told of the paths: what has changed, pair by pair.

use std::{collections::BTreeMap, time::Duration};

pub use warren_model::keys::{PairReport, PathState as PathReport};
use warren_model::{NodeName, NodeUid, PskConflict};

use super::path::{KEY_SLOTS, NodeKeys, Path, is_draining};

/// A draining path counts as quiet when nothing has arrived on it for so long. The drain time of the rotation comes
/// on top.
pub const QUIET: Duration = Duration::from_secs(1);

/// What a device shows of a path.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// See [`super::is_verified`].
    pub verified: bool,
    /// Bytes received from the peer on this device.
    pub received: u64,
    /// The ends are known to have different pre-shared keys.
    pub conflict: Option<PskConflict>,
}

#[derive(Debug)]
struct Told {
    uid: NodeUid,
    paths: Vec<PathReport>,
    /// Bytes received and since when it has been so many, by slot, of draining paths.
    still: [Option<(u64, Duration)>; KEY_SLOTS as usize],
}

/// Remembers what was reported in this stream. Make a new one for a new stream.
#[derive(Debug, Default)]
pub struct Reporter {
    told: BTreeMap<NodeName, Told>,
}

impl Reporter {
    /// A pair as it is now; returns the report where something has changed. `seen` by slot, `sending` is what the path
    /// map says (not what is wanted).
    pub fn pair(
        &mut self,
        now: Duration,
        peer: &NodeName,
        keys: (&NodeKeys, &NodeKeys),
        paths: &[Path],
        seen: [Seen; KEY_SLOTS as usize],
        sending: Option<u8>,
    ) -> Option<PairReport> {
        let (own, other) = keys;
        if !self.told.contains_key(peer) {
            let told = Told {
                uid: other.uid.clone(),
                paths: vec![],
                still: Default::default(),
            };
            self.told.insert(peer.clone(), told);
        }
        let told = self.told.get_mut(peer)?;
        let mut still = [None; KEY_SLOTS as usize];
        let report = |path: &Path| {
            let slot = usize::from(path.slot);
            let mut quiet = false;
            if is_draining(own, other, path) {
                let received = seen[slot].received;
                let since = told.still[slot].filter(|(before, _)| *before == received);
                let (_, since) = *still[slot].insert(since.unwrap_or((received, now)));
                quiet = now.saturating_sub(since) >= QUIET;
            }
            PathReport {
                own: path.own,
                peer: path.peer,
                verified: seen[slot].verified,
                sending: sending == Some(path.slot),
                quiet,
                conflict: seen[slot].conflict,
            }
        };
        let now_paths: Vec<_> = paths.iter().map(report).collect();
        told.still = still;
        if now_paths == told.paths && told.uid == other.uid {
            return None;
        }
        told.paths.clone_from(&now_paths);
        told.uid.clone_from(&other.uid);
        Some(PairReport {
            peer: peer.clone(),
            uid: other.uid.clone(),
            paths: now_paths,
        })
    }

    /// A peer left the directory.
    pub fn gone(&mut self, peer: &NodeName) -> Option<PairReport> {
        let told = self.told.remove(peer)?;
        Some(PairReport {
            peer: peer.clone(),
            uid: told.uid,
            paths: vec![],
        })
    }

    /// Forgets all peers that are not `present`.
    pub fn left(&mut self, present: impl Fn(&NodeName) -> bool) -> Vec<PairReport> {
        let gone: Vec<_> = self.told.keys().filter(|name| !present(name)).cloned().collect();
        gone.iter().filter_map(|name| self.gone(name)).collect()
    }

    /// Whether a path waits to become quiet: look again before long.
    pub fn is_waiting(&self) -> bool {
        self.told
            .values()
            .any(|told| told.still.iter().flatten().next().is_some())
    }
}
