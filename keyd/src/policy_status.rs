//! The `Valid` condition of policy objects, for `kubectl get cnp`.
//!
//! Level-triggered: whenever what keyd has to say of an object, or what the object says of itself, changes, both are
//! compared, and the difference is written. Lost writes are repeated; nothing waits for them.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use futures::{StreamExt as _, stream::FuturesUnordered};
use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use warren_model::policy::{PolicyRef, Validity};

use crate::store::Store;

/// Conditions that are written at the same time: a new term may have thousands to write, and the API server has others
/// to serve.
const PARALLEL: usize = 4;
/// Pause after a write that failed.
const PAUSE: Duration = Duration::from_secs(2);

/// What the API server has of an object, beside its rules.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Seen {
    /// `metadata.generation`.
    pub(crate) generation: Option<i64>,
    /// The condition that it has.
    pub(crate) condition: Option<Condition>,
}

/// What objects say and what they should say.
#[derive(Debug, Default)]
pub(crate) struct PolicyStatuses {
    seen: BTreeMap<PolicyRef, Seen>,
    validity: BTreeMap<PolicyRef, Validity>,
    changed: BTreeSet<PolicyRef>,
}

impl PolicyStatuses {
    /// An object was seen.
    pub(crate) fn seen(&mut self, policy: &PolicyRef, seen: Seen) {
        self.seen.insert(policy.clone(), seen);
        self.changed.insert(policy.clone());
    }

    /// What is to be said of an object; `None` where it is gone.
    pub(crate) fn judged(&mut self, policy: PolicyRef, validity: Option<Validity>) {
        match validity {
            Some(validity) => drop(self.validity.insert(policy.clone(), validity)),
            None => {
                self.validity.remove(&policy);
                self.seen.remove(&policy);
            }
        }
        self.changed.insert(policy);
    }

    /// The conditions to write.
    pub(crate) fn take(&mut self, now: Timestamp) -> Vec<(PolicyRef, Condition)> {
        // Whole seconds, as all conditions have.
        let now = Timestamp::from_second(now.as_second()).unwrap_or(now);
        let mut out = vec![];
        for policy in std::mem::take(&mut self.changed) {
            let (Some(seen), Some(validity)) = (self.seen.get(&policy), self.validity.get(&policy)) else {
                continue;
            };
            let old = seen.condition.as_ref();
            let new = warren_crds::cilium::condition(validity.clone(), seen.generation, Time(now), old);
            if old != Some(&new) {
                out.push((policy, new));
            }
        }
        out
    }
}

/// Writes conditions until nobody sends any more; of several for one object the newest counts.
pub(crate) async fn write(store: Store, mut wanted: mpsc::UnboundedReceiver<(PolicyRef, Condition)>) {
    let mut waiting: BTreeMap<PolicyRef, Condition> = BTreeMap::new();
    let mut busy: BTreeSet<PolicyRef> = BTreeSet::new();
    let mut running = FuturesUnordered::new();
    let mut not_before = Instant::now();
    loop {
        while running.len() < PARALLEL
            && not_before <= Instant::now()
            && let Some(policy) = waiting.keys().find(|policy| !busy.contains(policy)).cloned()
            && let Some(condition) = waiting.remove(&policy)
        {
            busy.insert(policy.clone());
            let store = store.clone();
            running.push(async move {
                let result = store.policy_status(&policy, &condition).await;
                (policy, condition, result)
            });
        }
        let paused = !waiting.is_empty() && not_before > Instant::now();
        tokio::select! {
            received = wanted.recv() => match received {
                Some((policy, condition)) => drop(waiting.insert(policy, condition)),
                None => return,
            },
            Some((policy, condition, result)) = running.next(), if !running.is_empty() => {
                busy.remove(&policy);
                if let Err(error) = result {
                    tracing::warn!(%policy, "cannot write the Valid condition, trying again: {error:#}");
                    waiting.entry(policy).or_insert(condition);
                    not_before = Instant::now() + PAUSE;
                }
            }
            () = sleep_until(not_before), if paused => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use warren_model::policy::PolicyKind;

    use super::*;

    fn policy() -> PolicyRef {
        PolicyRef {
            kind: PolicyKind::CiliumNetworkPolicy,
            namespace: "shop".into(),
            name: "web".into(),
        }
    }

    fn validity(valid: bool, message: &str) -> Option<Validity> {
        let message = message.into();
        Some(Validity { valid, message })
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    fn one(statuses: &mut PolicyStatuses, seconds: i64) -> Option<Condition> {
        let mut all = statuses.take(at(seconds));
        assert!(all.len() <= 1);
        all.pop().map(|(_, condition)| condition)
    }

    #[test]
    fn only_differences_are_written_and_times_move_with_the_status() {
        let mut statuses = PolicyStatuses::default();
        let seen = |generation, condition: Option<&Condition>| Seen {
            generation: Some(generation),
            condition: condition.cloned(),
        };
        statuses.seen(&policy(), seen(1, None));
        assert_eq!(one(&mut statuses, 1), None, "nothing is said before it is known");
        statuses.judged(policy(), validity(true, "fine"));
        let first = one(&mut statuses, 100).unwrap();
        assert_eq!(
            (
                first.status.as_str(),
                first.reason.as_str(),
                first.observed_generation
            ),
            ("True", "Accepted", Some(1))
        );
        statuses.seen(&policy(), seen(1, Some(&first)));
        assert_eq!(one(&mut statuses, 200), None, "it says so already");
        statuses.seen(&policy(), seen(2, Some(&first)));
        let second = one(&mut statuses, 300).unwrap();
        assert_eq!(second.observed_generation, Some(2));
        assert_eq!(second.last_transition_time, first.last_transition_time);
        statuses.judged(policy(), validity(false, "wrong"));
        let third = one(&mut statuses, 400).unwrap();
        assert_eq!(
            (third.status.as_str(), third.last_transition_time),
            ("False", Time(at(400)))
        );
        // Somebody else wrote nonsense: it is corrected.
        let nonsense = Condition {
            message: "nonsense".into(),
            ..first
        };
        statuses.seen(&policy(), seen(2, Some(&nonsense)));
        assert_eq!(one(&mut statuses, 500).unwrap().message, "wrong");
        statuses.judged(policy(), None);
        assert_eq!(one(&mut statuses, 600), None);
        assert!(statuses.seen.is_empty() && statuses.validity.is_empty());
    }
}
