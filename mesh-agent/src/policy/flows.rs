//! Connection tracking: flows that are over are collected, those that are there are told.

use std::time::Duration;

use anyhow::{Context as _, Result};
use warren_agent_api::{FlowStatus, Response};
use warren_bpf::{Flow, monotonic_time};
use warren_model::IdentityId;

use super::Shared;
use crate::machine;

/// How often flows are collected.
const INTERVAL: Duration = Duration::from_secs(5);

/// Collects from now on, in a thread of its own.
pub(super) fn start(shared: &Shared, limit: u32) -> Result<()> {
    shared
        .programs
        .lock()
        .set_flow_limit(limit)
        .context("the limit of flows cannot be set")?;
    let shared = shared.clone();
    std::thread::Builder::new()
        .name("flows".into())
        .spawn(move || {
            loop {
                collect(&shared);
                std::thread::sleep(INTERVAL);
            }
        })
        .context("no thread to collect flows")?;
    Ok(())
}

fn collect(shared: &Shared) {
    let result = shared.programs.lock().collect_flows(monotonic_time());
    let usage = shared.programs.lock().usage();
    let lost = shared.programs.lock().events_lost();
    let mut report = shared.report();
    match result {
        Ok(flows) => {
            report.flows_removed.inc_by(flows.removed.into());
            report.flows = flows;
            report.flows_fault = None;
        }
        Err(error) => report.flows_fault = Some(format!("flows cannot be collected: {error}")),
    }
    match usage {
        Ok(usage) => report.usage = usage,
        Err(error) => tracing::warn!(%error, "how full the maps are is not known"),
    }
    if let Ok(lost) = lost {
        report.events_lost = lost;
    }
}

impl Shared {
    /// Flows, of one endpoint or of all.
    pub(crate) fn conntrack(&self, endpoint: Option<u16>, limit: u32) -> Response {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let flows = self.programs.lock().flows(endpoint, limit);
        match flows {
            Ok(flows) => {
                let now = monotonic_time();
                Response::Flows(flows.iter().map(|flow| self.flow(flow, now)).collect())
            }
            Err(error) => Response::Error {
                message: format!("the flows cannot be read: {error}"),
                retry: true,
            },
        }
    }

    fn flow(&self, flow: &Flow, now: Duration) -> FlowStatus {
        let idle = now.saturating_sub(flow.last_seen);
        let seconds = |time: Duration| u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
        FlowStatus {
            endpoint: flow.endpoint,
            direction: machine::policy_direction(flow.direction),
            protocol: flow.protocol,
            local: flow.local,
            remote: flow.remote,
            peer: IdentityId(flow.peer),
            state: flow.state.name().into(),
            idle_seconds: seconds(idle),
            expires_seconds: seconds(flow.lifetime.saturating_sub(idle)),
            rule: self.names.of(flow.rule),
        }
    }
}
