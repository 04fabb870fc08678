//! `MeshState`: the fence of leadership.

#![expect(
    unreachable_pub,
    reason = "the schema derive repeats the struct in an inner scope"
)]

use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

/// State of the whole mesh; one object named `warren`.
#[derive(CustomResource, KubeSchema, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[kube(
    group = "warren.dev",
    version = "v1alpha1",
    kind = "MeshState",
    plural = "meshstates",
    doc = "State of the whole mesh. Written by keyd alone.",
    derive = "PartialEq",
    printcolumn(name = "Epoch", type_ = "integer", json_path = ".spec.epoch"),
    printcolumn(name = "Holder", type_ = "string", json_path = ".spec.holder"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = kube::core::Rule::new("self.metadata.name == 'warren'").message("the only MeshState is named warren")
)]
#[serde(rename_all = "camelCase")]
pub struct MeshStateSpec {
    /// The newest leadership term. Every term starts with a compare-and-swap to the last one plus one, at least the
    /// Unix time in milliseconds.
    #[x_kube(validation = ("self >= oldSelf", "an epoch never goes back"))]
    #[schemars(range(max = 253_402_300_799_999_u64))]
    pub epoch: u64,
    /// Which keyd holds that term.
    #[serde(default)]
    pub holder: String,
    /// A time that keyd had reached, Unix milliseconds: it never signs an earlier one, whatever its clock says.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub signed_unix_ms: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}
