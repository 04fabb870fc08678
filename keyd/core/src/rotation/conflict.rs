//! Paths whose ends have different pre-shared keys.
//!
//! A pre-shared key is agreed on by two agents, once for a pair of generations, and `keyd` never sees it. An end that has
//! lost it (its disk was set back) does not get it again: the other end makes no new one on the word of somebody who has
//! only the node's WireGuard key. So the agent that finds out reports it here, and both ends are told which key to forget.
//! `keyd` knows by other means than WireGuard keys who speaks to it, and a node that lies hurts its own pair alone: unlike
//! with a new generation of keys, no other pair is concerned.

use warren_model::{ForgetPsk, NodeName, keys::PathState};

use super::{Machine, event::Output};

/// How long until the ends are told again, milliseconds.
const AGAIN_MS: u64 = 5_000;

impl Machine {
    /// Tells both ends of such paths what to forget.
    pub(super) fn settle_conflicts(&mut self, now: u64) {
        let conflicts = self.members.iter().flat_map(|(node, member)| {
            let peers = member.reports.conflicts();
            peers.map(move |peer| (node.clone(), peer.clone()))
        });
        for (node, peer) in conflicts.collect::<Vec<_>>() {
            let uid = self.members.get(&peer).map(|other| other.keys.uid.clone());
            let (Some(uid), Some(member)) = (uid, self.members.get_mut(&node)) else {
                continue;
            };
            if !member.reports.may_settle(now, AGAIN_MS, &peer) {
                continue;
            }
            let paths = member.reports.of(&peer, &uid).unwrap_or_default();
            let orders: Vec<_> = paths.iter().flat_map(|path| orders(&node, &peer, path)).collect();
            for (node, forget) in orders {
                if self.members.get(&node).is_some_and(|member| member.connected) {
                    self.out.push(Output::Forget { node, forget });
                }
            }
        }
    }
}

/// What a node, and its peer, have to forget for a path that the node reports.
fn orders(node: &NodeName, peer: &NodeName, path: &PathState) -> Vec<(NodeName, ForgetPsk)> {
    let Some(conflict) = path.conflict else {
        return vec![];
    };
    let here = conflict.own.map(|id| (node, peer, path.own, path.peer, id));
    let there = conflict.peer.map(|id| (peer, node, path.peer, path.own, id));
    let order = |(node, peer, own, other, id): (&NodeName, &NodeName, _, _, _)| {
        let peer = peer.clone();
        (node.clone(), ForgetPsk { peer, own, other, id })
    };
    here.into_iter().chain(there).map(order).collect()
}
