//! What is worth an Event on a Node: said in the log, and in a cluster to the API server. Nothing waits for it; what cannot be
//! said in time is left out.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use tokio::sync::mpsc;
use warren_model::{NodeName, NodeUid};

/// Events that may wait for the API server.
const QUEUE: usize = 1024;

/// An Event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Note {
    pub(crate) node: NodeName,
    pub(crate) uid: Option<NodeUid>,
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

/// Where Events go. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Notes(Option<mpsc::Sender<Note>>);

impl Notes {
    /// To the API server as well.
    pub(crate) fn to_api(client: Client, keyd_id: &str) -> Self {
        let (notes, mut queue) = mpsc::channel::<Note>(QUEUE);
        let reporter = Reporter {
            controller: "warren-keyd".into(),
            instance: Some(keyd_id.to_owned()),
        };
        let recorder = Recorder::new(client, reporter);
        tokio::spawn(async move {
            while let Some(note) = queue.recv().await {
                let (event, node) = event(&note);
                if let Err(error) = recorder.publish(&event, &node).await {
                    tracing::warn!(node = %note.node, reason = note.reason, "cannot write an Event: {error}");
                }
            }
        });
        Self(Some(notes))
    }

    /// Says it.
    pub(crate) fn say(&self, note: Note) {
        let Note {
            node,
            reason,
            message,
            ..
        } = &note;
        match is_alarm(reason) {
            true => tracing::warn!(%node, reason, "{message}"),
            false => tracing::info!(%node, reason, "{message}"),
        }
        if let Some(notes) = &self.0 {
            // Full: the log has it.
            let _ = notes.try_send(note);
        }
    }
}

fn is_alarm(reason: &str) -> bool {
    !matches!(reason, "KeyRotated" | "KeyRotationAborted")
}

fn event(note: &Note) -> (Event, ObjectReference) {
    let event = Event {
        type_: match is_alarm(note.reason) {
            true => EventType::Warning,
            false => EventType::Normal,
        },
        reason: note.reason.into(),
        note: Some(note.message.chars().take(1024).collect()),
        action: "Keys".into(),
        secondary: None,
    };
    let node = ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Node".into()),
        name: Some(note.node.to_string()),
        uid: note.uid.as_ref().map(ToString::to_string),
        ..ObjectReference::default()
    };
    (event, node)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_went_wrong_is_a_warning_about_the_node() {
        let note = |reason| Note {
            node: "a".into(),
            uid: Some("u".into()),
            reason,
            message: "m".repeat(2000),
        };
        let (failed, node) = event(&note("KeyRotationFailed"));
        assert!(matches!(failed.type_, EventType::Warning));
        assert_eq!(failed.note.unwrap().len(), 1024, "the API server's limit");
        assert_eq!(
            (node.kind.as_deref(), node.name.as_deref(), node.uid.as_deref()),
            (Some("Node"), Some("a"), Some("u"))
        );
        let (done, _) = event(&note("KeyRotated"));
        assert!(matches!(done.type_, EventType::Normal));
    }
}
