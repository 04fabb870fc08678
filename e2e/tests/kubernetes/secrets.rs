//! A search for secrets in all that an operator, a log collector or a reader of the API can see, at the most verbose level. What
//! only a cluster has: service accounts' tokens, keyd's Secret, objects and Events.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use warren_e2e::{
    cluster::{Cluster, Node},
    lab::{
        secrets::{Finder, Secret},
        wait::wait_until,
    },
};

use crate::{
    keys,
    scene::{PATIENCE, Scene, answers},
    trust,
};

const NAMESPACE: &str = "kube-system";

/// A file of a node's.
fn file(node: &Node, path: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{}/root{path}", node.place.pid))
}

fn decoded(text: &str) -> Result<Vec<u8>> {
    STANDARD.decode(text.trim()).context("no base64")
}

/// The nodes' private keys, the CA's key and the key that signs, as they are now.
fn keys_now(cluster: &Cluster) -> Result<Vec<Secret>> {
    let mut secrets = Vec::new();
    for node in cluster.nodes() {
        let text = node
            .place
            .run(["sh", "-ec", "cat /var/lib/warren/agent/keys/gen*.key"])?;
        for key in text.lines() {
            let key = decoded(key)?.try_into().ok();
            let name = format!("a private key of {}", node.name);
            secrets.push(Secret::key(&name, key.context("a key has 32 bytes")?));
        }
    }
    let object = cluster.get(["secret", "warren-keyd", "-n", NAMESPACE])?;
    let entry = |name: &str| decoded(object["data"][name].as_str().unwrap_or_default());
    secrets.push(Secret::pkcs8("the CA's key", &entry("ca.key")?)?);
    secrets.push(Secret::signing_key(
        "a signing key",
        &entry("snapshot-signing.key")?,
    )?);
    Ok(secrets)
}

/// The tokens in Warren's pods: agents' for keyd, keyd's for the API server. Their signatures are what is secret.
fn tokens(cluster: &Cluster) -> Result<Vec<Secret>> {
    let mut secrets = Vec::new();
    for node in cluster.nodes() {
        for container in ["mesh-agent", "keyd"] {
            let paths = match container {
                "keyd" => "/var/run/secrets/kubernetes.io/serviceaccount/token",
                _ => "/var/run/secrets/keyd/token",
            };
            for pid in node.processes("", &[container, "run"])? {
                let token = std::fs::read_to_string(format!("/proc/{pid}/root{paths}"))
                    .with_context(|| format!("{container} of {}", node.name))?;
                let signature = token
                    .trim()
                    .split('.')
                    .nth(2)
                    .context("a token has three parts")?;
                let name = format!("the token of {container} on {}", node.name);
                secrets.push(Secret::text(&name, signature));
            }
        }
    }
    Ok(secrets)
}

/// keyd and the agents say all that they can, from their start on.
fn most_verbose(cluster: &Cluster) -> Result<()> {
    let workloads = ["deployment/keyd", "daemonset/mesh-agent"];
    // All at once: nobody sends anything meanwhile.
    let at_once = r#"{"spec":{"updateStrategy":{"rollingUpdate":{"maxUnavailable":"100%"}}}}"#;
    cluster.kubectl(["-n", NAMESPACE, "patch", workloads[1], "-p", at_once])?;
    for workload in workloads {
        cluster.kubectl(["-n", NAMESPACE, "set", "env", workload, "RUST_LOG=trace"])?;
    }
    for workload in workloads {
        cluster.kubectl(["-n", NAMESPACE, "rollout", "status", workload, "--timeout=90s"])?;
    }
    cluster.wait_pods(PATIENCE)?;
    cluster.wait_encrypted()
}

/// What the API server and every program answer, by the question.
fn everything_said(cluster: &Cluster) -> Result<Vec<(String, String)>> {
    let mut said = Vec::new();
    let objects = "meshnodes,meshidentities,meshstates,keyrotations,events,configmaps,nodes,pods,\
                   deployments,daemonsets,leases";
    let mut questions = vec![
        vec!["get", objects, "-A", "-o", "json", "--show-managed-fields"],
        vec!["describe", "nodes"],
    ];
    let parts = ["mesh-agent", "keyd"];
    let mut pods = Vec::new();
    for part in parts {
        for pod in cluster.pods_of(part)? {
            let field = |value: &Value| value.as_str().map(str::to_owned).context("a pod without it");
            pods.push((
                part,
                field(&pod["metadata"]["name"])?,
                field(&pod["status"]["hostIP"])?,
            ));
        }
    }
    for (part, pod, _) in &pods {
        let commands: &[&[&str]] = match *part {
            "keyd" => &[
                &["keyd", "status", "-o", "json"],
                &["keyd", "signing-key", "list"],
            ],
            _ => &[
                &["mesh-agent", "status", "-o", "json"],
                &["mesh-agent", "encrypt", "status", "-o", "json"],
            ],
        };
        for command in commands {
            questions.push([&["-n", NAMESPACE, "exec", pod, "--"], *command].concat());
        }
    }
    for question in questions {
        let output = cluster.kubectl_output(question.iter().copied())?;
        let text = [output.stdout, output.stderr].concat();
        said.push((question.join(" "), String::from_utf8_lossy(&text).into_owned()));
    }
    for (part, pod, host) in &pods {
        said.push((format!("metrics of {pod}"), cluster.metrics(part, host)?));
    }
    Ok(said)
}

pub(crate) fn nowhere(scene: &mut Scene) -> Result<()> {
    let cluster = &scene.cluster;
    most_verbose(cluster)?;
    let mut secrets = keys_now(cluster)?;
    trust::signing_key(cluster, "rotate")?;
    cluster.apply(&[
        json!({"apiVersion": "warren.dev/v1alpha1", "kind": "KeyRotation", "metadata": {"name": "searched"},
        "spec": {"pace": {"concurrency": "100%", "drainSeconds": 1}}}),
    ])?;
    keys::succeeded(cluster, "searched")?;
    secrets.extend(keys_now(cluster)?);
    let tokens = tokens(cluster)?;
    ensure!(tokens.len() > cluster.nodes().len(), "{tokens:?}");
    secrets.extend(tokens);
    let finder = Finder::new(secrets);
    let logs = cluster.folder().join("logs");
    finder.power_check(&logs)?;

    let mut found = finder.in_files(&logs, &|_| false)?;
    for node in cluster.nodes() {
        let folder = file(node, "/var/log/pods");
        wait_until(PATIENCE, "the agent's log is verbose", || {
            let traced = node.place.run([
                "sh",
                "-ec",
                "grep -rl TRACE /var/log/pods/kube-system_mesh-agent*",
            ])?;
            ensure!(!traced.is_empty(), "{} has no such line", folder.display());
            Ok(())
        })?;
        found.extend(finder.in_files(&folder, &|_| false)?);
    }
    for (what, text) in everything_said(cluster)? {
        ensure!(!text.is_empty(), "nothing is said: {what}");
        let here = finder.find(text.as_bytes()).into_iter();
        found.extend(here.map(|found| format!("{found} of {what}")));
    }
    ensure!(found.is_empty(), "{found:#?}");
    // The Secret itself is where they are: the search reads answers of the API server as well as logs.
    let secret = cluster.get(["secret", "warren-keyd", "-n", NAMESPACE])?;
    let signing = decoded(
        secret["data"]["snapshot-signing.key"]
            .as_str()
            .unwrap_or_default(),
    )?;
    ensure!(!finder.find(&signing).is_empty(), "the search finds nothing");
    answers(&scene.pods[0], &scene.pods[1])
}
