//! `warren encrypt status`.

use crate::{
    args::{Format, OutputOptions, Target},
    assess::{Assessment, assess, short, span},
    keys, output,
    source::{self, Source},
};

/// Prints the judgement; `false` where something is wrong.
pub(crate) async fn run(target: &Target, options: &OutputOptions) -> anyhow::Result<bool> {
    let source = Source::open(target).await?;
    let status = source.cluster_status().await?;
    // Only the leader knows; that there is none is a problem of the cluster's already.
    let rotations = if status.leader {
        keys::under_way(&mut source.keyd().await?).await?
    } else {
        Vec::new()
    };
    // Nodes' clocks and this machine's may be wrong; an older keyd does not say its time.
    let now = match status.now_unix_ms {
        0 => source::now(),
        keyds => keyds,
    };
    let assessment = assess(&status, rotations, now);
    match options.output {
        Format::Json => output::json(&assessment)?,
        Format::Text => output::print(&text(&assessment))?,
    }
    Ok(assessment.healthy)
}

fn text(assessment: &Assessment) -> String {
    let total = assessment.nodes.len();
    let verdict = match (
        assessment.encryption,
        assessment.encrypted_nodes == total && total > 0,
    ) {
        (false, _) => "off",
        (true, true) if assessment.healthy => "on",
        (true, true) => "on, with problems",
        (true, false) => "not complete",
    };
    let encrypted_pairs = assessment.pairs.iter().filter(|pair| pair.encrypted).count();
    let mut text = format!(
        "Encryption:        WireGuard, {verdict}\n\
         Nodes encrypted:   {} of {total}\n\
         Pairs encrypted:   {encrypted_pairs} of {} (both ends agree on the keys, handshake within 3 min)\n\
         Pre-shared keys:   {} of {} pairs (post-quantum: ML-KEM-768 and X25519)\n\
         Oldest handshake:  {}\n",
        assessment.encrypted_nodes,
        assessment.pairs.len(),
        assessment.pre_shared_pairs,
        assessment.pairs.len(),
        match assessment.oldest_handshake_seconds {
            Some(seconds) => format!("{} ago", span(seconds)),
            None if assessment.pairs.is_empty() => "-".into(),
            None => "a pair has none".into(),
        },
    );
    for rotation in &assessment.rotations {
        text += &format!("Key rotation:      {} {}\n", rotation.name, keys::bar(rotation));
    }
    if total > 0 {
        let rows = assessment.nodes.iter().map(|node| {
            vec![
                node.name.clone(),
                if node.encrypted { "yes" } else { "NO" }.into(),
                format!("{}/{}", node.encrypted_peers, node.peers),
                if node.datapath.is_empty() {
                    "-".into()
                } else {
                    node.datapath.clone()
                },
                if node.public_key.is_empty() {
                    "-".into()
                } else {
                    short(&node.public_key)
                },
                node.generation.to_string(),
                node.pods.to_string(),
                node.drops.to_string(),
            ]
        });
        let header = [
            "NODE",
            "ENCRYPTED",
            "PEERS",
            "DATAPATH",
            "KEY",
            "GENERATION",
            "PODS",
            "DROPS",
        ];
        text += &format!("\n{}\n", output::table(&header, rows.collect()));
    }
    let exemptions = assessment.exemptions.iter();
    text += &output::section(
        "Not encrypted, by design",
        exemptions.map(|(what, nodes)| format!("{what} (on {nodes} of {total} nodes)")),
    );
    let without = assessment.no_pre_shared_key.iter();
    text += &output::section(
        "Without pre-shared key",
        without.map(|(why, pairs)| match pairs {
            1 => format!("1 pair: {why}"),
            pairs => format!("{pairs} pairs: {why}"),
        }),
    );
    let drops = assessment.drops.iter().filter(|(_, packets)| **packets > 0);
    text += &output::section(
        "Dropped packets",
        drops.map(|(reason, packets)| format!("{packets:>10}  {reason}")),
    );
    text += &output::section("Problems", assessment.problems.iter().cloned());
    text
}
