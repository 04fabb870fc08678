//! The local socket: one JSON object per line each way, root only.

use std::{fs, io, os::unix::fs::PermissionsExt as _, path::Path};

use anyhow::{Context as _, Result};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    sync::{mpsc, oneshot},
};
use warren_agent_api::{Request, Response};

use crate::runner::Input;

/// The longest request, bytes.
const LONGEST: u64 = 4 * 1024 * 1024;

/// Listens at `path`, in place of an agent before.
pub(crate) fn listen(path: &Path, inputs: mpsc::UnboundedSender<Input>) -> Result<()> {
    let context = || format!("cannot listen at {}", path.display());
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).with_context(context),
        _ => {}
    }
    // The directory is 0700, so that nobody comes between bind and chmod.
    let listener = UnixListener::bind(path).with_context(context)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).with_context(context)?;
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    tokio::spawn(serve(stream, inputs.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "a local connection could not be accepted");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            }
        }
    });
    Ok(())
}

async fn serve(stream: UnixStream, inputs: mpsc::UnboundedSender<Input>) {
    let (read, mut write) = stream.into_split();
    let mut reader = BufReader::new(read);
    loop {
        let mut line = String::new();
        match (&mut reader).take(LONGEST).read_line(&mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let response = match serde_json::from_str::<Request>(&line) {
            Ok(request) => ask(request, &inputs).await,
            Err(error) => Response::Error {
                message: format!("the request cannot be read: {error}"),
                retry: false,
            },
        };
        let Ok(mut answer) = serde_json::to_vec(&response) else {
            return;
        };
        answer.push(b'\n');
        if write.write_all(&answer).await.is_err() {
            return;
        }
    }
}

async fn ask(request: Request, inputs: &mpsc::UnboundedSender<Input>) -> Response {
    let (reply, answer) = oneshot::channel();
    let stopping = || Response::Error {
        message: "the agent is stopping".into(),
        retry: true,
    };
    if inputs.send(Input::Local(request, reply)).is_err() {
        return stopping();
    }
    answer.await.unwrap_or_else(|_| stopping())
}
