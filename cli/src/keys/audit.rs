//! `warren keys audit`.

use clap::Args;
use serde::Serialize;
use warren_keyd_api::proto::AuditKeysRequest;

use super::view::{End, Pair, Path};
use crate::{
    args::{Format, OutputOptions, Target},
    keyd::said,
    output,
    source::Source,
};

#[derive(Debug, Clone, Args)]
pub(crate) struct AuditOptions {
    /// Pairs of this node only.
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    node: String,
    /// Pairs that disagree only.
    #[arg(long)]
    disagreeing: bool,
    #[command(flatten)]
    output: OutputOptions,
}

/// The judgement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Audit {
    healthy: bool,
    pairs: Vec<Pair>,
}

/// Prints the pairs; `false` where one disagrees.
pub(super) async fn run(target: &Target, options: &AuditOptions) -> anyhow::Result<bool> {
    let mut keyd = Source::open(target).await?.keyd().await?;
    let request = AuditKeysRequest {
        node: options.node.clone(),
        only_disagreeing: options.disagreeing,
    };
    let mut messages = keyd.keys().audit(request).await.map_err(said)?.into_inner();
    let mut pairs = Vec::new();
    while let Some(pair) = messages.message().await.map_err(said)? {
        pairs.push(Pair::from(pair));
    }
    let audit = Audit {
        healthy: pairs.iter().all(|pair| pair.agree),
        pairs,
    };
    match options.output.output {
        Format::Json => output::json(&audit)?,
        Format::Text => output::print(&text(&audit, options.disagreeing))?,
    }
    Ok(audit.healthy)
}

fn text(audit: &Audit, only_disagreeing: bool) -> String {
    let agree = audit.pairs.iter().filter(|pair| pair.agree).count();
    let total = audit.pairs.len();
    let mut text = match (only_disagreeing, total) {
        (true, 0) => "All pairs agree on their keys\n".to_owned(),
        (true, _) => format!("Pairs that disagree: {total}\n"),
        (false, 0) => "There is no pair of nodes\n".to_owned(),
        (false, _) => {
            let shared = audit.pairs.iter().filter(|pair| pair.pre_shared_key).count();
            format!(
                "Pairs that agree on their keys: {agree} of {total}\nPairs with a pre-shared key:    {shared} of {total}\n"
            )
        }
    };
    if total > 0 {
        let rows = audit.pairs.iter().map(|pair| {
            let [a, b] = &pair.nodes;
            let paths: Vec<_> = pair.paths.iter().map(path).collect();
            vec![
                a.clone(),
                b.clone(),
                if pair.agree { "yes" } else { "NO" }.to_owned(),
                if pair.pre_shared_key { "yes" } else { "no" }.to_owned(),
                if paths.is_empty() {
                    "-".to_owned()
                } else {
                    paths.join("  ")
                },
            ]
        });
        let header = ["NODE", "PEER", "AGREE", "PRE-SHARED KEY", "PATHS (GENERATIONS)"];
        text += &format!("\n{}\n", output::table(&header, rows.collect()));
    }
    let faults = audit.pairs.iter().flat_map(|pair| {
        let [a, b] = &pair.nodes;
        pair.faults
            .iter()
            .map(move |fault| format!("{a} and {b}: {fault}"))
    });
    text + &output::section("Who disagrees", faults)
}

/// `2-1*`: generation 2 of the one, 1 of the other, both send on it; what is not as usual in brackets.
fn path(path: &Path) -> String {
    let [a, b] = path.generations;
    let sending = |end: &Option<End>| end.is_some_and(|end| end.sending);
    let mark = match (sending(&path.ends[0]), sending(&path.ends[1])) {
        (true, true) => "*",
        (true, false) | (false, true) => "* (one way)",
        (false, false) => "",
    };
    let note = match path.ends {
        [Some(a), Some(b)] if a.verified && b.verified => "",
        [Some(_), Some(_)] => " (not verified)",
        _ => " (one end only)",
    };
    format!("{a}-{b}{mark}{note}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: End = End {
        verified: true,
        sending: true,
        quiet: false,
    };

    fn of(ends: [Option<End>; 2]) -> Path {
        Path {
            generations: [2, 1],
            ends,
        }
    }

    #[test]
    fn paths_show_what_is_unusual() {
        assert_eq!(path(&of([Some(GOOD), Some(GOOD)])), "2-1*");
        let old = End {
            sending: false,
            ..GOOD
        };
        assert_eq!(path(&of([Some(old), Some(old)])), "2-1");
        assert_eq!(path(&of([Some(GOOD), Some(old)])), "2-1* (one way)");
        let dead = End {
            verified: false,
            ..old
        };
        assert_eq!(path(&of([Some(dead), Some(old)])), "2-1 (not verified)");
        assert_eq!(path(&of([Some(old), None])), "2-1 (one end only)");
    }

    #[test]
    fn a_pair_that_disagrees_is_named_with_its_reason() {
        let pair = |b: &str, agree, faults: &[&str]| Pair {
            nodes: ["node1".into(), b.into()],
            agree,
            faults: faults.iter().map(|fault| (*fault).to_owned()).collect(),
            paths: vec![of([Some(GOOD), Some(GOOD)])],
            pre_shared_key: agree,
        };
        let audit = Audit {
            healthy: false,
            pairs: vec![
                pair("node2", true, &[]),
                pair("node3", false, &["node3 has no peer for node1"]),
            ],
        };
        let said = text(&audit, false);
        assert!(
            said.starts_with(
                "Pairs that agree on their keys: 1 of 2\nPairs with a pre-shared key:    1 of 2\n"
            ),
            "{said}"
        );
        assert!(
            said.contains("Who disagrees:\n  node1 and node3: node3 has no peer for node1\n"),
            "{said}"
        );
    }
}
