//! The gRPC service for agents.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};
use warren_keyd_api::{
    proto::{AgentMessage, EnrollRequest, EnrollResponse, KeydMessage, keyd_server::Keyd},
    tls::{CertifiedNode, certified_node},
};
use warren_keyd_core::SessionId;
use warren_model::{NodeName, NodeUid};

use crate::{
    auth::Authenticator,
    clock, hub,
    metrics::Metrics,
    notes::{About, Notes},
    session::Session,
    tokens::{TokenRefusal, Tokens},
    trust::Trust,
};

/// What this keyd is at the moment.
#[derive(Debug, Clone)]
pub(crate) enum Role {
    /// It serves; the hub of the term.
    Leader {
        hub: mpsc::Sender<hub::Command>,
        epoch: u64,
    },
    /// Another one serves, reachable there. Empty while nobody is known.
    Follower { leader: Vec<String> },
}

/// Shared by all streams.
#[derive(Clone)]
pub(crate) struct Service {
    pub(crate) trust: Arc<Trust>,
    pub(crate) role: watch::Receiver<Role>,
    pub(crate) authenticator: Authenticator,
    /// Stand-alone mode only.
    pub(crate) tokens: Option<Arc<Mutex<Tokens>>>,
    pub(crate) metrics: Metrics,
    pub(crate) notes: Notes,
    pub(crate) next_session: Arc<AtomicU64>,
}

impl Service {
    pub(crate) fn new_session(&self) -> SessionId {
        SessionId(self.next_session.fetch_add(1, Ordering::Relaxed))
    }

    /// The hub, if this keyd leads.
    pub(crate) fn hub(&self) -> Result<mpsc::Sender<hub::Command>, Vec<String>> {
        match &*self.role.borrow() {
            Role::Leader { hub, .. } => Ok(hub.clone()),
            Role::Follower { leader } => Err(leader.clone()),
        }
    }

    /// The UID under which a node exists.
    async fn node_uid(&self, name: &NodeName) -> Result<NodeUid, Status> {
        let ended = || Status::unavailable("keyd is changing its leader: try again");
        let hub = self
            .hub()
            .map_err(|_| Status::unavailable("this keyd does not lead: ask the leader"))?;
        let (reply, answer) = oneshot::channel();
        hub.send(hub::Command::NodeUid(name.clone(), reply))
            .await
            .map_err(|_| ended())?;
        answer.await.map_err(|_| ended())?.ok_or_else(|| {
            Status::failed_precondition(format!(
                "node {name} does not exist: add its Node to the manifests first"
            ))
        })
    }

    fn enroll_refused(&self, status: Status, node: &NodeName) -> Status {
        self.metrics.refused_authentications.inc();
        match status.code() {
            // keyd's business.
            Code::Unavailable | Code::Internal => {
                tracing::warn!(%node, "enrolment refused: {}", status.message());
            }
            _ => {
                // Who asks has proved nothing: the name is no more than his word.
                let name: String = node
                    .as_str()
                    .chars()
                    .filter(|c| !c.is_control())
                    .take(64)
                    .collect();
                let message = format!(
                    "somebody who calls himself {name} may not enrol: {}",
                    status.message()
                );
                self.notes.alarm(About::Mesh, "EnrolmentRefused", message);
            }
        }
        status
    }
}

fn certificate_of<T>(request: &Request<T>) -> Option<CertifiedNode> {
    certified_node(request.peer_certs()?.first()?)
}

#[tonic::async_trait]
impl Keyd for Service {
    type SessionStream = ReceiverStream<Result<KeydMessage, Status>>;

    async fn enroll(&self, request: Request<EnrollRequest>) -> Result<Response<EnrollResponse>, Status> {
        let certificate = certificate_of(&request);
        let EnrollRequest {
            token,
            node_name,
            csr_der,
        } = request.into_inner();
        let node = NodeName::from(node_name);
        let Some(tokens) = &self.tokens else {
            let status = Status::unimplemented(
                "this keyd runs in Kubernetes: agents authenticate with their service-account token",
            );
            return Err(self.enroll_refused(status, &node));
        };
        let uid = self
            .node_uid(&node)
            .await
            .map_err(|status| self.enroll_refused(status, &node))?;
        let now = clock::unix_ms();
        // A bad request must not use the token up, so the certificate is made first and given out last.
        let (issued, not_after) = self
            .trust
            .authority
            .issue_client(&csr_der, &node, &uid, now / 1000)
            .map_err(|error| self.enroll_refused(Status::invalid_argument(error.to_string()), &node))?;
        let renewal = token.is_empty()
            && certificate
                == Some(CertifiedNode {
                    name: node.clone(),
                    uid,
                });
        if !renewal {
            let redeemed = tokens.lock().await.redeem(&token, &node, now);
            redeemed.map_err(|refusal| {
                let message = refusal.to_string();
                let status = match refusal {
                    TokenRefusal::Store(_) => Status::internal(message),
                    TokenRefusal::Unknown
                    | TokenRefusal::Used
                    | TokenRefusal::Expired
                    | TokenRefusal::OtherNode
                    | TokenRefusal::Ttl => Status::permission_denied(message),
                };
                self.enroll_refused(status, &node)
            })?;
        }
        tracing::info!(%node, renewal, "node enrolled");
        Ok(Response::new(EnrollResponse {
            certificate_der: issued.to_vec(),
            ca_der: self.trust.authority.certificate().to_vec(),
            not_after_unix_ms: i64::try_from(not_after.saturating_mul(1000)).unwrap_or(i64::MAX),
            roots: Some(self.trust.signing().roots.to_proto()),
        }))
    }

    async fn session(
        &self,
        request: Request<Streaming<AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let certificate = certificate_of(&request);
        let (out, stream) = mpsc::channel(4);
        let session = Session::new(self.clone(), certificate, out);
        tokio::spawn(session.run(request.into_inner()));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}
