//! `keyd token` and `keyd status`: the other side of the local socket.

use std::path::Path;

use anyhow::anyhow;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use warren_keyd_api::{
    admin,
    proto::{
        CreateJoinTokenRequest, RotateSigningKeyRequest, SigningKey, SigningKeysRequest, StatusRequest,
        StatusResponse, keys_client::KeysClient,
    },
    status::ClusterStatus,
};

use crate::args::Format;

/// Prints a join token.
pub(crate) async fn create_token(node: String, ttl: Option<u64>, socket: &Path) -> anyhow::Result<()> {
    let request = CreateJoinTokenRequest {
        node_name: node,
        ttl_seconds: ttl.unwrap_or(0),
    };
    let response = admin::connect(socket)
        .await?
        .create_join_token(request)
        .await
        .map_err(|status| anyhow!("{}", status.message()))?;
    println!("{}", response.into_inner().token);
    Ok(())
}

/// Prints what keyd knows.
pub(crate) async fn status(output: Format, socket: &Path) -> anyhow::Result<()> {
    let response = admin::connect(socket)
        .await?
        .status(StatusRequest {})
        .await
        .map_err(|status| anyhow!("{}", status.message()))?
        .into_inner();
    match output {
        Format::Json => println!(
            "{}",
            serde_json::to_string_pretty(&ClusterStatus::from(response))?
        ),
        Format::Text => print!("{}", text(&response)),
    }
    Ok(())
}

/// Prints the signing keys.
pub(crate) async fn signing_keys(socket: &Path) -> anyhow::Result<()> {
    let response = keys(socket).await?.signing_keys(SigningKeysRequest {}).await;
    let response = response.map_err(|status| anyhow!("{}", status.message()))?;
    for key in response.into_inner().keys {
        println!("{}", line(&key));
    }
    Ok(())
}

/// Has a new signing key made, and prints it.
pub(crate) async fn rotate_signing_key(socket: &Path) -> anyhow::Result<()> {
    let response = keys(socket)
        .await?
        .rotate_signing_key(RotateSigningKeyRequest {})
        .await;
    let response = response.map_err(|status| anyhow!("{}", status.message()))?;
    println!("{}", line(&response.into_inner().key.unwrap_or_default()));
    Ok(())
}

async fn keys(socket: &Path) -> anyhow::Result<KeysClient<tonic::transport::Channel>> {
    Ok(KeysClient::new(admin::channel(socket).await?))
}

fn line(key: &SigningKey) -> String {
    let made = k8s_openapi::jiff::Timestamp::from_millisecond(key.made_unix_ms).unwrap_or_default();
    let public = STANDARD.encode(&key.public_key);
    format!("{} {public} made {made:.0}", key.generation)
}

fn address(bytes: &[u8]) -> String {
    warren_keyd_api::convert::address_from_bytes(bytes).map_or_else(|_| "?".into(), |ip| ip.to_string())
}

fn text(status: &StatusResponse) -> String {
    use std::fmt::Write as _;
    let mut out = String::new();
    let role = if status.leader {
        "leader".to_owned()
    } else {
        format!("follower of {}", status.leader_address)
    };
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "keyd {} ({}), {role}, source {}",
        status.keyd_id, status.version, status.source
    );
    let _ = writeln!(
        out,
        "directory: epoch {}, version {}",
        status.epoch, status.directory_version
    );
    let _ = writeln!(
        out,
        "{} nodes, {} identities, {} pod addresses",
        status.nodes.len(),
        status.identities,
        status.workloads
    );
    let _ = writeln!(
        out,
        "{} policies ({} invalid), {} selectors",
        status.policies, status.invalid_policies, status.selectors
    );
    for node in &status.nodes {
        let entry = node.node.clone().unwrap_or_default();
        let state = match (node.connected, node.applied_version == status.directory_version) {
            (false, _) => "not connected",
            (true, true) => "up to date",
            (true, false) => "catching up",
        };
        let keys = entry.slots.len();
        let endpoint = entry
            .endpoints
            .first()
            .map_or_else(|| "no address".into(), |bytes| address(bytes));
        let _ = writeln!(out, "  {:<24} {endpoint:<24} {keys} key(s)  {state}", entry.name);
    }
    for problem in &status.problems {
        let _ = writeln!(out, "problem: {problem}");
    }
    out
}
