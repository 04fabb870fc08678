//! A directory whose time is over: the peers that there are stay, new ones are not taken.

use std::collections::BTreeMap;

use warren_model::{NodeName, NodeRecord, directory::Checked};

/// The nodes as they were when the directory's time was over.
#[derive(Debug, Clone)]
pub(crate) struct Frozen {
    nodes: BTreeMap<NodeName, NodeRecord>,
}

impl Frozen {
    pub(crate) fn new(checked: Option<&Checked>) -> Self {
        Self {
            nodes: checked.map(|checked| checked.nodes.clone()).unwrap_or_default(),
        }
    }

    /// Takes out of accepted records what is new. What is gone is gone: a key that is revoked leaves also now. `hard`: no peer
    /// stays.
    pub(crate) fn apply(&self, checked: &mut Checked, own: &NodeName, hard: bool) {
        checked.nodes.retain(|name, record| {
            if name == own {
                return true;
            }
            match self.nodes.get(name).filter(|was| !hard && was.uid == record.uid) {
                Some(was) => {
                    keep(was, record);
                    true
                }
                None => false,
            }
        });
    }
}

fn keep(was: &NodeRecord, record: &mut NodeRecord) {
    record
        .slots
        .retain(|slot| was.slots.iter().any(|known| known.public_key == slot.public_key));
    record.addresses.retain(|address| was.addresses.contains(address));
    record.prefixes.retain(|prefix| was.prefixes.contains(prefix));
    if record
        .endpoints
        .iter()
        .any(|endpoint| !was.endpoints.contains(endpoint))
    {
        record.endpoints.clone_from(&was.endpoints);
    }
    if !record.slots.iter().any(|slot| slot.generation == record.active) {
        record.active = was.active;
    }
}
