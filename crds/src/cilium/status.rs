//! The `Valid` condition.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use warren_model::policy::{PolicyError, Rule};

/// The condition that a policy deserves: status and message. `True` also where parts cannot be enforced yet;
/// the message then says which and what happens instead.
pub fn valid_condition<S>(outcome: &Result<Vec<Rule<S>>, PolicyError>) -> (bool, String) {
    match outcome {
        Err(error) => (
            false,
            format!("{error}. The object enforces nothing until this is corrected."),
        ),
        Ok(rules) => {
            let notes: Vec<_> = rules.iter().flat_map(Rule::notes).collect();
            match notes.is_empty() {
                true => (true, "The policy is enforced.".into()),
                false => (
                    true,
                    format!("The policy is enforced, except: {}.", notes.join("; ")),
                ),
            }
        }
    }
}

/// The same as a Kubernetes condition. `previous` keeps its time of transition while the status stays.
pub fn condition(
    valid: bool,
    message: String,
    generation: Option<i64>,
    now: Time,
    previous: Option<&Condition>,
) -> Condition {
    let status = if valid { "True" } else { "False" };
    let since = previous
        .filter(|p| p.status == status)
        .map_or(now, |p| p.last_transition_time.clone());
    Condition {
        type_: "Valid".into(),
        status: status.into(),
        reason: if valid { "Accepted" } else { "Invalid" }.into(),
        message,
        observed_generation: generation,
        last_transition_time: since,
    }
}
