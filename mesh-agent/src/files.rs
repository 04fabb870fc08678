//! What the agent keeps on disk: keys ([`crate::keys`]), last good snapshot, endpoints, trust. Every file is replaced as a whole
//! (written beside, synced, renamed) and readable by root alone.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Seek as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use warren_agent_core::{Endpoint, Endpoints};
use warren_keyd_api::snapshot::{Directory, RootChain};
use warren_model::Datapath;

use crate::keys::KeyStore;

/// The state directory.
#[derive(Debug, Clone)]
pub(crate) struct StateDir(PathBuf);

/// Pods of this node as they are kept across restarts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SavedEndpoints {
    pub(crate) endpoints: Endpoints,
    /// Pods that are gone and whose end `keyd` has perhaps not heard of.
    #[serde(default)]
    pub(crate) unreported: Vec<Endpoint>,
    /// Interface indexes mean nothing after a reboot.
    pub(crate) boot_id: String,
}

impl StateDir {
    /// Opens the directory, making it where it does not exist.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        for directory in [path.to_owned(), path.join("keys"), path.join("trust")] {
            make_private_dir(&directory)?;
        }
        Ok(Self(path.to_owned()))
    }

    /// Where trust material is kept.
    pub(crate) fn trust(&self) -> PathBuf {
        self.0.join("trust")
    }

    /// This node's private keys.
    pub(crate) fn keys(&self) -> Result<KeyStore> {
        KeyStore::open(&self.0.join("keys"))
    }

    /// The last good snapshot. A damaged file is a warning: the agent starts as without one.
    pub(crate) fn load_snapshot(&self, roots: &RootChain) -> Option<Directory> {
        let path = self.0.join("snapshot");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!(file = %path.display(), %error, "the snapshot cannot be read: starting without one");
                return None;
            }
        };
        match Directory::from_own_file(roots, &bytes) {
            Ok(directory) => Some(directory),
            Err(error) => {
                tracing::warn!(file = %path.display(), %error, "the snapshot is not usable: starting without one");
                None
            }
        }
    }

    /// Keeps a snapshot's file form.
    pub(crate) fn save_snapshot(&self, bytes: &[u8]) -> Result<()> {
        write_private(&self.0.join("snapshot"), bytes)
    }

    /// Pods as they were before a restart; none after a reboot. A damaged file is a warning: pods are then found
    /// by their devices.
    pub(crate) fn load_endpoints(&self) -> SavedEndpoints {
        let path = self.0.join("endpoints.json");
        let fresh = || SavedEndpoints {
            boot_id: boot_id(),
            ..SavedEndpoints::default()
        };
        let Ok(text) = fs::read(&path) else { return fresh() };
        match serde_json::from_slice::<SavedEndpoints>(&text) {
            Ok(saved) if saved.boot_id == boot_id() => saved,
            Ok(saved) => {
                let gone = saved.endpoints.iter().map(|(_, endpoint)| endpoint.clone());
                let gone = saved.unreported.iter().cloned().chain(gone);
                // One that was adopted without a name is nobody to report.
                SavedEndpoints {
                    unreported: gone.filter(|endpoint| endpoint.pod.is_some()).collect(),
                    ..fresh()
                }
            }
            Err(error) => {
                tracing::warn!(file = %path.display(), %error, "the saved pods cannot be read: looking for them");
                fresh()
            }
        }
    }

    /// Keeps the pods.
    pub(crate) fn save_endpoints(&self, saved: &SavedEndpoints) -> Result<()> {
        write_private(&self.0.join("endpoints.json"), &serde_json::to_vec_pretty(saved)?)
    }

    /// Keeps a signed time that has been reached, with the time since boot at which it was.
    pub(crate) fn save_time(&self, signed_ms: u64, boot_ms: u64) -> Result<()> {
        let line = format!("{signed_ms} {boot_ms} {}\n", boot_id());
        write_private(&self.0.join("time"), line.as_bytes())
    }

    /// What [`Self::save_time`] kept: the signed time, and since when in this boot; (0, 0) where nothing is known. How long a
    /// machine was off nobody knows.
    pub(crate) fn load_time(&self, boot_ms: u64) -> (u64, u64) {
        let text = fs::read_to_string(self.0.join("time")).unwrap_or_default();
        let mut words = text.splitn(3, ' ');
        let mut number = || words.next().and_then(|word| word.parse().ok());
        match (number(), number()) {
            (Some(signed), Some(at)) if words.next().map(str::trim) == Some(&boot_id()) && at <= boot_ms => {
                (signed, at)
            }
            (Some(signed), Some(_)) => (signed, boot_ms),
            _ => (0, 0),
        }
    }

    /// The datapath that this node ran with before.
    pub(crate) fn read_datapath(&self) -> Result<Option<Datapath>> {
        let path = self.0.join("datapath");
        match fs::read_to_string(&path) {
            Ok(text) if text.trim() == "kernel" => Ok(Some(Datapath::Kernel)),
            Ok(text) if text.trim() == "userspace" => Ok(Some(Datapath::Userspace)),
            Ok(text) => bail!(
                "{} says {:?}: write kernel or userspace, or remove it",
                path.display(),
                text.trim()
            ),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Remembers the datapath.
    pub(crate) fn write_datapath(&self, datapath: Datapath) -> Result<()> {
        if self.read_datapath()? == Some(datapath) {
            return Ok(());
        }
        write_private(&self.0.join("datapath"), format!("{datapath}\n").as_bytes())
    }
}

/// Which directory the devices were last made from. Kept where a reboot forgets it, as it does the devices: a disk that was
/// set back (a restored image) must not take devices back with it.
#[derive(Debug, Clone)]
pub(crate) struct Applied(PathBuf);

impl Applied {
    /// The marker in the run directory.
    pub(crate) fn new(run_dir: &Path) -> Self {
        Self(run_dir.join("applied"))
    }

    /// Epoch and version; (0, 0) after a reboot, or where nothing was applied yet.
    pub(crate) fn read(&self) -> (u64, u64) {
        let text = fs::read_to_string(&self.0).unwrap_or_default();
        let mut words = text.splitn(3, ' ');
        let mut number = || words.next().and_then(|word| word.parse().ok());
        match (number(), number()) {
            (Some(epoch), Some(version)) if words.next().map(str::trim) == Some(&boot_id()) => {
                (epoch, version)
            }
            _ => (0, 0),
        }
    }

    /// Written after the directory is on disk and before devices follow it.
    pub(crate) fn write(&self, (epoch, version): (u64, u64)) -> Result<()> {
        write_private(&self.0, format!("{epoch} {version} {}\n", boot_id()).as_bytes())
    }
}

/// Changes with every boot of the machine, and with the network namespace that interface indexes belong to.
fn boot_id() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = fs::read_link("/proc/thread-self/ns/net").unwrap_or_default();
    format!("{} {}", boot.trim(), namespace.display())
}

/// Makes a directory, with its parents, that only root may enter.
pub(crate) fn make_private_dir(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot make the directory {}", path.display()))
}

/// Replaces a file: written beside it, synced, renamed, directory synced. Mode 0600 from the first moment.
pub(crate) fn write_private(path: &Path, content: &[u8]) -> Result<()> {
    let context = || format!("cannot write {}", path.display());
    let directory = path.parent().with_context(context)?;
    let name = path.file_name().with_context(context)?.to_string_lossy();
    let beside = directory.join(format!(".{name}.new"));
    let write = || -> io::Result<()> {
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&beside)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        File::open(directory)?.sync_all()
    };
    write().with_context(context)
}

/// Overwrites a file's content and syncs it: secrets that its name does not lead to any more, or soon will not.
pub(crate) fn overwrite(mut file: &File) -> io::Result<()> {
    let length = usize::try_from(file.metadata()?.len()).unwrap_or_default();
    file.rewind()?;
    file.write_all(&vec![0; length])?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_truncated_snapshot_is_as_none() {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDir::open(directory.path()).unwrap();
        let signer = warren_keyd_api::snapshot::ManifestSigner::generate().unwrap();
        let roots = RootChain::first(&signer, 0);
        assert!(state.load_snapshot(&roots).is_none());
        state.save_snapshot(b"WARRENS1\0\0").unwrap();
        assert!(state.load_snapshot(&roots).is_none());
    }

    #[test]
    fn what_was_applied_is_known_until_the_next_boot() {
        let directory = tempfile::tempdir().unwrap();
        let applied = Applied::new(directory.path());
        assert_eq!(applied.read(), (0, 0));
        applied.write((7, 9)).unwrap();
        assert_eq!(applied.read(), (7, 9));
        for other in ["8 9 another boot", "8", "x y z", ""] {
            fs::write(directory.path().join("applied"), other).unwrap();
            assert_eq!(applied.read(), (0, 0), "{other}");
        }
    }

    #[test]
    fn signed_time_goes_on_within_a_boot_and_stands_still_between_two() {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDir::open(directory.path()).unwrap();
        assert_eq!(state.load_time(9), (0, 0));
        state.save_time(1000, 5).unwrap();
        assert_eq!(state.load_time(9), (1000, 5));
        fs::write(directory.path().join("time"), "1000 5 another boot\n").unwrap();
        assert_eq!(state.load_time(9), (1000, 9));
        for bad in ["", "x 5 y", "1000"] {
            fs::write(directory.path().join("time"), bad).unwrap();
            assert_eq!(state.load_time(9), (0, 0), "{bad}");
        }
    }

    #[test]
    fn the_datapath_is_remembered_and_nonsense_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDir::open(directory.path()).unwrap();
        assert_eq!(state.read_datapath().unwrap(), None);
        state.write_datapath(Datapath::Userspace).unwrap();
        assert_eq!(state.read_datapath().unwrap(), Some(Datapath::Userspace));
        fs::write(directory.path().join("datapath"), "magic").unwrap();
        assert!(state.read_datapath().is_err());
    }

    #[test]
    fn endpoints_survive_a_restart_but_not_a_reboot() {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDir::open(directory.path()).unwrap();
        let mut saved = state.load_endpoints();
        let pod = warren_model::PodRef {
            namespace: "demo".into(),
            name: "api".into(),
            uid: "u1".into(),
        };
        saved.unreported.push(Endpoint {
            key: None,
            pod: Some(pod),
            ifindex: 3,
            mac: [0; 6],
            addresses: Default::default(),
            identity: warren_model::IdentityId::INIT,
            deleted: true,
        });
        state.save_endpoints(&saved).unwrap();
        assert_eq!(state.load_endpoints(), saved);
        saved.boot_id = "before".into();
        let named = saved.unreported[0].clone();
        let nameless = Endpoint {
            pod: None,
            ifindex: 4,
            ..named.clone()
        };
        for endpoint in [named, nameless] {
            saved.endpoints.add(endpoint, &Default::default());
        }
        state.save_endpoints(&saved).unwrap();
        let loaded = state.load_endpoints();
        assert!(loaded.endpoints.is_empty());
        assert_eq!(loaded.unreported.len(), 2);
        fs::write(directory.path().join("endpoints.json"), "{").unwrap();
        assert!(state.load_endpoints().endpoints.is_empty());
    }
}
