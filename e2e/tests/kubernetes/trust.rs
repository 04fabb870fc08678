//! The signing key, and what the accounts of Warren's parts may do.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use warren_e2e::{cluster::Cluster, lab::wait::wait_until};

use crate::scene::{PATIENCE, Scene, answers, nothing_lost};

const NAMESPACE: &str = "kube-system";

fn leader(cluster: &Cluster) -> Result<String> {
    let lease = cluster.get(["lease", "warren-keyd", "-n", NAMESPACE])?;
    let holder = lease["spec"]["holderIdentity"].as_str().unwrap_or_default();
    ensure!(!holder.is_empty(), "no keyd leads");
    Ok(holder.to_owned())
}

/// `keyd signing-key ...` in the pod that leads; the generations that it prints.
pub(crate) fn signing_key(cluster: &Cluster, verb: &str) -> Result<Vec<u64>> {
    let leader = leader(cluster)?;
    let text = cluster.kubectl([
        "-n",
        NAMESPACE,
        "exec",
        &leader,
        "--",
        "keyd",
        "signing-key",
        verb,
    ])?;
    let generation = |line: &str| line.split(' ').next()?.parse().ok();
    Ok(text.lines().filter_map(generation).collect())
}

fn wait_root(cluster: &Cluster, generation: u64) -> Result<()> {
    for node in cluster.nodes() {
        wait_until(PATIENCE, &format!("{} follows", node.name), || {
            let root = cluster.agent_status(&node.name)?.root;
            let pinned = root.map_or(0, |root| root.generation);
            ensure!(pinned == generation, "it has pinned {pinned}");
            Ok(())
        })?;
    }
    Ok(())
}

fn signatures(cluster: &Cluster) -> Result<BTreeSet<String>> {
    let nodes = cluster.get(["meshnodes"])?;
    let items = nodes["items"].as_array().into_iter().flatten();
    Ok(items.map(|node| node["spec"]["signature"].to_string()).collect())
}

pub(crate) fn signing_key_replaced(scene: &mut Scene) -> Result<()> {
    let cluster = &scene.cluster;
    let flows = scene.start_flows()?;
    let before = signatures(cluster)?;
    let made = signing_key(cluster, "rotate")?;
    ensure!(made == [2], "{made:?}");
    wait_root(cluster, 2)?;
    wait_until(PATIENCE, "all MeshNodes are signed anew", || {
        ensure!(signatures(cluster)?.is_disjoint(&before), "not yet");
        Ok(())
    })?;
    // The next leader signs with it.
    let old = leader(cluster)?;
    cluster.kubectl(["-n", NAMESPACE, "delete", "pod", &old, "--wait"])?;
    let known = wait_until(PATIENCE, "another keyd leads", || {
        ensure!(leader(cluster)? != old, "the old one leads");
        signing_key(cluster, "list")
    })?;
    ensure!(known == [1, 2], "{known:?}");
    let made = signing_key(cluster, "rotate")?;
    ensure!(made == [3], "{made:?}");
    wait_root(cluster, 3)?;
    cluster.wait_encrypted()?;
    nothing_lost(flows)?;
    // New nodes begin with it.
    let map = cluster.get(["configmap", "warren-trust", "-n", NAMESPACE])?;
    let roots = map["data"]["snapshot-roots"]
        .as_str()
        .context("no snapshot-roots")?;
    let lines = roots.lines().filter(|line| !line.starts_with('#'));
    ensure!(lines.count() == 3, "{roots}");
    answers(&scene.pods[0], &scene.pods[1])
}

/// What an account may do, as the API server lists it: resource, names, verbs.
fn may(cluster: &Cluster, account: &str, namespace: &str) -> Result<BTreeSet<String>> {
    let who = format!("--as=system:serviceaccount:{NAMESPACE}:{account}");
    let text = cluster.kubectl(["auth", "can-i", "--list", "--no-headers", "-n", namespace, &who])?;
    let line = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    Ok(text.lines().map(line).collect())
}

pub(crate) fn permissions(scene: &mut Scene) -> Result<()> {
    let cluster = &scene.cluster;
    // What everybody may: ask what he may do, and read the API server's version and kinds.
    let everybody = may(cluster, "nobody-in-particular", NAMESPACE)?;
    for account in ["mesh-agent", "default"] {
        for namespace in [NAMESPACE, "default"] {
            let more: Vec<_> = may(cluster, account, namespace)?
                .difference(&everybody)
                .cloned()
                .collect();
            ensure!(more.is_empty(), "{account} may, in {namespace}: {more:#?}");
        }
    }
    // keyd has exactly what permissions.md lists; the chart's check compares that with the templates.
    let keyd: Vec<_> = may(cluster, "keyd", "demo")?
        .difference(&everybody)
        .cloned()
        .collect();
    for line in &keyd {
        ensure!(
            !line.contains('*') && !line.contains("secrets"),
            "keyd may, in any namespace: {line}"
        );
    }
    for (verb, resource, namespace) in [
        ("get", "secrets", "default"),
        ("list", "secrets", NAMESPACE),
        ("get", "secrets/another", NAMESPACE),
        ("update", "nodes", "default"),
        ("patch", "pods/status", "default"),
        ("delete", "meshnodes.warren.dev", "default"),
        ("delete", "meshstates.warren.dev", "default"),
        ("update", "keyrotations.warren.dev", "default"),
        ("create", "clusterrolebindings", "default"),
        ("impersonate", "users", "default"),
        ("create", "pods/exec", NAMESPACE),
    ] {
        let who = format!("--as=system:serviceaccount:{NAMESPACE}:keyd");
        let output = cluster.kubectl_output(["auth", "can-i", verb, resource, "-n", namespace, &who])?;
        ensure!(
            !output.status.success(),
            "keyd may {verb} {resource} in {namespace}"
        );
    }
    // And it does all its work with that: nothing of its log says that something was forbidden.
    for pod in cluster.pods_of("keyd")? {
        let name = pod["metadata"]["name"].as_str().context("a pod without a name")?;
        let log = cluster.kubectl(["-n", NAMESPACE, "logs", name])?;
        let refused = log.lines().find(|line| line.contains("orbidden"));
        ensure!(refused.is_none(), "{name}: {refused:?}");
    }
    Ok(())
}
