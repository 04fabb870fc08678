//! What is worth an Event: said in the log, counted, and in a cluster said to the API server. Nothing waits for it; what cannot
//! be said in time is left out, and whoever tries a thousand things makes no thousand Events.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use tokio::sync::mpsc;
use warren_crds::STATE_NAME;
use warren_model::{NodeName, NodeUid};

use crate::{clock, metrics::Metrics};

/// Events that may wait for the API server.
const QUEUE: usize = 1024;

/// What an Event is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum About {
    /// A Node.
    Node(NodeName, Option<NodeUid>),
    /// What is no Node's: strangers, objects of nobody. Its Events are those of the MeshState.
    Mesh,
}

impl std::fmt::Display for About {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Node(name, _) => write!(f, "node {name}"),
            Self::Mesh => f.write_str("the mesh"),
        }
    }
}

/// An Event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Note {
    pub(crate) about: About,
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

/// Where Events go. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Notes {
    events: Option<mpsc::Sender<Note>>,
    metrics: Metrics,
    limiter: Arc<Mutex<Limiter>>,
}

impl Notes {
    /// To log and metrics alone.
    pub(crate) fn new(metrics: Metrics) -> Self {
        Self {
            events: None,
            metrics,
            limiter: Arc::default(),
        }
    }

    /// To the API server as well.
    pub(crate) fn to_api(client: Client, keyd_id: &str, metrics: Metrics) -> Self {
        let (notes, mut queue) = mpsc::channel::<Note>(QUEUE);
        let reporter = Reporter {
            controller: "warren-keyd".into(),
            instance: Some(keyd_id.to_owned()),
        };
        tokio::spawn(async move {
            while let Some(note) = queue.recv().await {
                let (event, object) = event(&note);
                // A recorder counts what has the same reason and object as one Event, with the first one's message. Here each
                // message is to be read; there are not too many, see `Limiter`.
                let recorder = Recorder::new(client.clone(), reporter.clone());
                if let Err(error) = recorder.publish(&event, &object).await {
                    tracing::warn!(about = %note.about, reason = note.reason, "cannot write an Event: {error}");
                }
            }
        });
        Self {
            events: Some(notes),
            ..Self::new(metrics)
        }
    }

    /// Says it.
    pub(crate) fn say(&self, note: Note) {
        let Note {
            about,
            reason,
            message,
        } = &note;
        if is_alarm(reason) {
            self.metrics.alarm(reason);
            let mut limiter = self.limiter.lock().unwrap_or_else(PoisonError::into_inner);
            if !limiter.allows(&note, clock::monotonic_ms()) {
                return tracing::debug!(%about, reason, "{message}");
            }
            drop(limiter);
            tracing::warn!(%about, reason, "{message}");
        } else {
            tracing::info!(%about, reason, "{message}");
        }
        if let Some(events) = &self.events {
            // Full: the log has it.
            let _ = events.try_send(note);
        }
    }

    /// Something is not as it should be, by this reason in camel case.
    pub(crate) fn alarm(&self, about: About, reason: &'static str, message: impl Into<String>) {
        // What strangers say of themselves may be in it.
        let message = message.into().chars().filter(|c| !c.is_control()).collect();
        self.say(Note {
            about,
            reason,
            message,
        });
    }
}

/// How many different alarms about one object are said at once, and how many a second later on.
const BURST: u64 = 64;
const PER_SECOND: u64 = 1;
/// The same alarm is said again after this time, milliseconds.
const AGAIN_MS: u64 = 60_000;
/// More objects than these are not told apart.
const OBJECTS: usize = 4096;

/// Which alarms are said; all are counted.
#[derive(Debug, Default)]
struct Limiter {
    objects: HashMap<About, Bucket>,
}

#[derive(Debug)]
struct Bucket {
    tokens: u64,
    at: u64,
    said: HashMap<(&'static str, String), u64>,
}

impl Limiter {
    fn allows(&mut self, note: &Note, now: u64) -> bool {
        let about = match &note.about {
            // Another incarnation is no other object.
            About::Node(name, _) => About::Node(name.clone(), None),
            About::Mesh => About::Mesh,
        };
        if !self.objects.contains_key(&about) && self.objects.len() >= OBJECTS {
            self.objects
                .retain(|_, bucket| now.saturating_sub(bucket.at) < AGAIN_MS);
            if self.objects.len() >= OBJECTS {
                return false;
            }
        }
        let bucket = self.objects.entry(about).or_insert_with(|| Bucket {
            tokens: BURST,
            at: now,
            said: HashMap::new(),
        });
        let passed = now.saturating_sub(bucket.at) / 1000;
        bucket.tokens = (bucket.tokens + passed * PER_SECOND).min(BURST);
        bucket.at += passed * 1000;
        bucket.said.retain(|_, at| now.saturating_sub(*at) < AGAIN_MS);
        let what = (note.reason, note.message.clone());
        if bucket.tokens == 0 || bucket.said.contains_key(&what) {
            return false;
        }
        bucket.tokens -= 1;
        bucket.said.insert(what, now);
        true
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
    let object = match &note.about {
        About::Node(name, uid) => ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Node".into()),
            name: Some(name.to_string()),
            uid: uid.as_ref().map(ToString::to_string),
            ..ObjectReference::default()
        },
        About::Mesh => ObjectReference {
            api_version: Some("warren.dev/v1alpha1".into()),
            kind: Some("MeshState".into()),
            name: Some(STATE_NAME.into()),
            ..ObjectReference::default()
        },
    };
    (event, object)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(about: About, reason: &'static str, message: &str) -> Note {
        Note {
            about,
            reason,
            message: message.to_owned(),
        }
    }

    fn node(name: &str) -> About {
        About::Node(name.into(), Some("u".into()))
    }

    #[test]
    fn what_went_wrong_is_a_warning_about_the_node_or_the_mesh() {
        let (failed, object) = event(&note(node("a"), "KeyRotationFailed", &"m".repeat(2000)));
        assert!(matches!(failed.type_, EventType::Warning));
        assert_eq!(failed.note.unwrap().len(), 1024, "the API server's limit");
        assert_eq!(
            (
                object.kind.as_deref(),
                object.name.as_deref(),
                object.uid.as_deref()
            ),
            (Some("Node"), Some("a"), Some("u"))
        );
        let (done, _) = event(&note(node("a"), "KeyRotated", "m"));
        assert!(matches!(done.type_, EventType::Normal));
        let (_, object) = event(&note(About::Mesh, "AuthenticationRefused", "m"));
        assert_eq!(
            (object.kind.as_deref(), object.name.as_deref()),
            (Some("MeshState"), Some("warren"))
        );
    }

    #[test]
    fn a_flood_of_alarms_is_counted_but_not_said() {
        let mut limiter = Limiter::default();
        let mut said = 0;
        for n in 0..10_000 {
            said += u64::from(limiter.allows(&note(node("a"), "KeyRefused", &n.to_string()), 5));
        }
        assert_eq!(said, BURST);
        // Others are heard, and later this one as well.
        assert!(limiter.allows(&note(node("b"), "KeyRefused", "x"), 5));
        assert!(!limiter.allows(&note(node("b"), "KeyRefused", "x"), 5));
        assert!(!limiter.allows(&note(About::Node("b".into(), None), "KeyRefused", "x"), 5));
        assert!(limiter.allows(&note(node("b"), "EndpointRefused", "x"), 5));
        assert!(limiter.allows(&note(node("a"), "KeyRefused", "y"), 1005));
        assert!(limiter.allows(&note(node("b"), "KeyRefused", "x"), 5 + AGAIN_MS));
        for n in 0..2 * OBJECTS {
            limiter.allows(&note(node(&n.to_string()), "KeyRefused", "x"), 5 + AGAIN_MS);
        }
        assert_eq!(limiter.objects.len(), OBJECTS);
    }
}
