//! Keys rotate by custom resource, under traffic.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use warren_e2e::{cluster::Cluster, lab::wait::wait_until};

use crate::scene::{PATIENCE, Scene, answers, nothing_in_clear, nothing_lost};

pub(crate) fn rotate(scene: &mut Scene) -> Result<()> {
    refused(&scene.cluster)?;
    let (capture, flows) = (scene.capture()?, scene.start_flows()?);
    let before = keys(&scene.cluster)?;
    let spec = json!({"reason": "all at once", "pace": {"concurrency": "100%", "drainSeconds": 2}});
    let status = succeeds(&scene.cluster, "all", &spec)?;
    ensure!(status["counts"]["done"] == 3, "{status}");
    ensure!(
        !status["startedAt"].is_null() && !status["completedAt"].is_null(),
        "{status}"
    );
    let all = keys(&scene.cluster)?;
    for (node, old) in &before {
        ensure!(
            all.get(node)
                .is_some_and(|new| new.iter().all(|key| !old.contains(key))),
            "{node} kept a key: {old:?}, then {all:?}"
        );
    }
    // One alone: the others keep theirs.
    let spec = json!({"nodes": {"names": ["node2"]}, "pace": {"drainSeconds": 2}});
    succeeds(&scene.cluster, "one", &spec)?;
    let one = keys(&scene.cluster)?;
    for (node, now) in &one {
        ensure!(
            (all.get(node) == Some(now)) == (node != "node2"),
            "{node}: {all:?}, then {one:?}"
        );
    }
    nothing_lost(flows)?;
    scene.cluster.wait_encrypted()?;
    answers(&scene.pods[0], &scene.pods[2])?;
    events(&scene.cluster)?;
    nothing_in_clear(&capture.finish()?)
}

/// Creates a rotation and waits for its end; its status.
fn succeeds(cluster: &Cluster, name: &str, spec: &Value) -> Result<Value> {
    create(cluster, name, spec)?;
    succeeded(cluster, name)
}

/// Begins to rotate one node after the other, and returns in the middle of the first.
pub(crate) fn begin(cluster: &Cluster, name: &str) -> Result<()> {
    let pace = json!({"pace": {"concurrency": "1", "drainSeconds": 2}});
    create(cluster, name, &pace)?;
    wait_until(PATIENCE, &format!("rotation {name} has begun"), || {
        let object = cluster.get(["keyrotation", name])?;
        let moving = object["status"]["counts"]["moving"].as_u64();
        ensure!(moving.is_some_and(|moving| moving > 0), "{}", object["status"]);
        Ok(())
    })
}

/// Waits until all nodes have new keys; the status.
pub(crate) fn succeeded(cluster: &Cluster, name: &str) -> Result<Value> {
    wait_until(PATIENCE, &format!("rotation {name} is over"), || {
        let object = cluster.get(["keyrotation", name])?;
        ensure!(object["status"]["phase"] == "Succeeded", "{}", object["status"]);
        Ok(object["status"].clone())
    })
}

fn create(cluster: &Cluster, name: &str, spec: &Value) -> Result<()> {
    cluster.apply(&[json!({
        "apiVersion": "warren.dev/v1alpha1",
        "kind": "KeyRotation",
        "metadata": {"name": name},
        "spec": spec,
    })])
}

/// What the API server does not take.
fn refused(cluster: &Cluster) -> Result<()> {
    let bad = [
        (json!({"pace": {"concurrency": "0"}}), "concurrency is a number"),
        (
            json!({"pace": {"drainSeconds": 40, "deadlineSeconds": 60}}),
            "twice the drain time",
        ),
        (json!({"nodes": {}}), "name nodes or labels"),
        (json!({"schedule": {"every": "1w"}}), "hours or days"),
    ];
    for (spec, reason) in bad {
        let error = cluster
            .apply(&[json!({
                "apiVersion": "warren.dev/v1alpha1",
                "kind": "KeyRotation",
                "metadata": {"name": "bad"},
                "spec": spec,
            })])
            .err()
            .with_context(|| format!("{spec} was taken"))?;
        let text = format!("{error:#}");
        ensure!(text.contains(reason), "{spec}: {text}");
    }
    Ok(())
}

/// Public keys of every node.
fn keys(cluster: &Cluster) -> Result<BTreeMap<String, Vec<String>>> {
    let list = cluster.get(["meshnodes"])?;
    let mut found = BTreeMap::new();
    for node in list["items"].as_array().into_iter().flatten() {
        let name = node["metadata"]["name"]
            .as_str()
            .context("a MeshNode without a name")?;
        let slots = node["spec"]["slots"].as_array().into_iter().flatten();
        let mut keys: Vec<_> = slots
            .filter_map(|slot| slot["publicKey"].as_str().map(str::to_owned))
            .collect();
        keys.sort();
        keys.dedup();
        ensure!(!keys.is_empty(), "{name} has no key");
        found.insert(name.to_owned(), keys);
    }
    Ok(found)
}

/// Every node tells of its new key.
fn events(cluster: &Cluster) -> Result<()> {
    wait_until(PATIENCE, "every Node has an Event of its rotation", || {
        let list = cluster.get(["events", "-A", "--field-selector=involvedObject.kind=Node"])?;
        let of = |node: &str| {
            let mut events = list["items"].as_array().into_iter().flatten();
            events.any(|event| event["involvedObject"]["name"] == node && event["reason"] == "KeyRotated")
        };
        for node in ["node1", "node2", "node3"] {
            ensure!(of(node), "{node} has none");
        }
        Ok(())
    })
}
