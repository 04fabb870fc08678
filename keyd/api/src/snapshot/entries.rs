//! The set of entries and its digest.

use std::collections::BTreeMap;

use aws_lc_rs::digest::{Context, SHA256};
use prost::Message as _;

use super::CHUNK_BYTES;
use crate::proto::{Entry, EntryKey, SignedManifest, Update};

/// So many entries lie between two checkpoints of the digest.
const CHECKPOINT_EVERY: usize = 512;

/// All entries of a directory, by kind and key, with the hash of each and the state of the digest at some places: a
/// change hashes only what changed, and 32 bytes per entry behind it.
#[derive(Clone, Default)]
pub struct EntrySet {
    entries: BTreeMap<Name, Hashed>,
    /// The digest of everything before an entry that was there when it was taken.
    checkpoints: BTreeMap<Name, Context>,
}

impl PartialEq for EntrySet {
    fn eq(&self, other: &Self) -> bool {
        self.entries == other.entries
    }
}

impl Eq for EntrySet {}

impl std::fmt::Debug for EntrySet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map()
            .entries(self.entries.iter().map(|(name, (value, _))| (name, value)))
            .finish()
    }
}

/// Kind and key.
type Name = (i32, String);
/// A value and its entry's hash.
type Hashed = (Vec<u8>, [u8; 32]);

/// What [`EntrySet::change`] replaced, oldest first.
#[derive(Debug)]
pub(super) struct Undo(Vec<(Name, Option<Hashed>)>);

impl EntrySet {
    /// Inserts or replaces an entry; true where that changed something.
    pub fn upsert(&mut self, entry: Entry) -> bool {
        let hash = entry_digest(&entry);
        let old = self.put((entry.kind, entry.key), Some((entry.value, hash)));
        old.is_none_or(|(_, old)| old != hash)
    }

    /// Removes an entry; true where it was there.
    pub fn remove(&mut self, key: &EntryKey) -> bool {
        self.put((key.kind, key.key.clone()), None).is_some()
    }

    /// Replaces an entry and forgets the checkpoints behind it; returns what was there.
    fn put(&mut self, name: Name, new: Option<Hashed>) -> Option<Hashed> {
        // A checkpoint at the very name does not cover it, but must not stay where the entry goes.
        drop(self.checkpoints.split_off(&name));
        match new {
            Some(new) => self.entries.insert(name, new),
            None => self.entries.remove(&name),
        }
    }

    /// Removes and upserts, in this order; what comes back takes all of it back again.
    pub(super) fn change(&mut self, removes: &[EntryKey], upserts: &[Entry]) -> Undo {
        let mut undo = Vec::with_capacity(removes.len() + upserts.len());
        for key in removes {
            let name = (key.kind, key.key.clone());
            let old = self.put(name.clone(), None);
            undo.push((name, old));
        }
        for entry in upserts {
            let name = (entry.kind, entry.key.clone());
            let new = (entry.value.clone(), entry_digest(entry));
            let old = self.put(name.clone(), Some(new));
            undo.push((name, old));
        }
        Undo(undo)
    }

    /// Takes a change back.
    pub(super) fn revert(&mut self, undo: Undo) {
        for (name, old) in undo.0.into_iter().rev() {
            self.put(name, old);
        }
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// All entries, sorted by kind and key.
    pub fn iter(&self) -> impl Iterator<Item = Entry> + '_ {
        self.entries.iter().map(|((kind, key), (value, _))| Entry {
            kind: *kind,
            key: key.clone(),
            value: value.clone(),
        })
    }

    /// SHA-256 over the entries' hashes, sorted by kind and key.
    pub fn digest(&self) -> [u8; 32] {
        self.digest_from_checkpoint().0
    }

    /// As [`Self::digest`]; the next one begins where nothing has changed since.
    pub fn digest_and_keep(&mut self) -> [u8; 32] {
        let (digest, checkpoints) = self.digest_from_checkpoint();
        self.checkpoints.extend(checkpoints);
        digest
    }

    /// The digest, and the checkpoints passed on the way.
    fn digest_from_checkpoint(&self) -> ([u8; 32], Vec<(Name, Context)>) {
        let (mut all, rest) = match self.checkpoints.last_key_value() {
            Some((name, state)) => (state.clone(), self.entries.range(name.clone()..)),
            None => (Context::new(&SHA256), self.entries.range::<Name, _>(..)),
        };
        let mut passed = vec![];
        let mut hashes = Vec::with_capacity(32 * CHECKPOINT_EVERY);
        for (count, (name, (_, hash))) in rest.enumerate() {
            if count > 0 && count.is_multiple_of(CHECKPOINT_EVERY) {
                all.update(&hashes);
                hashes.clear();
                passed.push((name.clone(), all.clone()));
            }
            hashes.extend_from_slice(hash);
        }
        all.update(&hashes);
        (finish(all), passed)
    }
}

/// SHA-256(kind as one byte || length of key, 4 bytes big-endian || key || value).
fn entry_digest(entry: &Entry) -> [u8; 32] {
    let mut one = Context::new(&SHA256);
    // Kinds are small; one that is not must not collide with another's byte.
    one.update(&[u8::try_from(entry.kind).unwrap_or(u8::MAX)]);
    one.update(&u32::try_from(entry.key.len()).unwrap_or(u32::MAX).to_be_bytes());
    one.update(entry.key.as_bytes());
    one.update(&entry.value);
    finish(one)
}

fn finish(context: Context) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(context.finish().as_ref());
    out
}

/// Splits a change into updates of at most [`CHUNK_BYTES`] of entries each (a single entry that is larger travels
/// alone); the manifest goes into the last. Always yields at least one.
pub fn chunks(
    (epoch, version): (u64, u64),
    snapshot: bool,
    upserts: impl IntoIterator<Item = Entry>,
    removes: impl IntoIterator<Item = EntryKey>,
    manifest: SignedManifest,
) -> Vec<Update> {
    let empty = || Update {
        epoch,
        version,
        snapshot,
        ..Update::default()
    };
    let mut out = vec![];
    let mut current = empty();
    let mut size = 0;
    let mut room = |current: &mut Update, bytes: usize| {
        if size > 0 && size + bytes > CHUNK_BYTES {
            out.push(std::mem::replace(current, empty()));
            size = 0;
        }
        size += bytes;
    };
    for entry in upserts {
        // 16 bytes cover the field tags and lengths around an entry.
        room(&mut current, entry.encoded_len() + 16);
        current.upserts.push(entry);
    }
    for key in removes {
        room(&mut current, key.encoded_len() + 16);
        current.removes.push(key);
    }
    current.last = true;
    current.manifest = Some(manifest);
    out.push(current);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: &str, value: &[u8]) -> Entry {
        Entry {
            kind: 1,
            key: key.into(),
            value: value.to_vec(),
        }
    }

    #[test]
    fn the_digest_depends_on_content_not_on_history() {
        let mut a = EntrySet::default();
        let mut b = EntrySet::default();
        a.upsert(entry("x", b"1"));
        a.upsert(entry("y", b"2"));
        b.upsert(entry("y", b"old"));
        b.upsert(entry("z", b"3"));
        assert_ne!(a.digest(), b.digest());
        assert!(b.upsert(entry("y", b"2")));
        assert!(!b.upsert(entry("y", b"2")));
        b.upsert(entry("x", b"1"));
        assert!(b.remove(&EntryKey {
            kind: 1,
            key: "z".into()
        }));
        assert_eq!(a.digest(), b.digest());
        // Key and value cannot trade bytes.
        let mut c = EntrySet::default();
        let mut d = EntrySet::default();
        c.upsert(entry("ab", b"c"));
        d.upsert(entry("a", b"bc"));
        assert_ne!(c.digest(), d.digest());
    }

    #[test]
    fn checkpoints_change_nothing() {
        let mut set = EntrySet::default();
        let mut dice = 1_u64;
        let mut roll = |sides: u64| {
            // A linear congruential generator (Knuth): any spread will do.
            dice = dice
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (dice >> 33) % sides
        };
        for _ in 0..200 {
            for _ in 0..roll(300) {
                let (kind, key) = (1 + roll(3) as i32, format!("k{}", roll(2000)));
                match roll(4) {
                    0 => drop(set.remove(&EntryKey { kind, key })),
                    n => drop(set.upsert(Entry {
                        kind,
                        key,
                        value: vec![n as u8],
                    })),
                }
            }
            let mut fresh = EntrySet::default();
            fresh.change(&[], &set.iter().collect::<Vec<_>>());
            assert_eq!(set.digest(), fresh.digest());
            assert_eq!(set.digest_and_keep(), fresh.digest());
            assert_eq!(set.digest(), fresh.digest());
        }
        assert!(set.checkpoints.len() > 3);
    }

    #[test]
    fn a_change_can_be_taken_back() {
        let key = |key: &str| EntryKey {
            kind: 1,
            key: key.into(),
        };
        let mut set = EntrySet::default();
        set.change(&[], &[entry("a", b"1"), entry("b", b"2")]);
        let before = set.clone();
        let removes = [key("a"), key("missing"), key("a")];
        let upserts = [
            entry("a", b"3"),
            entry("b", b"4"),
            entry("b", b"5"),
            entry("c", b"6"),
        ];
        let undo = set.change(&removes, &upserts);
        let values: Vec<_> = set.iter().map(|entry| entry.value).collect();
        assert_eq!(values, [b"3", b"5", b"6"]);
        set.revert(undo);
        assert_eq!(set, before);
        assert_eq!(set.digest(), before.digest());
    }

    #[test]
    fn chunks_stay_small_and_only_the_last_takes_effect() {
        let entries: Vec<_> = (0..5000).map(|n| entry(&format!("n{n}"), &[7; 1000])).collect();
        let removes = (0..10).map(|n| EntryKey {
            kind: 1,
            key: format!("gone{n}"),
        });
        let updates = chunks((3, 4), true, entries.clone(), removes, SignedManifest::default());
        assert!(updates.len() >= 5);
        assert!(updates.iter().all(|update| update.encoded_len() <= CHUNK_BYTES));
        assert!(
            updates
                .iter()
                .rev()
                .skip(1)
                .all(|update| !update.last && update.manifest.is_none())
        );
        assert!(updates.last().unwrap().last);
        assert_eq!(
            updates.iter().flat_map(|u| u.upserts.clone()).collect::<Vec<_>>(),
            entries
        );
        assert_eq!(updates.iter().map(|u| u.removes.len()).sum::<usize>(), 10);
        assert_eq!(chunks((1, 1), true, [], [], SignedManifest::default()).len(), 1);
    }
}
