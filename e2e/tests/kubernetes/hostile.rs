//! What keyd and the API server must refuse.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use warren_e2e::{cluster::hello::Heard, lab::wait::wait_until};

use crate::{
    scene::{PATIENCE, Scene, answers},
    tampering::{alarms, events_about},
};

/// How long a Node that was registered again may take: the control plane may first collect the pods of the deleted one.
const REGISTERED: Duration = Duration::from_secs(180);
/// What agents' tokens are for.
const AUDIENCE: &str = "keyd.warren.dev";

/// Says Hello with a token, as a node, to the keyd that leads.
fn hello(scene: &Scene, token: &str, node: &str) -> Result<Heard> {
    let folder = scene.cluster.folder().join("hostile");
    fs::create_dir_all(&folder)?;
    let trust = scene
        .cluster
        .get(["configmap", "warren-trust", "-n", "kube-system"])?;
    let (ca, file) = (folder.join("ca.crt"), folder.join("token"));
    fs::write(
        &ca,
        trust["data"]["ca.crt"]
            .as_str()
            .context("warren-trust has no ca.crt")?,
    )?;
    fs::write(&file, token)?;
    let tool = scene.cluster.folder().join("bin/warren-cluster");
    // Any of them will do: it names the leader.
    let pods = scene.cluster.pods_of("keyd")?;
    let host = pods.first().and_then(|pod| pod["status"]["hostIP"].as_str());
    let host = host.context("no keyd runs")?;
    let mut keyd = format!("{host}:4250");
    for _ in 0..3 {
        let command = [
            tool.display().to_string(),
            "hello".into(),
            "--keyd".into(),
            keyd.clone(),
            "--ca".into(),
            ca.display().to_string(),
            "--token-file".into(),
            file.display().to_string(),
            "--node".into(),
            node.into(),
        ];
        let text = wait_until(PATIENCE, "a keyd answers", || {
            scene.cluster.control_place().run(&command)
        })?;
        match serde_json::from_str(&text)? {
            Heard::Redirect(leaders) => keyd = leaders.into_iter().next().context("a redirect to nowhere")?,
            heard => return Ok(heard),
        }
    }
    bail!("the keyds send us in a circle")
}

fn refused(scene: &Scene, token: &str, node: &str, why: &str) -> Result<()> {
    let alarm = |reason: &str| alarms(&scene.cluster, reason);
    let before = alarm("AuthenticationRefused")? + alarm("StreamRefused")?;
    match hello(scene, token, node)? {
        Heard::Refused(reason) => {
            ensure!(!reason.trim().is_empty(), "{why}: refused without a reason");
            wait_until(PATIENCE, &format!("{why}: an alarm"), || {
                let now = alarm("AuthenticationRefused")? + alarm("StreamRefused")?;
                ensure!(now > before, "none");
                Ok(())
            })?;
            println!("  | open stream | {why} | {reason} |");
            Ok(())
        }
        other => bail!("{why}: keyd answered {other:?}"),
    }
}

/// A token of the API server.
fn token(scene: &Scene, account: &str, audience: &str, pod: Option<&str>) -> Result<String> {
    let mut arguments = vec![
        "-n",
        "kube-system",
        "create",
        "token",
        account,
        "--audience",
        audience,
    ];
    if let Some(pod) = pod {
        arguments.extend(["--bound-object-kind", "Pod", "--bound-object-name", pod]);
    }
    Ok(scene.cluster.kubectl(arguments)?.trim().to_owned())
}

pub(crate) fn tokens(scene: &mut Scene) -> Result<()> {
    let agent = scene.cluster.pod_on("mesh-agent", "node1")?;
    // The same way with a good token is accepted: the refusals below are for their reasons.
    let good = token(scene, "mesh-agent", AUDIENCE, Some(&agent))?;
    let heard = hello(scene, &good, "node1")?;
    ensure!(matches!(heard, Heard::Welcome(_)), "a good token: {heard:?}");

    refused(scene, "", "node1", "no token")?;
    refused(scene, "nonsense", "node1", "no token at all")?;
    refused(
        scene,
        &token(
            scene,
            "mesh-agent",
            "https://kubernetes.default.svc.cluster.local",
            Some(&agent),
        )?,
        "node1",
        "wrong audience",
    )?;
    refused(
        scene,
        &token(scene, "mesh-agent", AUDIENCE, None)?,
        "node1",
        "no node claim",
    )?;
    refused(scene, &good, "node2", "another node's name")?;
    let pods = scene.cluster.pods_of("keyd")?;
    let keyd = pods.first().and_then(|pod| pod["metadata"]["name"].as_str());
    let keyd = keyd.context("no keyd")?;
    refused(
        scene,
        &token(scene, "keyd", AUDIENCE, Some(keyd))?,
        "node1",
        "another service account",
    )?;

    wait_until(PATIENCE, "Events about strangers", || {
        let said = events_about(&scene.cluster, "AuthenticationRefused", "MeshState", "warren")?;
        ensure!(said.len() >= 5, "{said:?}");
        Ok(())
    })?;
    // Nobody else noticed.
    scene.cluster.wait_encrypted()?;
    answers(&scene.pods[0], &scene.pods[1])
}

pub(crate) fn node_deleted(scene: &mut Scene) -> Result<()> {
    let agent = scene.cluster.pod_on("mesh-agent", "node3")?;
    let token = token(scene, "mesh-agent", AUDIENCE, Some(&agent))?;
    let heard = hello(scene, &token, "node3")?;
    ensure!(matches!(heard, Heard::Welcome(_)), "before: {heard:?}");
    let node = scene.cluster.get(["node", "node3"])?;
    scene.cluster.kubectl(["delete", "node", "node3"])?;
    for node in ["node1", "node2"] {
        wait_until(PATIENCE, &format!("{node} has forgotten node3"), || {
            let peers = scene.cluster.encrypt_status(node)?.peers.len();
            ensure!(peers == 1, "{peers} peers");
            Ok(())
        })?;
    }
    refused(scene, &token, "node3", "a deleted node")?;
    answers(&scene.pods[0], &scene.pods[1])?;
    // Registered again it is another Node: with its old disk, and with a new key. Its agent's token is the old Node's.
    let node = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": "node3"},
        "spec": {"podCIDR": node["spec"]["podCIDR"], "podCIDRs": node["spec"]["podCIDRs"]},
    });
    scene.cluster.apply(&[node])?;
    let restart = ["-n", "kube-system", "delete", "pod", &agent, "--ignore-not-found"];
    scene.cluster.kubectl(restart)?;
    wait_until(REGISTERED, "node3 is a peer again", || {
        let status = scene.cluster.encrypt_status("node1")?;
        ensure!(status.peers.len() == 2, "{} peers", status.peers.len());
        Ok(())
    })?;
    scene.cluster.wait_encrypted()
}
