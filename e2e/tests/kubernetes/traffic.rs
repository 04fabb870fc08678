//! What must work, and what it looks like between the nodes.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use warren_e2e::{
    app::ask::Protocol,
    cluster::pod::{AppPod, PORT},
    lab::{ask_from, net::node_address, wait::wait_until},
};

use crate::scene::{NODE_PORT, PATIENCE, Scene, answers, nothing_in_clear};

/// Shows that the capture can see plaintext: everything that later finds none rests on it.
pub(crate) fn power_check(scene: &mut Scene) -> Result<()> {
    scene.cluster.install(&["encryption.enabled=false"])?;
    scene.deploy()?;
    let capture = scene.capture()?;
    answers(&scene.pods[0], &scene.pods[1])?;
    let counts = capture.finish()?;
    ensure!(counts.plaintext > 100, "the capture is blind: {counts:?}");
    Ok(())
}

pub(crate) fn turn_on(scene: &mut Scene) -> Result<()> {
    scene.cluster.upgrade(&["encryption.enabled=true"])?;
    scene.cluster.wait_encrypted()?;
    let text = scene.cluster.kubectl([
        "-n",
        "kube-system",
        "exec",
        "ds/mesh-agent",
        "--",
        "mesh-agent",
        "encrypt",
        "status",
    ])?;
    ensure!(text.contains("Encryption: WireGuard"), "{text}");
    for node in scene.cluster.nodes() {
        let status = scene.cluster.encrypt_status(&node.name)?;
        ensure!(
            status.mismatches.is_empty(),
            "{}: {:?}",
            node.name,
            status.mismatches
        );
    }
    Ok(())
}

pub(crate) fn pods_reach_pods(scene: &mut Scene) -> Result<()> {
    let capture = scene.capture()?;
    for from in &scene.pods {
        for to in scene.pods.iter().filter(|to| to.name != from.name) {
            answers(from, to)?;
        }
    }
    // And one that came after the agents.
    let late = scene.add_pod("late", "node3")?;
    answers(&scene.pods[0], &late)?;
    answers(&late, &scene.pods[1])?;
    scene.remove_pod(&late)?;
    nothing_in_clear(&capture.finish()?)
}

pub(crate) fn services_and_dns(scene: &mut Scene) -> Result<()> {
    let capture = scene.capture()?;
    let service = scene.cluster.get(["service", "app"])?;
    let addresses: Vec<String> = texts(&service["spec"]["clusterIPs"]);
    ensure!(addresses.len() == 2, "the service has {addresses:?}");
    for pod in &scene.pods {
        for address in &addresses {
            everybody_answers(scene, pod, (address.parse::<std::net::IpAddr>()?, 80).into())?;
        }
        for node in 1..=3 {
            for address in node_address(node).both() {
                everybody_answers(scene, pod, (address, NODE_PORT).into())?;
            }
        }
        // By itself it takes IPv4 only.
        for kind in ["-type=a", "-type=aaaa"] {
            let question = ["nslookup", kind, "app.default.svc.cluster.local"];
            let found = scene.cluster.exec(&pod.name, &question)?;
            ensure!(
                addresses.iter().any(|address| found.contains(address)),
                "{kind}, from {}: {found}",
                pod.name
            );
        }
    }
    nothing_in_clear(&capture.finish()?)
}

/// Every pod behind the address answers some question.
fn everybody_answers(scene: &Scene, from: &AppPod, to: SocketAddr) -> Result<()> {
    let mut missing: Vec<&str> = scene.pods.iter().map(|pod| pod.name.as_str()).collect();
    wait_until(
        PATIENCE,
        &format!("every pod answers {} at {to}", from.name),
        || {
            let answer = from.ask(Protocol::Tcp, to, 1400)?;
            missing.retain(|name| *name != answer.name);
            ensure!(missing.is_empty(), "{missing:?} have not answered");
            Ok(())
        },
    )
}

pub(crate) fn nodes_and_pods(scene: &mut Scene) -> Result<()> {
    let capture = scene.capture()?;
    for node in scene.cluster.nodes() {
        for pod in &scene.pods {
            for address in &pod.addresses {
                let answer = ask_from(&node.place, Protocol::Tcp, (*address, PORT).into(), 1400, 5000)
                    .with_context(|| format!("{} -> {}", node.name, pod.name))?;
                ensure!(
                    answer.name == pod.name,
                    "{} answered for {}",
                    answer.name,
                    pod.name
                );
            }
        }
    }
    for pod in &scene.pods {
        for node in 1..=3 {
            for address in node_address(node).both() {
                let report = pod.ping(address, 1000)?;
                ensure!(
                    report.received == report.sent,
                    "{} -> node{node} {address}: {report:?}",
                    pod.name
                );
            }
        }
    }
    nothing_in_clear(&capture.finish()?)
}

/// The strings of a JSON array.
fn texts(value: &Value) -> Vec<String> {
    value
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(String::from)
        .collect()
}
