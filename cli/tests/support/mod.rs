//! Canned services on a keyd socket, and `warren` as a user runs it against them.
#![allow(dead_code, reason = "each test binary uses a part of this module")]

use std::{path::PathBuf, process::Command};

use tempfile::TempDir;
use tokio::{net::UnixListener, runtime::Runtime};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::server::Router;

/// Services on a socket, for as long as this lives.
pub(crate) struct Served {
    pub(crate) socket: PathBuf,
    pub(crate) runtime: Runtime,
    _directory: TempDir,
}

impl Served {
    pub(crate) fn new(services: Router) -> Self {
        let directory = TempDir::new().expect("directory");
        let socket = directory.path().join("keyd.sock");
        let runtime = Runtime::new().expect("runtime");
        let listener = runtime
            .block_on(async { UnixListener::bind(&socket) })
            .expect("bind");
        runtime.spawn(services.serve_with_incoming(UnixListenerStream::new(listener)));
        Self {
            socket,
            runtime,
            _directory: directory,
        }
    }

    /// Exit code, standard output, standard error.
    pub(crate) fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_warren"))
            .args(arguments)
            .arg("--keyd-socket")
            .arg(&self.socket)
            .output()
            .expect("run");
        let text = |bytes| String::from_utf8(bytes).expect("text");
        (
            output.status.code().expect("a code"),
            text(output.stdout),
            text(output.stderr),
        )
    }
}
