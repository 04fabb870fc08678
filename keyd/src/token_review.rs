//! Authentication by projected service-account tokens (Kubernetes 1.32 or newer: the node claims).

use std::{collections::BTreeMap, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use kube::{Api, Client, api::PostParams};
use tokio::time::{Instant, timeout};
use warren_keyd_api::TOKEN_AUDIENCE;

use crate::{
    auth::{Caller, Unauthenticated},
    clock,
};

const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const NODE_UID: &str = "authentication.kubernetes.io/node-uid";
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
/// A review takes no longer.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(5);
/// A token whose expiry cannot be read, or does not fit the time that keyd has, is asked for again after this time; no token
/// is believed for longer than a day.
const DEFAULT_VALIDITY: Duration = Duration::from_secs(600);
const MAX_VALIDITY: Duration = Duration::from_secs(24 * 3600);

/// Asks the API server about tokens.
#[derive(Clone)]
pub(crate) struct TokenReviews {
    client: Client,
    /// `system:serviceaccount:<namespace>:<name>` of the agents.
    account: String,
}

impl TokenReviews {
    pub(crate) fn new(client: Client, account: String) -> Self {
        Self { client, account }
    }

    /// Who presents this token? Whether the Node exists now is the index's business.
    pub(crate) async fn review(&self, token: &str) -> Result<Caller, Unauthenticated> {
        if token.is_empty() {
            return Err(Unauthenticated::no(
                "no service-account token: mount a projected token with the audience keyd.warren.dev",
            ));
        }
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: Some(token.to_owned()),
                audiences: Some(vec![TOKEN_AUDIENCE.into()]),
            },
            ..TokenReview::default()
        };
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let later = |why: String| Unauthenticated {
            message: format!("keyd cannot check tokens now: {why}"),
            retry: true,
        };
        let reviewed = match timeout(REVIEW_TIMEOUT, api.create(&PostParams::default(), &review)).await {
            Ok(Ok(reviewed)) => reviewed,
            // Never the error's Debug: a request in it would hold the token.
            Ok(Err(kube::Error::Api(status))) => return Err(later(status.message.clone())),
            Ok(Err(_)) => return Err(later("the API server cannot be reached".into())),
            Err(_) => return Err(later("the API server does not answer".into())),
        };
        let status = reviewed.status.unwrap_or_default();
        if status.authenticated != Some(true) {
            let why = status
                .error
                .unwrap_or_else(|| "the API server does not know it".into());
            return Err(Unauthenticated::no(format!(
                "the service-account token is not valid: {why}"
            )));
        }
        if !status
            .audiences
            .unwrap_or_default()
            .iter()
            .any(|audience| audience == TOKEN_AUDIENCE)
        {
            return Err(Unauthenticated::no(format!(
                "the token is not meant for the audience {TOKEN_AUDIENCE}"
            )));
        }
        self.caller(status.user.unwrap_or_default(), validity(token, clock::unix_ms()))
    }

    fn caller(&self, user: UserInfo, validity: Duration) -> Result<Caller, Unauthenticated> {
        let username = user.username.unwrap_or_default();
        if username != self.account {
            return Err(Unauthenticated::no(format!(
                "{username} is not the agents' service account {}",
                self.account
            )));
        }
        let extra = user.extra.unwrap_or_default();
        let (node, uid) = (claim(&extra, NODE_NAME)?, claim(&extra, NODE_UID)?);
        let (pod, pod_uid) = (claim(&extra, POD_NAME)?, claim(&extra, POD_UID)?);
        let namespace = username.split(':').nth(2).unwrap_or_default().to_owned();
        Ok(Caller {
            node: node.into(),
            uid: uid.into(),
            until: Some(Instant::now() + validity),
            pod: Some((namespace, pod, pod_uid)),
        })
    }
}

/// Exactly one value of a claim.
fn claim(extra: &BTreeMap<String, Vec<String>>, name: &str) -> Result<String, Unauthenticated> {
    match extra.get(name).map(Vec::as_slice) {
        Some([value]) if !value.is_empty() => Ok(value.clone()),
        _ => Err(Unauthenticated::no(format!(
            "the token has no claim {name}: it must be bound to a pod, and the cluster be Kubernetes 1.32 or newer"
        ))),
    }
}

/// How long a token is good that the API server believes now. Where its times and ours do not fit, our clock is wrong: that must
/// neither lock the agent out nor make the token last.
fn validity(token: &str, now_unix_ms: u64) -> Duration {
    let payload = token
        .split('.')
        .nth(1)
        .and_then(|part| URL_SAFE_NO_PAD.decode(part).ok());
    let claims = payload.and_then(|bytes| serde_json::from_slice::<serde_json::Value>(&bytes).ok());
    let time = |name: &str| Some(claims.as_ref()?.get(name)?.as_u64()?.saturating_mul(1000));
    let (issued, expiry) = (time("iat"), time("exp"));
    let Some(expiry) = expiry else {
        return DEFAULT_VALIDITY;
    };
    // Clocks differ by some seconds.
    let begins = issued.unwrap_or_default().saturating_sub(60_000);
    let validity = match (begins..expiry).contains(&now_unix_ms) {
        true => Duration::from_millis(expiry - now_unix_ms),
        false => {
            let lifetime = expiry.saturating_sub(issued.unwrap_or_default());
            Duration::from_millis(lifetime).min(DEFAULT_VALIDITY)
        }
    };
    validity.min(MAX_VALIDITY)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const ACCOUNT: &str = "system:serviceaccount:kube-system:mesh-agent";

    /// An API server that answers every request with this status.
    fn reviews(status: &Value) -> TokenReviews {
        let answer = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
            "metadata": {}, "spec": {"token": ""}, "status": status});
        let service = tower::service_fn(move |_request: http::Request<kube::client::Body>| {
            let body = kube::client::Body::from(answer.to_string().into_bytes());
            async move { Ok::<_, std::convert::Infallible>(http::Response::new(body)) }
        });
        TokenReviews::new(Client::new(service, "default"), ACCOUNT.into())
    }

    fn good() -> Value {
        json!({
            "authenticated": true,
            "audiences": ["keyd.warren.dev"],
            "user": {"username": ACCOUNT, "extra": {
                NODE_NAME: ["node1"], NODE_UID: ["uid1"], POD_NAME: ["mesh-agent-x"], POD_UID: ["pod1"],
            }},
        })
    }

    async fn refused(status: Value) -> String {
        let error = reviews(&status).review("a.b.c").await.unwrap_err();
        assert!(!error.retry);
        error.message
    }

    #[tokio::test]
    async fn an_agents_token_names_its_node_and_pod() {
        let caller = reviews(&good()).review("a.b.c").await.unwrap();
        assert_eq!((caller.node.as_str(), caller.uid.as_str()), ("node1", "uid1"));
        assert_eq!(
            caller.pod,
            Some(("kube-system".into(), "mesh-agent-x".into(), "pod1".into()))
        );
    }

    #[tokio::test]
    async fn everything_else_is_refused_with_a_reason() {
        let mut status = good();
        status["authenticated"] = json!(false);
        status["error"] = json!("token has expired");
        assert!(refused(status).await.contains("token has expired"));
        let mut status = good();
        status["audiences"] = json!(["https://kubernetes.default.svc"]);
        assert!(refused(status).await.contains("audience"));
        let mut status = good();
        status["audiences"] = Value::Null;
        assert!(refused(status).await.contains("audience"));
        let mut status = good();
        status["user"]["username"] = json!("system:serviceaccount:shop:mesh-agent");
        assert!(refused(status).await.contains("service account"));
        for missing in [NODE_NAME, NODE_UID, POD_NAME, POD_UID] {
            let mut status = good();
            status["user"]["extra"].as_object_mut().unwrap().remove(missing);
            assert!(refused(status).await.contains(missing));
            let mut status = good();
            status["user"]["extra"][missing] = json!(["a", "b"]);
            assert!(refused(status).await.contains(missing));
        }
        assert!(
            reviews(&good())
                .review("")
                .await
                .unwrap_err()
                .message
                .contains("no service-account token")
        );
    }

    #[tokio::test]
    async fn an_unreachable_api_server_is_no_verdict() {
        let service = tower::service_fn(|_request: http::Request<kube::client::Body>| async {
            Err::<http::Response<kube::client::Body>, _>(std::io::Error::other("down"))
        });
        let reviews = TokenReviews::new(Client::new(service, "default"), ACCOUNT.into());
        let error = reviews.review("secret-token").await.unwrap_err();
        assert!(error.retry && !error.message.contains("secret-token"));
    }

    #[test]
    fn a_token_is_good_until_its_expiry() {
        let token = |claims: Value| format!("h.{}.s", URL_SAFE_NO_PAD.encode(claims.to_string()));
        assert_eq!(
            validity(&token(json!({"exp": 1100})), 1_000_000),
            Duration::from_secs(100)
        );
        // The API server believes it, so that it is our clock that is wrong: ten years ahead, or back in 1970.
        let hour = token(json!({"iat": 900, "exp": 4500}));
        assert_eq!(validity(&hour, 1_000_000), Duration::from_secs(3500));
        for wrong in [4_500_001, 320_000_000_000, 5_000] {
            assert_eq!(validity(&hour, wrong), DEFAULT_VALIDITY, "{wrong}");
        }
        let short = token(json!({"iat": 900, "exp": 910}));
        assert_eq!(validity(&short, 320_000_000_000), Duration::from_secs(10));
        assert_eq!(
            validity(&token(json!({"exp": u64::MAX})), 1_000_000),
            MAX_VALIDITY
        );
        assert_eq!(validity("junk", 0), DEFAULT_VALIDITY);
    }
}
