//! What agents say.

use warren_model::{Datapath, NodeName, NodeUid, SlotKey};

use super::{Added, Core};
use crate::event::{AgentEvent, EndpointError, Output, SessionId};

impl Core {
    pub(super) fn close(&mut self, session: SessionId, reason: String, retry: bool) {
        if let Some(closed) = self.sessions.close(session) {
            self.waiting.retain(|waiting| waiting.session != session);
            self.added.retain(|added| added.session != session);
            drop(closed);
        }
        self.out.push(Output::Close {
            session,
            reason,
            retry,
        });
    }
    pub(super) fn agent(&mut self, now: u64, event: AgentEvent) {
        match event {
            AgentEvent::Connected {
                session,
                node,
                uid,
                datapath,
                resume,
            } => {
                self.connected(session, node, uid, datapath, resume);
            }
            AgentEvent::Disconnected(session) => {
                self.sessions.close(session);
                self.waiting.retain(|waiting| waiting.session != session);
                self.added.retain(|added| added.session != session);
            }
            AgentEvent::KeyProved { session, slot } => self.key_proved(session, slot, now),
            AgentEvent::EndpointAdd {
                session,
                request_id,
                pod,
                addresses,
            } => {
                self.endpoint_add(
                    Added {
                        session,
                        request_id,
                        pod,
                        addresses,
                    },
                    now,
                );
            }
            AgentEvent::EndpointDelete {
                session,
                pod,
                addresses,
            } => {
                if let Some(node) = self.sessions.get(session).map(|session| session.node.clone()) {
                    self.endpoints
                        .delete(&node, &pod, &addresses, &mut self.identities, now);
                }
            }
            AgentEvent::Applied {
                session,
                epoch,
                version,
            } => {
                if epoch == self.settings.epoch {
                    self.sessions.applied(session, version, self.published.version());
                }
            }
        }
    }
    pub(super) fn connected(
        &mut self,
        session: SessionId,
        node: NodeName,
        uid: NodeUid,
        datapath: Option<Datapath>,
        resume: (u64, u64),
    ) {
        let refusal = match self.nodes.uid(&node) {
            _ if !self.synced => Some(("keyd is still reading the cluster's objects".to_owned(), true)),
            None => Some((format!("node {node} does not exist"), false)),
            Some(known) if *known != uid => Some((
                format!("node {node} has UID {known} now, not {uid}: enrol it again"),
                false,
            )),
            Some(_) => None,
        };
        if let Some((reason, retry)) = refusal {
            self.counters.refused_streams += 1;
            return self.out.push(Output::Close {
                session,
                reason,
                retry,
            });
        }
        self.nodes.set_datapath(&node, datapath);
        if let Some(older) = self.sessions.open(session, node.clone(), resume) {
            self.close(
                older,
                format!("a newer stream of node {node} replaces this one"),
                false,
            );
        }
    }
    pub(super) fn key_proved(&mut self, session: SessionId, slot: SlotKey, now: u64) {
        let Some(node) = self.sessions.get(session).map(|session| session.node.clone()) else {
            return;
        };
        let public_key = slot.public_key;
        let result = self.nodes.put_key(&node, slot, now);
        match &result {
            Ok(()) => drop(self.refusals.remove(&(node, "key"))),
            Err(reason) => {
                self.counters.refused_keys += 1;
                let sentence = format!("node {node} offers a key that is refused: {reason}");
                self.refusals.insert((node, "key"), (now, sentence));
            }
        }
        self.out.push(Output::KeyResult {
            session,
            public_key,
            result,
        });
    }
    /// A key that never got as far as a proof (malformed, low order, wrong proof): shown and counted like the
    /// others.
    pub fn key_refused(&mut self, now: u64, node: &NodeName, reason: &str) {
        self.counters.refused_keys += 1;
        let sentence = format!("node {node} offers a key that is refused: {reason}");
        self.refusals.insert((node.clone(), "key"), (now, sentence));
    }
    pub(super) fn endpoint_add(&mut self, added: Added, now: u64) {
        let Some(name) = self
            .sessions
            .get(added.session)
            .map(|session| session.node.clone())
        else {
            return;
        };
        self.nodes.settle();
        let result = match self.nodes.checked().get(&name) {
            Some(node) => self.endpoints.add(node, &added.pod, &added.addresses),
            None => Err(EndpointError {
                message: format!("node {name} is not a member"),
                retry: true,
            }),
        };
        match result {
            Ok(()) => {
                self.refusals.remove(&(name, "endpoint"));
                self.added.push(added);
            }
            Err(error) => {
                self.counters.refused_endpoints += 1;
                let sentence = format!(
                    "node {name} reports an endpoint that is refused: {}",
                    error.message
                );
                self.refusals.insert((name, "endpoint"), (now, sentence));
                let (session, request_id) = (added.session, added.request_id);
                self.out.push(Output::EndpointResult {
                    session,
                    request_id,
                    result: Err(error),
                });
            }
        }
    }
}
