//! What the hub knows, for operators, metrics and statuses.

use std::collections::BTreeMap;

use warren_keyd_api::{
    convert::node_to_proto,
    proto::{AgentStatus, NodeStatus, PolicyStatus, StatusResponse},
};
use warren_keyd_core::{Record, RotationObject};
use warren_model::NodeName;

use super::{Hub, Order, STATUS_EVERY, keys::revocation_status};
use crate::{metrics::Observation, node_status::Seen};

impl Hub {
    pub(super) fn policies(&self) -> Vec<PolicyStatus> {
        let policies = self.core.policies();
        let status = policies.iter().map(|(policy, validity)| PolicyStatus {
            kind: policy.kind.name().into(),
            namespace: policy.namespace.clone(),
            name: policy.name.clone(),
            valid: validity.valid,
            message: validity.message.clone(),
            rules: policies.rules(policy).len() as u64,
        });
        status.collect()
    }

    pub(super) fn problems(&self) -> Vec<String> {
        let mut problems = self.source_problems.clone();
        problems.extend(self.load_problems.iter().cloned());
        problems.extend(self.core.problems());
        problems.extend(self.store_problems.values().cloned());
        problems
    }

    /// (all, invalid) policy objects.
    pub(super) fn count_policies(&self) -> (usize, usize) {
        let policies = self.core.policies().iter();
        policies.fold((0, 0), |(all, invalid), (_, validity)| {
            (all + 1, invalid + usize::from(!validity.valid))
        })
    }

    pub(super) fn report(&self) -> StatusResponse {
        let (identities, workloads) = self.core.sizes();
        let (policies, invalid_policies) = self.count_policies();
        let nodes = self.core.records().filter_map(|record| match record {
            Record::Node(node) => Some(node),
            _ => None,
        });
        let nodes = nodes.map(|node| {
            let agent = self.agents.get(&node.name);
            NodeStatus {
                node: Some(node_to_proto(node)),
                connected: agent.is_some_and(|agent| agent.session.is_some()),
                last_seen_unix_ms: agent
                    .map_or(0, |agent| i64::try_from(agent.last_seen_unix_ms).unwrap_or(0)),
                applied_epoch: agent.map_or(0, |agent| agent.applied.0),
                applied_version: agent.map_or(0, |agent| agent.applied.1),
                status: agent.and_then(|agent| agent.status.clone()),
            }
        });
        StatusResponse {
            directory_version: self.core.version(),
            nodes: nodes.collect(),
            problems: self.problems(),
            identities: identities as u64,
            workloads: workloads as u64,
            policies: policies as u64,
            invalid_policies: invalid_policies as u64,
            selectors: self.core.policies().selectors().len() as u64,
            ..StatusResponse::default()
        }
    }

    fn open_rotations(&self) -> impl Iterator<Item = &RotationObject> {
        self.core.rotations().filter(|object| {
            let standing = self.core.machine().standing(&object.name);
            standing.is_some_and(|standing| !standing.progress.phase.is_over())
        })
    }

    pub(super) fn measure(&self) {
        let streams = self
            .agents
            .values()
            .filter(|agent| agent.session.is_some())
            .count();
        let (identities, workloads) = self.core.sizes();
        let (policies, invalid_policies) = self.count_policies();
        self.metrics.observe(
            self.core.counters(),
            &Observation {
                streams,
                identities,
                workloads,
                version: self.core.version(),
                problems: self.problems().len(),
                policies,
                invalid_policies,
                selectors: self.core.policies().selectors().len(),
                rotating_nodes: self.core.machine().flying().count(),
                open_rotations: self.open_rotations().count(),
            },
        );
    }

    /// What the agent of a node complains about that is news since its last report.
    pub(super) fn pass_on_alarms(&self, node: &NodeName, before: Option<&AgentStatus>) {
        let Some(now) = self.agents.get(node).and_then(|agent| agent.status.as_ref()) else {
            return;
        };
        let none = AgentStatus::default();
        let before = before.unwrap_or(&none);
        let alarm = |reason, message| self.shell.notes.alarm(self.about(node), reason, message);
        // A new process counts from zero.
        if now.refused_updates > before.refused_updates {
            let message = format!(
                "the agent of node {node} has refused {} updates of the directory, forged, replayed or damaged",
                now.refused_updates
            );
            alarm("SnapshotRefused", message);
        }
        if !now.trust_fault.is_empty() && now.trust_fault != before.trust_fault {
            let fault: String = now.trust_fault.chars().take(512).collect();
            alarm("TrustRefused", format!("the agent of node {node} says: {fault}"));
        }
        if now.expired && !before.expired {
            let message =
                format!("the directory of node {node} is older than it may be: it takes no new peers");
            alarm("DirectoryExpired", message);
        }
    }

    pub(super) fn write_conditions(&mut self) {
        let Some(statuses) = &mut self.policy_statuses else {
            return;
        };
        for wanted in statuses.take(k8s_openapi::jiff::Timestamp::now()) {
            // A writer that is gone ends with the term.
            let _ = self.shell.conditions.send(wanted);
        }
    }

    pub(super) fn write_statuses(&mut self) {
        let Some((statuses, last)) = &mut self.statuses else {
            return;
        };
        if last.elapsed() < STATUS_EVERY {
            return;
        }
        *last = tokio::time::Instant::now();
        let now = k8s_openapi::jiff::Timestamp::now();
        let mut gone = BTreeMap::new();
        for one in self.core.revocations() {
            // The newest incarnation comes first.
            if self.core.node_uid(&one.node).is_none() {
                gone.entry(one.node.clone()).or_insert(one);
            }
        }
        statuses.retain(|node| self.core.node_uid(node).is_some() || gone.contains_key(node));
        for (node, one) in gone {
            let revocation = revocation_status(&self.core, one);
            if let Some(status) = statuses.gone(&node, revocation, now) {
                // A publisher that is gone ends this task at its next output.
                let _ = self.orders.send(Order::Status(node, status));
            }
        }
        for record in self.core.records() {
            let Record::Node(node) = record else { continue };
            let agent = self.agents.get(&node.name);
            let status = agent.and_then(|agent| agent.status.as_ref());
            let seen = Seen {
                connected: agent.is_some_and(|agent| agent.session.is_some()),
                has_key: !node.slots.is_empty(),
                current: agent.is_some_and(|agent| agent.applied.0 == self.epoch),
                agent_version: agent.map(|agent| agent.version.clone()).unwrap_or_default(),
                problem: status.and_then(|status| status.problems.first().cloned()),
            };
            if let Some(status) = statuses.update(&node.name, &seen, now) {
                // A publisher that is gone ends this task at its next output.
                let _ = self.orders.send(Order::Status(node.name.clone(), status));
            }
        }
    }
}
