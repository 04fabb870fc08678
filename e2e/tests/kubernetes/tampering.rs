//! Keyd's objects, written by somebody else: refused by RBAC and the admission policy; and where somebody gets past those, not
//! believed and set right.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use warren_e2e::{cluster::Cluster, lab::wait::wait_until};

use crate::scene::{PATIENCE, Scene, answers};

/// Who may write in general, by the way that kubectl is to be run.
const WRITERS: [(&str, &[&str]); 2] = [
    (
        "a service account with cluster-admin",
        &["--as=system:serviceaccount:default:editor"],
    ),
    ("a cluster administrator (system:masters)", &[]),
];
/// Who may write nothing.
const OTHERS: [(&str, &[&str]); 4] = [
    (
        "the agents' account",
        &["--as=system:serviceaccount:kube-system:mesh-agent"],
    ),
    ("a node", &["--as=system:node:node1", "--as-group=system:nodes"]),
    (
        "a pod without permissions",
        &["--as=system:serviceaccount:default:default"],
    ),
    (
        "nobody",
        &["--as=system:anonymous", "--as-group=system:unauthenticated"],
    ),
];

fn forged(kind: &str, name: &str, spec: &Value) -> Value {
    json!({"apiVersion": "warren.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec})
}

/// A MeshIdentity with labels that are somebody's dream.
fn forged_identity(name: &str) -> Value {
    let number: u32 = name.parse().unwrap_or_default();
    let spec = json!({"number": number, "labels": {"k8s:app": "admin"}});
    forged("MeshIdentity", name, &spec)
}

/// (verb, object, arguments of kubectl, what is fed to it)
type Write = (&'static str, &'static str, Vec<String>, Value);

/// What is tried.
fn writes(cluster: &Cluster) -> Result<Vec<Write>> {
    let node = cluster.get(["meshnode", "node1"])?;
    let identities = cluster.get(["meshidentities"])?;
    let identity = identities["items"][0].clone();
    let number = identity["metadata"]["name"]
        .as_str()
        .context("no MeshIdentity")?
        .to_owned();
    let state = cluster.get(["meshstate", "warren"])?;
    let mut moved = node.clone();
    moved["spec"]["prefixes"] = json!(["10.244.2.0/24"]);
    // Its spec cannot be changed by anybody: the API server refuses that before it asks who it is.
    let mut touched = identity.clone();
    touched["metadata"]["labels"] = json!({"touched": "yes"});
    let mut raised = state.clone();
    raised["spec"]["epoch"] = json!(state["spec"]["epoch"].as_u64().unwrap_or(1) + 1000);
    // Not everybody may ask for the schema, which is not what is tested.
    let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let patch = |what: &str, patch: &Value| {
        let mut all = words(&format!("patch {what} --type=merge -p"));
        all.push(patch.to_string());
        all
    };
    let labels = json!({"metadata": {"labels": {"touched": "yes"}}});
    let status = json!({"status": {"ready": true, "agentVersion": "forged"}});
    let none = Value::Null;
    Ok(vec![
        (
            "create",
            "MeshNode",
            words("create --validate=false -f -"),
            forged("MeshNode", "node9", &node["spec"]),
        ),
        (
            "update",
            "MeshNode",
            words("replace --validate=false -f -"),
            moved,
        ),
        (
            "patch",
            "MeshNode",
            patch("meshnode node1", &labels),
            none.clone(),
        ),
        (
            "patch",
            "MeshNode's status",
            patch("meshnode node1 --subresource=status", &status),
            none.clone(),
        ),
        (
            "delete",
            "MeshNode",
            words("delete meshnode node1 --wait=false"),
            none.clone(),
        ),
        (
            "delete collection",
            "MeshNode",
            words("delete --raw /apis/warren.dev/v1alpha1/meshnodes"),
            none.clone(),
        ),
        (
            "create",
            "MeshIdentity",
            words("create --validate=false -f -"),
            forged_identity("60000"),
        ),
        (
            "update",
            "MeshIdentity",
            words("replace --validate=false -f -"),
            touched,
        ),
        (
            "patch",
            "MeshIdentity",
            patch(&format!("meshidentity {number}"), &labels),
            none.clone(),
        ),
        (
            "delete",
            "MeshIdentity",
            words(&format!("delete meshidentity {number} --wait=false")),
            none.clone(),
        ),
        (
            "delete collection",
            "MeshIdentity",
            words("delete --raw /apis/warren.dev/v1alpha1/meshidentities"),
            none.clone(),
        ),
        (
            "update",
            "MeshState",
            words("replace --validate=false -f -"),
            raised,
        ),
        (
            "patch",
            "MeshState",
            patch("meshstate warren", &json!({"spec": {"holder": "me"}})),
            none.clone(),
        ),
        (
            "delete",
            "MeshState",
            words("delete meshstate warren --wait=false"),
            none.clone(),
        ),
        (
            "patch",
            "KeyRotation's status",
            patch(
                "keyrotation watched --subresource=status",
                &json!({"status": {"phase": "Failed"}}),
            ),
            none,
        ),
    ])
}

/// What the devices of all nodes have.
fn devices(cluster: &Cluster) -> Result<Vec<(String, Vec<String>)>> {
    let of = |node: &str| -> Result<Vec<String>> {
        let status = cluster.encrypt_status(node)?;
        let own = status
            .interfaces
            .iter()
            .map(|i| format!("{} {:?}", i.name, i.public_key));
        let peers = status.peers.iter().map(|peer| {
            let (key, endpoint, prefixes) = (peer.public_key, peer.endpoint, &peer.allowed_prefixes);
            format!("{} {key} {endpoint:?} {prefixes:?}", peer.interface)
        });
        let mut all: Vec<String> = own.chain(peers).collect();
        all.sort();
        Ok(all)
    };
    let names = cluster.nodes().iter().map(|node| node.name.clone());
    names.map(|name| Ok((name.clone(), of(&name)?))).collect()
}

pub(crate) fn foreign_writes(scene: &mut Scene) -> Result<()> {
    let cluster = &scene.cluster;
    editor(cluster, "apply")?;
    let rotation = json!({"apiVersion": "warren.dev/v1alpha1", "kind": "KeyRotation", "metadata": {"name": "watched"},
        "spec": {"nodes": {"names": ["node1"]}, "abort": true}});
    cluster.apply(&[rotation])?;
    let before = devices(cluster)?;
    let writes = writes(cluster)?;
    // The policy may be a moment late.
    wait_until(PATIENCE, "the admission policy is in force", || {
        let (said, done) = attempt(cluster, &words_of(&writes[2].2), WRITERS[0].1, &Value::Null)?;
        ensure!(!done && said.contains("only keyd writes"), "{said}");
        Ok(())
    })?;
    let denied_before = denied(cluster)?;
    let (mut count, mut by_policies) = (0, 0);
    for (who, as_whom) in WRITERS.iter().chain(&OTHERS) {
        for (verb, object, words, body) in &writes {
            let (said, done) = attempt(cluster, &words_of(words), as_whom, body)?;
            ensure!(!done, "{who} may {verb} {object}");
            let by_policy = said.contains("only keyd writes");
            let wanted = WRITERS.iter().any(|(writer, _)| writer == who);
            ensure!(by_policy == wanted, "{who}, {verb} {object}: {said}");
            ensure!(
                by_policy || said.contains("orbidden"),
                "{who}, {verb} {object}: {said}"
            );
            count += 1;
            by_policies += u64::from(by_policy);
            println!(
                "  | {verb} | {object} | {who} | {} |",
                if by_policy { "admission policy" } else { "RBAC" }
            );
        }
    }
    println!("  {count} writes, {count} refused");
    // keyd never hears of them: here the API server counts.
    let counted = denied(cluster)? - denied_before;
    ensure!(
        counted >= by_policies,
        "{by_policies} refused by the policy, {counted} counted"
    );
    ensure!(devices(cluster)? == before, "a device has changed");
    cluster.kubectl(["delete", "keyrotation", "watched"])?;
    editor(cluster, "delete")
}

/// How often the API server has refused something by our policy, as its metrics say.
fn denied(cluster: &Cluster) -> Result<u64> {
    let text = cluster.kubectl(["get", "--raw", "/metrics"])?;
    let counts = text.lines().filter(|line| {
        line.starts_with("apiserver_validating_admission_policy_check_total{")
            && line.contains("policy=\"warren-objects\"")
            && line.contains("enforcement_action=\"deny\"")
    });
    let counts = counts.filter_map(|line| line.split_whitespace().next_back()?.parse::<u64>().ok());
    Ok(counts.sum())
}

fn words_of(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

/// A service account that may write everything.
fn editor(cluster: &Cluster, verb: &str) -> Result<()> {
    if verb == "delete" {
        return cluster
            .kubectl(["delete", "clusterrolebinding", "editor"])
            .map(drop);
    }
    cluster.apply(&[
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "editor"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
            "subjects": [{"kind": "ServiceAccount", "name": "editor", "namespace": "default"}],
        }),
    ])
}

/// What kubectl says, and whether it was done.
fn attempt(cluster: &Cluster, words: &[&str], as_whom: &[&str], body: &Value) -> Result<(String, bool)> {
    let all = words.iter().chain(as_whom).copied();
    let output = match body.is_null() {
        true => cluster.kubectl_output(all)?,
        false => {
            // kubectl takes the newest one: keyd may have written the status meanwhile.
            let mut body = body.clone();
            if let Some(metadata) = body["metadata"].as_object_mut() {
                metadata.remove("resourceVersion");
            }
            cluster.kubectl_with(all, body.to_string().as_bytes())?
        }
    };
    let said = [output.stdout, output.stderr].concat();
    Ok((
        String::from_utf8_lossy(&said).into_owned(),
        output.status.success(),
    ))
}

/// How often an alarm was counted, by all keyds.
pub(crate) fn alarms(cluster: &Cluster, reason: &str) -> Result<u64> {
    let mut sum = 0;
    for pod in cluster.pods_of("keyd")? {
        let Some(host) = pod["status"]["hostIP"].as_str() else {
            continue;
        };
        let text = cluster.metrics("keyd", host)?;
        let line = format!("warren_keyd_alarms_total{{reason=\"{reason}\"}} ");
        let counts = text
            .lines()
            .filter_map(|text| text.strip_prefix(&line)?.parse::<u64>().ok());
        sum += counts.sum::<u64>();
    }
    Ok(sum)
}

/// The messages of Events with this reason about this object.
pub(crate) fn events_about(cluster: &Cluster, reason: &str, kind: &str, name: &str) -> Result<Vec<String>> {
    let events = cluster.get(["events", "-n", "default"])?;
    let items = events["items"].as_array().into_iter().flatten();
    let wanted = items.filter(|event| {
        let about = &event["involvedObject"];
        event["reason"] == reason
            && about["kind"] == kind
            && about["name"] == name
            && event["type"] == "Warning"
    });
    Ok(wanted
        .filter_map(|event| event["message"].as_str().map(str::to_owned))
        .collect())
}

/// Somebody gets past the admission policy: nothing of what he writes is believed, each is an alarm with an Event, and keyd sets
/// it right.
pub(crate) fn tampered_objects(scene: &mut Scene) -> Result<()> {
    let cluster = &scene.cluster;
    let binding = cluster.get(["validatingadmissionpolicybinding", "warren-objects"])?;
    let before = devices(cluster)?;
    let old = cluster.get(["meshnode", "node2"])?;
    // Its keys change, so that what was signed before is old.
    let rotation = json!({"apiVersion": "warren.dev/v1alpha1", "kind": "KeyRotation", "metadata": {"name": "tampering"},
        "spec": {"nodes": {"names": ["node2"]}, "pace": {"drainSeconds": 1}}});
    cluster.apply(&[rotation])?;
    wait_until(PATIENCE, "node2 has another key", || {
        let object = cluster.get(["keyrotation", "tampering"])?;
        ensure!(object["status"]["phase"] == "Succeeded", "{}", object["status"]);
        Ok(())
    })?;
    cluster.wait_encrypted()?;
    let rotated = devices(cluster)?;
    ensure!(rotated != before, "nothing was rotated");
    let good = cluster.get(["meshnodes"])?;
    let alarms_before = alarms(cluster, "ObjectTampered")?;

    cluster.kubectl(["delete", "validatingadmissionpolicybinding", "warren-objects"])?;
    editor(cluster, "apply")?;
    let as_whom = WRITERS[0].1;
    wait_until(PATIENCE, "the policy is out of force", || {
        let patch = json!({"metadata": {"annotations": {"touched": "yes"}}}).to_string();
        let words = ["patch", "meshnode", "node1", "--type=merge", "-p", patch.as_str()];
        let (said, done) = attempt(cluster, &words, as_whom, &Value::Null)?;
        ensure!(done, "{said}");
        Ok(())
    })?;
    let write = |words: &str, body: &Value| -> Result<()> {
        let words: Vec<&str> = words.split(' ').collect();
        let (said, done) = attempt(cluster, &words, as_whom, body)?;
        ensure!(done, "{words:?}: {said}");
        Ok(())
    };
    let node = |name: &str| cluster.get(["meshnode", name]);
    // Somebody else's key, under the old signature.
    let mut stolen = node("node1")?;
    let key = node("node3")?["spec"]["slots"][0]["publicKey"].clone();
    for slot in stolen["spec"]["slots"].as_array_mut().into_iter().flatten() {
        slot["publicKey"] = key.clone();
    }
    write("replace -f -", &stolen)?;
    // What was signed before the rotation, replayed.
    let mut replayed = node("node2")?;
    replayed["spec"] = old["spec"].clone();
    write("replace -f -", &replayed)?;
    write("delete meshnode node3 --wait=true", &Value::Null)?;
    // Another node's object under a name of its own.
    write(
        "create -f -",
        &forged("MeshNode", "node9", &node("node1")?["spec"]),
    )?;
    let identities = cluster.get(["meshidentities"])?;
    let items = identities["items"].as_array().context("no MeshIdentities")?;
    let [changed, deleted, ..] = &items[..] else {
        bail!("{} MeshIdentities", items.len())
    };
    let number = |item: &Value| item["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    // Labels never change; another object of the same name is what is left.
    let gone = format!("delete meshidentity {} --wait=true", number(changed));
    write(&gone, &Value::Null)?;
    write("create -f -", &forged_identity(&number(changed)))?;
    write(
        &format!("delete meshidentity {} --wait=true", number(deleted)),
        &Value::Null,
    )?;
    write("create -f -", &forged_identity("60000"))?;

    let rows = [
        ("Node", "node1", "changed MeshNode node1"),
        ("Node", "node2", "changed MeshNode node2"),
        ("Node", "node3", "MeshNode node3"),
        ("Node", "node9", "made MeshNode node9"),
        ("MeshState", "warren", "changed MeshIdentity"),
        ("MeshState", "warren", "deleted MeshIdentity"),
        ("MeshState", "warren", "made MeshIdentity 60000"),
    ];
    for (kind, name, what) in rows {
        wait_until(PATIENCE, &format!("an Event: {what}"), || {
            let said = events_about(cluster, "ObjectTampered", kind, name)?;
            ensure!(said.iter().any(|message| message.contains(what)), "{said:?}");
            Ok(())
        })?;
        println!("  | write past the policy | {what} | ObjectTampered on {kind} {name} |");
    }
    let counted = alarms(cluster, "ObjectTampered")? - alarms_before;
    ensure!(counted >= rows.len() as u64, "{counted} alarms");
    wait_until(PATIENCE, "keyd has set it right", || {
        for item in good["items"].as_array().into_iter().flatten() {
            let name = item["metadata"]["name"].as_str().unwrap_or_default();
            let now = node(name)?;
            ensure!(now["spec"] == item["spec"], "{name}: {}", now["spec"]);
        }
        let now = cluster.get(["meshidentity", &number(changed)])?;
        ensure!(
            now["spec"]["labels"] == changed["spec"]["labels"],
            "{}",
            now["spec"]
        );
        cluster.get(["meshidentity", &number(deleted)])?;
        let stranger = cluster.kubectl_output(["get", "meshidentity", "60000"])?;
        ensure!(!stranger.status.success(), "the stranger is still there");
        Ok(())
    })?;
    ensure!(devices(cluster)? == rotated, "a device has changed");

    // The fence itself: the term ends, the next one is beyond it.
    let state = cluster.get(["meshstate", "warren"])?;
    let mut raised = state.clone();
    let epoch = state["spec"]["epoch"].as_u64().context("no epoch")? + 1000;
    raised["spec"]["epoch"] = json!(epoch);
    write("replace -f -", &raised)?;
    wait_until(PATIENCE, "another term", || {
        let now = cluster.get(["meshstate", "warren"])?;
        ensure!(now["spec"]["epoch"].as_u64() > Some(epoch), "{}", now["spec"]);
        let said = events_about(cluster, "ObjectTampered", "MeshState", "warren")?;
        ensure!(
            said.iter()
                .any(|message| message.contains("changed MeshState warren")),
            "{said:?}"
        );
        Ok(())
    })?;
    cluster.wait_encrypted()?;
    ensure!(devices(cluster)? == rotated, "a device has changed");
    // The forged one is nobody's; keyd deletes no MeshNode.
    write("delete meshnode node9", &Value::Null)?;
    let clean = json!({"apiVersion": binding["apiVersion"], "kind": binding["kind"], "spec": binding["spec"],
        "metadata": {"name": "warren-objects", "labels": binding["metadata"]["labels"],
            "annotations": binding["metadata"]["annotations"]}});
    cluster.apply(&[clean])?;
    editor(cluster, "delete")?;
    answers(&scene.pods[0], &scene.pods[1])
}
