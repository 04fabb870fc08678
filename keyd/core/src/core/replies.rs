//! Answers that wait for a version.

use warren_model::IdentityId;

use super::{Added, Core};
use crate::{
    event::{CatchUp, EndpointError, Output, SessionId},
    sessions::Waiting,
};

impl Core {
    /// Catches new streams up.
    pub(super) fn greet(&mut self) {
        let version = self.published.version();
        for (session, node, (epoch, resume)) in self.sessions.take_new() {
            let increment = (epoch == self.settings.epoch)
                .then(|| self.published.since(resume))
                .flatten();
            let from = increment.map_or(CatchUp::Snapshot, CatchUp::Increment);
            self.out.push(Output::CatchUp {
                session,
                node,
                version,
                from,
            });
        }
    }
    /// Decides for every ADD of this round whether its addresses are free of their former owners.
    pub(super) fn answer_added(&mut self, now: u64) {
        let acknowledged = self.sessions.acknowledged();
        for Added {
            session,
            request_id,
            pod,
            addresses,
        } in std::mem::take(&mut self.added)
        {
            let owned = self.endpoints.owns_all(&pod, &addresses);
            let identity = self
                .endpoints
                .identity_of(&pod)
                .filter(|identity| owned && *identity != IdentityId::UNKNOWN);
            let Some(identity) = identity else {
                let message = format!("pod {pod} lost its address or has no identity: try again");
                let result = Err(EndpointError { message, retry: true });
                self.out.push(Output::EndpointResult {
                    session,
                    request_id,
                    result,
                });
                continue;
            };
            match self
                .published
                .retired_at(&addresses)
                .filter(|version| *version > acknowledged)
            {
                None => self.out.push(Output::EndpointResult {
                    session,
                    request_id,
                    result: Ok(identity),
                }),
                Some(version) => {
                    let deadline = now + self.settings.acknowledge_ms;
                    self.waiting.push(Waiting {
                        session,
                        request_id,
                        identity,
                        version,
                        deadline,
                    });
                }
            }
        }
    }
    pub(super) fn answer_waiting(&mut self, now: u64) {
        if let Some(version) = self
            .waiting
            .iter()
            .filter(|w| w.deadline <= now)
            .map(|w| w.version)
            .max()
        {
            for session in self.sessions.mark_laggards(version) {
                let reason = format!("version {version} was not acknowledged in time: reconnect");
                self.close_laggard(now, session, reason);
            }
        }
        let acknowledged = self.sessions.acknowledged();
        let out = &mut self.out;
        self.waiting.retain(|waiting| {
            let Waiting {
                session,
                request_id,
                identity,
                version,
                deadline,
            } = *waiting;
            if version <= acknowledged && deadline > now {
                out.push(Output::EndpointResult {
                    session,
                    request_id,
                    result: Ok(identity),
                });
                return false;
            }
            if deadline <= now {
                let message = "another node has not acknowledged that the address has a new owner".to_owned();
                let result = Err(EndpointError { message, retry: true });
                out.push(Output::EndpointResult {
                    session,
                    request_id,
                    result,
                });
            }
            deadline > now
        });
        self.published.forget_retired(acknowledged);
    }
    /// Ends a laggard's stream; its own waiting requests stay answered.
    pub(super) fn close_laggard(&mut self, now: u64, session: SessionId, reason: String) {
        self.end(now, session);
        self.out.push(Output::Close {
            session,
            reason,
            retry: true,
        });
    }
}
