//! `warren endpoint list`: what is enforced where, as the agents' maps have it.

use std::net::IpAddr;

use clap::Subcommand;
use serde::Serialize;
use warren_agent_api::{EndpointPolicyStatus, Request, Response};
use warren_model::NodeName;

use crate::{
    args::{Format, OutputOptions, Target},
    keyd::{Directory, Keyd},
    output,
    source::Source,
};

#[derive(Debug, Subcommand)]
pub(crate) enum EndpointCommand {
    /// Every pod and every host with what is enforced there.
    ///
    /// Asks the agent of every node. A direction is enabled where some policy selects the endpoint in it (whatever no rule
    /// allows is dropped), disabled where none does (everything passes), audit where violations are reported and pass,
    /// and closed while the agent does not know the pod's labels or policy yet (nothing passes).
    #[command(
        after_help = "Examples:\n  warren endpoint list\n  warren endpoint list -o json | jq '.endpoints[]'"
    )]
    List(OutputOptions),
}

/// What is done in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
enum Enforcement {
    Enabled,
    Disabled,
    Audit,
    Closed,
}

impl Enforcement {
    fn of(status: &EndpointPolicyStatus, enforced: bool) -> Self {
        match (status.closed, enforced, status.audit) {
            (true, _, _) => Self::Closed,
            (false, false, _) => Self::Disabled,
            (false, true, true) => Self::Audit,
            (false, true, false) => Self::Enabled,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Enabled => "enabled",
            Self::Disabled => "disabled",
            Self::Audit => "audit",
            Self::Closed => "closed",
        }
    }
}

/// An endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    node: String,
    /// `namespace/name`; `None` = the host.
    pod: Option<String>,
    /// Index on its node.
    endpoint: u16,
    identity: u32,
    addresses: Vec<IpAddr>,
    ingress: Enforcement,
    egress: Enforcement,
}

/// The report.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    endpoints: Vec<Row>,
    /// Agents that could not be asked: a sentence each.
    problems: Vec<String>,
}

/// Prints the list; `false` where a node could not be asked.
pub(crate) async fn run(target: &Target, command: &EndpointCommand) -> anyhow::Result<bool> {
    let EndpointCommand::List(options) = command;
    let mut keyd = Source::open(target).await?.keyd().await?;
    let directory = keyd.directory().await?;
    let report = collect(&mut keyd, &directory).await;
    match options.output {
        Format::Json => output::json(&report)?,
        Format::Text => output::print(&text(&report))?,
    }
    Ok(report.problems.is_empty())
}

async fn collect(keyd: &mut Keyd, directory: &Directory) -> Report {
    let mut report = Report::default();
    for node in directory.nodes.keys() {
        match keyd.ask(node, &Request::Endpoints).await {
            Ok(Response::Policies(list)) => {
                let mut rows: Vec<_> = list.iter().map(|status| row(node, status)).collect();
                rows.sort_by(|a, b| (&a.pod, a.endpoint).cmp(&(&b.pod, b.endpoint)));
                report.endpoints.extend(rows);
            }
            Ok(_) => report
                .problems
                .push(format!("the agent on {node} answered another question")),
            Err(error) => report.problems.push(format!("{error:#}")),
        }
    }
    report
}

fn row(node: &NodeName, status: &EndpointPolicyStatus) -> Row {
    Row {
        node: node.to_string(),
        pod: (status.endpoint != 0).then(|| match &status.pod {
            Some(pod) => pod.to_string(),
            None => format!("(unknown pod, endpoint {})", status.endpoint),
        }),
        endpoint: status.endpoint,
        identity: status.identity.0,
        addresses: status.addresses.clone(),
        ingress: Enforcement::of(status, status.ingress_enforced),
        egress: Enforcement::of(status, status.egress_enforced),
    }
}

fn text(report: &Report) -> String {
    let rows = report.endpoints.iter().map(|row| {
        let addresses: Vec<_> = row.addresses.iter().map(ToString::to_string).collect();
        vec![
            row.node.clone(),
            row.pod.clone().unwrap_or_else(|| "(host)".into()),
            row.identity.to_string(),
            if addresses.is_empty() {
                "-".into()
            } else {
                addresses.join(" ")
            },
            row.ingress.name().into(),
            row.egress.name().into(),
        ]
    });
    let header = ["NODE", "POD", "IDENTITY", "ADDRESSES", "INGRESS", "EGRESS"];
    let mut text = output::table(&header, rows.collect()) + "\n";
    text += &output::section("Problems", report.problems.iter().cloned());
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enforcement_is_closed_before_it_is_anything_else() {
        let status = |closed, audit| EndpointPolicyStatus {
            endpoint: 3,
            pod: None,
            addresses: Vec::new(),
            identity: warren_model::IdentityId(300),
            labels: Vec::new(),
            closed,
            ingress_enforced: true,
            egress_enforced: false,
            audit,
            entries: Vec::new(),
        };
        for (closed, audit, ingress, egress) in [
            (true, true, Enforcement::Closed, Enforcement::Closed),
            (false, true, Enforcement::Audit, Enforcement::Disabled),
            (false, false, Enforcement::Enabled, Enforcement::Disabled),
        ] {
            let row = row(&NodeName::from("n"), &status(closed, audit));
            assert_eq!((row.ingress, row.egress), (ingress, egress));
        }
    }
}
