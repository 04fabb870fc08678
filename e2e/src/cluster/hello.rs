//! One Hello to `keyd` with a token of the caller's choice, as `warren-cluster hello`: what an agent, or somebody who
//! is none, hears.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use warren_keyd_api::{
    proto::{Datapath, Hello, keyd_message::Body},
    stream::AgentStream,
    tls::{Trust, connect},
};

/// What `warren-cluster hello` takes.
#[derive(Debug, clap::Args)]
pub struct HelloArgs {
    /// HOST:PORT of a keyd.
    #[arg(long)]
    pub keyd: String,
    /// The CA's certificate.
    #[arg(long)]
    pub ca: PathBuf,
    /// A file with the token.
    #[arg(long)]
    pub token_file: PathBuf,
    /// Which node to say one is.
    #[arg(long)]
    pub node: String,
}

/// What keyd says to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Heard {
    /// Accepted; the UID of the node.
    Welcome(String),
    /// Not the leader; where the leader is.
    Redirect(Vec<String>),
    /// Refused, and why.
    Refused(String),
}

/// Says it and prints [`Heard`] as JSON.
pub fn hello(args: &HelloArgs) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let heard = runtime.block_on(say(args))?;
    println!("{}", serde_json::to_string(&heard)?);
    Ok(())
}

async fn say(args: &HelloArgs) -> Result<Heard> {
    let read =
        |path: &PathBuf| fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
    let trust = Trust::from_pem(&read(&args.ca)?)?;
    let channel = connect(&args.keyd, &trust, None, None).await?;
    let hello = Hello {
        protocol: 1,
        node_name: args.node.clone(),
        token: read(&args.token_file)?.trim().to_owned(),
        agent_version: env!("CARGO_PKG_VERSION").into(),
        datapath: Datapath::Userspace.into(),
        resume_epoch: 0,
        resume_version: 0,
        snapshot_root: vec![],
    };
    let mut stream = match AgentStream::open(channel, hello).await {
        Ok(stream) => stream,
        Err(status) => return Ok(Heard::Refused(status.message().to_owned())),
    };
    match stream.receive().await {
        Ok(Some(Body::Welcome(welcome))) => Ok(Heard::Welcome(welcome.node_uid)),
        Ok(Some(Body::Redirect(redirect))) => Ok(Heard::Redirect(redirect.addresses)),
        Ok(Some(Body::Goodbye(goodbye))) => Ok(Heard::Refused(goodbye.reason)),
        Ok(Some(other)) => bail!("keyd began with something else: {other:?}"),
        Ok(None) => bail!("keyd ended the stream without a word"),
        Err(status) => Ok(Heard::Refused(status.message().to_owned())),
    }
}
