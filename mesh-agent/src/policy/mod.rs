//! Policy on this node: a thread of its own turns the directory into map entries, so that no policy waits for anything
//! else; two more read events and collect flows that are over.

mod answer;
mod cgroup;
mod enforcer;
mod events;
mod flows;
mod names;
mod print;
mod report;
mod room;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;
use warren_agent_api::{EndpointPolicyStatus, Response};
use warren_agent_core::policy::{LocalEndpoint, Packet};

use crate::{keyd::Received, machine::Programs};

pub(crate) use answer::{event_limit, packet, unknown};
pub(crate) use cgroup::node_cgroup;
pub(crate) use enforcer::Enforcer;
pub(crate) use print::{conntrack_main, endpoints_main, events_main, policy_main};
pub(crate) use report::Report;

/// What the policy thread is told.
pub(crate) enum ToEnforcer {
    /// The directory changed. It is handed on to the node's loop when policy is in force.
    Directory(Received),
    /// The endpoints of this node are these; answered when their policies are written, as far as they are known.
    Endpoints(BTreeMap<u16, LocalEndpoint>, oneshot::Sender<()>),
    /// Identities in the maps of owners and endpoints are those of the directory of this position.
    Settled((u64, u64)),
    /// Identities in the maps of owners or endpoints changed: flows are to be judged again.
    Moved,
    /// Fill in what policy knows of endpoints, with or without their entries.
    Describe(
        Vec<EndpointPolicyStatus>,
        bool,
        oneshot::Sender<Vec<EndpointPolicyStatus>>,
    ),
    /// Judge a packet.
    Trace(Packet, oneshot::Sender<Response>),
}

/// What the threads of policy share with the rest of the agent.
#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) programs: Programs,
    pub(crate) names: names::RuleNames,
    pub(crate) events: events::EventLog,
    report: Arc<Mutex<Report>>,
}

impl Shared {
    /// Around programs that are open.
    pub(crate) fn new(programs: Programs) -> Self {
        Self {
            programs,
            names: names::RuleNames::default(),
            events: events::EventLog::default(),
            report: Arc::default(),
        }
    }

    /// What is known of policy now.
    pub(crate) fn report(&self) -> MutexGuard<'_, Report> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether an endpoint's policy is in the maps.
    pub(crate) fn is_written(&self, index: u16) -> bool {
        self.report().written.contains(&index)
    }

    /// Indexes that must not go to another pod yet.
    pub(crate) fn occupied(&self) -> BTreeSet<u16> {
        self.report().occupied.clone()
    }

    /// Starts reading events and collecting flows.
    pub(crate) fn watch(&self, flows_per_pod: u32) -> anyhow::Result<()> {
        events::start(self)?;
        flows::start(self, flows_per_pod)
    }
}
