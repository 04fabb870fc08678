//! What agents say.

use warren_model::{Datapath, NodeName, NodeUid};

use super::{Added, Core};
use crate::event::{AgentEvent, EndpointError, Output, SessionId};

impl Core {
    /// Forgets a stream.
    pub(super) fn end(&mut self, now: u64, session: SessionId) {
        if let Some(closed) = self.sessions.close(session) {
            self.stream_changed(now, closed.node, false);
        }
    }
    pub(super) fn close(&mut self, now: u64, session: SessionId, reason: String, retry: bool) {
        self.end(now, session);
        self.waiting.retain(|waiting| waiting.session != session);
        self.added.retain(|added| added.session != session);
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
                self.connected(now, session, node, &uid, datapath, resume);
            }
            AgentEvent::Disconnected(session) => {
                self.end(now, session);
                self.waiting.retain(|waiting| waiting.session != session);
                self.added.retain(|added| added.session != session);
            }
            AgentEvent::KeyProved { session, slots } => self.key_proved(session, &slots, now),
            AgentEvent::Held { session, keys } => self.held(now, session, keys),
            AgentEvent::Paths { session, pairs } => self.paths(now, session, pairs),
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
                let Some(node) = self.sessions.get(session).map(|session| session.node.clone()) else {
                    return;
                };
                let identities = &mut self.identities;
                if let Err(owner) = self.endpoints.delete(&node, &pod, &addresses, identities, now) {
                    let sentence =
                        format!("node {node} reports the end of pod {pod}, which runs on node {owner}");
                    self.counters.refused_endpoints += 1;
                    self.note(&node, "EndpointRefused", sentence);
                }
            }
            AgentEvent::Applied {
                session,
                epoch,
                version,
            } => {
                let published = (self.settings.epoch, self.published.version());
                if (epoch, version) > published
                    && let Some(node) = self.sessions.get(session).map(|session| session.node.clone())
                {
                    let sentence = format!(
                        "node {node} acknowledges directory {epoch}/{version}, and {}/{} is the newest",
                        published.0, published.1
                    );
                    self.note(&node, "MessageRefused", sentence);
                }
                if epoch == published.0 {
                    self.sessions.applied(session, version, published.1);
                }
            }
        }
    }
    pub(super) fn connected(
        &mut self,
        now: u64,
        session: SessionId,
        node: NodeName,
        uid: &NodeUid,
        datapath: Option<Datapath>,
        resume: (u64, u64),
    ) {
        let refusal = match self.nodes.uid(&node) {
            _ if !self.synced => Some(("keyd is still reading the cluster's objects".to_owned(), true)),
            None => Some((format!("node {node} does not exist"), false)),
            Some(known) if known != uid => Some((
                format!("node {node} has UID {known} now, not {uid}: enrol it again"),
                false,
            )),
            Some(_) => None,
        };
        if let Some((reason, retry)) = refusal {
            self.counters.refused_streams += 1;
            if !retry {
                self.note(&node, "StreamRefused", reason.clone());
            }
            return self.out.push(Output::Close {
                session,
                reason,
                retry,
            });
        }
        self.nodes.set_datapath(&node, datapath);
        if let Some(older) = self.sessions.open(session, node.clone(), resume) {
            let reason = format!("a newer stream of node {node} replaces this one");
            self.close(now, older, reason, false);
        }
        self.stream_changed(now, node, true);
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
                self.refusals
                    .insert((name.clone(), "endpoint"), (now, sentence.clone()));
                self.note(&name, "EndpointRefused", sentence);
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
