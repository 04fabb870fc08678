//! `warren keys` in the lab.

use std::process::Output;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{KEYD_SOCKET, Lab, Process};

/// The quickest pace that a rotation may have.
pub const QUICKLY: [&str; 4] = ["--concurrency", "100%", "--drain", "1s"];

impl Lab {
    /// `warren ...` on the node that runs `keyd`, whatever its exit code.
    pub fn warren(&self, command: &[&str]) -> Result<Output> {
        let socket = ["--keyd-socket", KEYD_SOCKET];
        let words = ["warren"].iter().chain(command).chain(&socket);
        self.node(1).try_place()?.output(words)
    }

    /// `warren ... -o json`, whatever its exit code.
    pub fn warren_json(&self, command: &[&str]) -> Result<Value> {
        let output = self.warren(&[command, &["-o", "json"]].concat())?;
        serde_json::from_slice(&output.stdout).with_context(|| {
            format!(
                "warren {} printed no JSON: {}",
                command.join(" "),
                String::from_utf8_lossy(&output.stderr).trim()
            )
        })
    }

    /// Rotates the keys of nodes (`["--all"]`, `["--node", "node2"]`, with whatever else) and waits until it is done. It
    /// must succeed.
    pub fn rotate(&self, which: &[&str]) -> Result<Value> {
        let command = [&["keys", "rotate", "--wait"], which].concat();
        let rotation = self.warren_json(&command)?;
        ensure!(
            rotation["phase"] == "Succeeded",
            "the rotation did not succeed: {rotation}"
        );
        Ok(rotation)
    }

    /// Starts `warren keys rotate --wait`; what it prints is in the log `rotate`.
    pub fn start_rotation(&self, which: &[&str]) -> Result<Process> {
        let socket = ["--keyd-socket", KEYD_SOCKET];
        let words = ["warren", "keys", "rotate", "--wait"]
            .iter()
            .chain(which)
            .chain(&socket);
        self.node(1).try_place()?.spawn(words, &self.shared.log("rotate"))
    }

    /// Whether both ends of every pair agree on their keys, and what is wrong.
    pub fn audit(&self) -> Result<()> {
        let audit = self.warren_json(&["keys", "audit", "--disagreeing"])?;
        ensure!(audit["healthy"] == true, "{}", audit["pairs"]);
        Ok(())
    }

    /// The public keys that the directory lists, hexadecimal, as devices write them.
    pub fn public_keys(&self) -> Result<Vec<String>> {
        use base64::{Engine as _, engine::general_purpose::STANDARD};
        let list = self.warren_json(&["keys", "list"])?;
        let nodes = list["nodes"].as_array().context("keyd lists no nodes")?;
        let keys = nodes
            .iter()
            .flat_map(|node| node["keys"].as_array().into_iter().flatten());
        keys.map(|key| {
            let text = key["publicKey"].as_str().context("a key without a public half")?;
            let bytes = STANDARD.decode(text)?;
            Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
        })
        .collect()
    }
}
