//! Rules on their way from `keyd` to agents: selectors by number, with their members beside them.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{error::PolicyError, rule::Rule};
use crate::Labels;

/// The number of a selector, given by `keyd`; never used again for another selector within an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SelectorId(pub u32);

impl fmt::Display for SelectorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What policy has to know of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeFacts {
    /// Labels of the Node object, keys with their source (`k8s:`): host policies select by them.
    pub labels: Labels,
    /// The node runs an API server.
    pub runs_apiserver: bool,
    /// The host does not reach its own pods by itself: probes need a rule.
    pub closed_to_host: bool,
    /// Audit mode for the whole node.
    pub audit: bool,
}

/// What the `Valid` condition of an object says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Validity {
    /// Whether the object is enforced, if only in part.
    pub valid: bool,
    /// What is wrong, or which parts cannot be enforced and what happens instead.
    pub message: String,
}

impl Validity {
    /// Of the outcome of parsing; `notes` are further sentences (without a full stop) on an object that is valid.
    pub fn of<S>(outcome: &Result<Vec<Rule<S>>, PolicyError>, notes: &[String]) -> Self {
        let rules = match outcome {
            Ok(rules) => rules,
            Err(error) => {
                let message = format!("{error}. The object enforces nothing until this is corrected.");
                return Self {
                    valid: false,
                    message,
                };
            }
        };
        let notes: Vec<_> = rules
            .iter()
            .flat_map(Rule::notes)
            .chain(notes.iter().cloned())
            .collect();
        let message = match notes.is_empty() {
            true => "The policy is enforced.".into(),
            false => format!("The policy is enforced, except: {}.", notes.join("; ")),
        };
        Self { valid: true, message }
    }
}
