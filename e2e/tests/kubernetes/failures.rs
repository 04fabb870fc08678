//! What may stop, and what goes on without it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use warren_e2e::{cluster::Cluster, lab::wait::wait_until};

use crate::{
    keys,
    scene::{PATIENCE, Scene, answers, nothing_in_clear, nothing_lost},
};

/// How long the API server stays away.
const AWAY: Duration = Duration::from_secs(60);

pub(crate) fn agent_pod_deleted(scene: &mut Scene) -> Result<()> {
    let (capture, flows) = (scene.capture()?, scene.start_flows()?);
    let old = scene.cluster.pod_on("mesh-agent", "node2")?;
    scene
        .cluster
        .kubectl(["-n", "kube-system", "delete", "pod", &old, "--wait"])?;
    scene.cluster.wait_pods(PATIENCE)?;
    scene.cluster.wait_encrypted()?;
    nothing_lost(flows)?;
    // The new one has adopted the pods that are there, and serves new ones.
    let late = scene.add_pod("after-agent", "node2")?;
    answers(&late, &scene.pods[0])?;
    answers(&scene.pods[2], &late)?;
    scene.remove_pod(&late)?;
    nothing_in_clear(&capture.finish()?)
}

pub(crate) fn keyd_leader_killed(scene: &mut Scene) -> Result<()> {
    let flows = scene.start_flows()?;
    let (leader, before) = leader(&scene.cluster)?;
    let node = scene.cluster.get(["pod", &leader, "-n", "kube-system"])?;
    let node = node["spec"]["nodeName"]
        .as_str()
        .context("the leader runs nowhere")?
        .to_owned();
    keys::begin(&scene.cluster, "leader-dies")?;
    // Without the node it cannot come back before the other has noticed.
    scene.cluster.kubectl(["cordon", &node])?;
    scene.cluster.kubectl([
        "-n",
        "kube-system",
        "delete",
        "pod",
        &leader,
        "--grace-period=0",
        "--force",
    ])?;
    kill_all(scene, &node, "keyd")?;
    wait_until(PATIENCE, "another keyd leads, in a later epoch", || {
        let (now, epoch) = self::leader(&scene.cluster)?;
        ensure!(now != leader && epoch > before, "{now} in epoch {epoch}");
        Ok(())
    })?;
    // It knows the cluster: a new pod gets its identity and is reached.
    let late = scene.add_pod("after-keyd", "node3")?;
    answers(&scene.pods[0], &late)?;
    scene.remove_pod(&late)?;
    scene.cluster.kubectl(["uncordon", &node])?;
    scene.cluster.wait_pods(PATIENCE)?;
    // It goes on with what the other had begun.
    keys::succeeded(&scene.cluster, "leader-dies")?;
    nothing_lost(flows)
}

/// A leader that was only slow lives on without the lease: its agents must not stay with it.
pub(crate) fn keyd_leader_demoted(scene: &mut Scene) -> Result<()> {
    let flows = scene.start_flows()?;
    let (leader, before) = leader(&scene.cluster)?;
    let pods = scene.cluster.pods_of("keyd")?;
    let other = pods
        .iter()
        .filter_map(|pod| pod["metadata"]["name"].as_str())
        .find(|name| *name != leader)
        .context("there is only one keyd")?;
    let patch = serde_json::json!({"spec": {"holderIdentity": other}}).to_string();
    let lease = [
        "-n",
        "kube-system",
        "patch",
        "lease",
        "warren-keyd",
        "--type=merge",
        "-p",
    ];
    scene.cluster.kubectl(lease.into_iter().chain([patch.as_str()]))?;
    wait_until(PATIENCE, "the other keyd leads, in a later epoch", || {
        let (now, epoch) = self::leader(&scene.cluster)?;
        ensure!(now == other && epoch > before, "{now} in epoch {epoch}");
        Ok(())
    })?;
    for node in ["node1", "node2", "node3"] {
        let late = scene.add_pod(&format!("after-lease-{node}"), node)?;
        answers(&scene.pods[0], &late)?;
        scene.remove_pod(&late)?;
    }
    nothing_lost(flows)
}

/// The leading keyd's pod and its epoch, by its own word.
fn leader(cluster: &Cluster) -> Result<(String, u64)> {
    for pod in cluster.pods_of("keyd")? {
        let name = pod["metadata"]["name"].as_str().context("a pod without a name")?;
        let output = cluster.kubectl_output([
            "-n",
            "kube-system",
            "exec",
            name,
            "--",
            "keyd",
            "status",
            "-o",
            "json",
        ])?;
        let Ok(status) = serde_json::from_slice::<Value>(&output.stdout) else {
            continue;
        };
        if status["leader"] == true {
            return Ok((name.to_owned(), status["epoch"].as_u64().unwrap_or_default()));
        }
    }
    anyhow::bail!("no keyd leads")
}

pub(crate) fn control_plane_gone(scene: &mut Scene) -> Result<()> {
    let (capture, flows) = (scene.capture()?, scene.start_flows()?);
    keys::begin(&scene.cluster, "api-server-away")?;
    scene.cluster.stop_api_server()?;
    let meanwhile = without_control_plane(scene);
    // Whatever happened: the scenarios after this one need it.
    scene.cluster.start_api_server()?;
    meanwhile?;
    keys::succeeded(&scene.cluster, "api-server-away")?;
    nothing_lost(flows)?;
    nothing_in_clear(&capture.finish()?)?;
    scene.cluster.wait_nodes()?;
    scene.cluster.wait_pods(PATIENCE)?;
    scene.cluster.wait_encrypted()
}

fn without_control_plane(scene: &Scene) -> Result<()> {
    let start = Instant::now();
    // kubelet starts them again, but they find no API server.
    for node in scene.cluster.nodes() {
        kill_all(scene, &node.name, "keyd")?;
    }
    let old = find(scene, "node1", "mesh-agent run")?;
    ensure!(!old.is_empty(), "no agent runs on node1");
    kill_all(scene, "node1", "mesh-agent run")?;
    wait_until(PATIENCE, "the agent of node1 runs again", || {
        let new = find(scene, "node1", "mesh-agent run")?;
        ensure!(new.iter().any(|pid| !old.contains(pid)), "not yet");
        Ok(())
    })?;
    for (from, to) in [(0, 1), (1, 2), (2, 0)] {
        answers(&scene.pods[from], &scene.pods[to])?;
    }
    // Traffic in the meantime is what is tested: the time is the point.
    std::thread::sleep(AWAY.saturating_sub(start.elapsed()));
    for (from, to) in [(1, 0), (2, 1), (0, 2)] {
        answers(&scene.pods[from], &scene.pods[to])?;
    }
    Ok(())
}

pub(crate) fn power_cut(scene: &mut Scene) -> Result<()> {
    let capture = scene.capture()?;
    scene.cluster.power_cycle(2, |cluster| {
        // Asked again and again: a watch of an API server that was away may see nothing (etcd 3.4 has no progress
        // notifications).
        wait_until(PATIENCE, "somebody notices the power cut", || {
            let node = cluster.get(["node", "node3"])?;
            let conditions = node["status"]["conditions"].as_array().into_iter().flatten();
            let ready = conditions.filter(|condition| condition["type"] == "Ready");
            let unknown = ready
                .map(|condition| &condition["status"])
                .any(|status| status == "Unknown");
            ensure!(unknown, "{}", node["status"]["conditions"]);
            Ok(())
        })
    })?;
    scene.cluster.wait_nodes()?;
    scene.cluster.wait_pods(PATIENCE)?;
    scene.cluster.wait_encrypted()?;
    // Its pods have new containers, and maybe new addresses.
    wait_until(PATIENCE, "the node's pod answers and is answered", || {
        scene.pods[2] = scene.cluster.app_pod("app-node3")?;
        answers(&scene.pods[0], &scene.pods[2])?;
        answers(&scene.pods[2], &scene.pods[1])
    })?;
    nothing_in_clear(&capture.finish()?)
}

/// The processes of a node whose command line begins like this.
fn find(scene: &Scene, node: &str, command: &str) -> Result<Vec<u32>> {
    let node = scene
        .cluster
        .nodes()
        .iter()
        .find(|known| known.name == node)
        .context("no such node")?;
    node.processes("", &command.split(' ').collect::<Vec<_>>())
}

/// SIGKILL for them.
fn kill_all(scene: &Scene, node: &str, command: &str) -> Result<()> {
    for pid in find(scene, node, command)? {
        // One that has ended by itself is as good.
        let _ = kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL);
    }
    Ok(())
}
