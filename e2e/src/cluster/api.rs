//! The API server's answers with their times, by way of `kubectl proxy`: a kubectl per request would take longer than
//! what is measured.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::Cluster;
use crate::lab::{process::Process, wait::wait_until};

/// A way to the API server as its administrator.
pub struct Api {
    socket: PathBuf,
    _proxy: Process,
}

impl Cluster {
    /// Opens a way to the API server.
    pub fn api(&self) -> Result<Api> {
        let socket = self.folder().join("api.sock");
        let flag = format!("--unix-socket={}", socket.display());
        let command = self.control.kubectl(["proxy", flag.as_str()])?;
        let proxy = self
            .control_place()
            .spawn(&command, &self.folder().join("logs/proxy.log"))?;
        let api = Api {
            socket,
            _proxy: proxy,
        };
        wait_until(Duration::from_secs(10), "kubectl proxy listens", || {
            api.request("GET", "/version", "application/json", &Value::Null)
        })?;
        Ok(api)
    }
}

impl Api {
    /// Makes an object in a collection.
    pub fn create(&self, collection: &str, object: &Value) -> Result<()> {
        self.request("POST", collection, "application/json", object)
    }

    /// Merges changes into an object (RFC 7396).
    pub fn merge(&self, path: &str, changes: &Value) -> Result<()> {
        self.request("PATCH", path, "application/merge-patch+json", changes)
    }

    /// A request on a connection of its own; returns when the whole answer is there.
    fn request(&self, method: &str, path: &str, kind: &str, body: &Value) -> Result<()> {
        let mut stream = UnixStream::connect(&self.socket).context("kubectl proxy does not listen")?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: {kind}\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .context("kubectl proxy is gone")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).context("no answer")?;
        let status = answer.split(' ').nth(1).and_then(|code| code.parse::<u16>().ok());
        match status {
            Some(200..=299) => Ok(()),
            Some(code) => bail!(
                "{method} {path}: status {code}: {}",
                answer.lines().last().unwrap_or_default()
            ),
            None => {
                ensure!(!answer.is_empty(), "{method} {path}: kubectl proxy said nothing");
                bail!("{method} {path}: the answer is no HTTP: {answer}")
            }
        }
    }
}
