//! What makes this keyd the cluster's: the CA and the key that signs snapshots.

use std::path::Path;

use anyhow::{Context as _, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use warren_keyd_api::{snapshot::ManifestSigner, tls::Authority};

use crate::{clock, files};

/// CA and signing key.
#[derive(Debug)]
pub(crate) struct Trust {
    pub(crate) authority: Authority,
    pub(crate) signer: ManifestSigner,
}

/// The three secrets as text, as they stand in files or in a Secret.
pub(crate) struct TrustText {
    pub(crate) ca_crt: String,
    pub(crate) ca_key: String,
    pub(crate) signing_key: String,
}

impl Trust {
    /// Makes new keys.
    pub(crate) fn generate() -> anyhow::Result<Self> {
        Ok(Self {
            authority: Authority::generate(clock::unix_ms() / 1000)?,
            signer: ManifestSigner::generate()?,
        })
    }

    /// Reads keys as [`Self::to_text`] gave them.
    pub(crate) fn from_text(text: &TrustText) -> anyhow::Result<Self> {
        let seed = STANDARD
            .decode(text.signing_key.trim())
            .ok()
            .context("the signing key is not base64")?;
        Ok(Self {
            authority: Authority::from_pem(&text.ca_crt, &text.ca_key)?,
            signer: ManifestSigner::from_seed(&seed)?,
        })
    }

    /// The secrets, for the place that keeps them.
    pub(crate) fn to_text(&self) -> anyhow::Result<TrustText> {
        Ok(TrustText {
            ca_crt: self.authority.certificate_pem(),
            ca_key: self.authority.expose_key_pem().to_owned(),
            signing_key: STANDARD.encode(self.signer.to_seed()?.as_slice()),
        })
    }

    /// Reads the keys from a folder, or makes them there on the first start. Half a set is an error: a new CA would
    /// lock every agent out.
    pub(crate) fn in_folder(folder: &Path) -> anyhow::Result<Self> {
        let names = ["ca.crt", "ca.key", "snapshot-signing.key"];
        let mut found = vec![];
        for name in names {
            let path = folder.join(name);
            found.push(files::read(&path).with_context(|| format!("cannot read {}", path.display()))?);
        }
        match <[Option<String>; 3]>::try_from(found) {
            Ok([Some(ca_crt), Some(ca_key), Some(signing_key)]) => {
                let trust = Self::from_text(&TrustText {
                    ca_crt,
                    ca_key,
                    signing_key,
                })
                .with_context(|| format!("the keys in {} are damaged: restore them", folder.display()))?;
                trust.write_public(folder)?;
                Ok(trust)
            }
            Ok([None, None, None]) => {
                let trust = Self::generate()?;
                let text = trust.to_text()?;
                // The certificate comes last: a crash in between leaves half a set only with nothing signed yet.
                for (name, content) in [
                    (names[1], text.ca_key),
                    (names[2], text.signing_key),
                    (names[0], text.ca_crt),
                ] {
                    let path = folder.join(name);
                    files::replace(&path, content.as_bytes())
                        .with_context(|| format!("cannot write {}", path.display()))?;
                }
                trust.write_public(folder)?;
                Ok(trust)
            }
            _ => bail!(
                "{} holds only some of {}: restore the missing ones, or remove all three to start a new cluster",
                folder.display(),
                names.join(", ")
            ),
        }
    }

    fn write_public(&self, folder: &Path) -> anyhow::Result<()> {
        let path = folder.join("snapshot-root.pub");
        files::replace(&path, format!("{}\n", self.signer.root().to_base64()).as_bytes())
            .with_context(|| format!("cannot write {}", path.display()))
    }
}
