//! The set of entries and its digest.

use std::collections::BTreeMap;

use aws_lc_rs::digest::{Context, SHA256};
use prost::Message as _;

use super::CHUNK_BYTES;
use crate::proto::{Entry, EntryKey, SignedManifest, Update};

/// All entries of a directory, by kind and key, with the hash of each, so that a change hashes only what changed
/// and 32 bytes per entry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EntrySet {
    entries: BTreeMap<(i32, String), (Vec<u8>, [u8; 32])>,
}

impl EntrySet {
    /// Inserts or replaces an entry; true where that changed something.
    pub fn upsert(&mut self, entry: Entry) -> bool {
        let hash = entry_digest(&entry);
        let old = self.entries.insert((entry.kind, entry.key), (entry.value, hash));
        old.is_none_or(|(_, old)| old != hash)
    }

    /// Removes an entry; true where it was there.
    pub fn remove(&mut self, key: &EntryKey) -> bool {
        self.entries.remove(&(key.kind, key.key.clone())).is_some()
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
        let mut all = Context::new(&SHA256);
        for (_, hash) in self.entries.values() {
            all.update(hash);
        }
        finish(all)
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
