//! `warren keys revoke`.

use std::time::Duration;

use anyhow::bail;
use clap::Args;
use tokio::time::{Instant, sleep};
use warren_keyd_api::proto::{ListKeysRequest, RevokeKeysRequest};

use super::{list, view::Revocation};
use crate::{
    args::{Format, OutputOptions, Target, duration},
    keyd::said,
    output,
    source::Source,
};

/// How often keyd is asked while waiting.
const INTERVAL: Duration = Duration::from_millis(100);

#[derive(Debug, Clone, Args)]
pub(crate) struct RevokeOptions {
    /// The node.
    #[arg(value_name = "NODE")]
    node: String,
    /// Why, for people.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    reason: String,
    /// How long to wait for the agents at most: 90, 90s, 5m, 1h.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration)]
    timeout: Duration,
    #[command(flatten)]
    output: OutputOptions,
}

/// Revokes; `false` where not every agent has removed the keys in time.
pub(super) async fn run(target: &Target, options: &RevokeOptions) -> anyhow::Result<bool> {
    let mut keyd = Source::open(target).await?.keyd().await?;
    let request = RevokeKeysRequest {
        node: options.node.clone(),
        reason: options.reason.clone(),
    };
    let start = Instant::now();
    let response = keyd.keys().revoke(request).await.map_err(said)?.into_inner();
    let Some(mut revocation) = response.revocation.map(Revocation::from) else {
        bail!("keyd did not say what it revoked: ask again with `warren keys list`");
    };
    while !complete(&revocation) && start.elapsed() < options.timeout {
        sleep(INTERVAL).await;
        let response = keyd.keys().list(ListKeysRequest { nodes: Vec::new() }).await;
        let found = response.map_err(said)?.into_inner().revocations;
        let same = found
            .into_iter()
            .find(|found| found.uid == revocation.uid && found.node == revocation.node);
        revocation = same.map_or(revocation, Revocation::from);
    }
    let seconds = start.elapsed().as_secs_f32();
    match options.output.output {
        Format::Json => output::json(&revocation)?,
        Format::Text => output::print(&format!(
            "Revoked after {seconds:.1} s: {}\n",
            list::revocation(&revocation)
        ))?,
    }
    Ok(complete(&revocation) || options.timeout.is_zero())
}

/// Published, and removed by every agent.
fn complete(revocation: &Revocation) -> bool {
    revocation.version > 0 && revocation.waiting.is_empty()
}
