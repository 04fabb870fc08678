//! What rule numbers mean, for events and flows, which outlive rules.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
};

use warren_agent_core::policy::{PolicyEngine, RuleName};
use warren_model::policy::PolicyRef;

/// How many names of rules that are gone are kept.
const MOST_GONE: usize = 8_192;

/// Names by number, shared between threads.
#[derive(Clone, Default)]
pub(crate) struct RuleNames(Arc<RwLock<HashMap<u32, Arc<str>>>>);

impl RuleNames {
    /// The name of a rule: object and place.
    pub(crate) fn of(&self, number: u32) -> Option<String> {
        let names = self.0.read().unwrap_or_else(PoisonError::into_inner);
        names.get(&number).map(|name| name.to_string())
    }

    /// The rules of these objects changed.
    pub(crate) fn update<'a>(
        &self,
        engine: &PolicyEngine,
        objects: impl IntoIterator<Item = &'a PolicyRef>,
        rules: usize,
    ) {
        let mut names = self.0.write().unwrap_or_else(PoisonError::into_inner);
        for object in objects {
            names.extend(
                engine
                    .rules_of_object(object)
                    .map(|(number, name)| (number, text(name).into())),
            );
        }
        if names.len() > rules + MOST_GONE {
            *names = engine
                .rule_numbers()
                .map(|(number, name)| (number, text(name).into()))
                .collect();
        }
    }
}

/// As in `CiliumNetworkPolicy demo/api spec.ingress[0]`.
pub(crate) fn text(name: &RuleName) -> String {
    match name.place.is_empty() {
        true => name.policy.to_string(),
        false => format!("{} {}", name.policy, name.place),
    }
}
