//! Join tokens of stand-alone mode: `warren1.<node>.<secret>.<SHA-256 of the CA certificate, hex>`.
//!
//! Single use, one hour, bound to a node name. The hash of the CA lets the agent know its `keyd` before it has
//! any certificate.

use std::{fmt, str::FromStr};

use aws_lc_rs::{
    digest,
    rand::{SecureRandom as _, SystemRandom},
};
use warren_model::NodeName;
use zeroize::Zeroizing;

const PREFIX: &str = "warren1.";

/// Why a text is not a join token. Never repeats the text: it is a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Not four parts that start with `warren1`.
    #[error("not a join token: expected warren1.<node>.<secret>.<CA hash>, as `keyd token create` prints it")]
    Shape,
    /// The secret is not 64 hexadecimal digits.
    #[error("the join token's secret is not 64 hexadecimal digits: copy the whole token")]
    Secret,
    /// The hash is not 64 hexadecimal digits.
    #[error("the join token's CA hash is not 64 hexadecimal digits: copy the whole token")]
    CaHash,
    /// No randomness.
    #[error("the system gave no random bytes")]
    Random,
}

/// A join token.
#[derive(Clone)]
pub struct JoinToken {
    node: NodeName,
    secret: Zeroizing<String>,
    ca_sha256: [u8; 32],
}

impl JoinToken {
    /// Makes a token for `node` with 32 random bytes as secret.
    pub fn generate(node: NodeName, ca_sha256: [u8; 32]) -> Result<Self, TokenError> {
        let mut secret = Zeroizing::new([0; 32]);
        SystemRandom::new()
            .fill(secret.as_mut())
            .map_err(|_| TokenError::Random)?;
        Ok(Self {
            node,
            secret: Zeroizing::new(hex::encode(*secret)),
            ca_sha256,
        })
    }

    /// The node that may join with it.
    pub fn node(&self) -> &NodeName {
        &self.node
    }

    /// The secret part, for `EnrollRequest.token`; nowhere else.
    pub fn expose_secret(&self) -> &str {
        &self.secret
    }

    /// SHA-256 of the CA certificate's DER.
    pub fn ca_sha256(&self) -> &[u8; 32] {
        &self.ca_sha256
    }

    /// The whole token as text, to be handed to the node's administrator.
    pub fn expose(&self) -> Zeroizing<String> {
        Zeroizing::new(format!(
            "{PREFIX}{}.{}.{}",
            self.node,
            *self.secret,
            hex::encode(self.ca_sha256)
        ))
    }
}

/// What `keyd` stores instead of the secret: SHA-256 of the secret's text. The secret has 256 random bits, so a
/// fast hash is as good as a slow one.
pub fn secret_hash(secret: &str) -> [u8; 32] {
    sha256(secret.as_bytes())
}

/// SHA-256.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    out
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        // Node names may hold dots: the two last parts are split off from the right.
        let rest = text.trim().strip_prefix(PREFIX).ok_or(TokenError::Shape)?;
        let mut parts = rest.rsplitn(3, '.');
        let (Some(hash), Some(secret), Some(node)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(TokenError::Shape);
        };
        if node.is_empty() {
            return Err(TokenError::Shape);
        }
        if secret.len() != 64 || hex::decode(secret).is_err() {
            return Err(TokenError::Secret);
        }
        let mut ca_sha256 = [0; 32];
        hex::decode_to_slice(hash, &mut ca_sha256).map_err(|_| TokenError::CaHash)?;
        Ok(Self {
            node: node.into(),
            secret: Zeroizing::new(secret.to_owned()),
            ca_sha256,
        })
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken(for {}, redacted)", self.node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_text_and_node_names_may_hold_dots() {
        let token = JoinToken::generate("node1.example.org".into(), [7; 32]).unwrap();
        let text = token.expose();
        let back: JoinToken = format!("{}\n", *text).parse().unwrap();
        assert_eq!(back.node().as_str(), "node1.example.org");
        assert_eq!(back.expose_secret(), token.expose_secret());
        assert_eq!(back.ca_sha256(), &[7; 32]);
        assert_eq!(format!("{token:?}"), "JoinToken(for node1.example.org, redacted)");
    }

    #[test]
    fn bad_tokens_are_refused() {
        let good = JoinToken::generate("n".into(), [7; 32])
            .unwrap()
            .expose()
            .to_string();
        assert_eq!("".parse::<JoinToken>().unwrap_err(), TokenError::Shape);
        assert_eq!("warren1.n".parse::<JoinToken>().unwrap_err(), TokenError::Shape);
        assert_eq!(
            good[..good.len() - 1].parse::<JoinToken>().unwrap_err(),
            TokenError::CaHash
        );
        assert_eq!(
            good.replace("warren1.n.", "warren1.n.0")
                .parse::<JoinToken>()
                .unwrap_err(),
            TokenError::Secret
        );
        assert_eq!(
            good.replace("warren1.n", "warren1.")
                .parse::<JoinToken>()
                .unwrap_err(),
            TokenError::Shape
        );
    }
}
