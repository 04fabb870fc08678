//! `warren keys rotate`.

use std::time::Duration;

use anyhow::bail;
use clap::{ArgGroup, Args, ValueEnum};
use tokio::time::{Instant, sleep};
use warren_keyd_api::proto::{Pace, RotateKeysRequest, RotationsRequest};

use super::{progress::Follower, rotations, view::Rotation};
use crate::{
    args::{Format, OutputOptions, Target, duration},
    keyd::{Keyd, said},
    output,
    source::Source,
};

/// How often keyd is asked while waiting.
const INTERVAL: Duration = Duration::from_millis(200);
/// How long keyd may be away while waiting: a leader is replaced in seconds.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Args)]
#[command(group = ArgGroup::new("choice").required(true).multiple(true).args(["node", "selector", "all"]))]
pub(crate) struct RotateOptions {
    /// These nodes, by name; may be given more than once.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    node: Vec<String>,
    /// Nodes with all of these labels.
    #[arg(long, value_name = "LABEL=VALUE", value_delimiter = ',', value_parser = label)]
    selector: Vec<(String, String)>,
    /// All nodes.
    #[arg(long, conflicts_with_all = ["node", "selector"])]
    all: bool,
    /// Why, for people.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    reason: String,
    /// The name of the KeyRotation [default: one is made up].
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    name: String,
    /// Nodes at once: a number, or a share of the chosen ones [default: 10%, at least one].
    #[arg(long, value_name = "N|N%", default_value = "", hide_default_value = true)]
    concurrency: String,
    /// Delay each node's start by up to this.
    #[arg(long, value_name = "DURATION", value_parser = seconds)]
    jitter: Option<u32>,
    /// How long an old key must be unused before it is destroyed [default: 15s].
    #[arg(long, value_name = "DURATION", value_parser = seconds)]
    drain: Option<u32>,
    /// How long one node may take; past it the old key goes on working [default: 10m].
    #[arg(long, value_name = "DURATION", value_parser = seconds)]
    deadline: Option<u32>,
    /// What happens to peers whose agent does not answer.
    #[arg(long, value_enum, default_value_t = Stragglers::Wait)]
    stragglers: Stragglers,
    /// Run again and again: a number of hours or days, like 12h or 30d [default: once].
    #[arg(long, value_name = "PERIOD", default_value = "", hide_default_value = true)]
    every: String,
    /// Wait until the rotation is over, and show how far it is.
    #[arg(long)]
    wait: bool,
    /// How long to wait at most: 90, 90s, 5m, 1h. The rotation goes on afterwards.
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = duration, requires = "wait")]
    timeout: Duration,
    #[command(flatten)]
    output: OutputOptions,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Stragglers {
    /// At its deadline a node keeps its old key.
    Wait,
    /// The same, but pairs without any traffic to lose are passed over.
    Leave,
    /// At the deadline the stragglers' keys are revoked.
    Revoke,
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((label, value)) if !label.is_empty() => Ok((label.to_owned(), value.to_owned())),
        _ => Err("write LABEL=VALUE".to_owned()),
    }
}

fn seconds(text: &str) -> Result<u32, String> {
    u32::try_from(duration(text)?.as_secs()).map_err(|_| "that is too long".to_owned())
}

impl RotateOptions {
    fn request(&self) -> RotateKeysRequest {
        RotateKeysRequest {
            name: self.name.clone(),
            nodes: self.node.clone(),
            match_labels: self.selector.iter().cloned().collect(),
            all: self.all,
            reason: self.reason.clone(),
            pace: Some(Pace {
                concurrency: self.concurrency.clone(),
                jitter_seconds: self.jitter.unwrap_or_default(),
                drain_seconds: self.drain.unwrap_or_default(),
                deadline_seconds: self.deadline.unwrap_or_default(),
            }),
            stragglers: match self.stragglers {
                Stragglers::Wait => "Wait",
                Stragglers::Leave => "Leave",
                Stragglers::Revoke => "Revoke",
            }
            .into(),
            every: self.every.clone(),
        }
    }
}

/// Makes the rotation; with `--wait` follows it, and returns `false` where it did not succeed.
pub(super) async fn run(target: &Target, options: &RotateOptions) -> anyhow::Result<bool> {
    for (option, value) in [("--drain", options.drain), ("--deadline", options.deadline)] {
        if value == Some(0) {
            bail!("{option} 0 is not possible: leave it out for the default");
        }
    }
    let mut keyd = Source::open(target).await?.keyd().await?;
    let made = keyd.keys().rotate(options.request()).await.map_err(said)?;
    let name = made.into_inner().name;
    if !options.wait {
        match options.output.output {
            Format::Json => output::json(&serde_json::json!({"name": name}))?,
            Format::Text => output::print(&format!(
                "KeyRotation {name} made; follow it with: warren keys rotations {name}\n"
            ))?,
        }
        return Ok(true);
    }
    let rotation = follow(target, keyd, &name, options.timeout).await?;
    match options.output.output {
        Format::Json => output::json(&rotation)?,
        Format::Text => output::print(&rotations::details(&rotation))?,
    }
    Ok(rotation.succeeded())
}

/// Waits until the rotation is over, showing how far it is.
async fn follow(target: &Target, keyd: Keyd, name: &str, timeout: Duration) -> anyhow::Result<Rotation> {
    let (start, mut follower) = (Instant::now(), Follower::default());
    let (mut keyd, mut answered) = (Some(keyd), Instant::now());
    loop {
        match look(target, &mut keyd, name).await {
            Ok(rotation) => {
                answered = Instant::now();
                if let Some(rotation) = rotation {
                    follower.show(&rotation, start.elapsed().as_secs_f32());
                    if rotation.is_over() {
                        return Ok(rotation);
                    }
                }
            }
            Err(error) => {
                // The rotation goes on without us, also under another leader.
                keyd = None;
                if answered.elapsed() > PATIENCE {
                    return Err(error.context(format!("KeyRotation {name} cannot be followed")));
                }
            }
        }
        if start.elapsed() >= timeout {
            bail!(
                "KeyRotation {name} is not over after {} s; it goes on: warren keys rotations {name}",
                timeout.as_secs()
            );
        }
        sleep(INTERVAL).await;
    }
}

/// The rotation, once keyd has read it.
async fn look(target: &Target, keyd: &mut Option<Keyd>, name: &str) -> anyhow::Result<Option<Rotation>> {
    let keyd = match keyd {
        Some(keyd) => keyd,
        None => keyd.insert(Source::open(target).await?.keyd().await?),
    };
    let request = RotationsRequest {
        names: vec![name.to_owned()],
    };
    let response = keyd.keys().rotations(request).await.map_err(said)?.into_inner();
    Ok(response
        .rotations
        .into_iter()
        .find(|rotation| rotation.name == name)
        .map(Rotation::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_and_seconds() {
        assert_eq!(label("zone=a"), Ok(("zone".into(), "a".into())));
        assert_eq!(label("x="), Ok(("x".into(), String::new())));
        assert!(label("zone").is_err() && label("=a").is_err());
        assert_eq!(seconds("2m"), Ok(120));
        assert!(seconds("99999999h").is_err());
    }
}
