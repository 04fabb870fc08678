//! When what was written to the folder holds everywhere.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{KEYD_SOCKET, Lab, policies::cnp, wait::wait_until};

/// How long a change may take from the folder to the last map.
const LIMIT: Duration = Duration::from_secs(60);
/// The name of the object that is written behind a change, to see that `keyd` has read up to there.
const FENCE: &str = "lab-fence-";

impl Lab {
    /// Writes policies and waits until they hold on every node.
    pub fn apply(&self, objects: &[Value]) -> Result<()> {
        for object in objects {
            self.shared.manifests.apply(object)?;
        }
        self.wait_in_force()
    }

    /// Removes policies and waits until they are gone on every node.
    pub fn withdraw(&self, objects: &[Value]) -> Result<()> {
        for object in objects {
            self.shared.manifests.withdraw(object)?;
        }
        self.wait_in_force()
    }

    /// Waits until everything that is in the folder now is in the maps of every node.
    pub fn wait_in_force(&self) -> Result<()> {
        // keyd takes an object for deleted when it has missed it twice; the second fence is behind that.
        for _ in 0..2 {
            self.fence()?;
        }
        let wanted = directory(&self.keyd_status()?)?;
        wait_until(LIMIT, "every agent has applied the directory", || {
            let status = self.keyd_status()?;
            let nodes = status["nodes"].as_array().context("keyd lists no nodes")?;
            for node in nodes {
                let number = |key: &str| node[key].as_u64().unwrap_or_default();
                let applied = (number("appliedEpoch"), number("appliedVersion"));
                ensure!(applied >= wanted, "{}: {applied:?} of {wanted:?}", node["name"]);
            }
            Ok(())
        })
    }

    /// Writes an object behind everything else and waits until `keyd` knows it.
    fn fence(&self) -> Result<()> {
        let number = self.shared.next_serial();
        let name = format!("{FENCE}{number}");
        let fence = cnp(
            "default",
            &name,
            serde_json::json!({"endpointSelector": {"matchLabels": {"lab-fence": name}}, "ingress": [{}]}),
        );
        // One file: the former fence goes as this one comes.
        self.shared
            .manifests
            .write_raw("zz-fence.json", &fence.to_string())?;
        wait_until(LIMIT, "keyd has read the manifests", || {
            let policies = self.policies()?;
            ensure!(
                policies.iter().any(|policy| policy["name"] == name.as_str()),
                "not yet"
            );
            Ok(())
        })
    }

    /// `warren policy get -o json`.
    pub fn policies(&self) -> Result<Vec<Value>> {
        let command = [
            "warren",
            "policy",
            "get",
            "-o",
            "json",
            "--keyd-socket",
            KEYD_SOCKET,
        ];
        // Its exit code says whether all are valid.
        let output = self.keyd_node().try_place()?.output(command)?;
        serde_json::from_slice(&output.stdout).with_context(|| {
            let said = String::from_utf8_lossy(&output.stderr);
            format!("warren policy get printed no list: {}", said.trim())
        })
    }

    fn keyd_status(&self) -> Result<Value> {
        let text = self
            .keyd_node()
            .run(["keyd", "status", "-o", "json", "--socket", KEYD_SOCKET])?;
        serde_json::from_str(&text).context("keyd status printed no JSON")
    }

    fn keyd_node(&self) -> std::sync::Arc<super::Node> {
        self.node(1)
    }
}

fn directory(status: &Value) -> Result<(u64, u64)> {
    let number = |key: &str| {
        status[key]
            .as_u64()
            .with_context(|| format!("keyd's status has no {key}"))
    };
    Ok((number("epoch")?, number("directoryVersion")?))
}
