//! `warren status`.

use std::time::Duration;

use anyhow::bail;
use tokio::time::{Instant, sleep};

use crate::{
    args::{Format, StatusOptions, Target},
    components::{Report, judge},
    output,
    source::Source,
};

/// How often the cluster is asked while waiting.
const INTERVAL: Duration = Duration::from_secs(1);

/// Prints the report; `false` where something is wrong.
pub(crate) async fn run(target: &Target, options: &StatusOptions) -> anyhow::Result<bool> {
    let report = if options.wait {
        wait(target, options.timeout).await?
    } else {
        report(target).await?
    };
    match options.output.output {
        Format::Json => output::json(&report)?,
        Format::Text => output::print(&text(&report))?,
    }
    Ok(report.healthy)
}

async fn report(target: &Target) -> anyhow::Result<Report> {
    let source = Source::open(target).await?;
    let components = match &source {
        Source::Socket(_) => Vec::new(),
        Source::Kubernetes(cluster) => cluster.components().await?,
    };
    let status = source.cluster_status().await;
    Ok(judge(
        components,
        status.as_ref().map_err(|error| format!("{error:#}")),
    ))
}

/// Asks until all is well, and says on standard error what is still missing whenever that changes.
async fn wait(target: &Target, timeout: Duration) -> anyhow::Result<Report> {
    let start = Instant::now();
    let mut said = String::new();
    loop {
        let (missing, last) = match report(target).await {
            Ok(report) if report.healthy => return Ok(report),
            Ok(report) => (report.problems.join("; "), Ok(report)),
            Err(error) => (format!("{error:#}"), Err(error)),
        };
        if missing != said {
            eprintln!("{:>4} s  waiting: {missing}", start.elapsed().as_secs());
            said = missing;
        }
        if start.elapsed() >= timeout {
            eprintln!("warren: not ready after {} s", timeout.as_secs());
            return match last {
                Ok(report) => Ok(report),
                Err(error) => bail!(error),
            };
        }
        sleep(INTERVAL).await;
    }
}

fn text(report: &Report) -> String {
    let mut text = format!("Warren: {}\n", if report.healthy { "OK" } else { "NOT OK" });
    if !report.components.is_empty() {
        let rows = report.components.iter().map(|component| {
            vec![
                component.name.clone(),
                if component.ok() { "OK" } else { "NOT OK" }.into(),
                component.kind.clone(),
                component.desired.to_string(),
                component.ready.to_string(),
                component.available.to_string(),
                component.images.join(" "),
            ]
        });
        let header = [
            "COMPONENT",
            "STATE",
            "KIND",
            "DESIRED",
            "READY",
            "AVAILABLE",
            "IMAGES",
        ];
        text += &format!("\n{}\n", output::table(&header, rows.collect()));
    }
    if let Some(mesh) = &report.mesh {
        text += &format!(
            "\nkeyd:    {} at {}\nAgents:  {} of {} connected, {} up to date{}\nPods:    {} managed\n",
            if mesh.keyd_version.is_empty() {
                "-"
            } else {
                &mesh.keyd_version
            },
            if mesh.leader.is_empty() { "-" } else { &mesh.leader },
            mesh.connected,
            mesh.nodes,
            mesh.up_to_date,
            match mesh.agent_versions.as_slice() {
                [] => String::new(),
                versions => format!(", version {}", versions.join(", ")),
            },
            mesh.pods,
        );
    }
    text + &output::section("Problems", report.problems.iter().cloned())
}
