//! `warren keys list`.

use clap::Args;
use warren_keyd_api::proto::ListKeysRequest;

use super::view::{Key, Keys, NodeKeys, Revocation};
use crate::{
    args::{Format, OutputOptions, Target},
    assess::{short, span},
    keyd::said,
    output,
    source::{self, Source},
};

#[derive(Debug, Clone, Args)]
pub(crate) struct ListOptions {
    /// Only these nodes.
    #[arg(value_name = "NODE")]
    nodes: Vec<String>,
    #[command(flatten)]
    output: OutputOptions,
}

/// Prints the keys; `false` where a node has none, or has lost it.
pub(super) async fn run(target: &Target, options: &ListOptions) -> anyhow::Result<bool> {
    let mut keyd = Source::open(target).await?.keyd().await?;
    let request = ListKeysRequest {
        nodes: options.nodes.clone(),
    };
    let response = keyd.keys().list(request).await.map_err(said)?.into_inner();
    let mut keys = Keys::of(response, source::now());
    let unknown = options
        .nodes
        .iter()
        .filter(|name| keys.nodes.iter().all(|node| node.node != **name))
        .map(|name| format!("there is no node {name}"))
        .collect::<Vec<_>>();
    keys.healthy &= unknown.is_empty();
    keys.problems.extend(unknown);
    match options.output.output {
        Format::Json => output::json(&keys)?,
        Format::Text => output::print(&text(&keys))?,
    }
    Ok(keys.healthy)
}

fn text(keys: &Keys) -> String {
    let rows: Vec<_> = keys.nodes.iter().flat_map(rows).collect();
    let header = [
        "NODE",
        "GENERATION",
        "STATE",
        "KEY",
        "AGE",
        "HELD",
        "AGENT",
        "ROTATION",
    ];
    let mut text = format!("{}\n", output::table(&header, rows));
    text += &output::section("Revoked", keys.revocations.iter().map(revocation));
    text + &output::section("Problems", keys.problems.iter().cloned())
}

/// A row per key; a node without one has a row as well.
fn rows(node: &NodeKeys) -> Vec<Vec<String>> {
    let rotation = match (node.phase, node.waiting_for.as_str()) {
        ("", _) => "-".to_owned(),
        (phase, "") => phase.to_owned(),
        (phase, other) => format!("{phase}, waits for {other}"),
    };
    let agent = if node.connected {
        "connected"
    } else {
        "NOT CONNECTED"
    };
    let row = |key: [String; 5]| {
        let mut row = vec![node.node.clone()];
        row.extend(key);
        row.extend([agent.to_owned(), rotation.clone()]);
        row
    };
    if node.keys.is_empty() {
        return vec![row(["-", "NO KEY", "-", "-", "-"].map(str::to_owned))];
    }
    node.keys.iter().map(|key| row(cells(key))).collect()
}

fn cells(key: &Key) -> [String; 5] {
    [
        key.generation.to_string(),
        key.state.to_owned(),
        short(&key.public_key),
        key.age_seconds.map_or_else(|| "-".to_owned(), span),
        match key.held {
            Some(true) => "yes",
            Some(false) => "NO",
            None => "-",
        }
        .to_owned(),
    ]
}

/// A line about a revocation.
pub(super) fn revocation(revocation: &Revocation) -> String {
    let total = revocation.acknowledged.len() + revocation.waiting.len();
    let mut line = format!(
        "{} ({}): removed by {} of {total} agents",
        revocation.node,
        match revocation.public_keys.as_slice() {
            [] => "no key".to_owned(),
            keys => keys.iter().map(|key| short(key)).collect::<Vec<_>>().join(", "),
        },
        revocation.acknowledged.len(),
    );
    if !revocation.waiting.is_empty() {
        line += &format!("; not yet by {}", revocation.waiting.join(", "));
    }
    line
}

#[cfg(test)]
mod tests {
    use warren_keyd_api::proto::{
        KeyHeld, KeyState, KeyStatus, ListKeysResponse, NodeKeysStatus, NodePhase, Revocation,
    };

    use super::*;

    const NOW: i64 = 1_800_000_000_000;

    fn key(generation: u64, state: KeyState, held: KeyHeld) -> KeyStatus {
        KeyStatus {
            generation,
            public_key: vec![u8::try_from(generation).unwrap(); 32],
            state: state.into(),
            accepted_unix_ms: NOW - 7_500_000,
            held: held.into(),
        }
    }

    fn response() -> ListKeysResponse {
        ListKeysResponse {
            nodes: vec![
                NodeKeysStatus {
                    node: "node1".into(),
                    active: 1,
                    last: 2,
                    keys: vec![
                        key(1, KeyState::Active, KeyHeld::Yes),
                        key(2, KeyState::Candidate, KeyHeld::Yes),
                    ],
                    connected: true,
                    phase: NodePhase::Verifying.into(),
                    waiting_for: "node2".into(),
                    ..NodeKeysStatus::default()
                },
                NodeKeysStatus {
                    node: "node2".into(),
                    ..NodeKeysStatus::default()
                },
            ],
            revocations: vec![Revocation {
                node: "node9".into(),
                public_keys: vec![vec![7; 32]],
                acknowledged: vec!["node1".into()],
                waiting: vec!["node2".into()],
                ..Revocation::default()
            }],
        }
    }

    #[test]
    fn every_key_has_a_row_and_every_fault_a_sentence() {
        let keys = Keys::of(response(), NOW);
        let text = text(&keys);
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| {
                line.split("  ")
                    .map(str::trim)
                    .filter(|cell| !cell.is_empty())
                    .collect()
            })
            .collect();
        assert_eq!(
            lines[1],
            [
                "node1",
                "1",
                "active",
                "AQEBAQEBAQEB...",
                "2 h 5 min",
                "yes",
                "connected",
                "verifying, waits for node2"
            ]
        );
        assert_eq!(lines[2][..3], ["node1", "2", "next"]);
        assert_eq!(
            lines[3],
            ["node2", "-", "NO KEY", "-", "-", "-", "NOT CONNECTED", "-"]
        );
        assert!(
            text.contains("node9 (BwcHBwcHBwcH...): removed by 1 of 2 agents; not yet by node2"),
            "{text}"
        );
        assert_eq!(
            keys.problems,
            ["node node2 has no key: has its agent ever connected?"]
        );
        assert!(!keys.healthy);
    }

    #[test]
    fn a_lost_key_is_a_problem_one_nobody_spoke_of_is_none() {
        for (held, problems) in [(KeyHeld::No, 1), (KeyHeld::Unspecified, 0), (KeyHeld::Yes, 0)] {
            let mut response = response();
            response.nodes.truncate(1);
            response.nodes[0].keys[0].held = held.into();
            assert_eq!(Keys::of(response, NOW).problems.len(), problems, "{held:?}");
        }
    }
}
