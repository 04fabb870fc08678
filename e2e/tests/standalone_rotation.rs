//! Keys rotate, by manifest, while traffic flows.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use warren_agent_api::{EncryptStatus, KeyPhase, KeyState};
use warren_e2e::{
    lab::{Lab, wait::wait_until},
    scenario::{Flows, client_and_server, nothing_in_clear, two_nodes},
};

/// How long a rotation may take at most: the limit ends a broken run.
const LIMIT: Duration = Duration::from_secs(120);

/// A rotation of some nodes, or of all, at the quickest pace.
fn rotation(name: &str, nodes: &[&str]) -> serde_json::Value {
    let mut object = json!({
        "apiVersion": "warren.dev/v1alpha1",
        "kind": "KeyRotation",
        "metadata": {"name": name},
        "spec": {"reason": "test", "pace": {"concurrency": "100%", "drainSeconds": 1, "deadlineSeconds": 300}}
    });
    if !nodes.is_empty() {
        object["spec"]["nodes"] = json!({"names": nodes});
    }
    object
}

/// The generation of a node's only key.
fn only_key(status: &EncryptStatus) -> Result<u64> {
    ensure!(status.enabled, "{:?}", status.mismatches);
    ensure!(status.keys.phase == KeyPhase::Settled, "{}", status.keys.phase);
    let [key] = &status.keys.generations[..] else {
        anyhow::bail!("keys: {:?}", status.keys.generations);
    };
    ensure!(key.held && key.state == KeyState::Active, "{key:?}");
    Ok(key.generation)
}

/// Applies a rotation and waits until the nodes have keys of these generations, and no others.
fn rotate(lab: &Lab, name: &str, nodes: &[&str], generations: &[u64]) -> Result<()> {
    let since = std::time::Instant::now();
    lab.manifests().apply(&rotation(name, nodes))?;
    let result = wait_until(LIMIT, &format!("{name} is done"), || {
        for (node, generation) in lab.nodes().iter().zip(generations) {
            let found = only_key(&node.encrypt_status()?)?;
            ensure!(found == *generation, "{}: key generation {found}", node.name);
        }
        Ok(())
    });
    println!("{name}: {} ms", since.elapsed().as_millis());
    result
}

#[test]
fn one_node_the_other_and_all_without_losing_a_packet() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let capture = lab.capture()?;
        let (client, server) = client_and_server(lab)?;
        let flows = Flows::start(&client, &server)?;
        rotate(lab, "first", &["node1"], &[2, 1])?;
        rotate(lab, "second", &["node2"], &[2, 2])?;
        rotate(lab, "all", &[], &[3, 3])?;
        rotate(lab, "again", &[], &[4, 4])?;
        flows.finish_without_loss()?;
        nothing_in_clear(&capture.finish()?)
    })
}
