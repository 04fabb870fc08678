//! What makes this keyd the cluster's: the CA and the key that signs snapshots and MeshNodes.
//!
//! The signing key can be replaced: the next one is stored together with the old one's word for it, as one write, before it
//! signs anything. What signs is changed by [`Trust::activate`] alone.

mod folder;
mod secret;

use std::sync::{Arc, PoisonError, RwLock};

use anyhow::{Context as _, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use kube::Client;
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, MutexGuard};
use warren_keyd_api::{
    snapshot::{ManifestSigner, Root, RootChain},
    tls::Authority,
};
use zeroize::{ZeroizeOnDrop, Zeroizing};

use self::{folder::Folder, secret::KeydSecret};
use crate::clock;

/// CA and signing key, with the place that keeps them.
pub(crate) struct Trust {
    pub(crate) authority: Authority,
    signing: RwLock<Arc<Signing>>,
    place: Place,
    changing: Mutex<()>,
}

enum Place {
    Folder(Folder),
    Secret(Box<KeydSecret>),
}

/// The key that signs, and how agents know it.
#[derive(Debug)]
pub(crate) struct Signing {
    pub(crate) signer: ManifestSigner,
    pub(crate) roots: RootChain,
    /// MeshNodes that a root before this generation has signed are not believed.
    objects_from: u64,
}

/// [`Signing`] as it is kept.
#[derive(Serialize, Deserialize, ZeroizeOnDrop)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct SigningText {
    seed: String,
    #[zeroize(skip)]
    objects_from: u64,
    #[zeroize(skip)]
    roots: Vec<String>,
}

/// The three entries as text, as they stand in files or in a Secret.
struct TrustText {
    ca_crt: String,
    ca_key: String,
    signing_key: Zeroizing<String>,
}

const CA_CRT: &str = "ca.crt";
const CA_KEY: &str = "ca.key";
const SIGNING_KEY: &str = "snapshot-signing.key";
/// Public: what a new agent begins with.
const ROOTS: &str = "snapshot-roots";

fn now_ms() -> i64 {
    i64::try_from(clock::unix_ms()).unwrap_or(i64::MAX)
}

impl Signing {
    fn generate() -> anyhow::Result<Self> {
        let signer = ManifestSigner::generate()?;
        let roots = RootChain::first(&signer, now_ms());
        Ok(Self {
            signer,
            roots,
            objects_from: 1,
        })
    }

    fn from_text(text: &str) -> anyhow::Result<Self> {
        // The error of the parser may repeat the text, which is secret.
        let text: SigningText = serde_json::from_str(text)
            .ok()
            .context("the signing key is malformed")?;
        let seed = STANDARD
            .decode(text.seed.trim())
            .ok()
            .map(Zeroizing::new)
            .context("the signing key is not base64")?;
        let roots = RootChain::from_text(&text.roots.join("\n"))?;
        let signer = ManifestSigner::from_seed(&seed)?.in_chain(&roots);
        ensure!(
            signer.root() == roots.newest().key,
            "the signing key is not that of the newest snapshot root"
        );
        Ok(Self {
            signer,
            roots,
            objects_from: text.objects_from,
        })
    }

    fn to_text(&self) -> anyhow::Result<Zeroizing<String>> {
        let text = SigningText {
            seed: STANDARD.encode(self.signer.to_seed()?.as_slice()),
            objects_from: self.objects_from,
            roots: self.roots.to_text().lines().map(str::to_owned).collect(),
        };
        Ok(Zeroizing::new(serde_json::to_string(&text)?))
    }

    /// A new key, for which this one vouches. MeshNodes of both are believed until [`Self::renewed`].
    fn next(&self) -> anyhow::Result<Self> {
        let signer = ManifestSigner::generate()?;
        let roots = self.roots.with(&self.signer, signer.root(), now_ms())?;
        Ok(Self {
            signer: signer.in_chain(&roots),
            roots,
            objects_from: self.objects_from,
        })
    }

    /// The same key; MeshNodes of former ones are not believed any more.
    fn renewed(&self) -> anyhow::Result<Self> {
        Ok(Self {
            signer: ManifestSigner::from_seed(&self.signer.to_seed()?)?.in_chain(&self.roots),
            roots: self.roots.clone(),
            objects_from: self.generation(),
        })
    }

    /// The newest root.
    pub(crate) fn newest(&self) -> &Root {
        self.roots.newest()
    }

    pub(crate) fn generation(&self) -> u64 {
        self.newest().generation
    }

    /// Whether no MeshNode of a former key is believed.
    pub(crate) fn is_renewed(&self) -> bool {
        self.objects_from >= self.generation()
    }

    /// Who signed an object: the generation of a root that is still believed for objects; `None` for nobody of ours.
    pub(crate) fn object_signer(&self, label: &[u8], message: &[u8], signature: &[u8]) -> Option<u64> {
        let believed = self.roots.roots().iter().rev();
        let mut believed = believed.take_while(|root| root.generation >= self.objects_from);
        believed
            .find(|root| root.key.verify(label, message, signature).is_ok())
            .map(|root| root.generation)
    }

    fn position(&self) -> (u64, u64) {
        (self.generation(), self.objects_from)
    }
}

impl Trust {
    fn new(authority: Authority, signing: Signing, place: Place) -> Self {
        Self {
            authority,
            signing: RwLock::new(Arc::new(signing)),
            place,
            changing: Mutex::default(),
        }
    }

    fn from_text(text: &TrustText, place: Place) -> anyhow::Result<Self> {
        let authority = Authority::from_pem(&text.ca_crt, &text.ca_key)?;
        Ok(Self::new(
            authority,
            Signing::from_text(&text.signing_key)?,
            place,
        ))
    }

    fn generate(place: Place) -> anyhow::Result<Self> {
        let authority = Authority::generate(clock::unix_ms() / 1000)?;
        Ok(Self::new(authority, Signing::generate()?, place))
    }

    fn to_text(&self) -> anyhow::Result<TrustText> {
        Ok(TrustText {
            ca_crt: self.authority.certificate_pem(),
            ca_key: self.authority.expose_key_pem().to_owned(),
            signing_key: self.signing().to_text()?,
        })
    }

    /// What signs now.
    pub(crate) fn signing(&self) -> Arc<Signing> {
        self.signing
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// From now on this signs.
    pub(crate) fn activate(&self, signing: Arc<Signing>) {
        *self.signing.write().unwrap_or_else(PoisonError::into_inner) = signing;
    }

    /// Held while what is stored is changed.
    pub(crate) async fn turn(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().await
    }

    /// What is stored: newer than what signs after a crash, or where another keyd has changed it.
    pub(crate) async fn stored(&self) -> anyhow::Result<Signing> {
        let text = match &self.place {
            Place::Folder(folder) => folder.signing_key()?,
            Place::Secret(secret) => secret.signing_key().await?,
        };
        Signing::from_text(&text).with_context(|| format!("{SIGNING_KEY} is damaged: restore it"))
    }

    /// Stores a new key, vouched for by what signs, unless something newer is stored. Returns what is stored then; it has to
    /// be activated.
    pub(crate) async fn store_next(&self) -> anyhow::Result<Arc<Signing>> {
        let was = self.signing();
        self.store(&was, was.next()?).await
    }

    /// MeshNodes of former keys are not believed from now on. Durable and active when this returns.
    pub(crate) async fn store_renewed(&self) -> anyhow::Result<()> {
        let was = self.signing();
        if !was.is_renewed() {
            let stored = self.store(&was, was.renewed()?).await?;
            if stored.generation() == was.generation() {
                self.activate(stored);
            }
        }
        Ok(())
    }

    /// Compare-and-swap.
    async fn store(&self, was: &Signing, new: Signing) -> anyhow::Result<Arc<Signing>> {
        let text = new.to_text()?;
        let expected = |stored: &str| Ok(Signing::from_text(stored)?.position() == was.position());
        let stored = match &self.place {
            Place::Folder(folder) => folder.swap(expected, &text)?,
            Place::Secret(secret) => secret.swap(expected, &text).await?,
        };
        Ok(Arc::new(match stored {
            true => new,
            false => self.stored().await?,
        }))
    }

    /// Puts the public part where agents that are new find it.
    pub(crate) async fn publish(&self) -> anyhow::Result<()> {
        let roots = self.signing().roots.to_text();
        match &self.place {
            Place::Folder(folder) => folder.publish(&roots),
            Place::Secret(secret) => secret.publish(&self.authority.certificate_pem(), &roots).await,
        }
    }

    /// Reads the keys from a folder, or makes them there on the first start.
    pub(crate) async fn in_folder(path: &std::path::Path) -> anyhow::Result<Self> {
        let folder = Folder::new(path);
        let trust = match folder.read()? {
            Some(text) => Self::from_text(&text, Place::Folder(folder))
                .with_context(|| format!("the keys in {} are damaged: restore them", path.display()))?,
            None => {
                let trust = Self::generate(Place::Folder(folder.clone()))?;
                folder.create(&trust.to_text()?)?;
                trust
            }
        };
        trust.publish().await?;
        Ok(trust)
    }

    /// Reads the keys from the Secret; the first keyd makes them.
    pub(crate) async fn in_secret(client: &Client, namespace: &str) -> anyhow::Result<Self> {
        let secret = KeydSecret::new(client, namespace);
        let damaged = "the keys in the Secret warren-keyd are damaged: restore them";
        let trust = match secret.read().await? {
            Some(text) => Self::from_text(&text, Place::Secret(secret.into())).context(damaged)?,
            None => {
                let trust = Self::generate(Place::Secret(secret.clone().into()))?;
                match secret.create(&trust.to_text()?).await? {
                    None => trust,
                    // Another replica was first.
                    Some(text) => Self::from_text(&text, Place::Secret(secret.into())).context(damaged)?,
                }
            }
        };
        trust.publish().await?;
        Ok(trust)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn trust(path: &std::path::Path) -> Trust {
        Trust::in_folder(path).await.unwrap()
    }

    #[tokio::test]
    async fn a_new_key_is_stored_before_it_signs_and_found_after_a_crash() {
        let folder = tempfile::tempdir().unwrap();
        let one = trust(folder.path()).await;
        let next = one.store_next().await.unwrap();
        assert_eq!((next.generation(), one.signing().generation()), (2, 1));
        assert!(!next.is_renewed());
        // A crash here: the next process signs with it.
        let two = trust(folder.path()).await;
        assert_eq!(two.signing().newest(), next.newest());
        two.store_renewed().await.unwrap();
        assert!(two.signing().is_renewed());
        let three = trust(folder.path()).await;
        assert!(three.signing().is_renewed());
        let public = std::fs::read_to_string(folder.path().join(ROOTS)).unwrap();
        assert_eq!(RootChain::from_text(&public).unwrap(), three.signing().roots);
    }

    #[tokio::test]
    async fn of_two_keyds_the_first_ones_key_counts() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (trust(folder.path()).await, trust(folder.path()).await);
        let first = one.store_next().await.unwrap();
        let second = two.store_next().await.unwrap();
        assert_eq!(first.newest(), second.newest());
        two.activate(second);
        assert_eq!(two.store_next().await.unwrap().generation(), 3);
    }

    #[tokio::test]
    async fn objects_of_a_former_key_are_believed_until_all_are_renewed() {
        let folder = tempfile::tempdir().unwrap();
        let trust = trust(folder.path()).await;
        let old = trust.signing();
        let signature = old.signer.sign(b"l", b"m");
        let signed = |trust: &Trust| trust.signing().object_signer(b"l", b"m", &signature);
        assert_eq!(signed(&trust), Some(1));
        trust.activate(trust.store_next().await.unwrap());
        assert_eq!(signed(&trust), Some(1));
        trust.store_renewed().await.unwrap();
        assert_eq!(signed(&trust), None);
        assert_eq!(trust.signing().object_signer(b"l", b"x", &signature), None);
    }

    #[tokio::test]
    async fn half_a_set_or_a_damaged_one_is_an_error_that_shows_no_secret() {
        let folder = tempfile::tempdir().unwrap();
        trust(folder.path()).await;
        let path = folder.path().join(SIGNING_KEY);
        let text = std::fs::read_to_string(&path).unwrap();
        let (before, after) = text.split_at(40);
        for bad in ["", "x", before, after] {
            std::fs::write(&path, bad).unwrap();
            let error = format!("{:#}", Trust::in_folder(folder.path()).await.err().unwrap());
            assert!(error.contains("restore"), "{error}");
            assert!(bad.len() < 9 || !error.contains(&bad[8..]), "{error}");
        }
        std::fs::remove_file(&path).unwrap();
        let error = format!("{:#}", Trust::in_folder(folder.path()).await.err().unwrap());
        assert!(error.contains("only some of"), "{error}");
    }
}
