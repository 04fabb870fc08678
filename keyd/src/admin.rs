//! The local socket: status and join tokens, for root of the node alone.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use futures::{StreamExt as _, stream, stream::BoxStream};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{mpsc, oneshot},
};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, transport::Server};
use warren_keyd_api::proto::{
    AskAgentRequest, AskAgentResponse, CreateJoinTokenRequest, CreateJoinTokenResponse, DirectoryChunk,
    DirectoryRequest, EntryKind, PoliciesRequest, PoliciesResponse, StatusRequest, StatusResponse,
    admin_server::{Admin, AdminServer},
    keys_server::KeysServer,
};
use warren_model::NodeName;

use crate::{
    clock, files, hub,
    keys_service::KeysService,
    questions::AskError,
    service::{Role, Service},
    source::parse::valid_name,
    tokens::DEFAULT_TTL_SECONDS,
};

/// How long an agent may take to answer a question.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// A larger question is refused.
const MAX_REQUEST_BYTES: usize = 64 * 1024;

/// The admin service.
pub(crate) struct AdminService {
    pub(crate) service: Service,
    pub(crate) keyd_id: String,
    pub(crate) source: &'static str,
    pub(crate) encryption: bool,
    /// Under which agents reach this keyd.
    pub(crate) advertise: String,
}

pub(crate) fn ended() -> Status {
    Status::unavailable("keyd is changing its leader: try again")
}

/// The hub; only the leader's index is published.
pub(crate) fn leader(service: &Service) -> Result<mpsc::Sender<hub::Command>, Status> {
    service.hub().map_err(|leader| {
        Status::failed_precondition(match leader.first() {
            Some(address) => format!("this keyd does not lead: ask the one at {address}"),
            None => "no keyd leads at the moment: try again".to_owned(),
        })
    })
}

impl AdminService {
    fn leader(&self) -> Result<mpsc::Sender<hub::Command>, Status> {
        leader(&self.service)
    }
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn status(&self, _request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let role = self.service.role.borrow().clone();
        let mut response = match &role {
            Role::Leader { hub, epoch } => {
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
        response.now_unix_ms = i64::try_from(clock::unix_ms()).unwrap_or(i64::MAX);
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

    type DirectoryStream = BoxStream<'static, Result<DirectoryChunk, Status>>;

    async fn directory(
        &self,
        request: Request<DirectoryRequest>,
    ) -> Result<Response<Self::DirectoryStream>, Status> {
        let kinds = request.into_inner().kinds.into_iter().map(|kind| {
            EntryKind::try_from(kind)
                .map_err(|_| Status::invalid_argument(format!("entries of kind {kind} are not known")))
        });
        let (reply, answer) = oneshot::channel();
        let command = hub::Command::Directory(kinds.collect::<Result<_, _>>()?, reply);
        self.leader()?.send(command).await.map_err(|_| ended())?;
        let chunks = answer.await.map_err(|_| ended())?;
        Ok(Response::new(stream::iter(chunks.into_iter().map(Ok)).boxed()))
    }

    async fn policies(
        &self,
        _request: Request<PoliciesRequest>,
    ) -> Result<Response<PoliciesResponse>, Status> {
        let (reply, answer) = oneshot::channel();
        let command = hub::Command::Policies(reply);
        self.leader()?.send(command).await.map_err(|_| ended())?;
        let policies = answer.await.map_err(|_| ended())?;
        Ok(Response::new(PoliciesResponse { policies }))
    }

    async fn ask_agent(
        &self,
        request: Request<AskAgentRequest>,
    ) -> Result<Response<AskAgentResponse>, Status> {
        let AskAgentRequest { node, request_json } = request.into_inner();
        if request_json.len() > MAX_REQUEST_BYTES {
            let message = format!("the request is larger than {MAX_REQUEST_BYTES} bytes");
            return Err(Status::invalid_argument(message));
        }
        let (reply, answer) = oneshot::channel();
        let command = hub::Command::Ask(NodeName::from(node.as_str()), request_json, reply);
        self.leader()?.send(command).await.map_err(|_| ended())?;
        let answer = match tokio::time::timeout(ANSWER_TIMEOUT, answer).await {
            Ok(answer) => answer.map_err(|_| ended())?,
            Err(_) => Err(AskError::TimedOut(node)),
        };
        let response_json = answer.map_err(|error| {
            let message = error.to_string();
            match error {
                AskError::UnknownNode(_) => Status::not_found(message),
                AskError::NotConnected(_) | AskError::Left => Status::unavailable(message),
                AskError::TimedOut(_) => Status::deadline_exceeded(message),
                AskError::Refused(_) => Status::failed_precondition(message),
                AskError::TooMany => Status::resource_exhausted(message),
            }
        })?;
        Ok(Response::new(AskAgentResponse { response_json }))
    }
}

/// A socket file that is removed at the end, unless another keyd has put its own in its place.
#[derive(Debug)]
struct Socket {
    path: PathBuf,
    inode: (u64, u64),
}

impl Drop for Socket {
    fn drop(&mut self) {
        if inode(&self.path).is_ok_and(|now| now == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> std::io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
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
    let socket = Socket {
        path: path.to_owned(),
        inode: inode(path)?,
    };
    Ok((listener, socket))
}

/// Serves the socket. Besides the file's mode the peer's user is checked: root, or whoever runs keyd.
pub(crate) fn serve(
    path: &Path,
    admin: AdminService,
    keys: KeysService,
) -> anyhow::Result<impl Future<Output = ()> + use<>> {
    let (listener, socket) = bind(path)?;
    // The process owns the file it has just made.
    let own = fs::metadata(path)?.uid();
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
            .add_service(KeysServer::new(keys))
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
