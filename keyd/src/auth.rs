//! Who is at the other end of a stream.

use tokio::time::Instant;
use warren_keyd_api::tls::CertifiedNode;
use warren_model::{NodeName, NodeUid};

use crate::{notes::About, token_review::TokenReviews};

/// A proved identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) node: NodeName,
    pub(crate) uid: NodeUid,
    /// When the proof is worth nothing any more; `None` for a certificate, which lives as long as the node.
    pub(crate) until: Option<Instant>,
    /// (namespace, name, UID) of the agent's pod.
    pub(crate) pod: Option<(String, String, String)>,
}

impl Caller {
    /// As what an Event is about.
    pub(crate) fn about(&self) -> About {
        About::Node(self.node.clone(), Some(self.uid.clone()))
    }
}

/// How agents prove who they are.
#[derive(Clone)]
pub(crate) enum Authenticator {
    /// Stand-alone: a client certificate from a join token.
    Certificates,
    /// Kubernetes: a projected service-account token.
    Tokens(TokenReviews),
}

/// A sentence for the agent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Unauthenticated {
    pub(crate) message: String,
    /// keyd could not ask; the agent may be right.
    pub(crate) retry: bool,
}

impl Unauthenticated {
    pub(crate) fn no(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            retry: false,
        }
    }
}

impl Authenticator {
    /// Checks certificate or token against the name that the agent claims.
    pub(crate) async fn authenticate(
        &self,
        certificate: Option<&CertifiedNode>,
        token: &str,
        claimed: &NodeName,
    ) -> Result<Caller, Unauthenticated> {
        let caller = match self {
            Self::Tokens(reviews) => reviews.review(token).await?,
            Self::Certificates if token.is_empty() => by_certificate(certificate)?,
            Self::Certificates => {
                return Err(Unauthenticated::no(
                    "this keyd runs without Kubernetes and takes client certificates, not tokens: use a join token",
                ));
            }
        };
        if caller.node != *claimed {
            let message = format!(
                "this is node {claimed} by its own word, but {} by its proof",
                caller.node
            );
            return Err(Unauthenticated::no(message));
        }
        Ok(caller)
    }
}

fn by_certificate(certificate: Option<&CertifiedNode>) -> Result<Caller, Unauthenticated> {
    let CertifiedNode { name, uid } = certificate.ok_or_else(|| {
        Unauthenticated::no("no client certificate: enrol with a join token (`keyd token create`)")
    })?;
    Ok(Caller {
        node: name.clone(),
        uid: uid.clone(),
        until: None,
        pod: None,
    })
}
