//! The local socket: status and join tokens, for root of the node alone.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context as _;
use futures::StreamExt as _;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::oneshot,
};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, transport::Server};
use warren_keyd_api::proto::{
    CreateJoinTokenRequest, CreateJoinTokenResponse, StatusRequest, StatusResponse,
    admin_server::{Admin, AdminServer},
};
use warren_model::NodeName;

use crate::{
    clock, files, hub,
    service::{Role, Service},
    source::parse::valid_name,
    tokens::DEFAULT_TTL_SECONDS,
};

/// The admin service.
pub(crate) struct AdminService {
    pub(crate) service: Service,
    pub(crate) keyd_id: String,
    pub(crate) source: &'static str,
    pub(crate) encryption: bool,
    /// Under which agents reach this keyd.
    pub(crate) advertise: String,
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn status(&self, _request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let role = self.service.role.borrow().clone();
        let mut response = match &role {
            Role::Leader { hub, epoch } => {
                let ended = || Status::unavailable("keyd is changing its leader: try again");
                let (reply, answer) = oneshot::channel();
                hub.send(hub::Command::Report(reply)).await.map_err(|_| ended())?;
                let report = answer.await.map_err(|_| ended())?;
                StatusResponse {
                    leader: true,
                    epoch: *epoch,
                    leader_address: self.advertise.clone(),
                    ..report
                }
            }
            Role::Follower { leader } => StatusResponse {
                leader_address: leader.first().cloned().unwrap_or_default(),
                ..StatusResponse::default()
            },
        };
        response.keyd_id.clone_from(&self.keyd_id);
        response.version = env!("CARGO_PKG_VERSION").into();
        response.source = self.source.into();
        response.encryption = self.encryption;
        Ok(Response::new(response))
    }

    async fn create_join_token(
        &self,
        request: Request<CreateJoinTokenRequest>,
    ) -> Result<Response<CreateJoinTokenResponse>, Status> {
        let CreateJoinTokenRequest {
            node_name,
            ttl_seconds,
        } = request.into_inner();
        let tokens = self.service.tokens.as_ref().ok_or_else(|| {
            Status::failed_precondition(
                "join tokens are for stand-alone mode; in Kubernetes agents use their service account",
            )
        })?;
        valid_name(&node_name).map_err(Status::invalid_argument)?;
        let ttl = if ttl_seconds == 0 {
            DEFAULT_TTL_SECONDS
        } else {
            ttl_seconds
        };
        let ca = self.service.trust.authority.sha256();
        let token = tokens
            .lock()
            .await
            .create(NodeName::from(node_name.as_str()), ttl, ca, clock::unix_ms())
            .map_err(|refusal| Status::invalid_argument(refusal.to_string()))?;
        tracing::info!(node = %node_name, ttl, "join token made");
        Ok(Response::new(CreateJoinTokenResponse {
            token: token.expose().to_string(),
        }))
    }
}

/// A socket file that is removed at the end.
#[derive(Debug)]
struct Socket(PathBuf);

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Binds the socket, 0600 from the moment it is visible under its name.
fn bind(path: &Path) -> anyhow::Result<(UnixListener, Socket)> {
    let parent = path.parent().unwrap_or(Path::new("."));
    files::make_dir(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    let mut private = path.as_os_str().to_owned();
    private.push(format!(".{}", std::process::id()));
    let private = PathBuf::from(private);
    files::remove(&private)?;
    let listener = UnixListener::bind(&private)
        .with_context(|| format!("cannot listen on {} (--admin-socket)", path.display()))?;
    fs::set_permissions(&private, Permissions::from_mode(0o600))?;
    fs::rename(&private, path).with_context(|| format!("cannot make the socket {}", path.display()))?;
    Ok((listener, Socket(path.to_owned())))
}

/// Serves the socket. Besides the file's mode the peer's user is checked: root, or whoever runs keyd.
pub(crate) fn serve(path: &Path, admin: AdminService) -> anyhow::Result<impl Future<Output = ()> + use<>> {
    let (listener, socket) = bind(path)?;
    // The process owns the file it has just made.
    let own = std::os::unix::fs::MetadataExt::uid(&fs::metadata(path)?);
    let incoming = UnixListenerStream::new(listener).filter(move |stream| {
        let allowed = match stream {
            Ok(stream) => may_ask(stream, own),
            Err(_) => true,
        };
        async move { allowed }
    });
    let admin = Arc::new(admin);
    Ok(async move {
        let _socket = socket;
        let served = Server::builder()
            .add_service(AdminServer::from_arc(admin))
            .serve_with_incoming(incoming)
            .await;
        if let Err(error) = served {
            tracing::error!("the admin socket ended: {error}");
        }
    })
}

fn may_ask(stream: &UnixStream, own: u32) -> bool {
    stream
        .peer_cred()
        .is_ok_and(|peer| peer.uid() == 0 || peer.uid() == own)
}
