//! The TLS listener: handshakes run beside each other, each with a time limit, and a failed one ends nothing else.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
    time::timeout,
};
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use warren_keyd_api::{
    MAX_MESSAGE_BYTES,
    proto::keyd_server::KeydServer,
    tls::{handshake_acceptor, server_config},
};

use crate::{
    clock,
    notes::{About, Notes},
    service::Service,
};

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes at a time; more wait in the kernel's queue.
const HANDSHAKES: usize = 256;
/// HTTP/2 pings that find dead agents.
const PING_INTERVAL: Duration = Duration::from_secs(15);
const PING_TIMEOUT: Duration = Duration::from_secs(15);

/// Binds the port. Returns the bound address and the future that serves.
pub(crate) async fn bind(
    address: SocketAddr,
    service: Service,
) -> anyhow::Result<(SocketAddr, impl Future<Output = anyhow::Result<()>>)> {
    let authority = &service.trust.authority;
    let (chain, key) = authority.issue_server(clock::unix_ms() / 1000)?;
    let config = server_config(authority.certificate(), chain, key, || clock::unix_ms() / 1000)?;
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen for agents on {address} (--listen)"))?;
    let bound = listener.local_addr()?;
    let incoming = accept(listener, config, service.notes.clone());
    let keyd = KeydServer::new(service).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let serve = async move {
        Server::builder()
            .http2_keepalive_interval(Some(PING_INTERVAL))
            .http2_keepalive_timeout(Some(PING_TIMEOUT))
            // An agent has one stream; enrolment and a reconnect in flight need a few more.
            .max_concurrent_streams(8)
            .add_service(keyd)
            .serve_with_incoming(incoming)
            .await
            .context("the agents' listener ended")
    };
    Ok((bound, serve))
}

/// A connection that ends in the middle is none of the alarms: load balancers and probes do that.
fn refused(notes: &Notes, error: &std::io::Error) {
    match error
        .get_ref()
        .and_then(|error| error.downcast_ref::<rustls::Error>())
    {
        Some(error) => {
            let message = format!("somebody who connected as an agent is refused: {error}");
            notes.alarm(About::Mesh, "ConnectionRefused", message);
        }
        None => tracing::debug!("TLS handshake failed: {error}"),
    }
}

fn accept(
    listener: TcpListener,
    config: Arc<rustls::ServerConfig>,
    notes: Notes,
) -> ReceiverStream<std::io::Result<TlsStream<TcpStream>>> {
    let (ready, incoming) = mpsc::channel(64);
    let acceptor = handshake_acceptor(config);
    let slots = Arc::new(Semaphore::new(HANDSHAKES));
    tokio::spawn(async move {
        loop {
            let Ok(slot) = slots.clone().acquire_owned().await else {
                return;
            };
            let tcp = tokio::select! {
                accepted = listener.accept() => accepted,
                () = ready.closed() => return,
            };
            let tcp = match tcp {
                Ok((tcp, _)) => tcp,
                Err(error) => {
                    // Out of descriptors, mostly: waiting helps, ending does not.
                    tracing::warn!("cannot accept a connection: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (acceptor, ready, notes) = (acceptor.clone(), ready.clone(), notes.clone());
            tokio::spawn(async move {
                let _slot = slot;
                let _ = tcp.set_nodelay(true);
                match timeout(HANDSHAKE_TIMEOUT, acceptor.accept(tcp)).await {
                    Ok(Ok(tls)) => drop(ready.send(Ok(tls)).await),
                    Ok(Err(error)) => refused(&notes, &error),
                    Err(_) => tracing::debug!("TLS handshake took too long"),
                }
            });
        }
    });
    ReceiverStream::new(incoming)
}
