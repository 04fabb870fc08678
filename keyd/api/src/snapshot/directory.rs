//! The agent's copy of the directory.

use prost::Message as _;

use super::{EntrySet, RootChain, SnapshotError, SnapshotRoot, chunks};
use crate::{
    convert::{ConvertError, Record},
    proto::{Entry, EntryKey, Manifest, SignedManifest, Update},
    token::sha256,
};

/// First bytes of the file form; the digit is its version.
const FILE_MAGIC: &[u8; 8] = b"WARRENS1";

/// The largest set of entries that is accepted, bytes: about a million workloads.
const MAX_BYTES: usize = 256 * 1024 * 1024;

/// A verified copy of the directory that changes only as a whole.
///
/// Feed every [`Update`] to [`Self::apply`]. An error leaves the copy as it was; reconnect with the position of
/// [`Self::position`] then.
#[derive(Debug, Clone)]
pub struct Directory {
    root: SnapshotRoot,
    entries: EntrySet,
    current: Option<(Manifest, SignedManifest)>,
    pending: Option<Pending>,
}

#[derive(Debug, Clone)]
struct Pending {
    position: (u64, u64),
    change: Change,
    bytes: usize,
}

/// What an update changed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Change {
    /// Everything that is not among `upserts` is gone.
    pub snapshot: bool,
    /// New or changed entries, as they came.
    pub upserts: Vec<Entry>,
    /// Removed ones.
    pub removes: Vec<EntryKey>,
}

impl Directory {
    /// An empty directory of the cluster with this root.
    pub fn new(root: SnapshotRoot) -> Self {
        Self {
            root,
            entries: EntrySet::default(),
            current: None,
            pending: None,
        }
    }

    /// From now on only this root is believed; what is applied stays, and so does its position.
    pub fn set_root(&mut self, root: SnapshotRoot) {
        self.root = root;
        self.pending = None;
    }

    /// (epoch, version) of what is applied, for `Hello` and `Applied`; (0, 0) before the first snapshot.
    pub fn position(&self) -> (u64, u64) {
        self.current
            .as_ref()
            .map_or((0, 0), |(manifest, _)| (manifest.epoch, manifest.version))
    }

    /// The manifest of what is applied: its times are the only trusted clock.
    pub fn manifest(&self) -> Option<&Manifest> {
        self.current.as_ref().map(|(manifest, _)| manifest)
    }

    /// The entries themselves.
    pub fn entries(&self) -> &EntrySet {
        &self.entries
    }

    /// Every entry, parsed; one that does not parse is an error of its own and hides no other.
    pub fn records(&self) -> impl Iterator<Item = Result<Record, ConvertError>> + '_ {
        self.entries.iter().map(|entry| Record::parse(&entry))
    }

    /// Takes a chunk. `Some` when it was the last one and the whole change is verified and now in effect. On an
    /// error everything received of that change is forgotten.
    pub fn apply(&mut self, update: Update) -> Result<Option<Change>, SnapshotError> {
        let result = self.take(update);
        if result.is_err() {
            self.pending = None;
        }
        result
    }

    /// Forgets a half-received change, as when the stream broke.
    pub fn reset_pending(&mut self) {
        self.pending = None;
    }

    fn take(&mut self, update: Update) -> Result<Option<Change>, SnapshotError> {
        let position = (update.epoch, update.version);
        let bytes = update.encoded_len();
        let pending = self.pending.get_or_insert_with(|| Pending {
            position,
            change: Change {
                snapshot: update.snapshot,
                ..Change::default()
            },
            bytes: 0,
        });
        if pending.position != position || pending.change.snapshot != update.snapshot {
            return Err(SnapshotError::Position);
        }
        pending.bytes += bytes;
        if pending.bytes > MAX_BYTES {
            return Err(SnapshotError::TooLarge(MAX_BYTES));
        }
        pending.change.upserts.extend(update.upserts);
        pending.change.removes.extend(update.removes);
        if !update.last {
            return Ok(None);
        }
        let Some(Pending { change, .. }) = self.pending.take() else {
            return Ok(None);
        };
        let signed = update.manifest.ok_or(SnapshotError::NoManifest)?;
        self.commit(position, &change, signed)?;
        Ok(Some(change))
    }

    fn commit(
        &mut self,
        position: (u64, u64),
        change: &Change,
        signed: SignedManifest,
    ) -> Result<(), SnapshotError> {
        let manifest = self.root.open(&signed)?;
        if (manifest.epoch, manifest.version) != position {
            return Err(SnapshotError::Position);
        }
        let (have_epoch, have_version) = self.position();
        // A snapshot of the very position is a repetition; the digest below proves that it is the same.
        if position < (have_epoch, have_version) {
            let (epoch, version) = position;
            return Err(SnapshotError::GoesBack {
                have_epoch,
                have_version,
                epoch,
                version,
            });
        }
        if !change.snapshot && (self.current.is_none() || manifest.epoch != have_epoch) {
            return Err(SnapshotError::NeedsSnapshot);
        }
        let proves = |entries: &mut EntrySet| {
            entries.len() as u64 == manifest.entries
                && entries.digest_and_keep().as_slice() == manifest.digest
        };
        if change.snapshot {
            let mut entries = EntrySet::default();
            entries.change(&change.removes, &change.upserts);
            if !proves(&mut entries) {
                return Err(SnapshotError::Digest);
            }
            self.entries = entries;
        } else {
            // In place: a copy of everything for each small change would cost more than the change.
            let undo = self.entries.change(&change.removes, &change.upserts);
            if !proves(&mut self.entries) {
                self.entries.revert(undo);
                return Err(SnapshotError::Digest);
            }
        }
        self.current = Some((manifest, signed));
        Ok(())
    }

    /// The file form: magic, the length (8 bytes, big-endian), one snapshot update, SHA-256 of all before.
    /// `None` before the first snapshot.
    pub fn to_file(&self) -> Option<Vec<u8>> {
        let (manifest, signed) = self.current.as_ref()?;
        let update = Update {
            epoch: manifest.epoch,
            version: manifest.version,
            snapshot: true,
            last: true,
            upserts: self.entries.iter().collect(),
            removes: vec![],
            manifest: Some(signed.clone()),
        };
        let body = update.encode_to_vec();
        let mut out = Vec::with_capacity(body.len() + 48);
        out.extend_from_slice(FILE_MAGIC);
        out.extend_from_slice(&(body.len() as u64).to_be_bytes());
        out.extend_from_slice(&body);
        let checksum = sha256(&out);
        out.extend_from_slice(&checksum);
        Some(out)
    }

    /// Reads the file form and verifies it like an update from the stream.
    pub fn from_file(root: SnapshotRoot, file: &[u8]) -> Result<Self, SnapshotError> {
        let magic = &FILE_MAGIC[..file.len().min(8)];
        if !file.starts_with(magic) {
            return Err(SnapshotError::FileMagic);
        }
        let rest = file.get(8..).ok_or(SnapshotError::FileTruncated)?;
        let (length, rest) = rest.split_at_checked(8).ok_or(SnapshotError::FileTruncated)?;
        let length = length
            .iter()
            .fold(0_u64, |sum, byte| (sum << 8) | u64::from(*byte));
        let length = usize::try_from(length).map_err(|_| SnapshotError::FileTruncated)?;
        let (body, checksum) = rest
            .split_at_checked(length)
            .ok_or(SnapshotError::FileTruncated)?;
        if checksum.len() < 32 {
            return Err(SnapshotError::FileTruncated);
        }
        if checksum != sha256(&file[..16 + length]) {
            return Err(SnapshotError::FileChecksum);
        }
        let update = Update::decode(body).map_err(|_| SnapshotError::FileChecksum)?;
        let mut directory = Self::new(root);
        directory.apply(Update {
            snapshot: true,
            last: true,
            ..update
        })?;
        Ok(directory)
    }

    /// As [`Self::from_file`], for a file of one's own that may have been written before the newest root was followed. Only the
    /// newest one is believed afterwards.
    pub fn from_own_file(roots: &RootChain, file: &[u8]) -> Result<Self, SnapshotError> {
        let mut roots = roots.roots().iter().rev();
        let newest = roots.next().ok_or(SnapshotError::Signature)?.key;
        let mut read = Self::from_file(newest, file);
        for older in roots {
            match read {
                Err(SnapshotError::Signature) => read = Self::from_file(older.key, file),
                _ => break,
            }
        }
        let mut directory = read?;
        directory.set_root(newest);
        Ok(directory)
    }

    /// The whole directory as snapshot chunks, as `keyd` would send it.
    pub fn to_updates(&self) -> Option<Vec<Update>> {
        let (_, signed) = self.current.as_ref()?;
        Some(chunks(
            self.position(),
            true,
            self.entries.iter(),
            [],
            signed.clone(),
        ))
    }
}

#[cfg(test)]
mod tests {
    use warren_model::{IdentityId, Labels};

    use super::*;
    use crate::snapshot::ManifestSigner;

    struct Keyd {
        signer: ManifestSigner,
        entries: EntrySet,
    }

    impl Keyd {
        fn new() -> Self {
            Self {
                signer: ManifestSigner::generate().unwrap(),
                entries: EntrySet::default(),
            }
        }

        fn seal(&self, epoch: u64, version: u64) -> SignedManifest {
            self.signer.seal(Manifest {
                epoch,
                version,
                entries: self.entries.len() as u64,
                digest: self.entries.digest().to_vec(),
                ..Manifest::default()
            })
        }

        fn add(&mut self, number: u32) -> Entry {
            let entry = Record::Identity(IdentityId(number), Labels::default()).to_entry();
            self.entries.upsert(entry.clone());
            entry
        }

        fn snapshot(&self, epoch: u64, version: u64) -> Update {
            let mut all = chunks(
                (epoch, version),
                true,
                self.entries.iter(),
                [],
                self.seal(epoch, version),
            );
            all.remove(0)
        }

        fn increment(&self, epoch: u64, version: u64, upserts: Vec<Entry>) -> Update {
            chunks((epoch, version), false, upserts, [], self.seal(epoch, version)).remove(0)
        }
    }

    #[test]
    fn snapshot_then_increments() {
        let mut keyd = Keyd::new();
        let mut agent = Directory::new(keyd.signer.root());
        keyd.add(256);
        assert!(agent.apply(keyd.snapshot(1, 1)).unwrap().unwrap().snapshot);
        let entry = keyd.add(257);
        agent.apply(keyd.increment(1, 2, vec![entry])).unwrap().unwrap();
        assert_eq!(agent.position(), (1, 2));
        assert_eq!(agent.records().filter_map(Result::ok).count(), 2);
        // Removal.
        let key = EntryKey {
            kind: 2,
            key: "256".into(),
        };
        keyd.entries.remove(&key);
        let update = chunks((1, 3), false, [], [key], keyd.seal(1, 3)).remove(0);
        agent.apply(update).unwrap().unwrap();
        assert_eq!(agent.entries(), &keyd.entries);
    }

    #[test]
    fn chunks_take_effect_only_together() {
        let mut keyd = Keyd::new();
        let mut agent = Directory::new(keyd.signer.root());
        let first = keyd.add(256);
        keyd.add(257);
        let whole = keyd.snapshot(1, 1);
        let half = Update {
            last: false,
            manifest: None,
            upserts: vec![first],
            ..whole.clone()
        };
        assert_eq!(agent.apply(half.clone()), Ok(None));
        assert_eq!(agent.position(), (0, 0));
        let rest = Update {
            upserts: whole.upserts[1..].to_vec(),
            ..whole.clone()
        };
        assert!(agent.apply(rest.clone()).unwrap().is_some());
        // A missing chunk is noticed, and what came of it forgotten.
        let mut agent = Directory::new(keyd.signer.root());
        assert_eq!(agent.apply(rest), Err(SnapshotError::Digest));
        assert!(agent.apply(whole).unwrap().is_some());
    }

    #[test]
    fn forged_foreign_and_old_updates_are_refused() {
        let mut keyd = Keyd::new();
        keyd.add(256);
        let mut agent = Directory::new(keyd.signer.root());
        agent.apply(keyd.snapshot(5, 5)).unwrap().unwrap();
        let before = agent.to_file();

        let other = Keyd {
            signer: ManifestSigner::generate().unwrap(),
            entries: keyd.entries.clone(),
        };
        assert_eq!(agent.apply(other.snapshot(6, 1)), Err(SnapshotError::Signature));
        assert!(matches!(
            agent.apply(keyd.snapshot(5, 4)),
            Err(SnapshotError::GoesBack { .. })
        ));
        assert!(matches!(
            agent.apply(keyd.snapshot(4, 9)),
            Err(SnapshotError::GoesBack { .. })
        ));
        assert_eq!(
            agent.apply(keyd.increment(6, 1, vec![])),
            Err(SnapshotError::NeedsSnapshot)
        );
        let mut unsigned = keyd.snapshot(6, 1);
        unsigned.manifest = None;
        assert_eq!(agent.apply(unsigned), Err(SnapshotError::NoManifest));
        let mut moved = keyd.snapshot(6, 1);
        moved.version = 7;
        assert_eq!(agent.apply(moved), Err(SnapshotError::Position));
        let mut added = keyd.snapshot(6, 1);
        added
            .upserts
            .push(Record::Identity(IdentityId(999), Labels::default()).to_entry());
        assert_eq!(agent.apply(added), Err(SnapshotError::Digest));
        assert_eq!(agent.to_file(), before);
    }

    #[test]
    fn the_file_form_is_verified() {
        let mut keyd = Keyd::new();
        keyd.add(256);
        let mut agent = Directory::new(keyd.signer.root());
        assert_eq!(agent.to_file(), None);
        agent.apply(keyd.snapshot(5, 5)).unwrap();
        let file = agent.to_file().unwrap();
        let back = Directory::from_file(keyd.signer.root(), &file).unwrap();
        assert_eq!(back.entries(), agent.entries());
        assert_eq!(back.position(), (5, 5));

        for length in 0..file.len() {
            let error = Directory::from_file(keyd.signer.root(), &file[..length]).unwrap_err();
            assert_eq!(error, SnapshotError::FileTruncated, "{length} bytes");
        }
        for at in 0..file.len() {
            let mut bad = file.clone();
            bad[at] ^= 0x40;
            assert!(
                Directory::from_file(keyd.signer.root(), &bad).is_err(),
                "byte {at}"
            );
        }
        let stranger = ManifestSigner::generate().unwrap().root();
        assert_eq!(
            Directory::from_file(stranger, &file).unwrap_err(),
            SnapshotError::Signature
        );
    }

    #[test]
    fn a_new_root_is_believed_and_the_old_one_no_more_and_nothing_goes_back() {
        let mut keyd = Keyd::new();
        keyd.add(256);
        let mut agent = Directory::new(keyd.signer.root());
        agent.apply(keyd.snapshot(5, 5)).unwrap().unwrap();
        let file = agent.to_file().unwrap();

        let first = RootChain::first(&keyd.signer, 0);
        let next = ManifestSigner::generate().unwrap();
        let roots = first.with(&keyd.signer, next.root(), 1).unwrap();
        let mut new = Keyd {
            signer: next.in_chain(&roots),
            entries: keyd.entries.clone(),
        };
        // Not before it is followed.
        assert_eq!(agent.apply(new.snapshot(5, 6)), Err(SnapshotError::Signature));
        agent.set_root(roots.newest().key);
        assert_eq!(agent.position(), (5, 5));
        let entry = keyd.add(257);
        assert_eq!(
            agent.apply(keyd.increment(5, 6, vec![entry])),
            Err(SnapshotError::Signature)
        );
        assert!(matches!(
            agent.apply(new.snapshot(5, 4)),
            Err(SnapshotError::GoesBack { .. })
        ));
        let entry = new.add(258);
        agent.apply(new.increment(5, 6, vec![entry])).unwrap().unwrap();
        assert_eq!(
            agent.manifest().unwrap().cluster_id,
            keyd.signer.root().cluster_id()
        );

        // The agent's own file may be older than what it has followed since, but no older than its first root.
        let mut read = Directory::from_own_file(&roots, &file).unwrap();
        assert_eq!(read.position(), (5, 5));
        assert_eq!(read.apply(keyd.snapshot(5, 7)), Err(SnapshotError::Signature));
        assert_eq!(
            Directory::from_own_file(&first, &agent.to_file().unwrap()).unwrap_err(),
            SnapshotError::Signature
        );
    }

    #[test]
    fn signers_survive_their_seed() {
        let signer = ManifestSigner::generate().unwrap();
        let back = ManifestSigner::from_seed(&signer.to_seed().unwrap()).unwrap();
        assert_eq!(back.root(), signer.root());
    }
}
