//! `warren identity`: the numbers that policy knows pods by.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::bail;
use clap::{Args, Subcommand};
use serde::Serialize;
use warren_model::{IdentityId, Labels, policy::reserved_labels};

use crate::{
    args::{Format, OutputOptions, Target},
    keyd::Directory,
    output,
    source::Source,
};

#[derive(Debug, Subcommand)]
pub(crate) enum IdentityCommand {
    /// All identities, with how many pods have each.
    ///
    /// An identity is a number for one set of labels that policy looks at: the pod's own, its namespace's, its service
    /// account and the cluster. Numbers below 256 are reserved for nodes and the world.
    #[command(
        after_help = "Examples:\n  warren identity list\n  warren identity list -o json | jq '.[].labels'"
    )]
    List(OutputOptions),
    /// One identity: its labels and its pods.
    #[command(after_help = "Examples:\n  warren identity get 257\n  warren identity get 257 -o json")]
    Get(GetOptions),
}

#[derive(Debug, Clone, Args)]
pub(crate) struct GetOptions {
    /// The number.
    pub(crate) number: u32,
    #[command(flatten)]
    pub(crate) output: OutputOptions,
}

/// An identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Identity {
    number: u32,
    labels: BTreeMap<String, String>,
    /// `namespace/name`.
    pods: BTreeSet<String>,
}

/// Prints it.
pub(crate) async fn run(target: &Target, command: &IdentityCommand) -> anyhow::Result<bool> {
    let mut keyd = Source::open(target).await?.keyd().await?;
    let identities = identities(&keyd.directory().await?);
    match command {
        IdentityCommand::List(options) => match options.output {
            Format::Json => output::json(&identities)?,
            Format::Text => output::print(&list(&identities))?,
        },
        IdentityCommand::Get(options) => {
            let number = options.number;
            let Some(identity) = identities.iter().find(|identity| identity.number == number) else {
                bail!("there is no identity {number}: `warren identity list` shows them all");
            };
            match options.output.output {
                Format::Json => output::json(identity)?,
                Format::Text => output::print(&one(identity))?,
            }
        }
    }
    Ok(true)
}

fn identities(directory: &Directory) -> Vec<Identity> {
    let reserved = (1..IdentityId::FIRST_ALLOCATED.0)
        .map(IdentityId)
        .map(|number| (number, reserved_labels(number, false)))
        .filter(|(_, labels)| !labels.0.is_empty());
    let mut all: BTreeMap<IdentityId, Labels> = reserved.collect();
    all.extend(
        directory
            .identities
            .iter()
            .map(|(number, labels)| (*number, labels.clone())),
    );
    all.into_iter()
        .map(|(number, labels)| Identity {
            number: number.0,
            labels: labels.0,
            pods: directory
                .workloads
                .values()
                .filter(|workload| workload.identity == number)
                .map(|workload| workload.pod.to_string())
                .collect(),
        })
        .collect()
}

/// `key=value`, or the key alone.
fn label((key, value): (&String, &String)) -> String {
    if value.is_empty() {
        key.clone()
    } else {
        format!("{key}={value}")
    }
}

fn list(identities: &[Identity]) -> String {
    let rows = identities.iter().map(|identity| {
        vec![
            identity.number.to_string(),
            identity.pods.len().to_string(),
            identity.labels.iter().map(label).collect::<Vec<_>>().join(" "),
        ]
    });
    output::table(&["IDENTITY", "PODS", "LABELS"], rows.collect()) + "\n"
}

fn one(identity: &Identity) -> String {
    let mut text = format!("Identity:  {}\n", identity.number);
    text += &output::section("Labels", identity.labels.iter().map(label));
    text + &output::section("Pods", identity.pods.iter().cloned())
}
