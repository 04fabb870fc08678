//! Client of keyd's local socket.

use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::transport::{Channel, Endpoint};

use crate::proto::admin_client::AdminClient;

/// Where `keyd` listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/warren/keyd.sock";

/// The socket could not be reached.
#[derive(Debug, thiserror::Error)]
#[error("cannot reach keyd at {}: {reason}; is keyd running, and are you root?", path.display())]
pub struct AdminError {
    path: PathBuf,
    reason: std::io::Error,
}

/// Connects to keyd's socket.
pub async fn connect(path: &Path) -> Result<AdminClient<Channel>, AdminError> {
    Ok(AdminClient::new(channel(path).await?))
}

/// A channel to keyd's socket, for any of its services ([`AdminClient`], [`KeysClient`](crate::proto::keys_client::KeysClient)).
pub async fn channel(path: &Path) -> Result<Channel, AdminError> {
    let error = |reason| AdminError {
        path: path.to_owned(),
        reason,
    };
    // Tried here because an error inside tonic's connector loses the sentence.
    drop(tokio::net::UnixStream::connect(path).await.map_err(error)?);
    let socket = path.to_owned();
    Endpoint::from_static("http://keyd.sock")
        .connect_with_connector(tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
        }))
        .await
        .map_err(|source| error(std::io::Error::other(source)))
}

/// A client over a connection that exists already, as through a command in keyd's pod. It is not made again: once it
/// breaks, every call fails.
pub async fn over<T>(connection: T) -> Result<AdminClient<Channel>, tonic::transport::Error>
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    Ok(AdminClient::new(channel_over(connection).await?))
}

/// As [`over`], for any service.
pub async fn channel_over<T>(connection: T) -> Result<Channel, tonic::transport::Error>
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let mut connection = Some(TokioIo::new(connection));
    Endpoint::from_static("http://keyd.sock")
        .connect_with_connector(tower::service_fn(move |_| {
            let connection = connection.take();
            async move { connection.ok_or_else(|| std::io::Error::other("the connection to keyd broke")) }
        }))
        .await
}
