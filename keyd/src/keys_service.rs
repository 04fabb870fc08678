//! The service Keys of the local socket.

use futures::{StreamExt as _, stream, stream::BoxStream};
use tokio::sync::{mpsc, oneshot};
use tonic::{Request, Response, Status};
use warren_keyd_api::proto::{
    AbortRotationRequest, AbortRotationResponse, AuditKeysRequest, ListKeysRequest, ListKeysResponse,
    NodeStatus, PairAudit, RevokeKeysRequest, RevokeKeysResponse, RotateKeysRequest, RotateKeysResponse,
    RotateSigningKeyRequest, RotateSigningKeyResponse, RotationsRequest, RotationsResponse, SigningKey,
    SigningKeysRequest, SigningKeysResponse, keys_server::Keys,
};
use warren_keyd_api::snapshot::Root;
use warren_model::NodeName;

use crate::{
    admin::{ended, leader},
    clock, hub,
    rotations::{Maker, Unmade},
    service::Service,
};

/// A reason is for people; the rest of a longer one is left out.
const MAX_REASON: usize = 256;

/// Keys, for operators.
pub(crate) struct KeysService {
    pub(crate) service: Service,
    pub(crate) maker: Maker,
}

impl KeysService {
    async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<T>) -> hub::Command) -> Result<T, Status> {
        let hub: mpsc::Sender<hub::Command> = leader(&self.service)?;
        let (reply, answer) = oneshot::channel();
        hub.send(question(reply)).await.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())
    }

    /// Old requests of stand-alone mode.
    async fn tidy(&self) {
        let all = self.ask(|reply| hub::Command::Rotations(vec![], reply)).await;
        let over = |phase: &str| matches!(phase, "Succeeded" | "Failed" | "Aborted");
        let over: Vec<_> = all
            .unwrap_or_default()
            .into_iter()
            .filter(|one| one.every.is_empty() && over(&one.phase))
            .map(|one| one.name)
            .collect();
        if let Err(error) = self.maker.tidy(|name| over.iter().any(|one| one == name)) {
            tracing::warn!("cannot remove old rotations: {error}");
        }
    }
}

impl From<Unmade> for Status {
    fn from(error: Unmade) -> Self {
        let message = error.to_string();
        match error {
            Unmade::Invalid(_) => Self::invalid_argument(message),
            Unmade::Exists(_) => Self::already_exists(message),
            Unmade::Unknown(_) => Self::not_found(message),
            Unmade::Foreign(_) => Self::failed_precondition(message),
            Unmade::Store(_) => Self::unavailable(message),
        }
    }
}

fn signing_key(root: &Root) -> SigningKey {
    SigningKey {
        generation: root.generation,
        public_key: root.key.as_bytes().to_vec(),
        made_unix_ms: root.made_unix_ms,
    }
}

fn names(list: Vec<String>) -> Vec<NodeName> {
    list.into_iter().map(NodeName::from).collect()
}

#[tonic::async_trait]
impl Keys for KeysService {
    async fn list(&self, request: Request<ListKeysRequest>) -> Result<Response<ListKeysResponse>, Status> {
        let nodes = names(request.into_inner().nodes);
        let response = self.ask(|reply| hub::Command::ListKeys(nodes, reply)).await?;
        Ok(Response::new(response))
    }

    async fn rotate(
        &self,
        request: Request<RotateKeysRequest>,
    ) -> Result<Response<RotateKeysResponse>, Status> {
        // Only where there is somebody to do it.
        leader(&self.service)?;
        self.tidy().await;
        let name = self.maker.create(request.into_inner(), clock::unix_ms()).await?;
        tracing::info!(rotation = %name, "KeyRotation made");
        Ok(Response::new(RotateKeysResponse { name }))
    }

    async fn abort(
        &self,
        request: Request<AbortRotationRequest>,
    ) -> Result<Response<AbortRotationResponse>, Status> {
        let name = request.into_inner().name;
        let known = vec![name.clone()];
        if self
            .ask(|reply| hub::Command::Rotations(known, reply))
            .await?
            .is_empty()
        {
            return Err(Unmade::Unknown(name).into());
        }
        self.maker.abort(&name).await?;
        tracing::info!(rotation = %name, "KeyRotation is to be aborted");
        Ok(Response::new(AbortRotationResponse {}))
    }

    async fn revoke(
        &self,
        request: Request<RevokeKeysRequest>,
    ) -> Result<Response<RevokeKeysResponse>, Status> {
        let RevokeKeysRequest { node, reason } = request.into_inner();
        let name = NodeName::from(node);
        let reason = match reason.trim() {
            "" => "an operator wants it".to_owned(),
            given => given
                .chars()
                .filter(|c| !c.is_control())
                .take(MAX_REASON)
                .collect(),
        };
        let asked = name.clone();
        let revoked = self
            .ask(|reply| hub::Command::Revoke(asked, reason, reply))
            .await?;
        let (uid, flushed) = revoked.map_err(Status::not_found)?;
        if !flushed.await.map_err(|_| ended())? {
            return Err(Status::unavailable(format!(
                "the keys of node {name} are revoked and agents are told, but that cannot be stored yet: keyd goes on trying"
            )));
        }
        let keys = self
            .ask(|reply| hub::Command::ListKeys(vec![name.clone()], reply))
            .await?;
        let revocation = keys.revocations.into_iter().find(|one| one.uid == uid.as_str());
        Ok(Response::new(RevokeKeysResponse { revocation }))
    }

    type AuditStream = BoxStream<'static, Result<PairAudit, Status>>;

    async fn audit(&self, request: Request<AuditKeysRequest>) -> Result<Response<Self::AuditStream>, Status> {
        let AuditKeysRequest {
            node,
            only_disagreeing,
        } = request.into_inner();
        let node = (!node.is_empty()).then(|| NodeName::from(node));
        let pairs = self
            .ask(|reply| hub::Command::Audit(node, only_disagreeing, reply))
            .await?;
        Ok(Response::new(stream::iter(pairs.into_iter().map(Ok)).boxed()))
    }

    async fn rotations(
        &self,
        request: Request<RotationsRequest>,
    ) -> Result<Response<RotationsResponse>, Status> {
        let names = request.into_inner().names;
        let rotations = self.ask(|reply| hub::Command::Rotations(names, reply)).await?;
        Ok(Response::new(RotationsResponse { rotations }))
    }

    async fn signing_keys(
        &self,
        _request: Request<SigningKeysRequest>,
    ) -> Result<Response<SigningKeysResponse>, Status> {
        let report = self.ask(hub::Command::Report).await?;
        let signing = self.service.trust.signing();
        let pinned = |node: &NodeStatus| node.status.as_ref().map(|status| status.root_generation);
        let behind = report
            .nodes
            .iter()
            .filter(|node| pinned(node) != Some(signing.generation()));
        let name = |node: &NodeStatus| node.node.clone().unwrap_or_default().name;
        Ok(Response::new(SigningKeysResponse {
            keys: signing.roots.roots().iter().map(signing_key).collect(),
            behind: behind.map(name).collect(),
            objects_renewed: signing.is_renewed(),
        }))
    }

    async fn rotate_signing_key(
        &self,
        _request: Request<RotateSigningKeyRequest>,
    ) -> Result<Response<RotateSigningKeyResponse>, Status> {
        let rotated = self.ask(hub::Command::RotateSigningKey).await?;
        let rotated = rotated.map_err(Status::unavailable)?;
        Ok(Response::new(RotateSigningKeyResponse {
            key: Some(signing_key(rotated.signing.newest())),
            epoch: rotated.epoch,
            version: rotated.version,
        }))
    }
}
