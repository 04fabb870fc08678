//! Questions to agents on behalf of an operator who asked keyd.

use std::collections::BTreeMap;

use tokio::sync::oneshot;
use warren_keyd_core::SessionId;

/// Questions that may be open at a time.
const MAX_OPEN: usize = 1024;

/// Why there is no response.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AskError {
    /// No Node has this name.
    #[error("node {0} does not exist: `warren status` lists the nodes")]
    UnknownNode(String),
    /// Its agent has no stream.
    #[error("the agent of node {0} is not connected to keyd: ask it on its node, or look why it is away")]
    NotConnected(String),
    /// Its stream ended before it answered.
    #[error("the agent left before it answered: try again")]
    Left,
    /// Nothing came in time.
    #[error("the agent of node {0} did not answer within 5 seconds")]
    TimedOut(String),
    /// It has no response, and says why.
    #[error("the agent refuses: {0}")]
    Refused(String),
    /// Too many others are waiting.
    #[error("{MAX_OPEN} questions to agents are open: try again")]
    TooMany,
}

/// Where the response goes.
pub(crate) type Reply = oneshot::Sender<Result<String, AskError>>;

/// Open questions.
#[derive(Debug, Default)]
pub(crate) struct Questions {
    open: BTreeMap<u64, (SessionId, Reply)>,
    last: u64,
}

impl Questions {
    /// The number of a new question to the agent of a stream; `None` after answering that there are too many.
    pub(crate) fn ask(&mut self, session: SessionId, reply: Reply) -> Option<u64> {
        self.forget_abandoned();
        if self.open.len() >= MAX_OPEN {
            // The asker may be gone; that is its business. So below.
            let _ = reply.send(Err(AskError::TooMany));
            return None;
        }
        self.last += 1;
        self.open.insert(self.last, (session, reply));
        Some(self.last)
    }

    /// An agent answers. What was not asked, or another agent was asked, is ignored.
    pub(crate) fn answer(&mut self, session: SessionId, id: u64, answer: Result<String, String>) {
        if self.open.get(&id).is_none_or(|(asked, _)| *asked != session) {
            return;
        }
        if let Some((_, reply)) = self.open.remove(&id) {
            let _ = reply.send(answer.map_err(AskError::Refused));
        }
    }

    /// A stream ended.
    pub(crate) fn left(&mut self, session: SessionId) {
        for (_, (_, reply)) in self.open.extract_if(.., |_, (asked, _)| *asked == session) {
            let _ = reply.send(Err(AskError::Left));
        }
    }

    /// Askers that have given up.
    pub(crate) fn forget_abandoned(&mut self) {
        self.open.retain(|_, (_, reply)| !reply.is_closed());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_agent_that_was_asked_can_answer() {
        let mut questions = Questions::default();
        let (reply, mut response) = oneshot::channel();
        let id = questions.ask(SessionId(1), reply).unwrap();
        questions.answer(SessionId(2), id, Ok("lie".into()));
        questions.answer(SessionId(1), id + 1, Ok("nothing".into()));
        assert!(response.try_recv().is_err());
        questions.answer(SessionId(1), id, Ok("truth".into()));
        assert_eq!(response.try_recv().unwrap(), Ok("truth".into()));
        questions.answer(SessionId(1), id, Ok("again".into()));
    }

    #[test]
    fn an_agent_that_leaves_answers_nothing_and_abandoned_questions_are_forgotten() {
        let mut questions = Questions::default();
        let (reply, mut response) = oneshot::channel();
        questions.ask(SessionId(1), reply);
        let (abandoned, gone) = oneshot::channel();
        questions.ask(SessionId(2), abandoned);
        drop(gone);
        questions.left(SessionId(1));
        assert_eq!(response.try_recv().unwrap(), Err(AskError::Left));
        questions.forget_abandoned();
        assert!(questions.open.is_empty());
    }
}
