//! The policy objects of `cilium.io/v2` and, beside them, Kubernetes NetworkPolicy: types, schemas and the one
//! place where they become [`warren_model::policy::Rule`]s.
//!
//! The definitions of [`all`] are installed on request only, so that they do not fight a real Cilium.

mod crd;
mod l7;
mod object;
mod parse;
mod spec;
mod status;

pub use crd::all;
pub use l7::{DnsRule, FqdnSelector, HeaderMatch, HttpRule, KafkaRule, L7Rules};
pub use object::{
    CiliumCIDRGroup, CiliumCIDRGroupSpec, CiliumClusterwideNetworkPolicy, CiliumNetworkPolicy, PolicyStatus,
};
pub use parse::{check, check_group, parse, parse_group, policy_ref};
pub use spec::{
    CidrRule, EgressDenyRule, EgressRule, EnableDefaultDeny, IcmpField, IcmpRule, IcmpType, IngressDenyRule,
    IngressRule, K8sServiceNamespace, K8sServiceSelectorNamespace, LabelSelector, LabelSelectorRequirement,
    Log, PolicyRule, PortProtocol, PortRule, RuleLabel, Service,
};
pub use status::condition;

#[cfg(test)]
mod tests;
