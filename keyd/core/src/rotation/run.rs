//! One run of a rotation.

use warren_model::NodeName;

use super::{
    flight::{Member, Members},
    schedule,
    spec::RotationSpec,
    status::{Planned, Progress, RotationPhase},
};

#[derive(Debug)]
pub(super) struct Rotation {
    pub(super) created: u64,
    pub(super) spec: RotationSpec,
    pub(super) progress: Progress,
    /// Since when nothing could begin although there was room.
    pub(super) blocked_since: Option<u64>,
    pub(super) dirty: bool,
}

impl Planned {
    /// Whether the node still has to get a newer key.
    pub(super) fn is_open(&self, member: &Member) -> bool {
        self.outcome.is_none() && member.keys.uid == self.uid && member.keys.active <= self.from
    }
}

impl Rotation {
    /// Begins a new run where the schedule says so.
    pub(super) fn wake(&mut self, unix_seconds: u64) {
        let Some(every) = self
            .spec
            .every_seconds
            .filter(|_| self.progress.phase.is_over() && !self.spec.abort)
        else {
            return;
        };
        let (due, last) = schedule::due(unix_seconds, self.progress.started, every);
        if due {
            self.progress.phase = RotationPhase::Pending;
            self.dirty = true;
        } else if last != self.progress.started {
            self.progress.started = last;
            self.dirty = true;
        }
    }

    pub(super) fn begin(&mut self, members: &Members, unix_seconds: u64) {
        let chosen = members
            .iter()
            .filter(|(name, m)| m.is_published() && self.spec.selection.selects(name, &m.labels));
        let plan = chosen
            .map(|(name, member)| {
                let planned = Planned {
                    uid: member.keys.uid.clone(),
                    from: member.keys.active,
                    outcome: None,
                };
                (name.clone(), planned)
            })
            .collect();
        self.progress = Progress {
            phase: RotationPhase::Running,
            run: self.progress.run + 1,
            started: unix_seconds,
            completed: 0,
            plan,
        };
        self.blocked_since = None;
        self.dirty = true;
    }
}

/// A delay below `most` that is the same for the same names (FNV-1a).
pub(super) fn jitter(rotation: &str, node: &NodeName, most: u64) -> u64 {
    let bytes = rotation.bytes().chain([0]).chain(node.as_str().bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    hash % (most + 1)
}
