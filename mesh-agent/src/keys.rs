//! This node's private keys: a file each, `keys/gen{N}.key`, and one copy in memory. A key is on disk, synced, before
//! anybody hears of it; a void one is overwritten there before its file goes, and in memory when its last user is done.
//!
//! A key that was made with pre-shared keys has a second file, `gen{N}.psk`, from the moment that it was made, with those
//! of its paths; it goes with the key.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context as _, Result, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use warren_agent_core::{
    psk::{Ends, Record},
    slots::Keyring,
};
use warren_keyd_api::proof;
use warren_model::{NodeUid, PreSharedKey, PrivateKey, PskId, PublicKey};
use zeroize::Zeroizing;

use crate::{
    files::{overwrite, write_private},
    psk::Table,
};

/// The only key's file of agents that did not rotate.
const FIRST_NAME: &str = "slot0.key";
/// The UID of the Node that the keys are for.
const OWNER_NAME: &str = "node-uid";
/// Two of a node are in use at once; the others are void and about to go.
const MOST: usize = 8;
/// Bytes of a key file: base64 of 32 bytes, the end of the line.
const KEY_LINE: usize = 44 + 1;
/// More than a key file ever has.
const LONGEST_FILE: u64 = 4096;

/// The private keys, shared by whoever proves them and whoever gives them to devices.
#[derive(Clone)]
pub(crate) struct KeyStore(Arc<Mutex<Keys>>);

struct Keys {
    directory: PathBuf,
    held: BTreeMap<u64, Held>,
}

struct Held {
    public: PublicKey,
    /// At one place in memory, which is overwritten when the last user is done.
    private: Arc<PrivateKey>,
    /// `None`: it was made without.
    shared: Option<Table>,
}

impl KeyStore {
    /// Reads all keys. A file that is there but cannot be used is an error: a new key in its place would cut this node
    /// off without anybody having asked for it.
    pub(crate) fn open(directory: &Path) -> Result<Self> {
        adopt_first(directory)?;
        let mut held = BTreeMap::new();
        let entries = fs::read_dir(directory)
            .with_context(|| format!("cannot read the key directory {}", directory.display()))?;
        for entry in entries {
            let path = entry
                .with_context(|| format!("cannot read the key directory {}", directory.display()))?
                .path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with('.') {
                // A write that a crash broke off.
                destroy_file(&path)?;
            } else if let Some(generation) = generation_of(&name) {
                let private = read_key(&path)?;
                let public = proof::public_key(&private);
                let shared = Table::read(&directory.join(shared_name(generation)))?;
                held.insert(
                    generation,
                    Held {
                        public,
                        private,
                        shared,
                    },
                );
            }
        }
        destroy_orphans(directory, &held)?;
        Ok(Self(Arc::new(Mutex::new(Keys {
            directory: directory.to_owned(),
            held,
        }))))
    }

    fn lock(&self) -> MutexGuard<'_, Keys> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The public halves.
    pub(crate) fn keyring(&self) -> Keyring {
        let keys = self.lock();
        Keyring::new(
            keys.held
                .iter()
                .map(|(generation, held)| (*generation, held.public)),
        )
    }

    /// The private half of a key, and its generation.
    pub(crate) fn private(&self, public: &PublicKey) -> Option<(u64, Arc<PrivateKey>)> {
        let keys = self.lock();
        keys.held
            .iter()
            .find(|(_, held)| held.public == *public)
            .map(|(generation, held)| (*generation, Arc::clone(&held.private)))
    }

    /// Makes the key of a generation unless it is there; it is on disk when this returns. `pre_shared`: its holder agrees on
    /// pre-shared keys.
    pub(crate) fn make(&self, generation: u64, pre_shared: bool) -> Result<PublicKey> {
        let mut keys = self.lock();
        if let Some(held) = keys.held.get(&generation) {
            return Ok(held.public);
        }
        if generation == 0 || keys.held.len() >= MOST {
            bail!(
                "a key of generation {generation} is not made: there are {} keys",
                keys.held.len()
            );
        }
        let path = keys.path(generation);
        let private = Arc::new(proof::generate_private_key().context("cannot make a key")?);
        // Of its final length: a text that grows leaves copies behind.
        let mut text = Zeroizing::new([b'\n'; KEY_LINE]);
        STANDARD
            .encode_slice(private.expose(), &mut text[..KEY_LINE - 1])
            .ok()
            .context("a key has 32 bytes")?;
        let shared = pre_shared.then(Table::default);
        // First: a key without it is one without pre-shared keys.
        if let Some(table) = &shared {
            table.write(&keys.shared_path(generation))?;
        }
        write_private(&path, text.as_slice())?;
        let public = proof::public_key(&private);
        tracing::info!(generation, %public, pre_shared, "made a key");
        let held = Held {
            public,
            private,
            shared,
        };
        keys.held.insert(generation, held);
        Ok(public)
    }

    /// Whether a key was made with pre-shared keys.
    pub(crate) fn agrees(&self, generation: u64) -> bool {
        let keys = self.lock();
        keys.held
            .get(&generation)
            .is_some_and(|held| held.shared.is_some())
    }

    /// What is on disk of pre-shared keys.
    pub(crate) fn records(&self) -> BTreeMap<Ends, Record> {
        let keys = self.lock();
        let tables = keys
            .held
            .values()
            .filter_map(|held| Some((held.public, held.shared.as_ref()?)));
        let record = |(own, table): (PublicKey, &Table)| {
            let records: Vec<_> = table.records().collect();
            records
                .into_iter()
                .map(move |(peer, record)| (Ends { own, peer }, record))
        };
        tables.flat_map(record).collect()
    }

    /// A peer's pre-shared key on the device of one of this node's keys.
    pub(crate) fn shared(&self, ends: &Ends, id: PskId) -> Option<PreSharedKey> {
        let keys = self.lock();
        let held = keys.held.values().find(|held| held.public == ends.own)?;
        held.shared.as_ref()?.key(&ends.peer, id).cloned()
    }

    /// Brings the pre-shared keys of these paths to what the records say, synced, with one write for each key of this node's.
    /// Keys that no record names are destroyed; new ones are in `computed`. Returns whether each is so.
    pub(crate) fn save(
        &self,
        records: &[(Ends, Record)],
        computed: &BTreeMap<PskId, PreSharedKey>,
    ) -> Vec<bool> {
        let mut keys = self.lock();
        let owners: BTreeSet<PublicKey> = records.iter().map(|(ends, _)| ends.own).collect();
        let mut results = vec![false; records.len()];
        for own in owners {
            let generation = keys.held.iter().find(|(_, held)| held.public == own);
            let Some((generation, held)) = generation.map(|(generation, held)| (*generation, held)) else {
                // It was destroyed, and these with it.
                for ((ends, record), result) in records.iter().zip(&mut results) {
                    *result |= ends.own == own && *record == Record::default();
                }
                continue;
            };
            let before = held.shared.clone().unwrap_or_default();
            let mut table = before.clone();
            let of_own = records
                .iter()
                .zip(&mut results)
                .filter(|((ends, _), _)| ends.own == own);
            let mut set: Vec<_> = of_own
                .map(|((ends, record), result)| {
                    *result = table.set(ends.peer, record, computed);
                    result
                })
                .collect();
            if held.shared.is_none() && table.is_empty() {
                continue;
            }
            if let Err(error) = table.write(&keys.shared_path(generation)) {
                tracing::error!(generation, error = %format!("{error:#}"), "pre-shared keys cannot be kept");
                set.iter_mut().for_each(|result| **result = false);
                table = before;
            }
            if let Some(held) = keys.held.get_mut(&generation) {
                held.shared = Some(table);
            }
        }
        results
    }

    /// Notes whose keys these are. A Node that was deleted and registered again is another one: what was its key is revoked for
    /// ever, so all are destroyed. Returns whether any was.
    pub(crate) fn belong_to(&self, uid: &NodeUid) -> Result<bool> {
        let path = self.lock().directory.join(OWNER_NAME);
        let before = match fs::read_to_string(&path) {
            // An empty file says nothing.
            Ok(text) => Some(NodeUid::from(text.trim())).filter(|uid| !uid.as_str().is_empty()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        if before.as_ref() == Some(uid) {
            return Ok(false);
        }
        let mut destroyed = false;
        if before.is_some() {
            let generations: Vec<u64> = self.lock().held.keys().copied().collect();
            for generation in generations {
                self.destroy(generation)?;
                destroyed = true;
            }
        }
        write_private(&path, format!("{uid}\n").as_bytes())?;
        Ok(destroyed)
    }

    /// Destroys a key. It is gone from memory even where its file cannot be overwritten.
    pub(crate) fn destroy(&self, generation: u64) -> Result<()> {
        let mut keys = self.lock();
        let (path, shared) = (keys.path(generation), keys.shared_path(generation));
        if let Some(held) = keys.held.remove(&generation) {
            tracing::info!(generation, public = %held.public, "key destroyed");
        }
        destroy_file(&path)?;
        destroy_file(&shared)
    }
}

impl Keys {
    fn path(&self, generation: u64) -> PathBuf {
        self.directory.join(format!("gen{generation}.key"))
    }

    fn shared_path(&self, generation: u64) -> PathBuf {
        self.directory.join(shared_name(generation))
    }
}

fn shared_name(generation: u64) -> String {
    format!("gen{generation}.psk")
}

/// Pre-shared keys of a key that is gone, or was not made because of a crash.
fn destroy_orphans(directory: &Path, held: &BTreeMap<u64, Held>) -> Result<()> {
    let entries = fs::read_dir(directory)
        .with_context(|| format!("cannot read the key directory {}", directory.display()))?;
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.ends_with(".psk") && !held.keys().any(|generation| shared_name(*generation) == name) {
            destroy_file(&entry.path())?;
        }
    }
    Ok(())
}

fn generation_of(name: &str) -> Option<u64> {
    let number = name.strip_prefix("gen")?.strip_suffix(".key")?;
    let generation: u64 = number.parse().ok()?;
    (generation > 0 && number == generation.to_string()).then_some(generation)
}

/// The key of an agent that did not rotate is that of the first generation.
fn adopt_first(directory: &Path) -> Result<()> {
    let (before, after) = (directory.join(FIRST_NAME), directory.join("gen1.key"));
    if !before.exists() || after.exists() {
        return Ok(());
    }
    read_key(&before)?;
    fs::rename(&before, &after)
        .and_then(|()| File::open(directory)?.sync_all())
        .with_context(|| format!("cannot rename the key file {}", before.display()))
}

fn read_key(path: &Path) -> Result<Arc<PrivateKey>> {
    let damaged = || {
        format!(
            "the key file {} is damaged: restore it, or remove it to get a new key",
            path.display()
        )
    };
    let mut text = Zeroizing::new(Vec::with_capacity(LONGEST_FILE as usize));
    let read = File::open(path).and_then(|file| file.take(LONGEST_FILE).read_to_end(&mut text));
    if let Err(error) = read {
        bail!(
            "cannot read the key file {}: {error}; restore it or remove it",
            path.display()
        );
    }
    let trimmed = std::str::from_utf8(&text)
        .ok()
        .map(str::trim)
        .with_context(damaged)?;
    let bytes = Zeroizing::new(STANDARD.decode(trimmed).ok().with_context(damaged)?);
    let bytes: Zeroizing<[u8; 32]> = Zeroizing::new(bytes.as_slice().try_into().ok().with_context(damaged)?);
    let mode = fs::metadata(path).with_context(damaged)?.permissions().mode();
    if mode & 0o077 != 0 {
        tracing::warn!(file = %path.display(), "the key file was readable by others: restricted to root");
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).with_context(damaged)?;
    }
    Ok(Arc::new(PrivateKey::from_bytes(*bytes)))
}

/// Overwrites a file, syncs it, removes it, syncs the directory. One that is absent is no error.
fn destroy_file(path: &Path) -> Result<()> {
    let destroy = || -> io::Result<()> {
        let file = match OpenOptions::new().write(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        overwrite(&file)?;
        fs::remove_file(path)?;
        File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
    };
    destroy().with_context(|| format!("cannot destroy the key file {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(directory: &Path) -> KeyStore {
        KeyStore::open(directory).unwrap()
    }

    #[test]
    fn a_key_is_made_once_and_a_damaged_file_is_never_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let keys = store(directory.path());
        let key = keys.make(2, true).unwrap();
        assert_eq!(keys.make(2, false).unwrap(), key);
        assert_eq!(store(directory.path()).make(2, false).unwrap(), key);
        assert!(store(directory.path()).agrees(2));
        let path = directory.path().join("gen2.key");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        for damage in ["", "AAAA", "not a key", "\u{fffd}"] {
            fs::write(&path, damage).unwrap();
            let error = format!("{:#}", KeyStore::open(directory.path()).err().unwrap());
            assert!(error.contains("gen2.key") && !error.contains('\n'), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), damage);
        }
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(KeyStore::open(directory.path()).is_err());
    }

    #[test]
    fn the_key_of_an_agent_that_did_not_rotate_is_the_first_generation() {
        let directory = tempfile::tempdir().unwrap();
        let text = STANDARD.encode([7; 32]);
        fs::write(directory.path().join("slot0.key"), &text).unwrap();
        let keys = store(directory.path());
        let public = proof::public_key(&PrivateKey::from_bytes([7; 32]));
        assert_eq!(keys.keyring().held().get(&1), Some(&public));
        assert!(!directory.path().join("slot0.key").exists());
        assert_eq!(store(directory.path()).private(&public).unwrap().0, 1);
    }

    #[test]
    fn a_destroyed_key_is_overwritten_and_gone() {
        let directory = tempfile::tempdir().unwrap();
        let keys = store(directory.path());
        let (first, second) = (keys.make(1, true).unwrap(), keys.make(2, false).unwrap());
        let path = directory.path().join("gen1.key");
        // A second name of the file shows what was in it when it went.
        let beside = directory.path().join("beside");
        fs::hard_link(&path, &beside).unwrap();
        keys.destroy(1).unwrap();
        keys.destroy(1).unwrap();
        assert!(fs::read(&beside).unwrap().iter().all(|byte| *byte == 0));
        assert!(!path.exists() && keys.private(&first).is_none());
        assert!(!directory.path().join("gen1.psk").exists());
        assert_eq!(keys.keyring().held().keys().copied().collect::<Vec<_>>(), [2]);
        // What a crash left of a write is destroyed at the next start.
        fs::write(directory.path().join(".gen3.key.new"), "half a key").unwrap();
        fs::write(directory.path().join("gen3.psk"), "warren-psk 1\n").unwrap();
        assert_eq!(store(directory.path()).private(&second).unwrap().0, 2);
        assert!(!directory.path().join(".gen3.key.new").exists());
        assert!(!directory.path().join("gen3.psk").exists());
    }

    #[test]
    fn keys_of_a_node_that_was_deleted_are_destroyed() {
        let directory = tempfile::tempdir().unwrap();
        let keys = store(directory.path());
        let (first, again) = (NodeUid::from("uid-1"), NodeUid::from("uid-2"));
        let key = keys.make(1, true).unwrap();
        assert!(!keys.belong_to(&first).unwrap() && !keys.belong_to(&first).unwrap());
        assert!(!store(directory.path()).belong_to(&first).unwrap());
        assert_eq!(keys.make(1, true).unwrap(), key);
        assert!(keys.belong_to(&again).unwrap());
        assert!(keys.keyring().held().is_empty() && !directory.path().join("gen1.key").exists());
        let fresh = keys.make(1, true).unwrap();
        assert!(fresh != key && !store(directory.path()).belong_to(&again).unwrap());
    }

    #[test]
    fn pre_shared_keys_are_saved_together_and_go_with_their_key() {
        let directory = tempfile::tempdir().unwrap();
        let keys = store(directory.path());
        let (with, without) = (keys.make(1, true).unwrap(), keys.make(2, false).unwrap());
        assert!(keys.agrees(1) && !keys.agrees(2) && !keys.agrees(3));
        let peer = |n| PublicKey::from_bytes([n; 32]).unwrap();
        let ends = |own, n| Ends { own, peer: peer(n) };
        let secret = |n: u8| PreSharedKey::from_bytes(&[n; 32]).unwrap();
        let id = |n: u8| warren_wireguard::psk_id(&[n; 32]);
        let agreed = |n| Record {
            agreed: Some(id(n)),
            offered: None,
        };
        let computed = [(id(1), secret(1)), (id(2), secret(2))].into();
        let records = [
            (ends(with, 7), agreed(1)),
            (ends(with, 8), agreed(2)),
            (ends(with, 9), agreed(3)),
            (ends(peer(20), 9), agreed(1)),
            (ends(peer(20), 9), Record::default()),
            (ends(without, 7), Record::default()),
        ];
        // A key that nobody has, and one of a generation that is gone.
        assert_eq!(
            keys.save(&records, &computed),
            [true, true, false, false, true, true]
        );
        let again = store(directory.path());
        assert_eq!(again.records().len(), 2);
        assert!(again.shared(&ends(with, 7), id(1)) == Some(secret(1)));
        assert!(
            again.shared(&ends(with, 7), id(2)).is_none() && again.shared(&ends(without, 7), id(1)).is_none()
        );
        again.destroy(1).unwrap();
        assert!(again.records().is_empty() && again.shared(&ends(with, 7), id(1)).is_none());
        assert!(store(directory.path()).records().is_empty());
    }

    #[test]
    fn only_exact_names_are_keys() {
        assert_eq!(generation_of("gen12.key"), Some(12));
        for other in [
            "gen0.key",
            "gen01.key",
            "gen.key",
            "gen1.key.bak",
            "gen-1.key",
            "slot0.key",
        ] {
            assert_eq!(generation_of(other), None, "{other}");
        }
    }
}
