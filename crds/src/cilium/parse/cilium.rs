//! Rules of CiliumNetworkPolicy and CiliumClusterwideNetworkPolicy.

use warren_model::policy::{
    Directions, LabelKey, PolicyKind, PolicyRef, Requirement, Rule, Selector, Statement, Subject, keys,
};

use super::{
    element::{Element, Scope},
    faults::{Faults, Path},
    selector,
};
use crate::cilium::spec::PolicyRule;

/// The rule of a `spec`; `None` where it is not even clear whom it selects.
pub(super) fn rule(
    path: &Path,
    spec: &PolicyRule,
    policy: &PolicyRef,
    cluster: &str,
    faults: &mut Faults,
) -> Option<Rule> {
    let namespace =
        (policy.kind != PolicyKind::CiliumClusterwideNetworkPolicy).then_some(policy.namespace.as_str());
    let subject = subject(path, spec, namespace, faults);
    let ingress = spec.ingress.is_some() || spec.ingress_deny.is_some();
    let egress = spec.egress.is_some() || spec.egress_deny.is_some();
    if !ingress && !egress {
        faults.add(
            path,
            "has no section: write at least one of ingress, ingressDeny, egress and egressDeny",
        );
    }
    let explicit = spec.enable_default_deny.as_ref();
    let default_deny = Directions {
        ingress: explicit.and_then(|deny| deny.ingress).unwrap_or(ingress),
        egress: explicit.and_then(|deny| deny.egress).unwrap_or(egress),
    };
    let scope = Scope { namespace, cluster };
    let mut statements = section(path, "ingress", spec.ingress.as_deref(), &scope, faults);
    statements.extend(section(
        path,
        "ingressDeny",
        spec.ingress_deny.as_deref(),
        &scope,
        faults,
    ));
    statements.extend(section(path, "egress", spec.egress.as_deref(), &scope, faults));
    statements.extend(section(
        path,
        "egressDeny",
        spec.egress_deny.as_deref(),
        &scope,
        faults,
    ));
    Some(Rule {
        policy: policy.clone(),
        subject: subject?,
        default_deny,
        statements,
    })
}

fn section<'a, T>(
    path: &Path,
    name: &str,
    elements: Option<&'a [T]>,
    scope: &Scope<'_>,
    faults: &mut Faults,
) -> Vec<Statement>
where
    Element<'a>: From<&'a T>,
{
    let elements = elements.unwrap_or_default().iter().enumerate();
    elements
        .flat_map(|(i, element)| Element::from(element).statements(&path.member(name).item(i), scope, faults))
        .collect()
}

fn subject(path: &Path, spec: &PolicyRule, namespace: Option<&str>, faults: &mut Faults) -> Option<Subject> {
    match (&spec.endpoint_selector, &spec.node_selector) {
        (Some(selector), None) => {
            let at = path.member("endpointSelector");
            let mut requirements = selector::requirements(&at, selector, faults);
            let key = LabelKey::k8s(keys::NAMESPACE);
            requirements.push(match namespace {
                Some(own) => Requirement::is(key, own),
                None => Requirement::exists(key),
            });
            Some(Subject::Pods(Selector::new(requirements)))
        }
        (None, Some(_)) if namespace.is_some() => {
            let problem = "only CiliumClusterwideNetworkPolicy selects nodes: write endpointSelector";
            faults.add(&path.member("nodeSelector"), problem);
            None
        }
        (None, Some(selector)) => {
            let at = path.member("nodeSelector");
            Some(Subject::Nodes(Selector::new(selector::requirements(
                &at, selector, faults,
            ))))
        }
        _ => {
            faults.add(path, "write exactly one of endpointSelector and nodeSelector");
            None
        }
    }
}
