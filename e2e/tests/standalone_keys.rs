//! Keys rotate under traffic and while processes die, revoked ones never come back, and none shows up anywhere.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use warren_agent_api::{KeyPhase, Request, Response};
use warren_e2e::{
    app::ask::Protocol,
    bench::rotation::{
        Figures, Options, in_lab,
        load::{Rates, pods},
        power_check,
    },
    lab::{Lab, LabOptions, Node, Pod, QUICKLY, manifests::node_file, wait::wait_until},
    scenario::{Flows, nothing_in_clear, two_nodes, wait_answers},
};

/// The limit ends a broken run.
const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn keys_rotate_without_loss_and_old_ones_are_gone() -> Result<()> {
    let rates = Rates {
        pair: 500,
        others: 100,
        connections: 5,
    };
    let mut runs = Vec::new();
    for (nodes, cluster, single) in [(2, 1, 1), (3, 1, 1)] {
        runs.push(in_lab(&Options {
            nodes,
            ladder: vec![rates],
            control: Duration::from_secs(2),
            cluster,
            single,
        })?);
    }
    let figures = Figures::of(runs, power_check(rates)?);
    ensure!(figures.faults().is_empty(), "{:?}: {figures:?}", figures.faults());
    // Two and one, three and one.
    ensure!(figures.rotations == 4 && figures.keys_gone == 7, "{figures:?}");
    Ok(())
}

/// Where a node says that its key is; asked without starting a program, as a phase may be short.
fn phase(node: &Node) -> Result<KeyPhase> {
    match node.ask_agent(&Request::EncryptStatus)? {
        Response::EncryptStatus(status) => Ok(status.keys.phase),
        other => bail!("{} answered {other:?}", node.name),
    }
}

const PHASES: [KeyPhase; 4] = [
    KeyPhase::Preparing,
    KeyPhase::Verifying,
    KeyPhase::Switching,
    KeyPhase::Draining,
];

/// Rotates all nodes' keys; calls `at` with each phase that is seen at a node that is left alone.
fn rotate_and_disturb(lab: &Lab, mut at: impl FnMut(KeyPhase) -> Result<()>) -> Result<Vec<KeyPhase>> {
    let before = lab.public_keys()?;
    let watched = lab.node(2);
    let mut rotation = lab.start_rotation(&["--all", "--concurrency", "100%", "--drain", "2s"])?;
    let mut seen = Vec::new();
    let start = Instant::now();
    while rotation.running() {
        ensure!(
            start.elapsed() < LIMIT,
            "the rotation does not end: {}",
            rotation.tail()
        );
        let Ok(now) = phase(&watched) else { continue };
        if PHASES.contains(&now) && !seen.contains(&now) {
            seen.push(now);
            at(now)?;
        }
    }
    rotation.finish().context("the rotation did not succeed")?;
    wait_until(LIMIT, "all pairs agree on new keys", || {
        lab.audit()?;
        let after = lab.public_keys()?;
        ensure!(after.len() == before.len(), "keys: {after:?}");
        ensure!(
            after.iter().all(|key| !before.contains(key)),
            "an old key is left"
        );
        Ok(())
    })?;
    println!("disturbed at {seen:?}; {:.1} s", start.elapsed().as_secs_f32());
    ensure!(seen.len() >= 2, "only {seen:?} were seen: nothing was disturbed");
    Ok(seen)
}

/// An agent or keyd that dies costs nothing: not a packet.
#[test]
fn agents_and_keyd_die_in_every_phase() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let capture = lab.capture()?;
        let pods = pods(lab)?;
        let [client, server] = &pods[..] else {
            bail!("two pods")
        };
        let flows = Flows::start(client, server)?;
        let victim = lab.node(1);
        rotate_and_disturb(lab, |_| {
            victim.kill_agent()?;
            victim.start_agent()
        })?;
        rotate_and_disturb(lab, |_| {
            victim.kill_keyd()?;
            victim.start_keyd()
        })?;
        flows.finish_without_loss()?;
        nothing_in_clear(&capture.finish()?)
    })
}

/// A tunnel that dies takes its packets with it, but nothing leaves in clear, and the rotation ends well.
#[test]
fn a_tunnel_dies_in_every_phase() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let capture = lab.capture()?;
        let pods = pods(lab)?;
        let flows = Flows::start(&pods[0], &pods[1])?;
        let victim = lab.node(1);
        rotate_and_disturb(lab, |_| {
            let killed = victim.tunnels()?;
            victim.kill_tunnel()?;
            wait_until(LIMIT, "another tunnel runs", || {
                let now = victim.tunnels()?;
                ensure!(
                    !now.is_empty() && now.iter().all(|pid| !killed.contains(pid)),
                    "{now:?}"
                );
                Ok(())
            })
        })?;
        all_answer(&pods)?;
        let reports = flows.finish()?;
        ensure!(reports.iter().all(|report| report.received > 0), "{reports:?}");
        nothing_in_clear(&capture.finish()?)
    })
}

/// A node that is cut off for a while holds the rotation up and loses its own packets; the others lose nothing.
#[test]
fn a_node_is_cut_off_during_a_rotation() -> Result<()> {
    Lab::run(LabOptions::default(), |lab| {
        let capture = lab.capture()?;
        let pods = pods(lab)?;
        let others = Flows::start(&pods[0], &pods[1])?;
        let cut = lab.node(3);
        let link = |state: &str| lab.underlay().ip(&[format!("link set {} {state}", cut.port())]);
        let mut since = None;
        rotate_and_disturb(lab, |_| {
            if since.is_none() {
                link("down")?;
                since = Some(Instant::now());
                wait_until(LIMIT, "the partition is over", || {
                    let over = since.is_some_and(|since| since.elapsed() > Duration::from_secs(30));
                    ensure!(over, "not yet");
                    Ok(())
                })?;
                link("up")?;
            }
            Ok(())
        })?;
        others.finish_without_loss()?;
        all_answer(&pods)?;
        nothing_in_clear(&capture.finish()?)
    })
}

/// After a tunnel has died in the middle of a rotation, the next one loses nothing.
#[test]
fn a_rotation_after_a_tunnel_died_loses_nothing() -> Result<()> {
    Lab::run(LabOptions::default(), |lab| {
        let capture = lab.capture()?;
        let pods = pods(lab)?;
        let victim = lab.node(1);
        rotate_and_disturb(lab, |_| victim.kill_tunnel())?;
        all_answer(&pods)?;
        let flows = pods
            .iter()
            .zip(pods.iter().skip(1))
            .map(|(from, to)| Flows::start(from, to))
            .collect::<Result<Vec<_>>>()?;
        lab.rotate(&[&["--all"], &QUICKLY[..]].concat())?;
        flows.into_iter().try_for_each(Flows::finish_without_loss)?;
        nothing_in_clear(&capture.finish()?)
    })
}

fn all_answer(pods: &[Pod]) -> Result<()> {
    for from in pods {
        for to in pods.iter().filter(|to| to.name() != from.name()) {
            wait_answers(from, to)?;
        }
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The public keys that a node's own devices have.
fn own_keys(node: &Node) -> Result<Vec<String>> {
    let status = node.encrypt_status()?;
    let keys = status
        .interfaces
        .iter()
        .filter_map(|interface| interface.public_key);
    let mut keys: Vec<String> = keys.map(|key| hex(key.as_bytes())).collect();
    keys.sort();
    keys.dedup();
    ensure!(!keys.is_empty(), "{} has no key", node.name);
    Ok(keys)
}

#[test]
fn a_revoked_node_is_forgotten_everywhere_and_does_not_come_back() -> Result<()> {
    Lab::run(LabOptions::default(), |lab| {
        let capture = lab.capture()?;
        let pods = pods(lab)?;
        let others = Flows::start(&pods[0], &pods[1])?;
        let (stolen, peers) = (lab.node(3), [lab.node(1), lab.node(2)]);
        let revoked = own_keys(&stolen)?;
        for peer in &peers {
            let dump = peer.device_dump()?;
            ensure!(
                revoked.iter().any(|key| dump.contains(key)),
                "{} knows it",
                peer.name
            );
        }
        let answer = lab.warren_json(&[
            "keys",
            "revoke",
            "node3",
            "--reason",
            "stolen",
            "--timeout",
            "60s",
        ])?;
        ensure!(
            answer["waiting"].as_array().is_some_and(Vec::is_empty),
            "{answer}"
        );
        ensure!(
            answer["acknowledged"]
                .as_array()
                .is_some_and(|nodes| nodes.len() == 2),
            "{answer}"
        );
        let forgotten = || -> Result<()> {
            for peer in &peers {
                let dump = peer.device_dump()?;
                ensure!(
                    revoked.iter().all(|key| !dump.contains(key)),
                    "{} still has it",
                    peer.name
                );
            }
            let listed = lab.public_keys()?;
            ensure!(
                revoked.iter().all(|key| !listed.contains(key)),
                "keyd still lists it"
            );
            Ok(())
        };
        forgotten()?;
        for peer in &pods[..2] {
            for address in pods[2].addresses() {
                ensure!(
                    peer.ask(Protocol::Udp, *address, 64).is_err(),
                    "its pod still answers"
                );
            }
        }
        // With its disk it tries again and again: a new process, and keyd's new process, know no better.
        stolen.kill_agent()?;
        stolen.start_agent()?;
        lab.node(1).kill_keyd()?;
        lab.node(1).start_keyd()?;
        peers.iter().try_for_each(|peer| peer.wait_ready(1, LIMIT))?;
        wait_until(LIMIT, "its agent was refused", || {
            ensure!(
                stolen.agent_log(50).contains("refuse") || stolen.agent_log(50).contains("revoked"),
                "not yet"
            );
            Ok(())
        })?;
        forgotten()?;
        others.finish_without_loss()?;

        // The same name, another Node, an empty disk: that one is welcome.
        lab.manifests().remove(&node_file("node3"))?;
        drop(stolen);
        lab.forget_node(3)?;
        let new = lab.add_node(3)?;
        lab.wait_ready(LIMIT)?;
        let keys = own_keys(&new)?;
        ensure!(
            keys.iter().all(|key| !revoked.contains(key)),
            "it came back with a revoked key"
        );
        forgotten()?;
        nothing_in_clear(&capture.finish()?)
    })
}
