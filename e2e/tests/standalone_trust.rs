//! Whom nodes believe: signing keys that are replaced, and directories that grow old.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use warren_e2e::{
    app::ask::Protocol,
    lab::{Lab, LabOptions, Node, PodSpec, QUICKLY, wait::wait_until},
    scenario::{Flows, answers, client_and_server, insist, nothing_in_clear, wait_answers},
};

/// The limit ends a broken run.
const LIMIT: Duration = Duration::from_secs(60);

/// Has keyd sign with a new key; returns its generation. Does not wait for the agents.
fn rotate_signing(lab: &Lab) -> Result<u64> {
    let keys = lab.warren_json(&["keys", "rotate-signing", "--timeout", "0"])?;
    let last = keys["keys"].as_array().and_then(|keys| keys.last());
    last.and_then(|key| key["generation"].as_u64())
        .with_context(|| format!("no signing key: {keys}"))
}

fn wait_root(node: &Node, generation: u64) -> Result<()> {
    wait_until(
        LIMIT,
        &format!("{} follows signing key {generation}", node.name),
        || {
            let root = node.agent_status()?.root;
            let pinned = root.map_or(0, |root| root.generation);
            ensure!(pinned == generation, "it has pinned {pinned}");
            Ok(())
        },
    )
}

#[test]
fn a_new_signing_key_is_followed_without_a_pause() -> Result<()> {
    Lab::run(LabOptions::default(), |lab| {
        let capture = lab.capture()?;
        let (client, server) = client_and_server(lab)?;
        let flows = Flows::start(&client, &server)?;
        let away = lab.node(3);
        away.stop_agent()?;
        rotate_signing(lab)?;
        lab.node(1).kill_keyd()?;
        lab.node(1).start_keyd()?;
        let newest = rotate_signing(lab)?;
        ensure!(newest == 3, "signing key {newest}");
        for node in [lab.node(1), lab.node(2)] {
            wait_root(&node, newest)?;
        }
        // One that was away follows over both, and everything goes on with the newest.
        away.start_agent()?;
        wait_root(&away, newest)?;
        lab.wait_ready(LIMIT)?;
        lab.rotate(&[&["--all"], &QUICKLY[..]].concat())?;
        wait_until(LIMIT, "all follow, all MeshNodes are signed anew", || {
            let output = lab.warren(&["keys", "signing"])?;
            ensure!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stdout)
            );
            Ok(())
        })?;
        flows.finish_without_loss()?;

        // A node that has pinned another cluster's root takes nothing from this keyd, and says what to do; its traffic stays.
        let stranger = lab.node(2);
        stranger.stop_agent()?;
        let file = stranger.dir().join("state/agent/trust/snapshot-roots");
        let pinned = fs::read_to_string(&file)?;
        fs::write(&file, other_roots()?)?;
        stranger.start_agent()?;
        wait_until(LIMIT, "it refuses keyd", || {
            let problems = stranger.agent_status()?.problems;
            let clear = |problem: &String| {
                problem.contains("chain of snapshot roots is refused")
                    && problem.contains("remove /var/lib/warren")
            };
            ensure!(problems.iter().any(clear), "{problems:?}");
            Ok(())
        })?;
        answers(&client, &server)?;
        stranger.stop_agent()?;
        fs::write(&file, pinned)?;
        stranger.start_agent()?;
        lab.wait_ready(LIMIT)?;
        answers(&client, &server)?;
        nothing_in_clear(&capture.finish()?)
    })
}

/// The roots of a cluster that nobody knows.
fn other_roots() -> Result<String> {
    use warren_keyd_api::snapshot::{ManifestSigner, RootChain};
    Ok(RootChain::first(&ManifestSigner::generate()?, 0).to_text())
}

/// Signatures that end soon, so that a test can wait for it.
const EXPIRY: u64 = 10;

#[test]
fn a_directory_whose_time_is_over_keeps_its_peers_unless_it_is_to_fail_hard() -> Result<()> {
    let options = LabOptions {
        tune: |config| config.snapshot_expiry_seconds = EXPIRY,
        ..LabOptions::default()
    };
    Lab::run(options, |lab| {
        let capture = lab.capture()?;
        let (client, server) = client_and_server(lab)?;
        let third = lab.add_pod(PodSpec::new("third", 3))?;
        answers(&client, &third)?;
        let hard = lab.node(3);
        let file = hard.dir().join("etc/cluster.yaml");
        let config = fs::read_to_string(&file)?.replace("snapshotHardFail: false", "snapshotHardFail: true");
        ensure!(config.contains("snapshotHardFail: true"), "{config}");
        fs::write(&file, config)?;
        hard.stop_agent()?;
        hard.start_agent()?;
        lab.wait_ready(LIMIT)?;
        let flows = Flows::start(&client, &server)?;

        lab.node(1).kill_keyd()?;
        for node in lab.nodes() {
            wait_expired(&node, true)?;
            wait_until(LIMIT, "the metric says so", || {
                let metrics = node.run(["curl", "-sS", "http://127.0.0.1:9962/metrics"])?;
                ensure!(
                    metrics.contains("warren_agent_directory_expired 1"),
                    "{}: {metrics}",
                    node.name
                );
                Ok(())
            })?;
        }
        // An agent that starts now has its peers from its disk.
        let restarted = lab.node(2);
        restarted.kill_agent()?;
        restarted.start_agent()?;
        wait_expired(&restarted, true)?;
        wait_until(LIMIT, "node3 has let go of its peers", || {
            let peers = hard.encrypt_status()?.peers.len();
            ensure!(peers == 0, "{peers} peers");
            Ok(())
        })?;
        answers(&client, &server)?;
        for address in third.addresses() {
            ensure!(
                client.ask(Protocol::Udp, *address, 64).is_err(),
                "a pod of node3 still answers"
            );
        }
        insist(&third, client.addresses())?;
        flows.finish_without_loss()?;

        lab.node(1).start_keyd()?;
        for node in lab.nodes() {
            wait_expired(&node, false)?;
        }
        lab.wait_ready(LIMIT)?;
        wait_answers(&client, &third)?;
        nothing_in_clear(&capture.finish()?)
    })
}

fn wait_expired(node: &Node, expired: bool) -> Result<()> {
    wait_until(
        LIMIT,
        &format!("{}'s directory is over: {expired}", node.name),
        || {
            let status = node.agent_status()?;
            let said = status
                .problems
                .iter()
                .any(|problem| problem.contains("the directory expired"));
            ensure!(
                status.expired_seconds.is_some() == expired && said == expired,
                "{:?} {:?}",
                status.expired_seconds,
                status.problems
            );
            Ok(())
        },
    )
}
