//! The objects themselves. Written out where `kube`'s derive cannot help: a policy has `spec` or `specs`.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta};
use kube::{
    Resource,
    core::{ClusterResourceScope, NamespaceResourceScope},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::spec::PolicyRule;

/// Group of the objects.
pub(super) const GROUP: &str = "cilium.io";
/// Version of the objects.
pub(super) const VERSION: &str = "v2";
/// Group and version.
pub(super) const API_VERSION: &str = "cilium.io/v2";

/// What a controller says of a policy.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PolicyStatus {
    /// `Valid`, with what is wrong or cannot be enforced.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "super::crd::conditions")]
    pub conditions: Vec<Condition>,
}

macro_rules! resource {
    ($name:ident, $kind:literal, $plural:literal, $scope:ty, $default:ident) => {
        impl Resource for $name {
            type DynamicType = ();
            type Scope = $scope;

            fn kind(_: &()) -> Cow<'_, str> {
                $kind.into()
            }
            fn group(_: &()) -> Cow<'_, str> {
                GROUP.into()
            }
            fn version(_: &()) -> Cow<'_, str> {
                VERSION.into()
            }
            fn plural(_: &()) -> Cow<'_, str> {
                $plural.into()
            }
            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }
            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }

        fn $default() -> String {
            $kind.into()
        }
    };
}

fn api_version() -> String {
    API_VERSION.into()
}

macro_rules! policy {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $plural:literal, $scope:ty, $default:ident, $default_text:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(rename_all = "camelCase", deny_unknown_fields)]
        pub struct $name {
            /// `cilium.io/v2`.
            #[serde(default = "api_version")]
            pub api_version: String,
            /// Kind of the object.
            #[serde(default = $default_text)]
            pub kind: String,
            /// Name, namespace and the like.
            #[serde(default)]
            pub metadata: ObjectMeta,
            /// The rule; or `specs`.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub spec: Option<PolicyRule>,
            /// Several rules; or `spec`.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub specs: Option<Vec<PolicyRule>>,
            /// Written by the controller.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub status: Option<PolicyStatus>,
        }

        resource!($name, $kind, $plural, $scope, $default);
    };
}

policy!(
    /// Policy for the pods of a namespace.
    CiliumNetworkPolicy,
    "CiliumNetworkPolicy",
    "ciliumnetworkpolicies",
    NamespaceResourceScope,
    policy_kind,
    "policy_kind"
);

policy!(
    /// Policy for pods of all namespaces, or for nodes.
    CiliumClusterwideNetworkPolicy,
    "CiliumClusterwideNetworkPolicy",
    "ciliumclusterwidenetworkpolicies",
    ClusterResourceScope,
    clusterwide_kind,
    "clusterwide_kind"
);

/// A list of prefixes that policies refer to by name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CiliumCIDRGroup {
    /// `cilium.io/v2`.
    #[serde(default = "api_version")]
    pub api_version: String,
    /// Kind of the object.
    #[serde(default = "group_kind")]
    pub kind: String,
    /// Name and the like.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// The prefixes.
    pub spec: CiliumCIDRGroupSpec,
}

/// The prefixes of a group.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CiliumCIDRGroupSpec {
    /// The prefixes.
    #[serde(rename = "externalCIDRs")]
    pub external_cidrs: Vec<String>,
}

resource!(
    CiliumCIDRGroup,
    "CiliumCIDRGroup",
    "ciliumcidrgroups",
    ClusterResourceScope,
    group_kind
);
