//! `MeshIdentity`: the number of a set of labels.

#![expect(
    unreachable_pub,
    reason = "the schema derive repeats the struct in an inner scope"
)]

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};
use warren_model::{IdentityId, Labels};

/// One identity, named after its number.
#[derive(CustomResource, KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[kube(
    group = "warren.dev",
    version = "v1alpha1",
    kind = "MeshIdentity",
    plural = "meshidentities",
    shortname = "mid",
    doc = "The numeric identity of a set of labels. Written by keyd alone.",
    derive = "PartialEq",
    printcolumn(
        name = "Namespace",
        type_ = "string",
        json_path = ".spec.labels.k8s:io\\.kubernetes\\.pod\\.namespace"
    ),
    printcolumn(name = "Number", type_ = "integer", json_path = ".spec.number"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = kube::core::Rule::new("self.metadata.name == string(self.spec.number)")
        .message("a MeshIdentity is named after its number")
)]
#[serde(rename_all = "camelCase")]
pub struct MeshIdentitySpec {
    /// 256 to 65791; lower ones are reserved.
    #[schemars(range(min = 256, max = 65791))]
    #[x_kube(validation = ("self == oldSelf", "the number of an identity never changes"))]
    pub number: u32,
    /// Policy-relevant labels, keys with their source prefix.
    #[x_kube(validation = ("self == oldSelf", "the labels of an identity never change"))]
    pub labels: BTreeMap<String, String>,
}

impl MeshIdentity {
    /// The object of an identity.
    pub fn of(number: IdentityId, labels: &Labels) -> Self {
        Self::new(
            &number.to_string(),
            MeshIdentitySpec {
                number: number.0,
                labels: labels.0.clone(),
            },
        )
    }

    /// The identity of the object.
    pub fn identity(&self) -> (IdentityId, Labels) {
        (IdentityId(self.spec.number), Labels(self.spec.labels.clone()))
    }
}
