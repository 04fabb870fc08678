//! Signed snapshots and increments of the directory: what `keyd` builds and signs, what an agent checks,
//! applies as a whole and keeps on disk.

mod directory;
mod entries;
mod manifest;
mod roots;

pub use directory::{Change, Directory};
pub use entries::{EntrySet, chunks};
pub use manifest::{ManifestSigner, SnapshotRoot};
pub use roots::{Followed, MAX_ROOTS, Root, RootChain, RootError};

/// The largest chunk of an update, bytes of encoded entries.
pub const CHUNK_BYTES: usize = 1024 * 1024;

/// Why an update, or the file of a snapshot, is refused. The directory stays as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// The last chunk carries no manifest.
    #[error("the update carries no signed manifest")]
    NoManifest,
    /// The manifest is not a protobuf message.
    #[error("the manifest is malformed")]
    Manifest,
    /// Not signed by the pinned snapshot root.
    #[error("the manifest is not signed by this cluster's snapshot root")]
    Signature,
    /// Signed, but for another cluster.
    #[error("the manifest belongs to cluster {found}, not to {expected}")]
    Cluster {
        /// The pinned cluster.
        expected: String,
        /// The manifest's.
        found: String,
    },
    /// The chunks' position and the manifest's differ.
    #[error("the update's chunks and its manifest disagree on epoch and version")]
    Position,
    /// Older than what was applied.
    #[error("the update goes back from {have_epoch}/{have_version} to {epoch}/{version}")]
    GoesBack {
        /// Applied epoch.
        have_epoch: u64,
        /// Applied version.
        have_version: u64,
        /// Offered epoch.
        epoch: u64,
        /// Offered version.
        version: u64,
    },
    /// An increment on another epoch, or on nothing.
    #[error("an increment arrived where only a snapshot can follow")]
    NeedsSnapshot,
    /// The entries do not match the signed digest.
    #[error("the entries do not match the signed digest")]
    Digest,
    /// More data than a directory may have.
    #[error("the update is larger than {0} bytes")]
    TooLarge(usize),
    /// Not a snapshot file.
    #[error("the snapshot file is not one: its first bytes are wrong")]
    FileMagic,
    /// The file ends early.
    #[error("the snapshot file is truncated")]
    FileTruncated,
    /// The file's bytes changed.
    #[error("the snapshot file is corrupt: its checksum is wrong")]
    FileChecksum,
    /// The signing key is not a PKCS #8 ed25519 key.
    #[error("the signing key is not an ed25519 key in PKCS #8")]
    SigningKey,
}
