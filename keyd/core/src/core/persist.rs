//! Durable parts that changed.

use std::collections::BTreeSet;

use warren_model::{PodRef, PrefixSource};

use super::Core;
use crate::{
    event::{Mode, Output, Record, RecordKey},
    stored::Object,
};

impl Core {
    /// Writes what durable parts changed and returns which records may have.
    pub(super) fn persist(&mut self) -> BTreeSet<RecordKey> {
        let mut touched = BTreeSet::new();
        for name in self.nodes.take_changed() {
            if let Some(stored) = self.nodes.stored(&name)
                && self.persisted_nodes.get(&name) != Some(&stored)
            {
                self.persisted_nodes.insert(name.clone(), stored.clone());
                self.out.push(Output::Persist(Object::Node(stored)));
            }
            touched.insert(RecordKey::NodeFacts(name.clone()));
            touched.insert(RecordKey::Node(name));
        }
        touched.extend(self.facts.take_changed().into_iter().map(RecordKey::NodeFacts));
        for number in self.identities.take_changed() {
            self.number_changed(number);
            let labels = self.identities.labels(number);
            if labels != self.persisted_identities.get(&number) {
                let object = match labels {
                    Some(labels) => Object::Identity(number, labels.clone()),
                    None => Object::IdentityDelete(number),
                };
                match labels.cloned() {
                    Some(labels) => self.persisted_identities.insert(number, labels),
                    None => self.persisted_identities.remove(&number),
                };
                self.out.push(Output::Persist(object));
            }
            touched.insert(RecordKey::Identity(number));
        }
        touched.extend(self.take_policy_touched());
        let pods = self.endpoints.take_changed();
        if self.settings.mode == Mode::StandAlone {
            self.persist_endpoints(pods);
        }
        for address in self.endpoints.take_touched() {
            if self.settings.config.prefix_source == PrefixSource::PodIp {
                let now = self.endpoints.workload(address).map(|workload| workload.node);
                let before = match self.published.records().get(&RecordKey::Workload(address)) {
                    Some(Record::Workload(workload)) => Some(workload.node.clone()),
                    _ => None,
                };
                touched.extend(now.into_iter().chain(before).map(RecordKey::Node));
            }
            touched.insert(RecordKey::Workload(address));
        }
        touched
    }
    pub(super) fn persist_endpoints(&mut self, pods: BTreeSet<PodRef>) {
        for pod in pods {
            let stored = self.endpoints.stored(&pod);
            if self.persisted_endpoints.get(&pod) == stored.as_ref() {
                continue;
            }
            let object = match stored {
                Some(stored) => {
                    self.persisted_endpoints.insert(pod, stored.clone());
                    Object::Endpoint(stored)
                }
                None => {
                    self.persisted_endpoints.remove(&pod);
                    Object::EndpointDelete(pod)
                }
            };
            self.out.push(Output::Persist(object));
        }
    }
}
