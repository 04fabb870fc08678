//! Join tokens of stand-alone mode: single use, bound to a node, stored hashed.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use warren_keyd_api::token::{JoinToken, secret_hash};
use warren_model::NodeName;

use crate::files;

/// Lifetime unless asked otherwise, seconds.
pub(crate) const DEFAULT_TTL_SECONDS: u64 = 3600;
/// The longest lifetime, seconds: a day.
const MAX_TTL_SECONDS: u64 = 24 * 3600;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Stored {
    node: NodeName,
    secret_sha256: String,
    expires_unix_ms: u64,
    #[serde(default)]
    used: bool,
}

/// Why a token is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TokenRefusal {
    #[error("the join token is not known: make a new one with `keyd token create`")]
    Unknown,
    #[error("the join token has been used: make a new one with `keyd token create`")]
    Used,
    #[error("the join token has expired: make a new one with `keyd token create`")]
    Expired,
    #[error("the join token was made for another node")]
    OtherNode,
    #[error("a join token lives for 1 second to {MAX_TTL_SECONDS} seconds")]
    Ttl,
    #[error("cannot store join tokens: {0}")]
    Store(String),
}

/// The tokens, in one file.
#[derive(Debug)]
pub(crate) struct Tokens {
    path: PathBuf,
    stored: Vec<Stored>,
}

impl Tokens {
    pub(crate) fn open(path: PathBuf) -> anyhow::Result<Self> {
        use anyhow::Context as _;
        let text = files::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let stored = match text {
            Some(text) => serde_json::from_str(&text).with_context(|| {
                format!(
                    "{} is damaged: remove it to forget all join tokens",
                    path.display()
                )
            })?,
            None => vec![],
        };
        Ok(Self { path, stored })
    }

    /// Makes a token. Long expired ones are forgotten.
    pub(crate) fn create(
        &mut self,
        node: NodeName,
        ttl_seconds: u64,
        ca_sha256: [u8; 32],
        now_unix_ms: u64,
    ) -> Result<JoinToken, TokenRefusal> {
        if !(1..=MAX_TTL_SECONDS).contains(&ttl_seconds) {
            return Err(TokenRefusal::Ttl);
        }
        let token = JoinToken::generate(node.clone(), ca_sha256)
            .map_err(|error| TokenRefusal::Store(error.to_string()))?;
        self.stored
            .retain(|stored| stored.expires_unix_ms + MAX_TTL_SECONDS * 1000 > now_unix_ms);
        self.stored.push(Stored {
            node,
            secret_sha256: hex::encode(secret_hash(token.expose_secret())),
            expires_unix_ms: now_unix_ms + ttl_seconds * 1000,
            used: false,
        });
        self.save()?;
        Ok(token)
    }

    /// Uses a token up. It is marked in the file before this returns.
    pub(crate) fn redeem(
        &mut self,
        secret: &str,
        node: &NodeName,
        now_unix_ms: u64,
    ) -> Result<(), TokenRefusal> {
        // Compared by hash: how long that takes says nothing about the secret.
        let hash = hex::encode(secret_hash(secret));
        let stored = self
            .stored
            .iter_mut()
            .find(|stored| stored.secret_sha256 == hash)
            .ok_or(TokenRefusal::Unknown)?;
        if stored.used {
            return Err(TokenRefusal::Used);
        }
        if stored.expires_unix_ms <= now_unix_ms {
            return Err(TokenRefusal::Expired);
        }
        if stored.node != *node {
            return Err(TokenRefusal::OtherNode);
        }
        stored.used = true;
        self.save()
    }

    fn save(&self) -> Result<(), TokenRefusal> {
        let store = |error: &dyn std::fmt::Display| TokenRefusal::Store(error.to_string());
        let text = serde_json::to_vec_pretty(&self.stored).map_err(|error| store(&error))?;
        files::replace(&self.path, &text).map_err(|error| store(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_works_once_for_its_node_until_it_expires_also_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens.json");
        let mut tokens = Tokens::open(path.clone()).unwrap();
        let token = tokens.create("a".into(), 10, [0; 32], 1000).unwrap();
        let secret = token.expose_secret();
        assert!(!std::fs::read_to_string(&path).unwrap().contains(secret));
        assert!(matches!(
            tokens.redeem("00", &"a".into(), 1000),
            Err(TokenRefusal::Unknown)
        ));
        assert!(matches!(
            tokens.redeem(secret, &"b".into(), 1000),
            Err(TokenRefusal::OtherNode)
        ));
        assert!(matches!(
            tokens.redeem(secret, &"a".into(), 11_000),
            Err(TokenRefusal::Expired)
        ));
        let mut tokens = Tokens::open(path.clone()).unwrap();
        tokens.redeem(secret, &"a".into(), 10_999).unwrap();
        let mut tokens = Tokens::open(path).unwrap();
        assert!(matches!(
            tokens.redeem(secret, &"a".into(), 1000),
            Err(TokenRefusal::Used)
        ));
        assert!(matches!(
            tokens.create("a".into(), 0, [0; 32], 0),
            Err(TokenRefusal::Ttl)
        ));
    }
}
