//! Numbers for nodes. The maps speak of nodes by index; an index must mean the same node for as long as a map
//! holds it, also across restarts of the agent. 0 is always this node.

use std::collections::{BTreeMap, BTreeSet};

use warren_model::{NodeName, NodeRecord};

use crate::state::State;

/// Node indexes, 1 to 65535.
#[derive(Debug, Clone, Default)]
pub struct NodeIndexes(BTreeMap<NodeName, u16>);

impl NodeIndexes {
    /// Learns the indexes that the maps hold already: a prefix of a known node with an owner tells the node's
    /// index. Called once after a start, with the directory from disk.
    pub fn adopt<'a>(&mut self, nodes: impl IntoIterator<Item = &'a NodeRecord>, held: &State) {
        let mut used: BTreeSet<u16> = self.0.values().copied().collect();
        for node in nodes {
            if self.0.contains_key(&node.name) {
                continue;
            }
            let hosts = node.addresses.iter().map(|&address| address.into());
            let index = node.prefixes.iter().copied().chain(hosts).find_map(|prefix| {
                held.owners
                    .get(&prefix)
                    .map(|owner| owner.node)
                    .filter(|n| *n != 0 && !used.contains(n))
            });
            if let Some(index) = index {
                used.insert(index);
                self.0.insert(node.name.clone(), index);
            }
        }
    }

    /// Gives every node an index. Nodes that left lose theirs; a free index is taken only when no map holds it.
    pub fn assign<'a>(&mut self, names: impl IntoIterator<Item = &'a NodeName>, held: &State) {
        let names: BTreeSet<&NodeName> = names.into_iter().collect();
        self.0.retain(|name, _| names.contains(name));
        let mut used: BTreeSet<u16> = self.0.values().copied().collect();
        used.extend(held.owners.values().map(|owner| owner.node));
        used.extend(held.paths.keys());
        let mut next = 1u16;
        for name in names {
            if self.0.contains_key(name) {
                continue;
            }
            while next < u16::MAX && used.contains(&next) {
                next += 1;
            }
            if used.insert(next) {
                self.0.insert(name.clone(), next);
            }
        }
    }

    /// The index of a node.
    pub fn of(&self, name: &NodeName) -> Option<u16> {
        self.0.get(name).copied()
    }
}

#[cfg(test)]
mod tests {
    use warren_model::IdentityId;

    use super::*;
    use crate::state::Owner;

    fn node(name: &str, prefix: &str) -> NodeRecord {
        NodeRecord {
            name: name.into(),
            uid: name.into(),
            endpoints: vec![],
            addresses: vec![],
            prefixes: vec![prefix.parse().unwrap()],
            slots: vec![],
            active: 0,
            last: 0,
            datapath: None,
        }
    }

    fn owned(entries: &[(&str, u16)]) -> State {
        let owner = |node| Owner {
            node,
            pods: true,
            identity: IdentityId::UNKNOWN,
        };
        State {
            owners: entries
                .iter()
                .map(|(prefix, n)| (prefix.parse().unwrap(), owner(*n)))
                .collect(),
            ..State::default()
        }
    }

    #[test]
    fn a_restarted_agent_gives_the_same_indexes() {
        let held = owned(&[("10.244.1.0/24", 7), ("10.244.2.0/24", 3)]);
        let nodes = [
            node("a", "10.244.1.0/24"),
            node("b", "10.244.2.0/24"),
            node("c", "10.244.3.0/24"),
        ];
        let mut indexes = NodeIndexes::default();
        indexes.adopt(&nodes, &held);
        indexes.assign(nodes.iter().map(|n| &n.name), &held);
        assert_eq!(indexes.of(&"a".into()), Some(7));
        assert_eq!(indexes.of(&"b".into()), Some(3));
        assert_eq!(indexes.of(&"c".into()), Some(1));
    }

    #[test]
    fn an_index_is_not_given_away_while_a_map_still_holds_it() {
        let mut indexes = NodeIndexes::default();
        indexes.assign([&"a".into()], &State::default());
        let held = owned(&[("10.244.1.0/24", 1)]);
        indexes.assign([&"b".into()], &held);
        assert_eq!(indexes.of(&"a".into()), None);
        assert_eq!(indexes.of(&"b".into()), Some(2));
        indexes.assign([&"b".into(), &"c".into()], &State::default());
        assert_eq!(indexes.of(&"c".into()), Some(1));
    }
}
