//! Do both ends of every pair hold the same keys, and does each send by a path that works?

use std::collections::{BTreeMap, BTreeSet};

use warren_keyd_api::{
    convert::path_to_proto,
    proto::{AgentStatus, PairAudit, PathAudit, PeerStatus},
};
use warren_model::{NodeKeys, NodeName, keys::PathState};

use super::Hub;

/// One end of a pair.
struct End<'a> {
    name: &'a NodeName,
    keys: &'a NodeKeys,
    /// What it says of its paths to the other one.
    paths: Option<&'a [PathState]>,
    /// What its devices have, as it reports in its status; none where that is older than the directory that the
    /// agent has applied meanwhile: statuses come every few seconds only.
    status: Option<&'a AgentStatus>,
}

impl Hub {
    /// All pairs, or those of one node, in the order of the names.
    pub(super) fn audit(&self, node: Option<&NodeName>, only_disagreeing: bool) -> Vec<PairAudit> {
        let nodes: Vec<_> = self
            .core
            .node_keys()
            .filter(|(_, keys, _)| !keys.slots.is_empty())
            .map(|(name, keys, _)| (name, keys))
            .collect();
        let mut out = vec![];
        for (index, (a, a_keys)) in nodes.iter().enumerate() {
            for (b, b_keys) in &nodes[index + 1..] {
                if node.is_some_and(|node| node != *a && node != *b) {
                    continue;
                }
                let pair = audit(&self.end(a, a_keys, b, b_keys), &self.end(b, b_keys, a, a_keys));
                if !(only_disagreeing && pair.agree) {
                    out.push(pair);
                }
            }
        }
        out
    }

    fn end<'a>(
        &'a self,
        name: &'a NodeName,
        keys: &'a NodeKeys,
        peer: &NodeName,
        peer_keys: &NodeKeys,
    ) -> End<'a> {
        let said = self.core.machine().reported(name);
        End {
            name,
            keys,
            paths: said.and_then(|said| said.paths(peer, &peer_keys.uid)),
            status: self.status_of_applied(name),
        }
    }
}

fn audit(a: &End<'_>, b: &End<'_>) -> PairAudit {
    let mut faults = vec![];
    for (here, there) in [(a, b), (b, a)] {
        faults.extend(faults_at(here, there));
    }
    PairAudit {
        a: a.name.to_string(),
        b: b.name.to_string(),
        agree: faults.is_empty(),
        faults,
        paths: paths(a, b),
        pre_shared_key: sends_with_psk(a, b) && sends_with_psk(b, a),
    }
}

/// Whether an end sends by a path that has a pre-shared key. It is so for each path between keys that were made with them,
/// which is not verified without.
fn sends_with_psk(here: &End<'_>, there: &End<'_>) -> bool {
    let mut paths = here.paths.unwrap_or_default().iter();
    let sending = paths.find(|path| path.sending && path.verified);
    sending.is_some_and(|path| here.keys.agrees(path.own) && there.keys.agrees(path.peer))
}

/// What is wrong at one end.
fn faults_at(here: &End<'_>, there: &End<'_>) -> Vec<String> {
    let (name, peer) = (here.name, there.name);
    let Some(paths) = here.paths else {
        return vec![format!(
            "node {name} does not report of node {peer}: its agent is not connected, or does not know it yet"
        )];
    };
    let mut faults = vec![];
    match paths.iter().find(|path| path.sending) {
        None => faults.push(format!(
            "node {name} has no path by which it sends to node {peer}"
        )),
        Some(path) if !path.verified => faults.push(format!(
            "node {name} sends to node {peer} by a path without a fresh handshake (generation {} to {})",
            path.own, path.peer
        )),
        Some(_) => {}
    }
    for path in paths {
        if !here.keys.lists(path.own) || !there.keys.lists(path.peer) {
            faults.push(format!(
                "node {name} has a path of generation {} to generation {} of node {peer}, which the directory does not list",
                path.own, path.peer
            ));
        }
        if path.conflict.is_some() {
            faults.push(format!(
                "node {name} and node {peer} have different pre-shared keys (generation {} to {}), as a disk was set back: \
                 both are told to forget theirs",
                path.own, path.peer
            ));
        }
    }
    let devices = here.status.into_iter().flat_map(|status| &status.peers);
    for device in devices.filter(|device| device.node == peer.as_str()) {
        faults.extend(fault_of_device(here, there, device));
    }
    faults
}

/// Whether a device has keys that the directory lists.
fn fault_of_device(here: &End<'_>, there: &End<'_>, device: &PeerStatus) -> Option<String> {
    let listed = |keys: &NodeKeys, bytes: &[u8]| {
        keys.slots
            .iter()
            .any(|slot| slot.public_key.as_bytes().as_slice() == bytes)
    };
    let (name, peer, slot) = (here.name, there.name, device.slot);
    if !listed(there.keys, &device.public_key) {
        return Some(format!(
            "node {name} has another key for node {peer} on its device {slot} than the directory lists"
        ));
    }
    (!listed(here.keys, &device.own_public_key)).then(|| {
        format!("the device {slot} of node {name} has another key of its own than the directory lists")
    })
}

fn paths(a: &End<'_>, b: &End<'_>) -> Vec<PathAudit> {
    let at_a: BTreeMap<_, _> = a
        .paths
        .unwrap_or_default()
        .iter()
        .map(|path| ((path.own, path.peer), path))
        .collect();
    let at_b: BTreeMap<_, _> = b
        .paths
        .unwrap_or_default()
        .iter()
        .map(|path| ((path.peer, path.own), path))
        .collect();
    let all: BTreeSet<_> = at_a.keys().chain(at_b.keys()).copied().collect();
    all.into_iter()
        .map(|pair| PathAudit {
            a_generation: pair.0,
            b_generation: pair.1,
            at_a: at_a.get(&pair).map(|path| path_to_proto(path)),
            at_b: at_b.get(&pair).map(|path| path_to_proto(path)),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use warren_model::{PublicKey, SlotKey, keys::slots_of};

    use super::*;

    fn keys(uid: &str, generation: u64, key: u8) -> NodeKeys {
        let slots = slots_of(generation).map(|slot| SlotKey {
            slot,
            port: 51871 + u16::from(slot),
            generation,
            public_key: PublicKey::from_bytes([key; 32]).unwrap(),
            pre_shared_keys: true,
        });
        NodeKeys {
            uid: uid.into(),
            slots: slots.to_vec(),
            active: generation,
            last: generation,
        }
    }

    fn path(own: u64, peer: u64) -> PathState {
        PathState {
            own,
            peer,
            verified: true,
            sending: true,
            quiet: false,
            conflict: None,
        }
    }

    #[test]
    fn who_disagrees_is_said() {
        let (a_name, b_name) = ("a".into(), "b".into());
        let (a_keys, b_keys) = (keys("ua", 1, 7), keys("ub", 2, 8));
        let end = |paths| End {
            name: &a_name,
            keys: &a_keys,
            paths,
            status: None,
        };
        let other = |paths, status| End {
            name: &b_name,
            keys: &b_keys,
            paths,
            status,
        };
        let (at_a, at_b) = ([path(1, 2)], [path(2, 1)]);
        let good = audit(&end(Some(&at_a)), &other(Some(&at_b), None));
        assert!(
            good.agree && good.faults.is_empty() && good.pre_shared_key,
            "{good:?}"
        );
        assert_eq!(good.paths.len(), 1);
        assert!(good.paths[0].at_a.is_some() && good.paths[0].at_b.is_some());

        let silent = audit(&end(Some(&at_a)), &other(None, None));
        assert!(silent.faults[0].contains("node b does not report"), "{silent:?}");
        let stale = [PathState {
            verified: false,
            ..path(1, 2)
        }];
        let stale = audit(&end(Some(&stale)), &other(Some(&at_b), None));
        assert!(stale.faults[0].contains("without a fresh handshake"), "{stale:?}");
        let lost = [PathState {
            conflict: Some(warren_model::PskConflict {
                own: None,
                peer: Some(warren_model::PskId([7; 16])),
            }),
            ..path(1, 2)
        }];
        let lost = audit(&end(Some(&lost)), &other(Some(&at_b), None));
        assert!(lost.faults[0].contains("different pre-shared keys"), "{lost:?}");
        let void = [path(1, 2), path(1, 1)];
        let void = audit(&end(Some(&void)), &other(Some(&at_b), None));
        assert!(void.faults[0].contains("does not list"), "{void:?}");
        assert_eq!(void.paths.len(), 2);
        let status = AgentStatus {
            peers: vec![PeerStatus {
                node: "a".into(),
                public_key: vec![9; 32],
                own_public_key: vec![8; 32],
                ..PeerStatus::default()
            }],
            ..AgentStatus::default()
        };
        let wrong = audit(&end(Some(&at_a)), &other(Some(&at_b), Some(&status)));
        assert!(wrong.faults[0].contains("another key for node a"), "{wrong:?}");
    }
}
