//! Keys of nodes: what agents prove, hold and see goes into the machine of rotations, what it decides comes out.

use std::collections::BTreeMap;

use warren_model::{NodeKeys, NodeName, NodeUid, PublicKey, SlotKey, keys::PairReport};

use super::{Core, revocations::Revocation};
use crate::{
    event::{Output, RotationObject, SessionId},
    nodes::Buried,
    rotation::{self, Machine, Progress},
    stored::{Object, StoredNode},
};

/// More keys than these no agent holds: two published ones, one on its way, and what it has not destroyed yet.
const HELD_KEYS: usize = 64;

impl Core {
    /// The incarnation of a node has changed, or its labels may have.
    pub(super) fn tell_machine(&mut self, now: u64, name: &NodeName, before: Option<&NodeUid>) {
        let keys = self.nodes.keys(name).cloned();
        let node = name.clone();
        match keys {
            Some(keys) if before != Some(&keys.uid) => {
                self.machine.handle(now, rotation::Event::Keys { node, keys });
            }
            None if before.is_some() => self.machine.handle(now, rotation::Event::Gone(node)),
            _ => {}
        }
        if let Some(labels) = self.nodes.labels(name) {
            let (node, labels) = (name.clone(), labels.clone());
            self.machine.handle(now, rotation::Event::Labels { node, labels });
        }
    }
    /// A stream of this node has begun, or its only one has ended.
    pub(super) fn stream_changed(&mut self, now: u64, node: NodeName, connected: bool) {
        self.proving.remove(&node);
        self.machine.handle(
            now,
            match connected {
                true => rotation::Event::Connected(node),
                false => rotation::Event::Disconnected(node),
            },
        );
    }
    pub(super) fn key_proved(&mut self, session: SessionId, slots: &[SlotKey; 2], now: u64) {
        let Some(node) = self.sessions.get(session).map(|session| session.node.clone()) else {
            return;
        };
        let public_key = slots[0].public_key;
        let known = self
            .nodes
            .keys(&node)
            .and_then(|keys| keys.key(slots[0].generation));
        let result = match known == Some(public_key) {
            true => Ok(()),
            false => self.nodes.may_have_key(&node, public_key, now),
        };
        let mut result = result.and_then(|()| self.machine.proved(&node, slots));
        // The first key is offered unasked and asked for: what is being written is not offered against the rules.
        if result.is_err() && self.proving.get(&node).is_some_and(|(_, key)| *key == public_key) {
            result = Ok(());
        }
        match result {
            Ok(()) if known == Some(public_key) => self.key_result(&node, session, public_key, Ok(()), now),
            Ok(()) => {
                self.nodes.claim_key(&node, public_key, now);
                self.proving.insert(node, (session, public_key));
            }
            Err(reason) => self.key_result(&node, session, public_key, Err(reason), now),
        }
    }
    fn key_result(
        &mut self,
        node: &NodeName,
        session: SessionId,
        public_key: PublicKey,
        result: Result<(), String>,
        now: u64,
    ) {
        match &result {
            Ok(()) => drop(self.refusals.remove(&(node.clone(), "key"))),
            Err(reason) => self.key_refused(now, node, reason),
        }
        self.out.push(Output::KeyResult {
            session,
            public_key,
            result,
        });
    }
    /// A key that is refused, also one that never got as far as a proof (malformed, low order, wrong proof).
    pub fn key_refused(&mut self, now: u64, node: &NodeName, reason: &str) {
        self.counters.refused_keys += 1;
        let sentence = format!("node {node} offers a key that is refused: {reason}");
        self.refusals
            .insert((node.clone(), "key"), (now, sentence.clone()));
        self.note(node, "KeyRefused", sentence);
    }
    pub(super) fn note(&mut self, node: &NodeName, reason: &'static str, message: String) {
        self.out.push(Output::Note {
            node: node.clone(),
            reason,
            message,
        });
    }
    pub(super) fn held(&mut self, now: u64, session: SessionId, mut keys: BTreeMap<u64, PublicKey>) {
        let Some(node) = self.sessions.get(session).map(|session| session.node.clone()) else {
            return;
        };
        if keys.len() > HELD_KEYS {
            let reason = format!("node {node} says that it holds more than {HELD_KEYS} keys");
            self.note(&node, "MessageRefused", reason.clone());
            return self.close(now, session, reason, false);
        }
        if let Some((key, owner)) = keys
            .values()
            .find_map(|key| Some((*key, self.nodes.owner_of(*key, &node)?)))
        {
            let sentence = format!("node {node} says that it holds key {key} of node {owner}");
            self.note(&node, "KeyRefused", sentence);
        }
        // Keys of a former incarnation, or of others, are none that this node could be asked for.
        keys.retain(|_, key| self.nodes.may_hold(&node, *key));
        self.machine.handle(now, rotation::Event::Held { node, keys });
    }
    pub(super) fn paths(&mut self, now: u64, session: SessionId, mut pairs: Vec<PairReport>) {
        let Some(node) = self.sessions.get(session).map(|session| session.node.clone()) else {
            return;
        };
        // Whoever reports of nodes that do not exist must not fill the memory with them.
        pairs.retain(|pair| pair.peer != node && self.nodes.uid(&pair.peer).is_some());
        self.machine.handle(now, rotation::Event::Report { node, pairs });
    }
    /// What the store has of a node after a write.
    pub(super) fn stored(&mut self, now: u64, stored: StoredNode) {
        let name = stored.name.clone();
        let found = self.nodes.found(&stored);
        if found {
            self.persisted_nodes.insert(name.clone(), stored);
        } else if self.nodes.uid(&name).is_some() {
            self.counters.set_back += 1;
            self.note(
                &name,
                "MeshNodeSetBack",
                format!("the MeshNode of node {name} is not what keyd wrote: somebody set it back; it is written anew"),
            );
            self.persisted_nodes.remove(&name);
            self.nodes.touch(&name);
        }
        let Some(keys) = self.nodes.keys(&name).cloned() else {
            return;
        };
        if let Some((session, key)) = self.proving.remove(&name) {
            let result = match keys.slots.iter().any(|slot| slot.public_key == key) {
                true => Ok(()),
                false => Err("it was not stored: wait until you are asked again".to_owned()),
            };
            if result.is_ok() {
                self.refusals.remove(&(name.clone(), "key"));
            }
            // Not the agent's fault: no alarm.
            self.out.push(Output::KeyResult {
                session,
                public_key: key,
                result,
            });
        }
        self.machine
            .handle(now, rotation::Event::Keys { node: name, keys });
    }
    pub(super) fn rotation_upsert(&mut self, now: u64, object: RotationObject) {
        let known = self.rotations.get(&object.name);
        let fresh = known.is_none_or(|known| known.uid != object.uid);
        if fresh && known.is_some() {
            self.rotation_delete(now, &object.name);
        }
        let progress = fresh.then(|| {
            let stored = self.recovered_rotations.remove(&object.name);
            let same = stored.filter(|(uid, _)| *uid == object.uid);
            same.map(|(_, progress)| progress).unwrap_or_default()
        });
        let event = rotation::Event::Rotation {
            name: object.name.clone(),
            created: object.created,
            spec: object.spec.clone(),
            progress,
        };
        self.machine.handle(now, event);
        self.rotations.insert(object.name.clone(), object);
    }
    pub(super) fn rotation_delete(&mut self, now: u64, name: &str) {
        if self.rotations.remove(name).is_some() {
            self.machine
                .handle(now, rotation::Event::RotationGone(name.to_owned()));
            let delete = Object::RotationDelete(name.to_owned());
            self.out.push(Output::Persist(delete));
        }
    }
    /// Rotations that were stored and are not there any more.
    pub(super) fn forget_rotations(&mut self) {
        for (name, _) in std::mem::take(&mut self.recovered_rotations) {
            self.out.push(Output::Persist(Object::RotationDelete(name)));
        }
    }
    pub(super) fn rotation_progress(&mut self, now: u64, name: String, uid: &str, progress: Progress) {
        if let Some(object) = self.rotations.get(&name).filter(|object| object.uid == uid) {
            let (created, spec) = (object.created, object.spec.clone());
            let event = rotation::Event::Rotation {
                name,
                created,
                spec,
                progress: Some(progress),
            };
            self.machine.handle(now, event);
        }
    }
    /// Lets the machine decide. Revocations are made at once, the rest is returned.
    pub(super) fn turn(&mut self, now: u64) -> Vec<Output> {
        let mut out = vec![];
        for output in self.machine.poll(now, self.unix_seconds) {
            match output {
                rotation::Output::AskKey { node, generation } => {
                    if let Some(session) = self.sessions.of_node(&node) {
                        out.push(Output::AskKey { session, generation });
                    }
                }
                rotation::Output::Forget { node, forget } => {
                    if let Some(session) = self.sessions.of_node(&node) {
                        out.push(Output::ForgetPsk { session, forget });
                    }
                }
                rotation::Output::Write { node, was, keys } => out.extend(self.write(now, &node, was, &keys)),
                rotation::Output::Revoke(node) => {
                    // Gone meanwhile: then it is what was wanted.
                    let _ = self.revoke(now, &node, "it did not follow a rotation in time");
                }
                rotation::Output::Status { rotation, .. } => out.push(Output::Rotation(rotation)),
                rotation::Output::Note {
                    node,
                    reason,
                    message,
                } => out.push(Output::Note {
                    node,
                    reason,
                    message,
                }),
            }
        }
        out
    }
    fn write(&mut self, now: u64, node: &NodeName, was: NodeKeys, keys: &NodeKeys) -> Option<Output> {
        let stored = self.nodes.with_keys(node, keys, self.unix_seconds);
        if stored.is_none() {
            // Nothing to write to: the machine goes on from what there is.
            self.tell_machine(now, node, None);
        }
        self.counters.key_writes += u64::from(stored.is_some());
        stored.map(|stored| Output::WriteKeys {
            was,
            node: Box::new(stored),
        })
    }
    /// Removes a node's keys everywhere, for ever. Returns the UID of the incarnation that ends.
    pub fn revoke(&mut self, now: u64, name: &NodeName, reason: &str) -> Result<NodeUid, String> {
        let uid = self.nodes.uid(name).cloned();
        let Some(uid) = uid.filter(|_| self.nodes.revoke(name)) else {
            return Err(format!("there is no node {name}"));
        };
        self.note(
            name,
            "KeysRevoked",
            format!("the keys of node {name} are revoked: {reason}"),
        );
        self.node_gone(name, "was revoked", now);
        self.machine.handle(now, rotation::Event::Gone(name.clone()));
        self.tell_machine(now, name, Some(&uid));
        Ok(uid)
    }
    /// Remembers who was buried; what was published by then had its keys.
    pub(super) fn note_buried(&mut self) {
        for Buried { node, uid, keys } in self.nodes.take_buried() {
            self.counters.revocations += 1;
            self.revocations.add(Revocation {
                node,
                uid,
                keys,
                version: 0,
            });
        }
    }
    /// Wall clock, Unix seconds: for schedules and for times that people see. Call before [`Self::poll`].
    pub fn set_unix_time(&mut self, seconds: u64) {
        self.unix_seconds = seconds;
    }
    /// The rotations' machine, to look at.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }
    /// The rotations' objects.
    pub fn rotations(&self) -> impl Iterator<Item = &RotationObject> {
        self.rotations.values()
    }
    /// A rotation's object.
    pub fn rotation(&self, name: &str) -> Option<&RotationObject> {
        self.rotations.get(name)
    }
    /// Nodes that exist with their keys, and when each published generation was accepted, Unix seconds.
    pub fn node_keys(&self) -> impl Iterator<Item = (&NodeName, &NodeKeys, &BTreeMap<u64, u64>)> {
        self.nodes.all_keys()
    }
    /// Incarnations of nodes whose keys are void, the newest first.
    pub fn revocations(&self) -> impl Iterator<Item = &Revocation> {
        self.revocations.iter()
    }
    /// Which nodes that exist have applied a version of this term (first), and which have not.
    pub fn acknowledged(&self, version: u64) -> (Vec<NodeName>, Vec<NodeName>) {
        let names = self.nodes.all_keys().map(|(name, ..)| name.clone());
        names.partition(|name| {
            let applied = self.sessions.applied_by(name);
            version > 0 && applied.is_some_and(|applied| applied >= version)
        })
    }
}
