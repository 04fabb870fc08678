//! Policy objects and selectors on their way into the directory.

use std::collections::BTreeSet;

use warren_model::{IdentityId, policy::SelectorId};

use super::{Core, PolicyChange, policy};
use crate::event::{Output, RecordKey};

impl Core {
    /// Notes which records changes may have changed; they are published by the next poll, all in one version.
    pub(super) fn take_policy(&mut self, changes: Vec<PolicyChange>) {
        for change in changes {
            self.policy_touched.extend(policy::touched(&change));
            match change {
                PolicyChange::SelectorGone(id) => {
                    let blocks = published_blocks(id);
                    let published = self.published.records().range(blocks);
                    self.policy_touched.extend(published.map(|(key, _)| key.clone()));
                }
                PolicyChange::Validity { policy, .. } => drop(self.judged.insert(policy)),
                PolicyChange::Selector { .. }
                | PolicyChange::Members(_)
                | PolicyChange::Rules { .. }
                | PolicyChange::Removed(_) => {}
            }
        }
    }

    /// An identity came or went: only selectors that it matches change, and of them only its block.
    pub(super) fn number_changed(&mut self, number: IdentityId) {
        let changes = match self.identities.labels(number) {
            Some(labels) => self.policies.upsert_identity(number, labels),
            None => self.policies.remove_identity(number),
        };
        self.take_policy(changes);
    }

    pub(super) fn take_policy_touched(&mut self) -> BTreeSet<RecordKey> {
        std::mem::take(&mut self.policy_touched)
    }

    /// What is to be said of objects, once everything is known that it depends on.
    pub(super) fn tell_validity(&mut self) {
        for policy in std::mem::take(&mut self.judged) {
            let validity = self.policies.validity(&policy).cloned();
            self.out.push(Output::Validity { policy, validity });
        }
    }

    pub(super) fn policy_problems(&self) -> impl Iterator<Item = String> + '_ {
        let policies = self.policies.iter().filter(|(_, validity)| !validity.valid);
        let policies = policies.map(|(policy, validity)| format!("{policy}: {}", validity.message));
        let groups = self.policies.malformed_groups();
        policies.chain(groups.map(|(name, error)| format!("CiliumCIDRGroup {name}: {error}")))
    }
}

/// Every block of a selector.
fn published_blocks(id: SelectorId) -> std::ops::RangeInclusive<RecordKey> {
    RecordKey::Members(id, 0)..=RecordKey::Members(id, u32::MAX)
}
