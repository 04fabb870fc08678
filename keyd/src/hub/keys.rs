//! What operators ask about keys.

use tokio::sync::oneshot;
use warren_crds::RevocationStatus;
use warren_keyd_api::proto::{
    KeyHeld, KeyState, KeyStatus, ListKeysResponse, NodeKeysStatus, NodePhase, Revocation, RotationCounts,
    RotationException, RotationNode, RotationStatus,
};
use warren_keyd_core::{Core, Object, Output, RotationObject, StoredNode, rotation::Phase};
use warren_model::{NodeKeys, NodeName, NodeUid};

use super::{Hub, Order};
use crate::{
    clock,
    key_writer::Write,
    notes::{About, Note},
    rotations::{exception_of, phase_name, waiting_for},
    store::ObjectName,
};

/// The end of a node's keys: its UID, and a receiver that hears, once it is on its way to all agents, whether it is durable.
pub(crate) type Revoked = (NodeUid, oneshot::Receiver<bool>);

/// Nodes that are named as waited for.
const SHOWN: usize = 10;

pub(super) fn phase(phase: Phase) -> NodePhase {
    match phase {
        Phase::Pending => NodePhase::Pending,
        Phase::Preparing => NodePhase::Preparing,
        Phase::Verifying => NodePhase::Verifying,
        Phase::Switching => NodePhase::Switching,
        Phase::Draining => NodePhase::Draining,
        Phase::Retiring => NodePhase::Retiring,
        Phase::Done => NodePhase::Done,
        Phase::Failed => NodePhase::Failed,
        Phase::Gone => NodePhase::Gone,
    }
}

fn ms(seconds: u64) -> i64 {
    i64::try_from(seconds.saturating_mul(1000)).unwrap_or(i64::MAX)
}

/// What MeshNodes of nodes that are gone say: who has removed their keys.
pub(super) fn revocation_status(core: &Core, one: &warren_keyd_core::Revocation) -> RevocationStatus {
    let (acknowledged, waiting) = core.acknowledged(one.version);
    RevocationStatus {
        node_uid: one.uid.to_string(),
        complete: waiting.is_empty() && one.version > 0,
        acknowledged: u32::try_from(acknowledged.len()).unwrap_or(u32::MAX),
        waiting: waiting.iter().take(SHOWN).map(ToString::to_string).collect(),
    }
}

impl Hub {
    pub(super) fn list_keys(&self, names: &[NodeName]) -> ListKeysResponse {
        let wanted = |name: &NodeName| names.is_empty() || names.contains(name);
        let machine = self.core.machine();
        let nodes = self
            .core
            .node_keys()
            .filter(|(name, ..)| wanted(name))
            .map(|(name, keys, since)| NodeKeysStatus {
                node: name.to_string(),
                uid: keys.uid.to_string(),
                active: keys.active,
                last: keys.last,
                keys: keys
                    .generations()
                    .into_iter()
                    .filter_map(|generation| {
                        let since = since.get(&generation).copied().unwrap_or_default();
                        self.key_status(name, keys, generation, since)
                    })
                    .collect(),
                connected: self.session_of(name).is_some(),
                phase: machine.phase(name).map_or(NodePhase::Unspecified, phase).into(),
                waiting_for: machine
                    .waiting_for(name)
                    .map(ToString::to_string)
                    .unwrap_or_default(),
            });
        let revocations = self.core.revocations().filter(|one| wanted(&one.node));
        ListKeysResponse {
            nodes: nodes.collect(),
            revocations: revocations.map(|one| self.revocation(one)).collect(),
        }
    }

    fn key_status(&self, name: &NodeName, keys: &NodeKeys, generation: u64, since: u64) -> Option<KeyStatus> {
        let key = keys.key(generation)?;
        let held = self.core.machine().reported(name).and_then(|said| said.held());
        Some(KeyStatus {
            generation,
            public_key: key.as_bytes().to_vec(),
            state: match generation.cmp(&keys.active) {
                std::cmp::Ordering::Equal => KeyState::Active,
                std::cmp::Ordering::Greater => KeyState::Candidate,
                std::cmp::Ordering::Less => KeyState::Former,
            }
            .into(),
            accepted_unix_ms: ms(since),
            held: match held.map(|held| held.get(&generation) == Some(&key)) {
                None => KeyHeld::Unspecified,
                Some(true) => KeyHeld::Yes,
                Some(false) => KeyHeld::No,
            }
            .into(),
        })
    }

    pub(super) fn revocation(&self, one: &warren_keyd_core::Revocation) -> Revocation {
        let (acknowledged, waiting) = self.core.acknowledged(one.version);
        let names = |list: Vec<NodeName>| list.iter().map(ToString::to_string).collect();
        Revocation {
            node: one.node.to_string(),
            uid: one.uid.to_string(),
            epoch: self.epoch,
            version: one.version,
            public_keys: one.keys.iter().map(|key| key.as_bytes().to_vec()).collect(),
            acknowledged: names(acknowledged),
            waiting: names(waiting),
        }
    }

    pub(super) fn rotations(&self, names: &[String]) -> Vec<RotationStatus> {
        let mut objects: Vec<_> = self
            .core
            .rotations()
            .filter(|object| names.is_empty() || names.contains(&object.name))
            .collect();
        objects.sort_by_key(|object| (object.created, &object.name));
        objects
            .into_iter()
            .filter_map(|object| self.rotation(object))
            .collect()
    }

    fn rotation(&self, object: &RotationObject) -> Option<RotationStatus> {
        let standing = self.core.machine().standing(&object.name)?;
        let (progress, counts) = (standing.progress, standing.counts);
        let exceptions = progress.plan.iter().filter_map(|(node, planned)| {
            let (reason, message) = exception_of(planned.outcome.as_ref()?);
            Some(RotationException {
                node: node.to_string(),
                reason: reason.into(),
                message,
            })
        });
        let nodes = standing.nodes.iter().map(|(node, standing, peer)| RotationNode {
            node: node.to_string(),
            phase: phase(*standing).into(),
            waiting_for: peer.map(ToString::to_string).unwrap_or_default(),
        });
        let waited_for = waiting_for(standing.nodes.iter().filter_map(|(_, _, peer)| *peer));
        Some(RotationStatus {
            name: object.name.clone(),
            reason: object.reason.clone(),
            phase: phase_name(progress.phase).into(),
            run: progress.run,
            created_unix_ms: i64::try_from(object.created).unwrap_or(i64::MAX),
            started_unix_ms: ms(progress.started),
            completed_unix_ms: ms(progress.completed),
            counts: Some(RotationCounts {
                total: counts.total,
                pending: counts.pending,
                preparing: counts.preparing,
                verifying: counts.verifying,
                switching: counts.switching,
                draining: counts.draining,
                retiring: counts.retiring,
                done: counts.done,
                failed: counts.failed,
                gone: counts.gone,
            }),
            message: match &waited_for {
                Some(peer) if !progress.phase.is_over() => format!("waiting for node {peer}"),
                _ => format!("{} of {} nodes have new keys", counts.done, counts.total),
            },
            waiting_for: waited_for.unwrap_or_default(),
            exceptions: exceptions.collect(),
            nodes: nodes.collect(),
            abort: object.spec.abort,
            every: object.every.clone(),
        })
    }

    pub(super) fn revoke(
        &mut self,
        node: &NodeName,
        reason: &str,
        reply: oneshot::Sender<Result<Revoked, String>>,
    ) {
        match self.core.revoke(clock::monotonic_ms(), node, reason) {
            Ok(uid) => self.revoking.push((node.clone(), uid, reply)),
            // The asker may be gone; that is its business.
            Err(refusal) => drop(reply.send(Err(refusal))),
        }
    }

    /// Tells who asked for revocations as soon as what was just sent to the publisher is done.
    pub(super) fn answer_revoked(&mut self) {
        for (node, uid, reply) in self.revoking.drain(..) {
            let (done, flushed) = oneshot::channel();
            let object = Object::Node(StoredNode {
                name: node,
                order: 0,
                record: None,
                since: Default::default(),
                revoked: vec![],
            });
            // A publisher that is gone drops it, and the asker hears of that.
            let _ = self.orders.send(Order::Flush(ObjectName::of(&object), done));
            // The asker may be gone; that is its business.
            let _ = reply.send(Ok((uid, flushed)));
        }
    }

    /// Outputs that are not for the publisher; gives back one that is.
    pub(super) fn take_keys(&mut self, output: Output) -> Option<Output> {
        match output {
            Output::WriteKeys { was, node } => {
                // A writer that is gone ends with the term.
                let _ = self.shell.keys.send(Write { was, node });
            }
            Output::Rotation(name) => self.rotation_statuses.changed(name),
            Output::Note {
                node,
                reason,
                message,
            } => {
                let about = self.about(&node);
                self.shell.notes.say(Note {
                    about,
                    reason,
                    message,
                });
            }
            other => return Some(other),
        }
        None
    }

    /// A Node as what an Event is about.
    pub(super) fn about(&self, node: &NodeName) -> About {
        About::Node(node.clone(), self.core.node_uid(node).cloned())
    }

    pub(super) fn write_rotations(&mut self) {
        for wanted in self.rotation_statuses.take(&self.core) {
            // A writer that is gone ends with the term.
            let _ = self.shell.rotations.send(wanted);
        }
    }
}
