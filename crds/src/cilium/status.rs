//! The `Valid` condition.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use warren_model::policy::Validity;

/// What is said of an object, as a Kubernetes condition. `previous` keeps its time of transition while the status stays.
pub fn condition(
    validity: Validity,
    generation: Option<i64>,
    now: Time,
    previous: Option<&Condition>,
) -> Condition {
    let status = if validity.valid { "True" } else { "False" };
    let since = previous
        .filter(|p| p.status == status)
        .map_or(now, |p| p.last_transition_time.clone());
    Condition {
        type_: "Valid".into(),
        status: status.into(),
        reason: if validity.valid { "Accepted" } else { "Invalid" }.into(),
        message: validity.message,
        observed_generation: generation,
        last_transition_time: since,
    }
}
