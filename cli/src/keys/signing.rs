//! `warren keys signing` and `warren keys rotate-signing`.

use std::time::Duration;

use anyhow::{Context as _, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use clap::Args;
use serde::Serialize;
use tokio::time::{Instant, sleep};
use warren_keyd_api::proto::{self, RotateSigningKeyRequest, SigningKeysRequest};

use crate::{
    args::{Format, OutputOptions, Target, duration},
    assess::span,
    keyd::{Keyd, said},
    output,
    source::{self, Source},
};

/// How often keyd is asked while waiting.
const INTERVAL: Duration = Duration::from_millis(200);

#[derive(Debug, Clone, Args)]
pub(crate) struct SigningOptions {
    #[command(flatten)]
    output: OutputOptions,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct RotateSigningOptions {
    /// How long to wait for the agents at most: 90, 90s, 5m, 1h.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration)]
    timeout: Duration,
    #[command(flatten)]
    output: OutputOptions,
}

/// The keys that sign, or have signed, snapshots and MeshNodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct SigningKeys {
    /// The oldest first; the last one signs.
    keys: Vec<SigningKey>,
    /// Nodes whose agents have not said that they follow the last one.
    behind: Vec<String>,
    /// No MeshNode is signed by an older one any more.
    objects_renewed: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct SigningKey {
    generation: u64,
    /// Base64.
    public_key: String,
    made_unix_ms: i64,
    age_seconds: u64,
}

impl SigningKeys {
    fn of(response: proto::SigningKeysResponse, now: i64) -> Self {
        let key = |key: proto::SigningKey| SigningKey {
            generation: key.generation,
            public_key: STANDARD.encode(&key.public_key),
            made_unix_ms: key.made_unix_ms,
            age_seconds: u64::try_from((now - key.made_unix_ms) / 1000).unwrap_or_default(),
        };
        Self {
            keys: response.keys.into_iter().map(key).collect(),
            behind: response.behind,
            objects_renewed: response.objects_renewed,
        }
    }

    /// Everybody is where the last key is.
    fn settled(&self) -> bool {
        self.behind.is_empty() && self.objects_renewed
    }

    fn text(&self) -> String {
        let last = self.keys.len().saturating_sub(1);
        let rows = self.keys.iter().enumerate().map(|(index, key)| {
            vec![
                key.generation.to_string(),
                if index == last { "signs" } else { "replaced" }.to_owned(),
                key.public_key.clone(),
                span(key.age_seconds),
            ]
        });
        let mut text = format!(
            "{}\n",
            output::table(&["GENERATION", "STATE", "KEY", "AGE"], rows.collect())
        );
        if !self.objects_renewed {
            text +=
                "MeshNodes are being signed anew; those that a former key has signed are still believed\n";
        }
        text + &output::section(
            "Agents that have not said that they follow",
            self.behind.iter().cloned(),
        )
    }
}

async fn ask(keyd: &mut Keyd) -> anyhow::Result<SigningKeys> {
    let response = keyd.keys().signing_keys(SigningKeysRequest {}).await;
    Ok(SigningKeys::of(
        response.map_err(said)?.into_inner(),
        source::now(),
    ))
}

/// Prints the keys; `false` where an agent is behind.
pub(super) async fn run(target: &Target, options: &SigningOptions) -> anyhow::Result<bool> {
    let mut keyd = Source::open(target).await?.keyd().await?;
    let keys = ask(&mut keyd).await?;
    match options.output.output {
        Format::Json => output::json(&keys)?,
        Format::Text => output::print(&keys.text())?,
    }
    Ok(keys.settled())
}

/// Has a new key made; `false` where not everybody is there in time.
pub(super) async fn rotate(target: &Target, options: &RotateSigningOptions) -> anyhow::Result<bool> {
    let mut keyd = Source::open(target).await?.keyd().await?;
    let start = Instant::now();
    let response = keyd.keys().rotate_signing_key(RotateSigningKeyRequest {}).await;
    let made = response.map_err(said)?.into_inner().key;
    let made = made.context("keyd did not say which key it made: ask with `warren keys signing`")?;
    let keys = loop {
        let keys = ask(&mut keyd).await?;
        let Some(last) = keys.keys.last() else {
            bail!("keyd names no signing key: is it of another version?");
        };
        if last.generation < made.generation {
            bail!("keyd has lost signing key {}: look at its log", made.generation);
        }
        if keys.settled() || start.elapsed() >= options.timeout {
            break keys;
        }
        sleep(INTERVAL).await;
    };
    let seconds = start.elapsed().as_secs_f32();
    match options.output.output {
        Format::Json => output::json(&keys)?,
        Format::Text => output::print(&format!(
            "Snapshots are signed with key {} ({seconds:.1} s)\n{}",
            made.generation,
            keys.text()
        ))?,
    }
    Ok(keys.settled() || options.timeout.is_zero())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_800_000_000_000;

    fn response(behind: &[&str]) -> proto::SigningKeysResponse {
        let key = |generation: u8| proto::SigningKey {
            generation: generation.into(),
            public_key: vec![generation; 32],
            made_unix_ms: NOW - 7_500_000 / i64::from(generation),
        };
        proto::SigningKeysResponse {
            keys: vec![key(1), key(2)],
            behind: behind.iter().map(|name| (*name).to_owned()).collect(),
            objects_renewed: behind.is_empty(),
        }
    }

    #[test]
    fn the_last_key_signs_and_who_is_behind_is_named() {
        let keys = SigningKeys::of(response(&[]), NOW);
        let text = keys.text();
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(lines[1][..2], ["1", "replaced"]);
        assert_eq!(lines[2][..2], ["2", "signs"]);
        assert!(text.contains("2 h 5 min") && keys.settled(), "{text}");

        let keys = SigningKeys::of(response(&["node2"]), NOW);
        let text = keys.text();
        assert!(
            text.contains("node2") && text.contains("signed anew") && !keys.settled(),
            "{text}"
        );
    }
}
