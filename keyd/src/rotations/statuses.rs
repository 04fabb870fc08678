//! When which status is written: at once where a rotation begins or ends, else once a second at most. Of 500 nodes one changes
//! its phase all the time, and a status names all of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use k8s_openapi::jiff::Timestamp;
use tokio::time::Instant;
use warren_crds::KeyRotationStatus;
use warren_keyd_core::Core;

use super::{progress::status, writer::Wanted};
use crate::store::RotationStatuses;

/// Time between two statuses of a rotation that goes on.
const PAUSE: Duration = Duration::from_secs(1);

/// What was said of a rotation.
#[derive(Debug)]
struct Said {
    uid: String,
    status: KeyRotationStatus,
    at: Option<Instant>,
}

/// What was said of all rotations.
#[derive(Debug)]
pub(crate) struct Statuses {
    said: BTreeMap<String, Said>,
    changed: BTreeSet<String>,
}

impl Statuses {
    pub(crate) fn new(stored: &RotationStatuses) -> Self {
        let said = stored.iter().map(|(name, (uid, status))| {
            let said = Said {
                uid: uid.clone(),
                status: status.clone(),
                at: None,
            };
            (name.clone(), said)
        });
        Self {
            said: said.collect(),
            changed: BTreeSet::new(),
        }
    }

    /// There is something else to say of a rotation.
    pub(crate) fn changed(&mut self, name: String) {
        self.changed.insert(name);
    }

    /// What is waited for changes without a word from the core.
    pub(crate) fn look_again(&mut self, core: &Core) {
        let running = core.rotations().filter(|object| {
            let standing = core.machine().standing(&object.name);
            standing.is_some_and(|standing| !standing.progress.phase.is_over())
        });
        let names: Vec<_> = running.map(|object| object.name.clone()).collect();
        self.changed.extend(names);
    }

    /// Statuses to write now.
    pub(crate) fn take(&mut self, core: &Core) -> Vec<Wanted> {
        let mut out = vec![];
        let now = Instant::now();
        for name in std::mem::take(&mut self.changed) {
            let (Some(object), Some(standing)) = (core.rotation(&name), core.machine().standing(&name))
            else {
                self.said.remove(&name);
                continue;
            };
            let old = self.said.get(&name).filter(|said| said.uid == object.uid);
            let new = status(object, &standing, old.map(|said| &said.status), Timestamp::now());
            if old.is_some_and(|said| said.status == new) {
                continue;
            }
            let soon = old.is_some_and(|said| {
                said.status.phase == new.phase && said.at.is_some_and(|at| now.duration_since(at) < PAUSE)
            });
            if soon {
                self.changed.insert(name);
                continue;
            }
            let said = Said {
                uid: object.uid.clone(),
                status: new.clone(),
                at: Some(now),
            };
            self.said.insert(name.clone(), said);
            out.push(Wanted {
                name,
                uid: object.uid.clone(),
                status: new,
            });
        }
        out
    }
}
