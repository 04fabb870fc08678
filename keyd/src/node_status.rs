//! The status of MeshNode objects, for `kubectl get meshnodes`.

use std::collections::BTreeMap;

use k8s_openapi::jiff::Timestamp;
use warren_crds::{Condition, MeshNodeStatus, RevocationStatus};
use warren_model::NodeName;

/// What is known of a node at a moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) connected: bool,
    pub(crate) has_key: bool,
    pub(crate) current: bool,
    pub(crate) agent_version: String,
    pub(crate) problem: Option<String>,
}

/// Remembers what was written, so that only changes are.
#[derive(Debug, Default)]
pub(crate) struct Statuses {
    written: BTreeMap<NodeName, MeshNodeStatus>,
}

impl Statuses {
    /// The status to write, if it differs from the last one.
    pub(crate) fn update(&mut self, node: &NodeName, seen: &Seen, now: Timestamp) -> Option<MeshNodeStatus> {
        let old = self.written.get(node);
        let (ready, reason, message) = verdict(seen);
        let connected = if seen.connected {
            "AgentConnected"
        } else {
            "AgentAbsent"
        };
        let status = MeshNodeStatus {
            ready,
            agent_version: seen.agent_version.clone(),
            conditions: vec![
                condition(old, "Connected", seen.connected, connected, String::new(), now),
                condition(old, "Ready", ready, reason, message, now),
            ],
            revocation: None,
        };
        self.differs(node, status)
    }

    /// The same for a node that is gone: who has removed its keys.
    pub(crate) fn gone(
        &mut self,
        node: &NodeName,
        revocation: RevocationStatus,
        now: Timestamp,
    ) -> Option<MeshNodeStatus> {
        let old = self.written.get(node);
        let message = "the node was deleted, or its keys were revoked".to_owned();
        let status = MeshNodeStatus {
            conditions: vec![
                condition(old, "Connected", false, "Revoked", String::new(), now),
                condition(old, "Ready", false, "Revoked", message, now),
            ],
            revocation: Some(revocation),
            ..MeshNodeStatus::default()
        };
        self.differs(node, status)
    }

    fn differs(&mut self, node: &NodeName, status: MeshNodeStatus) -> Option<MeshNodeStatus> {
        if self.written.get(node) == Some(&status) {
            return None;
        }
        self.written.insert(node.clone(), status.clone());
        Some(status)
    }

    /// Forgets nodes that are gone.
    pub(crate) fn retain(&mut self, exists: impl Fn(&NodeName) -> bool) {
        self.written.retain(|node, _| exists(node));
    }
}

fn verdict(seen: &Seen) -> (bool, &'static str, String) {
    match seen {
        Seen { connected: false, .. } => (false, "AgentAbsent", "the agent has no stream to keyd".into()),
        Seen { has_key: false, .. } => (false, "NoKey", "the node has not proved a key".into()),
        Seen {
            problem: Some(problem),
            ..
        } => (false, "AgentProblem", problem.clone()),
        Seen { current: false, .. } => (
            false,
            "CatchingUp",
            "the agent has not applied this term's directory".into(),
        ),
        Seen { .. } => (true, "Ready", String::new()),
    }
}

fn condition(
    old: Option<&MeshNodeStatus>,
    type_: &str,
    value: bool,
    reason: &str,
    message: String,
    now: Timestamp,
) -> Condition {
    let status = if value { "True" } else { "False" };
    let same = old.and_then(|old| {
        old.conditions
            .iter()
            .find(|one| one.type_ == type_ && one.status == status)
    });
    // Whole seconds, as all conditions have.
    let now = Timestamp::from_second(now.as_second()).unwrap_or(now);
    Condition {
        type_: type_.into(),
        status: status.into(),
        reason: reason.into(),
        message,
        last_transition_time: same.map_or_else(|| now.to_string(), |same| same.last_transition_time.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_changes_are_written_and_times_move_with_the_status() {
        let mut statuses = Statuses::default();
        let node = NodeName::from("a");
        let mut seen = Seen {
            connected: true,
            has_key: true,
            current: true,
            agent_version: "1".into(),
            problem: None,
        };
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        let first = statuses.update(&node, &seen, at(100)).unwrap();
        assert!(first.ready);
        assert_eq!(first.conditions[1].last_transition_time, "1970-01-01T00:01:40Z");
        assert_eq!(statuses.update(&node, &seen, at(200)), None);
        seen.problem = Some("no route".into());
        let second = statuses.update(&node, &seen, at(300)).unwrap();
        assert!(!second.ready);
        assert_eq!(second.conditions[0], first.conditions[0]);
        assert_eq!(second.conditions[1].message, "no route");
        assert_eq!(second.conditions[1].last_transition_time, "1970-01-01T00:05:00Z");
        seen.connected = false;
        assert_eq!(
            statuses.update(&node, &seen, at(400)).unwrap().conditions[1].reason,
            "AgentAbsent"
        );
    }
}
