//! What somebody else has done to keyd's objects.
//!
//! The API server counts the changes of each object's spec (`metadata.generation`). What keyd has read at the begin of its term or
//! written since is noted; any other count is somebody else's doing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

/// Something odd.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Odd {
    pub(crate) kind: Kind,
    pub(crate) name: String,
    /// What was found: a generation, or that it is gone.
    change: Change,
}

/// Kinds that keyd alone writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    Node,
    Identity,
    State,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Change {
    /// (UID, generation) that we have not written.
    Changed(String, i64),
    Deleted,
    /// It was never ours.
    Foreign(String, i64),
}

impl fmt::Display for Odd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Node => "MeshNode",
            Kind::Identity => "MeshIdentity",
            Kind::State => "MeshState",
        };
        let name = &self.name;
        match &self.change {
            Change::Changed(..) => write!(
                f,
                "somebody else than keyd has changed {kind} {name}: it is not believed and written anew"
            ),
            Change::Deleted => write!(
                f,
                "somebody else than keyd has deleted {kind} {name}: it is written anew"
            ),
            Change::Foreign(..) => write!(
                f,
                "somebody else than keyd has made {kind} {name}: it is not believed"
            ),
        }
    }
}

/// What was read or written last: (UID, generation).
#[derive(Debug, Default)]
pub(super) struct Written(Mutex<BTreeMap<(Kind, String), (String, i64)>>);

impl Written {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<(Kind, String), (String, i64)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A term has begun, with this MeshState: of the rest counts what is read now.
    pub(super) fn begin(&self) {
        self.lock().retain(|(kind, _), _| *kind == Kind::State);
    }

    /// An object as it was read or written.
    pub(super) fn note(&self, kind: Kind, metadata: &ObjectMeta) {
        if let Some((name, version)) = place(metadata) {
            self.lock().insert((kind, name), version);
        }
    }

    /// Deleted by us.
    pub(super) fn forget(&self, kind: Kind, name: &str) {
        self.lock().remove(&(kind, name.to_owned()));
    }

    /// Compares with what there is of a kind.
    pub(super) fn odd(&self, kind: Kind, found: &[ObjectMeta]) -> BTreeSet<Odd> {
        let written = self.lock();
        let mut odd = BTreeSet::new();
        let mut seen = BTreeSet::new();
        for (name, version) in found.iter().filter_map(place) {
            let change = match written.get(&(kind, name.clone())) {
                Some(ours) if *ours == version => None,
                Some(_) => Some(Change::Changed(version.0, version.1)),
                None => Some(Change::Foreign(version.0, version.1)),
            };
            odd.extend(change.map(|change| Odd {
                kind,
                name: name.clone(),
                change,
            }));
            seen.insert(name);
        }
        let gone = written
            .keys()
            .filter(|(of, name)| *of == kind && !seen.contains(name));
        odd.extend(gone.map(|(kind, name)| Odd {
            kind: *kind,
            name: name.clone(),
            change: Change::Deleted,
        }));
        odd
    }
}

fn place(metadata: &ObjectMeta) -> Option<(String, (String, i64))> {
    let uid = metadata.uid.clone().unwrap_or_default();
    let generation = metadata.generation.unwrap_or_default();
    Some((metadata.name.clone()?, (uid, generation)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(name: &str, uid: &str, generation: i64) -> ObjectMeta {
        ObjectMeta {
            name: Some(name.into()),
            uid: Some(uid.into()),
            generation: Some(generation),
            ..ObjectMeta::default()
        }
    }

    #[test]
    fn what_others_change_delete_and_make_is_odd_and_what_we_do_is_not() {
        let written = Written::default();
        written.note(Kind::Node, &meta("a", "1", 3));
        written.note(Kind::Node, &meta("b", "2", 1));
        written.note(Kind::Identity, &meta("a", "9", 1));
        let odd = |found: &[ObjectMeta]| -> Vec<String> {
            written
                .odd(Kind::Node, found)
                .iter()
                .map(ToString::to_string)
                .collect()
        };
        let b = || meta("b", "2", 1);
        assert!(odd(&[meta("a", "1", 3), b()]).is_empty());
        assert!(odd(&[meta("a", "1", 4), b()])[0].contains("changed MeshNode a"));
        // Deleted and made again.
        assert!(odd(&[meta("a", "5", 3), b()])[0].contains("changed MeshNode a"));
        assert!(odd(&[b()])[0].contains("deleted MeshNode a"));
        assert!(odd(&[meta("a", "1", 3), b(), meta("c", "7", 1)])[0].contains("made MeshNode c"));
        written.note(Kind::Node, &meta("a", "1", 4));
        written.forget(Kind::Node, "b");
        assert!(odd(&[meta("a", "1", 4)]).is_empty());
    }
}
