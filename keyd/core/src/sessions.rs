//! Streams of agents, what they have acknowledged, and the endpoint replies that wait for it.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use warren_model::{IdentityId, NodeName};

use crate::event::SessionId;

/// A live stream.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) node: NodeName,
    /// The newest acknowledged version of this epoch.
    applied: u64,
    /// Position it resumes from, until it has been caught up.
    pub(crate) greet: Option<(u64, u64)>,
}

/// A CNI ADD whose address had another owner a moment ago.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Waiting {
    pub(crate) session: SessionId,
    pub(crate) request_id: u64,
    pub(crate) identity: IdentityId,
    pub(crate) version: u64,
    pub(crate) deadline: u64,
}

/// All live streams, at most one per node.
#[derive(Debug, Default)]
pub(crate) struct Sessions {
    by_id: BTreeMap<SessionId, Session>,
    by_node: HashMap<NodeName, SessionId>,
    /// Nodes that once let an ADD time out. They are not waited for until they acknowledge the newest version
    /// again: one node that never answers must not stop the pods of all others.
    laggards: BTreeSet<NodeName>,
}

impl Sessions {
    /// Registers a stream; returns the older one of the same node.
    pub(crate) fn open(&mut self, id: SessionId, node: NodeName, resume: (u64, u64)) -> Option<SessionId> {
        let older = self.by_node.insert(node.clone(), id).filter(|older| *older != id);
        if let Some(older) = older {
            self.by_id.remove(&older);
        }
        self.by_id.insert(
            id,
            Session {
                node,
                applied: 0,
                greet: Some(resume),
            },
        );
        older
    }

    pub(crate) fn close(&mut self, id: SessionId) -> Option<Session> {
        let session = self.by_id.remove(&id)?;
        if self.by_node.get(&session.node) == Some(&id) {
            self.by_node.remove(&session.node);
        }
        Some(session)
    }

    pub(crate) fn get(&self, id: SessionId) -> Option<&Session> {
        self.by_id.get(&id)
    }

    pub(crate) fn of_node(&self, node: &NodeName) -> Option<SessionId> {
        self.by_node.get(node).copied()
    }

    /// Takes the streams that have not been caught up yet.
    pub(crate) fn take_new(&mut self) -> Vec<(SessionId, NodeName, (u64, u64))> {
        self.by_id
            .iter_mut()
            .filter_map(|(id, session)| Some((*id, session.node.clone(), session.greet.take()?)))
            .collect()
    }

    /// An acknowledgement of this epoch; never goes back, never beyond what was published.
    pub(crate) fn applied(&mut self, id: SessionId, version: u64, published: u64) {
        let Some(session) = self.by_id.get_mut(&id) else {
            return;
        };
        if version <= published {
            session.applied = session.applied.max(version);
        }
        if session.applied == published {
            self.laggards.remove(&session.node);
        }
    }

    /// The newest version that a node's agent has acknowledged; `None` where it has no stream.
    pub(crate) fn applied_by(&self, node: &NodeName) -> Option<u64> {
        let session = self.of_node(node).and_then(|id| self.by_id.get(&id))?;
        Some(session.applied)
    }

    /// The version that every connected agent, laggards aside, has acknowledged.
    pub(crate) fn acknowledged(&self) -> u64 {
        let waited_for = self
            .by_id
            .values()
            .filter(|session| !self.laggards.contains(&session.node));
        waited_for
            .map(|session| session.applied)
            .min()
            .unwrap_or(u64::MAX)
    }

    /// Marks everybody behind `version` as laggard and returns their streams.
    pub(crate) fn mark_laggards(&mut self, version: u64) -> Vec<SessionId> {
        let behind: Vec<_> = self
            .by_id
            .iter()
            .filter(|(_, session)| session.applied < version && !self.laggards.contains(&session.node))
            .map(|(id, session)| (*id, session.node.clone()))
            .collect();
        self.laggards.extend(behind.iter().map(|(_, node)| node.clone()));
        behind.into_iter().map(|(id, _)| id).collect()
    }

    pub(crate) fn forget_node(&mut self, node: &NodeName) {
        self.laggards.remove(node);
    }

    pub(crate) fn problems(&self) -> impl Iterator<Item = String> + '_ {
        self.laggards.iter().map(|node| {
            format!(
                "node {node} does not acknowledge updates: new pods no longer wait for it; look at its agent"
            )
        })
    }
}
