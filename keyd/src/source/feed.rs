//! What the source says now, kept warm whether this keyd leads or not, and passed on to the hub of a term.

use std::collections::{BTreeMap, BTreeSet};

use tokio::sync::{mpsc, watch};
use warren_keyd_core::{Namespace, Node, Pod, SourceEvent};
use warren_model::NodeName;

use crate::hub;

/// Input of the feed.
#[derive(Debug)]
pub(crate) enum Feed {
    /// A change in the source.
    Event(SourceEvent),
    /// All problems of the source, as sentences; replaces the former ones.
    Problems(Vec<String>),
    /// A term begins: tell this hub everything, then every change.
    Attach(mpsc::Sender<hub::Command>),
}

#[derive(Debug, Default)]
struct State {
    nodes: BTreeMap<NodeName, Node>,
    namespaces: BTreeMap<String, Namespace>,
    pods: BTreeMap<(String, String), Pod>,
    problems: Vec<String>,
    synced: bool,
}

impl State {
    /// Takes an event in; false where it changes nothing.
    fn take(&mut self, event: &SourceEvent) -> bool {
        match event {
            SourceEvent::NodeUpsert(node) => {
                self.nodes.insert(node.name.clone(), node.clone()).as_ref() != Some(node)
            }
            SourceEvent::NodeDelete(name) => self.nodes.remove(name).is_some(),
            SourceEvent::NamespaceUpsert(namespace) => {
                self.namespaces
                    .insert(namespace.name.clone(), namespace.clone())
                    .as_ref()
                    != Some(namespace)
            }
            SourceEvent::NamespaceDelete(name) => self.namespaces.remove(name).is_some(),
            SourceEvent::PodUpsert(pod) => {
                let key = (pod.namespace.clone(), pod.name.clone());
                self.pods.insert(key, pod.clone()).as_ref() != Some(pod)
            }
            SourceEvent::PodDelete { namespace, name } => {
                self.pods.remove(&(namespace.clone(), name.clone())).is_some()
            }
            SourceEvent::Synced => !std::mem::replace(&mut self.synced, true),
        }
    }

    fn all(&self) -> impl Iterator<Item = hub::Command> + '_ {
        let namespaces = self
            .namespaces
            .values()
            .cloned()
            .map(SourceEvent::NamespaceUpsert);
        let nodes = self.nodes.values().cloned().map(SourceEvent::NodeUpsert);
        let pods = self.pods.values().cloned().map(SourceEvent::PodUpsert);
        let synced = self.synced.then_some(SourceEvent::Synced);
        let events = namespaces
            .chain(nodes)
            .chain(pods)
            .chain(synced)
            .map(hub::Command::Source);
        std::iter::once(hub::Command::SourceProblems(self.problems.clone())).chain(events)
    }
}

/// Runs the feed until its input ends. `synced` turns true with the first complete view.
pub(crate) async fn run(mut input: mpsc::Receiver<Feed>, synced: watch::Sender<bool>) {
    let mut state = State::default();
    let mut hub: Option<mpsc::Sender<hub::Command>> = None;
    while let Some(feed) = input.recv().await {
        let command = match feed {
            Feed::Event(event) => {
                if !state.take(&event) {
                    continue;
                }
                synced.send_replace(state.synced);
                hub::Command::Source(event)
            }
            Feed::Problems(problems) => {
                let old: BTreeSet<_> = state.problems.iter().collect();
                for problem in problems.iter().filter(|problem| !old.contains(problem)) {
                    tracing::warn!("{problem}");
                }
                state.problems.clone_from(&problems);
                hub::Command::SourceProblems(problems)
            }
            Feed::Attach(new) => {
                for command in state.all() {
                    if new.send(command).await.is_err() {
                        break;
                    }
                }
                hub = Some(new);
                continue;
            }
        };
        if let Some(current) = &hub
            && current.send(command).await.is_err()
        {
            hub = None;
        }
    }
}
