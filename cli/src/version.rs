//! `warren version`.

use std::time::Duration;

use serde::Serialize;
use tokio::time::timeout;
use warren_keyd_api::status::ClusterStatus;

use crate::{
    args::{Format, OutputOptions, Target},
    output,
    source::Source,
};

/// The command also works without a cluster: it does not wait for one.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Serialize)]
struct Versions {
    warren: &'static str,
    /// `None` where keyd cannot be asked.
    keyd: Option<String>,
    agents: Vec<String>,
}

/// Prints the versions; a cluster that cannot be reached is no failure.
pub(crate) async fn run(target: &Target, options: &OutputOptions) -> anyhow::Result<bool> {
    let status = timeout(PATIENCE, ask(target)).await.ok().and_then(Result::ok);
    let mut agents: Vec<String> = status
        .iter()
        .flat_map(|status| &status.nodes)
        .filter_map(|node| node.agent.as_ref().map(|agent| agent.agent_version.clone()))
        .collect();
    agents.sort();
    agents.dedup();
    let versions = Versions {
        warren: env!("CARGO_PKG_VERSION"),
        keyd: status.map(|status| status.version),
        agents,
    };
    match options.output {
        Format::Json => output::json(&versions)?,
        Format::Text => {
            let keyd = versions.keyd.as_deref().unwrap_or("not reachable");
            let agents = if versions.agents.is_empty() {
                "-".into()
            } else {
                versions.agents.join(", ")
            };
            output::print(&format!(
                "warren:  {}\nkeyd:    {keyd}\nagents:  {agents}\n",
                versions.warren
            ))?;
        }
    }
    Ok(true)
}

async fn ask(target: &Target) -> anyhow::Result<ClusterStatus> {
    Source::open(target).await?.cluster_status().await
}
