//! `KeyRotation`: new WireGuard keys for nodes, without losing a packet.

#![expect(
    unreachable_pub,
    reason = "the schema derive repeats the struct in an inner scope"
)]
#![expect(
    clippy::duplicated_attributes,
    reason = "the parameters of the printed columns have the same names"
)]

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Condition;

/// A change of the keys of some or all nodes. Rotations run one after the other, the oldest first.
///
/// A rotation in progress is stopped with `abort`; deleting the object does the same.
#[derive(CustomResource, KubeSchema, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[kube(
    group = "warren.dev",
    version = "v1alpha1",
    kind = "KeyRotation",
    plural = "keyrotations",
    shortname = "kr",
    status = "KeyRotationStatus",
    doc = "New WireGuard keys for nodes. Written by operators; its status by keyd alone.",
    derive = "PartialEq",
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Nodes", type_ = "integer", json_path = ".status.counts.total"),
    printcolumn(name = "Done", type_ = "integer", json_path = ".status.counts.done"),
    printcolumn(name = "Moving", type_ = "integer", json_path = ".status.counts.moving"),
    printcolumn(name = "Failed", type_ = "integer", json_path = ".status.counts.failed"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".spec.reason"),
    printcolumn(name = "Run", type_ = "integer", json_path = ".status.run", priority = 1),
    printcolumn(
        name = "Waiting",
        type_ = "string",
        json_path = ".status.waitingFor",
        priority = 1
    ),
    printcolumn(name = "Started", type_ = "date", json_path = ".status.startedAt"),
    printcolumn(name = "Completed", type_ = "date", json_path = ".status.completedAt"),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp",
        priority = 1
    )
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("has(self.nodes) == has(oldSelf.nodes) && (!has(self.nodes) || self.nodes == oldSelf.nodes)", "the choice of nodes never changes: create another KeyRotation"))]
#[x_kube(validation = ("!oldSelf.abort || self.abort", "what was aborted stays aborted: create another KeyRotation"))]
pub struct KeyRotationSpec {
    /// Which nodes; all where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodes: Option<NodeChoice>,
    /// For people: why.
    #[serde(default)]
    #[schemars(length(max = 256))]
    pub reason: String,
    /// How fast.
    #[serde(default)]
    pub pace: RotationPace,
    /// What happens to peers whose agent does not answer. `Wait`: at its deadline a node keeps its old key. `Leave`: the
    /// same, but pairs without any traffic to lose are passed over. `Revoke`: at the deadline the stragglers' keys are
    /// revoked.
    #[serde(default)]
    pub stragglers: StragglerPolicy,
    /// Runs again and again; once where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<RotationSchedule>,
    /// Begins nothing new. Nodes whose new key is not in use yet keep the old one, the others are finished.
    #[serde(default)]
    pub abort: bool,
}

/// Some nodes. Where both parts are given, both must hold.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("size(self.names) > 0 || size(self.matchLabels) > 0", "name nodes or labels; leave `nodes` out for all of them"))]
pub struct NodeChoice {
    /// By name.
    #[serde(default)]
    #[schemars(length(max = 1024), inner(length(min = 1, max = 253)))]
    pub names: Vec<String>,
    /// By labels of the Node, all of which must be there.
    #[serde(default)]
    #[schemars(extend("maxProperties" = 32, "additionalProperties" = {"type": "string", "maxLength": 63}))]
    pub match_labels: BTreeMap<String, String>,
}

/// The pace of a rotation.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("self.deadlineSeconds >= 2 * self.drainSeconds", "the deadline must be at least twice the drain time"))]
pub struct RotationPace {
    /// Nodes at once: a number, or a share of the chosen ones like `10%` (at least one).
    #[serde(default = "default_concurrency")]
    #[schemars(length(max = 8))]
    #[x_kube(validation = ("self.matches('^([1-9][0-9]{0,5}|[1-9][0-9]?%|100%)$')", "concurrency is a number from 1, or a share from 1% to 100%"))]
    pub concurrency: String,
    /// Each node's start is delayed by up to this.
    #[serde(default)]
    #[schemars(range(max = 3600))]
    pub jitter_seconds: u32,
    /// How long an old key must be unused before it goes.
    #[serde(default = "default_drain")]
    #[schemars(range(min = 1, max = 600))]
    pub drain_seconds: u32,
    /// How long one node may take. Past it the old key goes on working.
    #[serde(default = "default_deadline")]
    #[schemars(range(min = 30, max = 86400))]
    pub deadline_seconds: u32,
}

fn default_concurrency() -> String {
    "10%".to_owned()
}

fn default_drain() -> u32 {
    15
}

fn default_deadline() -> u32 {
    600
}

impl Default for RotationPace {
    fn default() -> Self {
        Self {
            concurrency: default_concurrency(),
            jitter_seconds: 0,
            drain_seconds: default_drain(),
            deadline_seconds: default_deadline(),
        }
    }
}

/// What happens to peers whose agent does not answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum StragglerPolicy {
    /// At its deadline a node keeps its old key.
    #[default]
    Wait,
    /// The same, but pairs without any traffic to lose are passed over.
    Leave,
    /// At the deadline the stragglers' keys are revoked.
    Revoke,
}

/// When a rotation runs again.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("self.every.matches('^([1-9][0-9]{0,3})(h|d)$')", "every is a number of hours or days, like 12h or 30d"))]
pub struct RotationSchedule {
    /// From start to start: hours or days, like `12h` or `30d`. Missed runs are made up for by one.
    #[schemars(length(max = 5))]
    pub every: String,
}

impl RotationSchedule {
    /// The period in seconds; `None` where the text is malformed.
    pub fn seconds(&self) -> Option<u64> {
        let (number, unit) = self.every.split_at_checked(self.every.len().checked_sub(1)?)?;
        let seconds = match unit {
            "h" => 3_600,
            "d" => 86_400,
            _ => return None,
        };
        number
            .parse::<u64>()
            .ok()
            .filter(|number| *number > 0)?
            .checked_mul(seconds)
    }
}

/// How far a rotation is. `plan` and `exceptions` are what a new leader goes on from; the keys themselves, and with them
/// the phase of each node, are in the MeshNodes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeyRotationStatus {
    /// `Pending`, `Running`, `Succeeded`, `Failed` or `Aborted`.
    #[serde(default)]
    pub phase: String,
    /// The generation of the spec that this is about.
    #[serde(default)]
    pub observed_generation: i64,
    /// Which run this is, from 1.
    #[serde(default)]
    pub run: u64,
    /// When the run began, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<String>,
    /// When it ended, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completed_at: Option<String>,
    /// Nodes by phase.
    #[serde(default)]
    pub counts: RotationCounts,
    /// The node that is waited for, where it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_for: Option<String>,
    /// Nodes with which something went wrong.
    #[serde(default)]
    pub exceptions: Vec<RotationException>,
    /// The chosen nodes, as they were when the run began.
    #[serde(default)]
    pub plan: Vec<PlannedNode>,
    /// `Progressing`, `Complete`, `Degraded`.
    #[serde(default)]
    pub conditions: Vec<Condition>,
}

/// Nodes by phase.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RotationCounts {
    /// Chosen.
    pub total: u32,
    /// Not begun.
    pub pending: u32,
    /// On their way: the sum of the next five.
    pub moving: u32,
    /// Making a key.
    pub preparing: u32,
    /// Handshakes on the new paths.
    pub verifying: u32,
    /// Moving to the new paths.
    pub switching: u32,
    /// Waiting for the last packets.
    pub draining: u32,
    /// Destroying the old key.
    pub retiring: u32,
    /// New key only.
    pub done: u32,
    /// Kept the old key, or still have both.
    pub failed: u32,
    /// Deleted meanwhile.
    pub gone: u32,
}

/// A node with which something went wrong.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RotationException {
    /// The node.
    pub node: String,
    /// `Failed`, `Stalled`, `Aborted` or `Gone`.
    pub reason: String,
    /// One sentence.
    #[serde(default)]
    pub message: String,
}

/// A node of the plan.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PlannedNode {
    /// The node.
    pub node: String,
    /// Its UID.
    #[serde(rename = "nodeUID")]
    pub node_uid: String,
    /// Its key generation when the run began. A node with a higher one has been rotated.
    pub generation: u64,
}

#[cfg(test)]
mod tests {
    use kube::CustomResourceExt as _;
    use serde_json::json;

    use super::*;

    #[test]
    fn an_empty_spec_means_all_nodes_at_the_usual_pace() {
        let spec: KeyRotationSpec = serde_json::from_value(json!({})).unwrap();
        assert_eq!(spec, KeyRotationSpec::default());
        assert_eq!(
            (spec.pace.concurrency.as_str(), spec.pace.drain_seconds),
            ("10%", 15)
        );
        let part: KeyRotationSpec = serde_json::from_value(json!({"pace": {"drainSeconds": 3}})).unwrap();
        assert_eq!((part.pace.drain_seconds, part.pace.deadline_seconds), (3, 600));
    }

    #[test]
    fn the_server_fills_in_what_rules_read() {
        // A rule that reads an absent field is an error for the API server, so these need defaults in the schema.
        let crd = serde_json::to_value(KeyRotation::crd()).unwrap();
        let spec = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
        assert_eq!(spec["properties"]["abort"]["default"], json!(false));
        let pace = &spec["properties"]["pace"];
        assert_eq!(pace["default"]["concurrency"], json!("10%"));
        for field in ["concurrency", "drainSeconds", "deadlineSeconds"] {
            assert!(!pace["properties"][field]["default"].is_null(), "{field}");
        }
        let nodes = &spec["properties"]["nodes"]["properties"];
        for field in ["names", "matchLabels"] {
            assert!(!nodes[field]["default"].is_null(), "{field}");
        }
        assert_eq!(crd["spec"]["names"]["shortNames"][0], "kr");
        assert!(crd["spec"]["versions"][0]["subresources"]["status"].is_object());
    }

    #[test]
    fn periods_are_hours_or_days() {
        let seconds = |every: &str| RotationSchedule { every: every.into() }.seconds();
        assert_eq!(seconds("12h"), Some(43_200));
        assert_eq!(seconds("30d"), Some(2_592_000));
        for bad in ["", "h", "0h", "1w", "-1d", "1.5h", "d1"] {
            assert_eq!(seconds(bad), None, "{bad}");
        }
    }
}
