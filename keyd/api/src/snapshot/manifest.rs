//! Signing and checking of manifests.

use aws_lc_rs::{
    encoding::AsBigEndian as _,
    signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use prost::Message as _;

use super::{RootChain, SnapshotError};
use crate::{
    proto::{Manifest, SignedManifest},
    token::sha256,
};

/// Domain separation of a manifest's signature.
const MANIFEST_LABEL: &[u8] = b"warren-manifest-v1";

/// An ed25519 public key that signs the snapshots of a cluster (see [`super::RootChain`]).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SnapshotRoot {
    key: [u8; 32],
    /// First 16 bytes of the SHA-256 of the cluster's first root.
    cluster: [u8; 16],
}

impl SnapshotRoot {
    /// Takes the 32 bytes of the key, which is its cluster's first.
    pub fn from_bytes(key: [u8; 32]) -> Self {
        Self {
            key,
            cluster: cluster(&key),
        }
    }

    /// A later root of a cluster.
    #[must_use]
    pub(super) fn of_cluster(self, cluster: [u8; 16]) -> Self {
        Self { cluster, ..self }
    }

    pub(super) fn cluster(&self) -> [u8; 16] {
        self.cluster
    }

    /// The 32 bytes of the key.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.key
    }

    /// The key as people see it.
    pub fn to_base64(&self) -> String {
        STANDARD.encode(self.key)
    }

    /// The id of the cluster that this root signs for: the first 16 bytes of the SHA-256 of its first root, in hex.
    pub fn cluster_id(&self) -> String {
        hex::encode(self.cluster)
    }

    /// Checks a signature over `label` and `message`.
    pub fn verify(&self, label: &[u8], message: &[u8], signature: &[u8]) -> Result<(), SnapshotError> {
        UnparsedPublicKey::new(&ED25519, &self.key)
            .verify(&[label, message].concat(), signature)
            .map_err(|_| SnapshotError::Signature)
    }

    /// Checks a manifest's signature and cluster.
    pub fn open(&self, signed: &SignedManifest) -> Result<Manifest, SnapshotError> {
        self.verify(MANIFEST_LABEL, &signed.manifest, &signed.signature)?;
        let manifest = Manifest::decode(signed.manifest.as_slice()).map_err(|_| SnapshotError::Manifest)?;
        let expected = self.cluster_id();
        if manifest.cluster_id != expected {
            return Err(SnapshotError::Cluster {
                expected,
                found: manifest.cluster_id,
            });
        }
        Ok(manifest)
    }
}

impl std::fmt::Debug for SnapshotRoot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SnapshotRoot({})", self.to_base64())
    }
}

fn cluster(first_root: &[u8; 32]) -> [u8; 16] {
    let mut out = [0; 16];
    out.copy_from_slice(&sha256(first_root)[..16]);
    out
}

/// The private half of a [`SnapshotRoot`]; `keyd` alone has it.
pub struct ManifestSigner {
    key: Ed25519KeyPair,
    root: SnapshotRoot,
}

impl std::fmt::Debug for ManifestSigner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ManifestSigner(for {:?}, redacted)", self.root)
    }
}

impl ManifestSigner {
    /// Makes a new key.
    pub fn generate() -> Result<Self, SnapshotError> {
        Self::new(Ed25519KeyPair::generate().map_err(|_| SnapshotError::SigningKey)?)
    }

    /// Takes a key as [`Self::to_seed`] gave it.
    pub fn from_seed(seed: &[u8]) -> Result<Self, SnapshotError> {
        Self::new(Ed25519KeyPair::from_seed_unchecked(seed).map_err(|_| SnapshotError::SigningKey)?)
    }

    fn new(key: Ed25519KeyPair) -> Result<Self, SnapshotError> {
        let root = key
            .public_key()
            .as_ref()
            .try_into()
            .map_err(|_| SnapshotError::SigningKey)?;
        Ok(Self {
            key,
            root: SnapshotRoot::from_bytes(root),
        })
    }

    /// The 32 secret bytes, for the file or Secret that keeps them; nowhere else.
    pub fn to_seed(&self) -> Result<zeroize::Zeroizing<Vec<u8>>, SnapshotError> {
        let seed = self.key.seed().map_err(|_| SnapshotError::SigningKey)?;
        let bytes = seed.as_be_bytes().map_err(|_| SnapshotError::SigningKey)?;
        Ok(zeroize::Zeroizing::new(bytes.as_ref().to_vec()))
    }

    /// The public half.
    pub fn root(&self) -> SnapshotRoot {
        self.root
    }

    /// The same key as a later one of its cluster: manifests that it seals say so.
    #[must_use]
    pub fn in_chain(self, chain: &RootChain) -> Self {
        let root = self.root.of_cluster(chain.newest().key.cluster());
        Self { root, ..self }
    }

    /// Signs `label` and `message`.
    pub fn sign(&self, label: &[u8], message: &[u8]) -> Vec<u8> {
        self.key.sign(&[label, message].concat()).as_ref().to_vec()
    }

    /// Signs a manifest; fills in the cluster id.
    pub fn seal(&self, mut manifest: Manifest) -> SignedManifest {
        manifest.cluster_id = self.root.cluster_id();
        let manifest = manifest.encode_to_vec();
        let signature = self.sign(MANIFEST_LABEL, &manifest);
        SignedManifest { manifest, signature }
    }
}
