//! `warren keys rotations` and `warren keys abort`.

use clap::Args;
use tonic::Code;
use warren_keyd_api::proto::{AbortRotationRequest, RotationsRequest};

use super::{progress::bar, view::Rotation};
use crate::{
    args::{Format, OutputOptions, Target},
    assess::span,
    keyd::{Keyd, said},
    output,
    source::{self, Source},
};

#[derive(Debug, Clone, Args)]
pub(crate) struct RotationsOptions {
    /// Only these, with all details.
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    #[command(flatten)]
    output: OutputOptions,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct AbortOptions {
    /// The KeyRotation.
    #[arg(value_name = "NAME")]
    name: String,
}

/// Prints the rotations; `false` where one has failed or is not there.
pub(super) async fn run(target: &Target, options: &RotationsOptions) -> anyhow::Result<bool> {
    let mut keyd = Source::open(target).await?.keyd().await?;
    let request = RotationsRequest {
        names: options.names.clone(),
    };
    let response = keyd.keys().rotations(request).await.map_err(said)?.into_inner();
    let rotations: Vec<Rotation> = response.rotations.into_iter().map(Rotation::from).collect();
    match options.output.output {
        Format::Json => output::json(&rotations)?,
        Format::Text if options.names.is_empty() => output::print(&text(&rotations, source::now()))?,
        Format::Text => {
            let all: Vec<_> = rotations.iter().map(details).collect();
            output::print(&all.join("\n"))?;
        }
    }
    let mut good = rotations.iter().all(|rotation| rotation.phase != "Failed");
    for name in &options.names {
        if rotations.iter().all(|rotation| rotation.name != *name) {
            eprintln!("warren: there is no KeyRotation {name}");
            good = false;
        }
    }
    Ok(good)
}

/// Asks a rotation to stop.
pub(super) async fn abort(target: &Target, options: &AbortOptions) -> anyhow::Result<bool> {
    let mut keyd = Source::open(target).await?.keyd().await?;
    let request = AbortRotationRequest {
        name: options.name.clone(),
    };
    keyd.keys().abort(request).await.map_err(said)?;
    output::print(&format!("KeyRotation {} stops\n", options.name))?;
    Ok(true)
}

/// The rotations that are not over. A keyd without this service has none.
pub(crate) async fn under_way(keyd: &mut Keyd) -> anyhow::Result<Vec<Rotation>> {
    match keyd
        .keys()
        .rotations(RotationsRequest { names: Vec::new() })
        .await
    {
        Ok(response) => Ok(response
            .into_inner()
            .rotations
            .into_iter()
            .map(Rotation::from)
            .filter(|rotation| rotation.phase == "Running")
            .collect()),
        Err(status) if status.code() == Code::Unimplemented => Ok(Vec::new()),
        Err(status) => Err(said(status)),
    }
}

fn text(rotations: &[Rotation], now: i64) -> String {
    if rotations.is_empty() {
        return "No KeyRotation; make one with: warren keys rotate --all\n".to_owned();
    }
    let rows = rotations.iter().map(|rotation| {
        let counts = &rotation.counts;
        let moving: u32 = counts.moving().map(|(count, _)| count).sum();
        vec![
            rotation.name.clone(),
            rotation.phase.clone(),
            format!("{}/{}", counts.done, counts.total),
            moving.to_string(),
            counts.failed.to_string(),
            ago(rotation.started_unix_ms, now),
            took(rotation).map_or_else(|| "-".to_owned(), |seconds| format!("{seconds:.1} s")),
            or_dash(&rotation.every),
            or_dash(&rotation.reason),
        ]
    });
    let header = [
        "NAME", "PHASE", "DONE", "MOVING", "FAILED", "STARTED", "TOOK", "EVERY", "REASON",
    ];
    format!("{}\n", output::table(&header, rows.collect()))
}

/// A rotation with its bar, its exceptions and, while it is not over, its nodes.
pub(super) fn details(rotation: &Rotation) -> String {
    let mut text = format!(
        "KeyRotation {}: {}\n{}\n",
        rotation.name,
        rotation.phase,
        bar(rotation)
    );
    for (what, value) in [
        ("Reason", &rotation.reason),
        ("Every", &rotation.every),
        ("Message", &rotation.message),
    ] {
        if !value.is_empty() {
            text += &format!("{:<9}{value}\n", format!("{what}:"));
        }
    }
    if let Some(seconds) = took(rotation) {
        text += &format!("{:<9}{seconds:.1} s\n", "Took:");
    }
    if !rotation.is_over() && !rotation.nodes.is_empty() {
        let rows = rotation
            .nodes
            .iter()
            .map(|node| vec![node.node.clone(), or_dash(node.phase), or_dash(&node.waiting_for)]);
        text += &format!(
            "\n{}\n",
            output::table(&["NODE", "PHASE", "WAITS FOR"], rows.collect())
        );
    }
    text + &output::section(
        "Exceptions",
        rotation
            .exceptions
            .iter()
            .map(|exception| format!("{}: {}: {}", exception.node, exception.reason, exception.message)),
    )
}

/// Seconds from start to end.
fn took(rotation: &Rotation) -> Option<f64> {
    let both = rotation.started_unix_ms > 0 && rotation.completed_unix_ms > 0;
    both.then(|| (rotation.completed_unix_ms - rotation.started_unix_ms).max(0) as f64 / 1000.0)
}

fn ago(then: i64, now: i64) -> String {
    match then {
        0 => "-".to_owned(),
        then => format!("{} ago", span(u64::try_from(now - then).unwrap_or(0) / 1000)),
    }
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-" } else { text }.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::view::{Counts, Exception, NodeProgress};

    fn rotation() -> Rotation {
        Rotation {
            name: "monthly".into(),
            phase: "Failed".into(),
            started_unix_ms: 1_000_000,
            completed_unix_ms: 1_012_500,
            counts: Counts {
                total: 3,
                done: 2,
                failed: 1,
                ..Counts::default()
            },
            exceptions: vec![Exception {
                node: "node3".into(),
                reason: "Failed".into(),
                message: "its deadline is over".into(),
            }],
            nodes: vec![NodeProgress {
                node: "node3".into(),
                phase: "failed",
                waiting_for: String::new(),
            }],
            ..Rotation::default()
        }
    }

    #[test]
    fn a_failed_rotation_says_where_and_why() {
        let text = details(&rotation());
        assert!(text.starts_with("KeyRotation monthly: Failed\n[####"), "{text}");
        assert!(text.contains("2 of 3 done, 1 FAILED\n"), "{text}");
        assert!(text.contains("Took:    12.5 s\n"), "{text}");
        assert!(text.contains("node3: Failed: its deadline is over"), "{text}");
        assert!(!text.contains("WAITS FOR"), "{text}");
    }

    #[test]
    fn the_list_has_a_row_each() {
        let text = text(&[rotation()], 1_060_000);
        let cells: Vec<_> = text
            .lines()
            .nth(1)
            .unwrap()
            .split("  ")
            .map(str::trim)
            .filter(|c| !c.is_empty())
            .collect();
        assert_eq!(
            cells,
            [
                "monthly",
                "Failed",
                "2/3",
                "0",
                "1",
                "1 min ago",
                "12.5 s",
                "-",
                "-"
            ]
        );
        assert!(super::text(&[], 0).contains("warren keys rotate"));
    }
}
