//! What the source says now, kept warm whether this keyd leads or not, and passed on to the hub of a term.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use tokio::sync::{mpsc, watch};
use warren_keyd_core::{Namespace, Node, Pod, RotationObject, SourceEvent};
use warren_model::{
    NodeName,
    policy::{PolicyError, PolicyRef, Rule},
};

use crate::{hub, policy_status::Seen};

/// Input of the feed.
#[derive(Debug)]
pub(crate) enum Feed {
    /// A change in the source.
    Event(SourceEvent),
    /// A policy object appeared or changed, with what it says of itself.
    Policy {
        policy: PolicyRef,
        outcome: Result<Vec<Rule>, PolicyError>,
        seen: Seen,
    },
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
    policies: BTreeMap<PolicyRef, (Result<Vec<Rule>, PolicyError>, Seen)>,
    groups: BTreeMap<String, Result<Vec<IpNet>, PolicyError>>,
    rotations: BTreeMap<String, RotationObject>,
    apiservers: BTreeSet<IpAddr>,
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
            SourceEvent::PolicyUpsert { policy, outcome } => {
                self.take_policy(policy, outcome, &Seen::default())
            }
            SourceEvent::PolicyDelete(policy) => self.policies.remove(policy).is_some(),
            SourceEvent::CidrGroupUpsert { name, outcome } => {
                self.groups.insert(name.clone(), outcome.clone()).as_ref() != Some(outcome)
            }
            SourceEvent::CidrGroupDelete(name) => self.groups.remove(name).is_some(),
            SourceEvent::ApiServers(addresses) => {
                std::mem::replace(&mut self.apiservers, addresses.clone()) != *addresses
            }
            SourceEvent::RotationUpsert(object) => {
                self.rotations
                    .insert(object.name.clone(), object.clone())
                    .as_ref()
                    != Some(object)
            }
            SourceEvent::RotationDelete(name) => self.rotations.remove(name).is_some(),
            SourceEvent::Synced => !std::mem::replace(&mut self.synced, true),
        }
    }

    fn take_policy(
        &mut self,
        policy: &PolicyRef,
        outcome: &Result<Vec<Rule>, PolicyError>,
        seen: &Seen,
    ) -> bool {
        let new = (outcome.clone(), seen.clone());
        let same = self.policies.get(policy) == Some(&new);
        self.policies.insert(policy.clone(), new);
        !same
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
        let groups = self
            .groups
            .iter()
            .map(|(name, outcome)| SourceEvent::CidrGroupUpsert {
                name: name.clone(),
                outcome: outcome.clone(),
            });
        let rotations = self.rotations.values().cloned().map(SourceEvent::RotationUpsert);
        let apiservers = std::iter::once(SourceEvent::ApiServers(self.apiservers.clone()));
        let policies = self
            .policies
            .iter()
            .map(|(policy, (outcome, seen))| hub::Command::Policy {
                policy: policy.clone(),
                outcome: outcome.clone(),
                seen: seen.clone(),
            });
        let events = namespaces
            .chain(nodes)
            .chain(pods)
            .chain(groups)
            .chain(rotations)
            .chain(apiservers);
        std::iter::once(hub::Command::SourceProblems(self.problems.clone()))
            .chain(events.map(hub::Command::Source))
            .chain(policies)
            .chain(synced.map(hub::Command::Source))
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
            Feed::Policy {
                policy,
                outcome,
                seen,
            } => {
                if !state.take_policy(&policy, &outcome, &seen) {
                    continue;
                }
                hub::Command::Policy {
                    policy,
                    outcome,
                    seen,
                }
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
