//! Kubernetes custom resources of Warren (`warren.dev/v1alpha1`), all cluster-scoped. `keyd` alone writes them.
//!
//! This crate holds types and their schemas: no client, no tokio, no IO. `cargo xtask generate` writes
//! [`all`] to `crds/generated/`.

pub mod cilium;
mod identity;
mod node;
mod rotation;
mod state;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt as _;

pub use identity::{MeshIdentity, MeshIdentitySpec};
pub use node::{
    Condition, MeshNode, MeshNodeSpec, MeshNodeStatus, RevocationStatus, RevokedKeys, SlotSpec, SpecError,
    signed_bytes,
};
pub use rotation::{
    KeyRotation, KeyRotationSpec, KeyRotationStatus, NodeChoice, PlannedNode, RotationCounts,
    RotationException, RotationPace, RotationSchedule, StragglerPolicy,
};
pub use state::{MeshState, MeshStateSpec};

/// API group of all resources.
pub const GROUP: &str = "warren.dev";

/// Name of the only `MeshState` object.
pub const STATE_NAME: &str = "warren";

/// Every custom resource definition, in the order in which they are installed.
pub fn all() -> Vec<CustomResourceDefinition> {
    vec![
        MeshNode::crd(),
        MeshIdentity::crd(),
        MeshState::crd(),
        KeyRotation::crd(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_definition_is_cluster_scoped_and_structural() {
        for crd in all() {
            assert_eq!(crd.spec.scope, "Cluster");
            assert_eq!(crd.spec.group, GROUP);
            let version = &crd.spec.versions[0];
            assert_eq!(version.name, "v1alpha1");
            let schema = serde_json::to_value(version.schema.as_ref().unwrap()).unwrap();
            assert_eq!(
                schema["openAPIV3Schema"]["type"], "object",
                "{}",
                crd.spec.names.kind
            );
            assert!(
                version
                    .additional_printer_columns
                    .as_ref()
                    .is_some_and(|columns| !columns.is_empty())
            );
            let rules = serde_json::to_string(&schema).unwrap();
            assert!(
                rules.contains("x-kubernetes-validations"),
                "{} has no CEL rule",
                crd.spec.names.kind
            );
        }
    }

    #[test]
    fn a_mesh_node_has_a_status_subresource_and_a_short_name() {
        let crd = serde_json::to_value(MeshNode::crd()).unwrap();
        assert_eq!(crd["spec"]["names"]["shortNames"][0], "mn");
        assert!(crd["spec"]["versions"][0]["subresources"]["status"].is_object());
    }
}
