//! What is published of policy, by key.

use std::collections::BTreeSet;

use warren_model::{IdentityId, policy::SelectorId};

use super::{PolicyChange, PolicyRepository};
use crate::event::{Record, RecordKey};

/// How many identities a record of members covers: a new identity changes only small records.
pub const MEMBERS_BLOCK: u32 = 256;

impl PolicyRepository {
    /// The record that a key of policy has now.
    pub(crate) fn record(&self, key: &RecordKey) -> Option<Record> {
        match key {
            RecordKey::Selector(id) => self
                .selectors()
                .selector(*id)
                .map(|selector| Record::Selector(*id, selector.clone())),
            RecordKey::Members(id, block) => {
                let members = self.selectors().members_in(*id, block_range(*block));
                let members: BTreeSet<_> = members.collect();
                (!members.is_empty()).then_some(Record::Members(*id, *block, members))
            }
            RecordKey::Policy(policy) => {
                let rules = self.numbered_rules(policy);
                (!rules.is_empty()).then(|| Record::Policy(policy.clone(), rules.to_vec()))
            }
            RecordKey::Node(_)
            | RecordKey::Identity(_)
            | RecordKey::Workload(_)
            | RecordKey::NodeFacts(_) => None,
        }
    }
}

/// The keys whose records a change may have changed. For a selector that is gone, only its own: its blocks are those
/// that were published.
pub(crate) fn touched(change: &PolicyChange) -> Vec<RecordKey> {
    let blocks = |id: SelectorId, identities: &mut dyn Iterator<Item = &IdentityId>| {
        let blocks: BTreeSet<_> = identities.map(|identity| identity.0 / MEMBERS_BLOCK).collect();
        blocks
            .into_iter()
            .map(|block| RecordKey::Members(id, block))
            .collect::<Vec<_>>()
    };
    match change {
        PolicyChange::Selector { id, members, .. } => {
            let mut keys = blocks(*id, &mut members.iter());
            keys.push(RecordKey::Selector(*id));
            keys
        }
        PolicyChange::Members(members) => blocks(
            members.selector,
            &mut members.added.iter().chain(&members.removed),
        ),
        PolicyChange::Rules { policy, .. } | PolicyChange::Removed(policy) => {
            vec![RecordKey::Policy(policy.clone())]
        }
        PolicyChange::SelectorGone(id) => vec![RecordKey::Selector(*id)],
        PolicyChange::Validity { .. } => vec![],
    }
}

fn block_range(block: u32) -> std::ops::RangeInclusive<IdentityId> {
    let first = block.saturating_mul(MEMBERS_BLOCK);
    IdentityId(first)..=IdentityId(first.saturating_add(MEMBERS_BLOCK - 1))
}
