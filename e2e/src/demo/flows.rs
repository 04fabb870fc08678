//! Numbered packets while something happens to the nodes.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

use super::{Figures, RATE, port, print_indented};
use crate::{
    app::wire::FlowReport,
    lab::{
        Flow, Lab, Pod, QUICKLY,
        wait::{wait_for, wait_until},
    },
};

/// Seconds of numbered packets around the agent's end.
const FLOW_SECONDS: u64 = 6;

/// SIGKILL for an agent while numbered packets flow.
pub(super) fn restart_during_flows(
    lab: &Lab,
    application: &[Pod],
    without_agent: impl FnOnce() -> Result<()>,
) -> Result<Vec<FlowReport>> {
    let start = Instant::now();
    let mut flows = start_flows(application)?;
    let node = lab.node(2);
    // The flow itself is the clock: a third of it before, the rest during and after the restart.
    let elapsed = |seconds| move || start.elapsed() > Duration::from_secs(seconds);
    wait_for(
        Duration::from_secs(60),
        "a third of the flow",
        elapsed(FLOW_SECONDS / 3),
    )?;
    node.kill_agent()?;
    println!("      killed; packets keep flowing");
    without_agent()?;
    println!("      the same connections pass and time out as before");
    wait_for(
        Duration::from_secs(60),
        "half of the flow",
        elapsed(FLOW_SECONDS / 2),
    )?;
    node.start_agent()?;
    node.wait_ready(lab.nodes().len() - 1, Duration::from_secs(60))?;
    println!("      restarted; it has adopted devices, programs and pods");
    wait_for(Duration::from_secs(60), "the flow's end", elapsed(FLOW_SECONDS))?;
    flows.iter_mut().for_each(Flow::stop);
    flows.into_iter().map(Flow::finish).collect()
}

/// Numbered packets from the first tier to the second, a flow in each family.
fn start_flows(application: &[Pod]) -> Result<Vec<Flow>> {
    let [frontend, api, ..] = application else {
        anyhow::bail!("the application has too few tiers")
    };
    [false, true]
        .into_iter()
        .map(|v6| frontend.flow_port(SocketAddr::new(api.address(v6)?, port("api")), RATE))
        .collect()
}

/// A flow's report for people.
pub(super) fn sentence(report: &FlowReport) -> String {
    format!(
        "sent {}, received {}, lost {}, duplicated {}, longest gap {} ms",
        report.sent, report.received, report.lost, report.duplicated, report.longest_gap_ms
    )
}

/// All nodes get new keys; every phase is shown.
pub(super) fn rotate_during_flows(
    lab: &Lab,
    application: &[Pod],
    figures: &mut Figures,
) -> Result<Vec<FlowReport>> {
    let before = lab.public_keys()?;
    let mut flows = start_flows(application)?;
    let command = [&["keys", "rotate", "--all", "--wait"], &QUICKLY[..]].concat();
    let output = lab.warren(&command)?;
    for said in [&output.stderr, &output.stdout] {
        print_indented(&String::from_utf8_lossy(said));
    }
    ensure!(output.status.success(), "the rotation did not succeed");
    // Agents report a moment after the fact.
    wait_until(Duration::from_secs(20), "all pairs agree on their keys", || {
        lab.audit()
    })?;
    flows.iter_mut().for_each(Flow::stop);
    let reports = flows.into_iter().map(Flow::finish).collect::<Result<Vec<_>>>()?;
    let after = lab.public_keys()?;
    figures.rotation_nodes = after.iter().filter(|key| !before.contains(key)).count() as u64;
    ensure!(
        before.iter().all(|key| !after.contains(key)),
        "a former key is still published"
    );
    Ok(reports)
}
