//! Keys of stand-alone mode: files of the state folder.

use std::{
    fs::{self, File},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use zeroize::Zeroizing;

use super::{CA_CRT, CA_KEY, ROOTS, SIGNING_KEY, TrustText};
use crate::files;

/// The state folder.
#[derive(Debug, Clone)]
pub(super) struct Folder(PathBuf);

impl Folder {
    pub(super) fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// The three files; `None` on the first start. Half a set is an error: a new CA would lock every agent out.
    pub(super) fn read(&self) -> anyhow::Result<Option<TrustText>> {
        let names = [CA_CRT, CA_KEY, SIGNING_KEY];
        let mut found = vec![];
        for name in names {
            let path = self.0.join(name);
            found.push(files::read(&path).with_context(|| format!("cannot read {}", path.display()))?);
        }
        match <[Option<String>; 3]>::try_from(found) {
            Ok([Some(ca_crt), Some(ca_key), Some(signing_key)]) => Ok(Some(TrustText {
                ca_crt,
                ca_key,
                signing_key: Zeroizing::new(signing_key),
            })),
            Ok([None, None, None]) => Ok(None),
            _ => bail!(
                "{} holds only some of {}: restore the missing ones, or remove all three to start a new cluster",
                self.0.display(),
                names.join(", ")
            ),
        }
    }

    pub(super) fn create(&self, text: &TrustText) -> anyhow::Result<()> {
        // The certificate comes last: a crash in between leaves half a set only with nothing signed yet.
        self.write(CA_KEY, &text.ca_key)?;
        self.write(SIGNING_KEY, &text.signing_key)?;
        self.write(CA_CRT, &text.ca_crt)
    }

    pub(super) fn signing_key(&self) -> anyhow::Result<Zeroizing<String>> {
        let path = self.0.join(SIGNING_KEY);
        fs::read_to_string(&path)
            .map(Zeroizing::new)
            .with_context(|| format!("cannot read {}", path.display()))
    }

    /// Replaces the signing key if the stored one is as expected; whether it was.
    pub(super) fn swap(
        &self,
        expected: impl Fn(&str) -> anyhow::Result<bool>,
        new: &str,
    ) -> anyhow::Result<bool> {
        let _lock = self.lock()?;
        if !expected(&self.signing_key()?)? {
            return Ok(false);
        }
        self.write(SIGNING_KEY, new)?;
        Ok(true)
    }

    pub(super) fn publish(&self, roots: &str) -> anyhow::Result<()> {
        self.write(ROOTS, roots)
    }

    /// Another keyd may have been started on the same folder.
    fn lock(&self) -> anyhow::Result<File> {
        let path = self.0.join(".keys.lock");
        let locked = File::create(&path).and_then(|file| {
            file.set_permissions(fs::Permissions::from_mode(0o600))?;
            file.lock()?;
            Ok(file)
        });
        locked.with_context(|| format!("cannot lock {}", path.display()))
    }

    fn write(&self, name: &str, content: &str) -> anyhow::Result<()> {
        let path = self.0.join(name);
        files::replace(&path, content.as_bytes()).with_context(|| format!("cannot write {}", path.display()))
    }
}
