//! The core's records as entries of the directory.

use warren_keyd_api::{
    convert::{MEMBERS_BLOCK, Record as WireRecord, policy_key},
    proto::{Entry, EntryKey, EntryKind},
};
use warren_keyd_core::{Change, Record, RecordKey};

/// Both ends must cut members into the same blocks.
const _: () = assert!(MEMBERS_BLOCK == warren_keyd_core::MEMBERS_BLOCK);

/// A change as it goes to agents.
pub(crate) fn encode(change: &Change) -> (Vec<Entry>, Vec<EntryKey>) {
    let upserts = change.upserts.iter().map(entry);
    let removes = change.removes.iter().map(entry_key);
    (upserts.collect(), removes.collect())
}

fn entry(record: &Record) -> Entry {
    let record = match record.clone() {
        Record::Node(node) => WireRecord::Node(node),
        Record::Identity(number, labels) => WireRecord::Identity(number, labels),
        Record::Workload(workload) => WireRecord::Workload(workload),
        Record::Selector(id, selector) => WireRecord::Selector(id, selector),
        Record::Members(id, block, members) => WireRecord::Members(id, block, members),
        Record::Policy(policy, rules) => WireRecord::Policy(policy, rules),
        Record::NodeFacts(name, facts) => WireRecord::NodeFacts(name, facts),
    };
    record.to_entry()
}

fn entry_key(key: &RecordKey) -> EntryKey {
    let (kind, key) = match key {
        RecordKey::Node(name) => (EntryKind::EntryNode, name.to_string()),
        RecordKey::Identity(number) => (EntryKind::EntryIdentity, number.to_string()),
        RecordKey::Workload(address) => (EntryKind::EntryWorkload, address.to_string()),
        RecordKey::Selector(id) => (EntryKind::EntrySelector, id.to_string()),
        RecordKey::Members(id, block) => (EntryKind::EntryMembers, format!("{id}/{block}")),
        RecordKey::Policy(policy) => (EntryKind::EntryPolicy, policy_key(policy)),
        RecordKey::NodeFacts(name) => (EntryKind::EntryNodeFacts, name.to_string()),
    };
    EntryKey {
        kind: kind.into(),
        key,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use warren_model::{
        IdentityId, Labels, NodeRecord, PodRef, WorkloadRecord,
        policy::{Directions, NodeFacts, PolicyKind, PolicyRef, Rule, Selector, SelectorId, Subject},
    };

    use super::*;

    #[test]
    fn every_record_is_removed_under_the_key_it_was_sent_with_and_read_back_as_it_was() {
        let policy = PolicyRef {
            kind: PolicyKind::CiliumClusterwideNetworkPolicy,
            namespace: String::new(),
            name: "p".into(),
        };
        let rule = Rule {
            policy: policy.clone(),
            subject: Subject::Pods(SelectorId(7)),
            default_deny: Directions::default(),
            statements: vec![],
        };
        let node = NodeRecord {
            name: "a".into(),
            uid: "u".into(),
            endpoints: vec![],
            addresses: vec![],
            prefixes: vec![],
            slots: vec![],
            active: 0,
            last: 0,
            datapath: None,
        };
        let workload = WorkloadRecord {
            ip: "fd00::1".parse().unwrap(),
            node: "a".into(),
            identity: IdentityId(300),
            pod: PodRef {
                namespace: "n".into(),
                name: "p".into(),
                uid: "u".into(),
            },
            policy_audit: true,
        };
        let members: BTreeSet<_> = [IdentityId(512), IdentityId(767)].into();
        let records = vec![
            Record::Node(node),
            Record::Identity(IdentityId(300), Labels::default()),
            Record::Workload(workload),
            Record::Selector(SelectorId(7), Selector::new([])),
            Record::Members(SelectorId(7), 2, members),
            Record::Policy(policy, vec![rule]),
            Record::NodeFacts("a".into(), NodeFacts::default()),
        ];
        let change = Change {
            removes: records.iter().map(Record::key).collect(),
            upserts: records,
        };
        let (upserts, removes) = encode(&change);
        for (entry, key) in upserts.iter().zip(removes) {
            assert_eq!((entry.kind, &entry.key), (key.kind, &key.key));
            let record = WireRecord::parse(entry).unwrap();
            assert_eq!(record.to_entry(), *entry);
        }
    }
}
