//! Objects to rules: parse, don't validate. Nothing after this module looks at an object again.
//!
//! Works on JSON values rather than on typed objects, so that one malformed object in a list never hides the
//! others, and a wrong type gets the same precise error as a wrong value.

mod cilium;
mod element;
mod faults;
mod kubernetes;
mod l7;
mod port;
mod selector;

use serde::de::DeserializeOwned;
use serde_json::Value;
use warren_model::policy::{PolicyError, PolicyKind, PolicyRef, Rule};

use self::faults::{Faults, Path};
use super::{
    object::{API_VERSION, CiliumCIDRGroup, CiliumClusterwideNetworkPolicy, CiliumNetworkPolicy},
    spec::PolicyRule,
};

/// Which object it is: its kind, namespace (`default` where a namespaced object names none) and name.
pub fn policy_ref(object: &Value) -> Result<PolicyRef, PolicyError> {
    let text = |path: &str| {
        object
            .pointer(path)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let (version, kind) = (text("/apiVersion"), text("/kind"));
    let kind = match (version.as_str(), kind.as_str()) {
        (API_VERSION, "CiliumNetworkPolicy") => PolicyKind::CiliumNetworkPolicy,
        (API_VERSION, "CiliumClusterwideNetworkPolicy") => PolicyKind::CiliumClusterwideNetworkPolicy,
        ("networking.k8s.io/v1", "NetworkPolicy") => PolicyKind::NetworkPolicy,
        _ => {
            let problem = format!(
                "{version:?} {kind:?} is no policy: write cilium.io/v2 CiliumNetworkPolicy or \
                 CiliumClusterwideNetworkPolicy, or networking.k8s.io/v1 NetworkPolicy"
            );
            return Err(PolicyError::new("kind", problem));
        }
    };
    let name = text("/metadata/name");
    if name.is_empty() {
        return Err(PolicyError::new("metadata.name", "the object has no name"));
    }
    let namespace = match (kind, text("/metadata/namespace")) {
        (PolicyKind::CiliumClusterwideNetworkPolicy, namespace) if !namespace.is_empty() => {
            let problem = "the kind is cluster-scoped: remove the namespace";
            return Err(PolicyError::new("metadata.namespace", problem));
        }
        (PolicyKind::CiliumClusterwideNetworkPolicy, namespace) => namespace,
        (_, namespace) if namespace.is_empty() => "default".into(),
        (_, namespace) => namespace,
    };
    Ok(PolicyRef {
        kind,
        namespace,
        name,
    })
}

/// The rules of a policy object, or the first thing that is wrong with it. `cluster` is the cluster's name,
/// which the entity `cluster` means.
pub fn parse(object: &Value, cluster: &str) -> Result<Vec<Rule>, PolicyError> {
    check(object, cluster).map_err(|mut faults| faults.swap_remove(0))
}

/// As [`parse`], with everything that is wrong; at least one fault where there is any.
pub fn check(object: &Value, cluster: &str) -> Result<Vec<Rule>, Vec<PolicyError>> {
    let policy = policy_ref(object).map_err(|fault| vec![fault])?;
    let mut faults = Faults::default();
    let rules = match policy.kind {
        PolicyKind::NetworkPolicy => kubernetes::rules(object, &policy, &mut faults),
        PolicyKind::CiliumNetworkPolicy => match typed::<CiliumNetworkPolicy>(object) {
            Ok(typed) => cilium_rules(typed.spec, typed.specs, &policy, cluster, &mut faults),
            Err(fault) => return Err(vec![fault]),
        },
        PolicyKind::CiliumClusterwideNetworkPolicy => match typed::<CiliumClusterwideNetworkPolicy>(object) {
            Ok(typed) => cilium_rules(typed.spec, typed.specs, &policy, cluster, &mut faults),
            Err(fault) => return Err(vec![fault]),
        },
    };
    faults.none_or(rules)
}

fn cilium_rules(
    spec: Option<PolicyRule>,
    specs: Option<Vec<PolicyRule>>,
    policy: &PolicyRef,
    cluster: &str,
    faults: &mut Faults,
) -> Vec<Rule> {
    let root = Path::root();
    let one = spec.map(|spec| (root.member("spec"), spec));
    let many = specs
        .into_iter()
        .flatten()
        .enumerate()
        .map(|(i, spec)| (root.member("specs").item(i), spec));
    let all: Vec<_> = one.into_iter().chain(many).collect();
    if all.is_empty() {
        faults.add(
            &root.member("spec"),
            "the policy has no rule: write spec or specs",
        );
    }
    all.iter()
        .filter_map(|(path, spec)| cilium::rule(path, spec, policy, cluster, faults))
        .collect()
}

/// A CiliumCIDRGroup: its name and prefixes, or the first thing that is wrong with it.
pub fn parse_group(object: &Value) -> Result<(String, Vec<ipnet::IpNet>), PolicyError> {
    check_group(object).map_err(|mut faults| faults.swap_remove(0))
}

/// As [`parse_group`], with everything that is wrong.
pub fn check_group(object: &Value) -> Result<(String, Vec<ipnet::IpNet>), Vec<PolicyError>> {
    let group: CiliumCIDRGroup = typed(object).map_err(|fault| vec![fault])?;
    let mut faults = Faults::default();
    let name = group.metadata.name.unwrap_or_default();
    if name.is_empty() {
        faults.add(
            &Path::root().member("metadata").member("name"),
            "the object has no name",
        );
    }
    let path = Path::root().member("spec").member("externalCIDRs");
    let cidrs = group.spec.external_cidrs.iter().enumerate();
    let cidrs = cidrs
        .filter_map(|(i, text)| element::prefix(&path.item(i), text, &mut faults))
        .collect();
    faults.none_or((name, cidrs))
}

/// Reads a typed object; an error names the member. A status is not looked at.
fn typed<T: DeserializeOwned>(object: &Value) -> Result<T, PolicyError> {
    let mut object = object.clone();
    if let Some(members) = object.as_object_mut() {
        members.remove("status");
    }
    serde_path_to_error::deserialize(object).map_err(|error| {
        let path = error.path().to_string();
        PolicyError::new(
            if path == "." { String::new() } else { path },
            error.into_inner().to_string(),
        )
    })
}
