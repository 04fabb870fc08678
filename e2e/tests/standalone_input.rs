//! Bad input of every kind: one clear sentence, and the rest keeps working.

use std::{fs, process::Command};

use anyhow::{Context as _, Result, ensure};
use warren_e2e::{
    lab::{
        KEYD_SOCKET, Lab, PodSpec, binaries,
        manifests::NodeManifest,
        net::{node_address, pod_cidrs},
        wait::wait_until,
    },
    scenario::{PATIENCE, answers, client_and_server, two_nodes, wait_answers},
};

/// Waits until `keyd` reports a problem that contains all of `words`, in one line.
fn keyd_complains(lab: &Lab, words: &[&str]) -> Result<()> {
    wait_until(
        PATIENCE,
        &format!("keyd reports a problem with {words:?}"),
        || {
            let text = lab
                .node(1)
                .run(["keyd", "status", "-o", "json", "--socket", KEYD_SOCKET])?;
            let status: serde_json::Value = serde_json::from_str(&text)?;
            let problems = status["problems"]
                .as_array()
                .context("no problems in the status")?;
            let found = problems
                .iter()
                .filter_map(|problem| problem.as_str())
                .any(|problem| words.iter().all(|word| problem.contains(word)) && !problem.contains('\n'));
            ensure!(found, "{problems:?}");
            Ok(())
        },
    )
}

#[test]
fn malformed_manifests_hurt_nobody_else() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let (client, server) = client_and_server(lab)?;
        lab.manifests()
            .write_raw("broken.yaml", "{{{ this is: [no yaml")?;
        keyd_complains(lab, &["broken.yaml"])?;
        lab.manifests().write_raw(
            "nameless.yaml",
            "apiVersion: v1\nkind: Pod\nmetadata: {labels: {a: b}}\n",
        )?;
        keyd_complains(lab, &["nameless.yaml"])?;
        lab.manifests().write_raw(
            "odd.yaml",
            "apiVersion: v1\nkind: Node\nmetadata: {name: odd, uid: u}\nspec: {podCIDRs: [nonsense]}\n",
        )?;
        keyd_complains(lab, &["odd"])?;
        answers(&client, &server)?;
        let late = lab.add_pod(PodSpec::new("late", 2))?;
        answers(&client, &late)
    })
}

#[test]
fn a_node_without_pod_cidrs_is_reported() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let (client, server) = client_and_server(lab)?;
        lab.manifests()
            .node(&NodeManifest::new("lonely", "uid-lonely", node_address(50), &[]))?;
        keyd_complains(lab, &["lonely", "podCIDR"])?;
        answers(&client, &server)
    })
}

#[test]
fn overlapping_pod_cidrs_are_refused_and_their_owner_keeps_them() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let (client, server) = client_and_server(lab)?;
        lab.manifests().node(&NodeManifest::new(
            "thief",
            "uid-thief",
            node_address(51),
            &pod_cidrs(2),
        ))?;
        keyd_complains(lab, &["thief", "10.244.2.0/24"])?;
        answers(&client, &server)?;
        answers(&server, &client)?;
        let late = lab.add_pod(PodSpec::new("late", 2))?;
        answers(&client, &late)
    })
}

#[test]
fn an_unreadable_key_file_is_one_clear_sentence() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let (client, server) = client_and_server(lab)?;
        let node = lab.node(2);
        let key = node.dir().join("state/agent/keys/gen1.key");
        let good = fs::read(&key).with_context(|| format!("no key at {}", key.display()))?;
        node.stop_agent()?;
        fs::write(&key, "this is no key\n")?;
        node.start_agent()?;
        wait_until(PATIENCE, "the agent names the file", || {
            ensure!(node.agent_log(20).contains("gen1.key"), "{}", node.agent_log(20));
            Ok(())
        })?;
        ensure!(
            !node.agent_log(1000).contains("this is no key"),
            "the log shows what is in the key file"
        );
        // The tunnel process has its keys: traffic flows on.
        answers(&client, &server)?;
        fs::write(&key, good)?;
        // Whether it gave up or tries again is its own affair.
        if !node.agent_running() {
            node.start_agent()?;
        }
        lab.wait_ready(PATIENCE)?;
        answers(&client, &server)
    })
}

#[test]
fn a_truncated_snapshot_is_fetched_anew() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let (client, server) = client_and_server(lab)?;
        let node = lab.node(2);
        let snapshot = node.dir().join("state/agent/snapshot");
        let length = fs::metadata(&snapshot)
            .with_context(|| format!("no snapshot at {}", snapshot.display()))?
            .len();
        for length in [length / 2, 0] {
            node.stop_agent()?;
            fs::File::options().write(true).open(&snapshot)?.set_len(length)?;
            answers(&client, &server)?;
            node.start_agent()?;
            lab.wait_ready(PATIENCE)?;
            ensure!(
                node.agent_log(1000).contains("snapshot"),
                "not a word: {}",
                node.agent_log(20)
            );
            wait_answers(&client, &server)?;
        }
        Ok(())
    })
}

#[test]
fn a_wrong_flag_is_a_usage_error_with_exit_code_2() -> Result<()> {
    for program in ["mesh-agent", "keyd", "warren"] {
        let output = Command::new(binaries::folder()?.join(program))
            .arg("--no-such-flag")
            .output()?;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.code() == Some(2),
            "{program}: {} {text}",
            output.status
        );
        ensure!(text.contains("--no-such-flag"), "{program}: {text}");
        ensure!(!text.contains("panicked"), "{program}: {text}");
    }
    Ok(())
}

#[test]
fn a_bad_configuration_is_one_clear_sentence() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let node = lab.node(2);
        let (client, server) = client_and_server(lab)?;
        let file = node.dir().join("etc/cluster.yaml");
        let good = fs::read_to_string(&file)?;
        node.stop_agent()?;
        for (bad, word) in [
            (
                "podPools: []\nnodePools: [172.30.0.0/24]\n".to_owned(),
                "podPools",
            ),
            (good.clone() + "\nnoSuchSetting: 1\n", "noSuchSetting"),
            ("{{{".to_owned(), "cluster.yaml"),
        ] {
            fs::write(&file, bad)?;
            let output = node.place().output([
                "mesh-agent",
                "run",
                "--config",
                "/etc/warren/cluster.yaml",
                "--node-name",
                "node2",
                "--keyd",
                "172.30.0.1:4250",
            ])?;
            let text = String::from_utf8_lossy(&output.stderr);
            ensure!(
                !output.status.success() && text.contains(word) && !text.contains("panicked"),
                "{word}: {text}"
            );
        }
        fs::write(&file, good)?;
        node.start_agent()?;
        lab.wait_ready(PATIENCE)?;
        answers(&client, &server)
    })
}
