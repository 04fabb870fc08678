//! The chain of keys that sign a cluster's snapshots.
//!
//! Each root vouches for the next one with its signature, the first for itself; the first one's hash names the cluster.
//! Whoever has pinned one root (an agent, on disk) believes those after it and nothing else: a root that was replaced can
//! vouch for nobody any more, as its successor is already known.
//!
//! ```text
//! root 1 --signs--> root 2 --signs--> root 3        a node with 2 pinned follows to 3, and never goes back
//!              '--signs--> root 2'                  a fork, by whoever has stolen root 1: refused by all that know 2
//! ```

use base64::{Engine as _, engine::general_purpose::STANDARD};
use prost::Message as _;

use super::{ManifestSigner, SnapshotRoot};
use crate::proto::{self, SignedRoot};

/// Domain separation of a root's signature.
const LABEL: &[u8] = b"warren-root-v1";

/// More roots than these no cluster has: one a week for twenty years.
pub const MAX_ROOTS: usize = 1024;

/// Why a chain is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RootError {
    /// No root at all.
    #[error("the chain of snapshot roots is empty")]
    Empty,
    /// More than [`MAX_ROOTS`].
    #[error("the chain of snapshot roots has more than {MAX_ROOTS} links")]
    TooLong,
    /// A root is not what it should be, or the one before did not sign it.
    #[error("snapshot root {0} is malformed or not signed by the one before it")]
    Link(u64),
    /// A line of the text form is not base64 of a root.
    #[error("line {0} is not a snapshot root")]
    Text(usize),
    /// It has fewer roots than are pinned.
    #[error("it ends with snapshot root {offered}, and root {pinned} is pinned")]
    Older {
        /// Its newest generation.
        offered: u64,
        /// The pinned generation.
        pinned: u64,
    },
    /// It does not contain the pinned root.
    #[error("it does not continue the pinned snapshot root {generation} ({root})")]
    Other {
        /// The first generation in which it differs.
        generation: u64,
        /// What is pinned there.
        root: String,
    },
}

/// A root of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root {
    /// 1 for the first.
    pub generation: u64,
    /// Its public key.
    pub key: SnapshotRoot,
    /// When it was made by keyd's clock, Unix milliseconds.
    pub made_unix_ms: i64,
}

/// A chain whose signatures have been checked; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootChain {
    signed: Vec<SignedRoot>,
    roots: Vec<Root>,
}

/// What an offered chain is to a pinned one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Followed {
    /// The same.
    Same,
    /// It goes on: pin this.
    Further(RootChain),
}

impl RootChain {
    /// The chain of a new cluster.
    pub fn first(signer: &ManifestSigner, made_unix_ms: i64) -> Self {
        let root = Root {
            generation: 1,
            key: signer.root(),
            made_unix_ms,
        };
        Self {
            signed: vec![sign(signer, &root)],
            roots: vec![root],
        }
    }

    /// The chain with one more root: `next`, for which `signer`, the newest, vouches.
    pub fn with(
        &self,
        signer: &ManifestSigner,
        next: SnapshotRoot,
        made_unix_ms: i64,
    ) -> Result<Self, RootError> {
        let generation = self.newest().generation + 1;
        if signer.root().as_bytes() != self.newest().key.as_bytes() {
            return Err(RootError::Link(generation));
        }
        if self.roots.len() >= MAX_ROOTS {
            return Err(RootError::TooLong);
        }
        let root = Root {
            generation,
            key: next.of_cluster(self.cluster()),
            made_unix_ms,
        };
        let mut out = self.clone();
        out.signed.push(sign(signer, &root));
        out.roots.push(root);
        Ok(out)
    }

    /// Checks a chain from its first root on.
    pub fn parse(signed: Vec<SignedRoot>) -> Result<Self, RootError> {
        if signed.len() > MAX_ROOTS {
            return Err(RootError::TooLong);
        }
        let mut roots: Vec<Root> = Vec::with_capacity(signed.len());
        for (link, generation) in signed.iter().zip(1..) {
            let root = open(link, generation, roots.last()).ok_or(RootError::Link(generation))?;
            roots.push(root);
        }
        if roots.is_empty() {
            return Err(RootError::Empty);
        }
        Ok(Self { signed, roots })
    }

    /// Reads the text form: a root per line, base64; empty lines and what follows `#` do not count.
    pub fn from_text(text: &str) -> Result<Self, RootError> {
        let mut signed = vec![];
        for (line, number) in text.lines().zip(1..) {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            let bytes = STANDARD.decode(line).map_err(|_| RootError::Text(number))?;
            signed.push(SignedRoot::decode(bytes.as_slice()).map_err(|_| RootError::Text(number))?);
        }
        Self::parse(signed)
    }

    /// The text form.
    pub fn to_text(&self) -> String {
        let mut text = String::from(
            "# The keys that sign snapshots, the oldest first; each is signed by the one before.\n",
        );
        for (signed, root) in self.signed.iter().zip(&self.roots) {
            let line = STANDARD.encode(signed.encode_to_vec());
            text += &format!("{line} # {}: {}\n", root.generation, root.key.to_base64());
        }
        text
    }

    /// For the wire.
    pub fn to_proto(&self) -> proto::Roots {
        proto::Roots {
            roots: self.signed.clone(),
        }
    }

    /// The root that signs now.
    pub fn newest(&self) -> &Root {
        self.roots.last().expect("a chain has at least one root")
    }

    /// All roots, the oldest first.
    pub fn roots(&self) -> &[Root] {
        &self.roots
    }

    /// The first 16 bytes of the SHA-256 of the first root.
    fn cluster(&self) -> [u8; 16] {
        self.newest().key.cluster()
    }

    /// Compares a chain that somebody offers with this one, which is pinned.
    pub fn follow(&self, offered: Self) -> Result<Followed, RootError> {
        let pairs = self.roots.iter().zip(&offered.roots);
        if let Some((pinned, _)) = pairs
            .into_iter()
            .find(|(pinned, offered)| pinned.key != offered.key)
        {
            return Err(RootError::Other {
                generation: pinned.generation,
                root: pinned.key.to_base64(),
            });
        }
        let (pinned, newest) = (self.newest().generation, offered.newest().generation);
        match newest.cmp(&pinned) {
            std::cmp::Ordering::Less => Err(RootError::Older {
                offered: newest,
                pinned,
            }),
            std::cmp::Ordering::Equal => Ok(Followed::Same),
            std::cmp::Ordering::Greater => Ok(Followed::Further(offered)),
        }
    }
}

fn sign(signer: &ManifestSigner, root: &Root) -> SignedRoot {
    let root = proto::Root {
        generation: root.generation,
        public_key: root.key.as_bytes().to_vec(),
        made_unix_ms: root.made_unix_ms,
    }
    .encode_to_vec();
    let signature = signer.sign(LABEL, &root);
    SignedRoot { root, signature }
}

/// A root of this generation, signed by the one before, or the first one by itself.
fn open(link: &SignedRoot, generation: u64, before: Option<&Root>) -> Option<Root> {
    let root = proto::Root::decode(link.root.as_slice()).ok()?;
    let bytes: [u8; 32] = root.public_key.as_slice().try_into().ok()?;
    let key = SnapshotRoot::from_bytes(bytes);
    let (key, signer) = match before {
        None => (key, key),
        Some(before) => (key.of_cluster(before.key.cluster()), before.key),
    };
    signer.verify(LABEL, &link.root, &link.signature).ok()?;
    (root.generation == generation).then_some(Root {
        generation,
        key,
        made_unix_ms: root.made_unix_ms,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signer() -> ManifestSigner {
        ManifestSigner::generate().unwrap()
    }

    /// A chain of three with its signers.
    fn three() -> (RootChain, Vec<ManifestSigner>) {
        let signers: Vec<_> = (0..3).map(|_| signer()).collect();
        let mut chain = RootChain::first(&signers[0], 1000);
        for pair in signers.windows(2) {
            chain = chain.with(&pair[0], pair[1].root(), 2000).unwrap();
        }
        (chain, signers)
    }

    fn short(chain: &RootChain, length: usize) -> RootChain {
        RootChain::parse(chain.signed[..length].to_vec()).unwrap()
    }

    #[test]
    fn a_pinned_root_is_followed_forward_over_any_distance_and_never_back() {
        let (chain, signers) = three();
        assert_eq!(RootChain::from_text(&chain.to_text()).unwrap(), chain);
        assert_eq!(RootChain::parse(chain.to_proto().roots).unwrap(), chain);
        assert_eq!(chain.newest().generation, 3);
        assert_eq!(chain.newest().key.as_bytes(), signers[2].root().as_bytes());
        for root in chain.roots() {
            assert_eq!(root.key.cluster_id(), signers[0].root().cluster_id());
        }
        for pinned in 1..=2 {
            let followed = short(&chain, pinned).follow(chain.clone());
            assert_eq!(followed, Ok(Followed::Further(chain.clone())));
            assert_eq!(
                chain.follow(short(&chain, pinned)),
                Err(RootError::Older {
                    offered: pinned as u64,
                    pinned: 3
                })
            );
        }
        assert_eq!(chain.follow(chain.clone()), Ok(Followed::Same));
    }

    #[test]
    fn a_replaced_key_vouches_for_nobody_any_more() {
        let (chain, signers) = three();
        // Whoever has stolen the first key makes a second one of his own, and as many more as he likes.
        let thief = signer();
        let mut fork = short(&chain, 1).with(&signers[0], thief.root(), 2000).unwrap();
        for _ in 0..3 {
            let error = short(&chain, 2).follow(fork.clone()).unwrap_err();
            assert!(matches!(error, RootError::Other { generation: 2, .. }), "{error}");
            let own = signer();
            fork = match fork.with(&thief, own.root(), 1) {
                Ok(longer) => longer,
                Err(_) => break,
            };
        }
        // Another cluster's chain, whole as it is.
        let (other, _) = three();
        assert!(matches!(
            chain.follow(other),
            Err(RootError::Other { generation: 1, .. })
        ));
        // Only the newest one goes on.
        assert_eq!(chain.with(&signers[1], thief.root(), 1), Err(RootError::Link(4)));
    }

    #[test]
    fn a_chain_that_was_tampered_with_is_refused() {
        let (chain, _) = three();
        let signed = chain.to_proto().roots;
        assert_eq!(RootChain::parse(vec![]), Err(RootError::Empty));
        assert_eq!(RootChain::parse(signed[1..].to_vec()), Err(RootError::Link(1)));
        let mut swapped = signed.clone();
        swapped.swap(1, 2);
        assert_eq!(RootChain::parse(swapped), Err(RootError::Link(2)));
        let mut skipped = signed.clone();
        skipped.remove(1);
        assert_eq!(RootChain::parse(skipped), Err(RootError::Link(2)));
        for link in 0..3 {
            for at in 0..signed[link].root.len() {
                let mut bad = signed.clone();
                bad[link].root[at] ^= 1;
                assert!(RootChain::parse(bad).is_err(), "link {link} byte {at}");
            }
            let mut bad = signed.clone();
            bad[link].signature[9] ^= 1;
            assert_eq!(RootChain::parse(bad), Err(RootError::Link(link as u64 + 1)));
        }
        let long = vec![signed[0].clone(); MAX_ROOTS + 1];
        assert_eq!(RootChain::parse(long), Err(RootError::TooLong));
        assert_eq!(RootChain::from_text("# nothing\n"), Err(RootError::Empty));
        assert_eq!(RootChain::from_text("\nnonsense!\n"), Err(RootError::Text(2)));
    }
}
