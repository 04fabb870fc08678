//! The directory in the core's words. Only entries that changed are read.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use warren_agent_core::{Change, Entry, EntryKey};
use warren_keyd_api::{
    convert::Record,
    proto::{self, EntryKind},
    snapshot::{self, Directory},
};
use warren_model::{
    IdentityId, NodeKeys, NodeName,
    policy::{PolicyKind, PolicyRef, SelectorId},
};

/// A change of the directory on its way to policy and to the node.
#[derive(Debug, Clone)]
pub(crate) struct Received {
    pub(crate) change: Arc<Change>,
    /// Everything in the directory that cannot be read, a sentence each.
    pub(crate) unreadable: Vec<String>,
    /// When the directory was signed, and when its signature ends, Unix milliseconds.
    pub(crate) signed: (u64, u64),
    /// Keys of nodes came, went or changed: it is on disk already.
    pub(crate) keys_changed: bool,
    /// When it was there.
    pub(crate) at: Instant,
}

/// What of the directory cannot be read, by kind and key.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    unreadable: BTreeMap<(i32, String), String>,
    keys: BTreeMap<NodeName, NodeKeys>,
}

impl Contents {
    /// All of a directory, as after a start.
    pub(crate) fn whole(&mut self, directory: &Directory) -> Received {
        let change = snapshot::Change {
            snapshot: true,
            upserts: directory.entries().iter().collect(),
            removes: Vec::new(),
        };
        self.change(directory, change)
    }

    /// What an update changed of a directory.
    pub(crate) fn change(&mut self, directory: &Directory, update: snapshot::Change) -> Received {
        let at = Instant::now();
        let (epoch, version) = directory.position();
        let mut change = Change {
            epoch,
            version,
            whole: update.snapshot,
            ..Change::default()
        };
        if update.snapshot {
            self.unreadable.clear();
        }
        for key in update.removes {
            self.unreadable.remove(&(key.kind, key.key.clone()));
            change.removes.extend(parse_key(key.kind, &key.key));
        }
        for entry in update.upserts {
            self.entry(&entry, &mut change);
        }
        Received {
            keys_changed: self.keys_of(&change),
            change: Arc::new(change),
            unreadable: self.unreadable.values().cloned().collect(),
            signed: directory.manifest().map_or((0, 0), |manifest| {
                let time = |ms: i64| u64::try_from(ms).unwrap_or_default();
                (time(manifest.issued_unix_ms), time(manifest.expires_unix_ms))
            }),
            at,
        }
    }

    /// Keeps the keys of nodes; returns whether any changed.
    fn keys_of(&mut self, change: &Change) -> bool {
        let before = match change.whole {
            true => std::mem::take(&mut self.keys),
            false => BTreeMap::new(),
        };
        let mut changed = false;
        for key in &change.removes {
            if let EntryKey::Node(name) = key {
                changed |= self.keys.remove(name).is_some();
            }
        }
        for entry in &change.upserts {
            if let Entry::Node(node) = entry {
                let keys = node.keys();
                let known = self.keys.insert(node.name.clone(), keys.clone());
                changed |= known.as_ref() != Some(&keys);
            }
        }
        match change.whole {
            true => before != self.keys,
            false => changed,
        }
    }

    /// An entry that cannot be read is said. A part of policy stays as it was then: without it, something might open. A
    /// node or a pod counts as gone.
    fn entry(&mut self, entry: &proto::Entry, change: &mut Change) {
        let place = (entry.kind, entry.key.clone());
        match Record::parse(entry) {
            Ok(record) => {
                self.unreadable.remove(&place);
                change.upserts.push(entry_of(record));
            }
            Err(error) => {
                self.unreadable.insert(place, format!("directory: {error}"));
                match parse_key(entry.kind, &entry.key) {
                    Some(key) if key.is_policy() => change.keeps.push(key),
                    Some(key) => change.removes.push(key),
                    None => {}
                }
            }
        }
    }
}

fn entry_of(record: Record) -> Entry {
    match record {
        Record::Node(node) => Entry::Node(node),
        Record::Identity(identity, labels) => Entry::Identity(identity, Arc::new(labels)),
        Record::Workload(workload) => Entry::Workload(workload),
        Record::Selector(id, selector) => Entry::Selector(id, selector),
        Record::Members(id, block, members) => Entry::Members(id, block, members),
        Record::Policy(policy, rules) => Entry::Rules(policy, rules),
        Record::NodeFacts(node, facts) => Entry::Facts(node, facts),
    }
}

/// The key of an entry; `None` for a kind that this version does not know, or a key that no readable entry has.
fn parse_key(kind: i32, key: &str) -> Option<EntryKey> {
    Some(match EntryKind::try_from(kind).ok()? {
        EntryKind::EntryUnspecified => return None,
        EntryKind::EntryNode => EntryKey::Node(key.into()),
        EntryKind::EntryIdentity => EntryKey::Identity(IdentityId(key.parse().ok()?)),
        EntryKind::EntryWorkload => EntryKey::Workload(key.parse().ok()?),
        EntryKind::EntrySelector => EntryKey::Selector(SelectorId(key.parse().ok()?)),
        EntryKind::EntryMembers => {
            let (id, block) = key.split_once('/')?;
            EntryKey::Members(SelectorId(id.parse().ok()?), block.parse().ok()?)
        }
        EntryKind::EntryPolicy => {
            let mut parts = key.splitn(3, '/');
            let (kind, namespace, name) = (parts.next()?, parts.next()?, parts.next()?);
            let kinds = [
                PolicyKind::CiliumNetworkPolicy,
                PolicyKind::CiliumClusterwideNetworkPolicy,
                PolicyKind::NetworkPolicy,
            ];
            EntryKey::Rules(PolicyRef {
                kind: kinds.into_iter().find(|known| known.name() == kind)?,
                namespace: namespace.into(),
                name: name.into(),
            })
        }
        EntryKind::EntryNodeFacts => EntryKey::Facts(key.into()),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use warren_keyd_api::snapshot::{EntrySet, ManifestSigner, chunks};
    use warren_model::{
        Labels,
        policy::{Directions, Rule, Selector, Subject},
    };

    use super::*;

    fn policy() -> PolicyRef {
        PolicyRef {
            kind: PolicyKind::CiliumNetworkPolicy,
            namespace: "shop".into(),
            name: "web".into(),
        }
    }

    fn records() -> Vec<Record> {
        let rule = Rule {
            policy: policy(),
            subject: Subject::Pods(SelectorId(7)),
            default_deny: Directions::default(),
            statements: vec![],
        };
        vec![
            Record::Identity(
                IdentityId(300),
                Labels([("k8s:app".to_owned(), "web".to_owned())].into()),
            ),
            Record::Selector(SelectorId(7), Selector::new([])),
            Record::Members(SelectorId(7), 1, BTreeSet::from([IdentityId(300)])),
            Record::Policy(policy(), vec![rule]),
            Record::NodeFacts("node1".into(), Default::default()),
        ]
    }

    #[test]
    fn keys_are_those_of_the_records() {
        for record in records() {
            let entry = record.to_entry();
            let expected = entry_of(record).key();
            assert_eq!(parse_key(entry.kind, &entry.key), Some(expected));
        }
        assert_eq!(parse_key(77, "x"), None);
        assert_eq!(parse_key(6, "Nonsense/a/b"), None);
        assert_eq!(parse_key(5, "7"), None);
    }

    #[test]
    fn a_policy_that_cannot_be_read_stays_and_is_said_until_it_can() {
        let signer = ManifestSigner::generate().unwrap();
        let mut entries = EntrySet::default();
        for record in records() {
            entries.upsert(record.to_entry());
        }
        let mut directory = Directory::new(signer.root());
        let mut publish = |entries: &EntrySet, snapshot: bool, upserts: Vec<proto::Entry>, version| {
            let manifest = signer.seal(proto::Manifest {
                epoch: 1,
                version,
                entries: entries.len() as u64,
                digest: entries.digest().to_vec(),
                ..proto::Manifest::default()
            });
            let update = chunks((1, version), snapshot, upserts, [], manifest).remove(0);
            let change = directory.apply(update).unwrap().unwrap();
            (directory.clone(), change)
        };
        let mut contents = Contents::default();
        let (at, change) = publish(&entries, true, entries.iter().collect(), 1);
        let received = contents.change(&at, change);
        assert_eq!(received.change.upserts.len(), 5);
        assert!(received.unreadable.is_empty() && received.change.whole);

        let mut broken = records()[3].to_entry();
        broken.value = vec![0xff];
        entries.upsert(broken.clone());
        let (at, change) = publish(&entries, false, vec![broken], 2);
        let received = contents.change(&at, change);
        assert_eq!(received.change.keeps, [EntryKey::Rules(policy())]);
        assert!(received.change.removes.is_empty() && received.change.upserts.is_empty());
        assert_eq!(received.unreadable.len(), 1);

        entries.upsert(records()[3].to_entry());
        let (at, change) = publish(&entries, false, vec![records()[3].to_entry()], 3);
        assert!(contents.change(&at, change).unreadable.is_empty());
    }
}
