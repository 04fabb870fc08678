//! The policy thread: directory -> engine -> maps. Nothing else writes the policy maps.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::{Duration, Instant},
};

use tokio::sync::mpsc::UnboundedSender;
use warren_agent_core::{
    Change, Entry,
    policy::{FirstNumbers, LocalEndpoint, MapWrite, Maps, PolicyEngine, PolicyEvent, PolicySource, repair},
};
use warren_bpf::Error;
use warren_model::{
    NodeName,
    policy::{NodeFacts, PolicyRef},
};

use super::{
    Shared, ToEnforcer, answer,
    room::{self, Entries},
};
use crate::{keyd::Received, machine, runner::Input};

/// How often the maps are compared with what they should hold, though nothing failed.
const COMPARE_INTERVAL: Duration = Duration::from_secs(60);
/// The first pause after a failure.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// The longest.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Writes between which others may have the maps.
const BATCH: usize = 64;
/// Instead of a grace period, where the kernel offers none.
const BLIND_GRACE: Duration = Duration::from_secs(1);

/// An agent without its policy thread would serve on, and policy stand still: better that whoever runs it starts it anew.
struct LastWord;

impl Drop for LastWord {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("the policy thread failed: the agent ends, everything stays in force");
            std::process::exit(1);
        }
    }
}

/// The policies of this node, and what the maps hold of them.
pub(crate) struct Enforcer {
    pub(super) shared: Shared,
    pub(super) source: PolicySource,
    pub(super) engine: PolicyEngine,
    /// Endpoints whose entries an agent before wrote, and whose policy is not known yet: they stay as they are.
    adopted: BTreeSet<u16>,
    endpoints_known: bool,
    /// The maps hold what the engine says; else they are repaired.
    in_step: bool,
    /// Endpoints that could not be written.
    unwritten: BTreeSet<u16>,
    /// How many entries the maps hold, at most.
    entries: Entries,
    /// Flows of these endpoints are to be forgotten before another pod has the index.
    forget: BTreeSet<u16>,
    attempts: u32,
    retry_at: Option<Instant>,
    compare_at: Instant,
    rules: BTreeMap<PolicyRef, usize>,
}

impl Enforcer {
    /// Begins with what the maps hold: it stays in force until there is something to put in its place.
    pub(crate) fn new(shared: Shared, node: NodeName, defaults: NodeFacts) -> Result<Self, Error> {
        let held = machine::policy_maps(shared.programs.lock().policy_contents()?);
        let adopted: BTreeSet<u16> = held
            .endpoints
            .keys()
            .copied()
            .filter(|index| *index != 0)
            .collect();
        let revision = shared.programs.lock().revision()?;
        {
            let mut report = shared.report();
            report.occupied.clone_from(&adopted);
            report.revision = revision;
        }
        let mut enforcer = Self {
            shared,
            source: PolicySource::new(node, defaults.clone()),
            engine: PolicyEngine::new(FirstNumbers::above(&held)),
            adopted,
            endpoints_known: false,
            in_step: true,
            unwritten: BTreeSet::new(),
            entries: Entries::of(&held),
            forget: BTreeSet::new(),
            attempts: 0,
            retry_at: None,
            compare_at: Instant::now() + COMPARE_INTERVAL,
            rules: BTreeMap::new(),
        };
        if !held.endpoints.contains_key(&0) {
            // A node that has no directory yet must be able to get one.
            enforcer.apply(vec![PolicyEvent::Node(defaults)]);
        }
        Ok(enforcer)
    }

    /// Serves until nobody is left to ask.
    pub(crate) fn run(mut self, messages: &Receiver<ToEnforcer>, inputs: &UnboundedSender<Input>) {
        let _last = LastWord;
        loop {
            let due = self
                .retry_at
                .map_or(self.compare_at, |at| at.min(self.compare_at));
            let pause = due.saturating_duration_since(Instant::now());
            match messages.recv_timeout(pause) {
                Ok(message) => self.take(message, inputs),
                Err(RecvTimeoutError::Timeout) => {
                    self.compare();
                    let _ = inputs.send(Input::Policy);
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn take(&mut self, message: ToEnforcer, inputs: &UnboundedSender<Input>) {
        match message {
            ToEnforcer::Directory(received) => {
                self.directory(&received);
                let _ = inputs.send(Input::Directory(received));
            }
            ToEnforcer::Endpoints(endpoints, done) => {
                self.endpoints(endpoints);
                let _ = done.send(());
            }
            ToEnforcer::Settled(position) => {
                let events = self.source.settled(position);
                if !events.is_empty() {
                    self.apply(events);
                }
            }
            ToEnforcer::Moved => self.raise(),
            ToEnforcer::Describe(endpoints, entries, reply) => {
                let _ = reply.send(answer::describe(self, endpoints, entries));
            }
            ToEnforcer::Trace(packet, reply) => {
                let _ = reply.send(answer::trace(self, &packet));
            }
        }
    }

    /// Takes a directory and brings it into force.
    pub(crate) fn directory(&mut self, received: &Received) {
        let first = self.source.position().is_none();
        let change = &received.change;
        let events = self.source.take(change);
        self.count_rules(change, &events);
        self.apply(events);
        let objects = change.upserts.iter().filter_map(|entry| match entry {
            Entry::Rules(policy, _) => Some(policy),
            _ => None,
        });
        let rules = self.rules.values().sum();
        self.shared.names.update(&self.engine, objects, rules);
        if first {
            self.prune();
        }
        let mut report = self.shared.report();
        report.position = self.source.position();
        report.policies = self.rules.len();
        report.rules = rules;
        if self.in_step {
            report.latency.observe(received.at.elapsed().as_secs_f64());
        }
    }

    fn count_rules(&mut self, change: &Change, events: &[PolicyEvent]) {
        for event in events {
            if let PolicyEvent::RulesGone(policy) = event {
                self.rules.remove(policy);
            }
        }
        for entry in &change.upserts {
            if let Entry::Rules(policy, rules) = entry {
                let statements = rules.iter().map(|rule| rule.statements.len()).sum();
                self.rules.insert(policy.clone(), statements);
            }
        }
    }

    fn endpoints(&mut self, endpoints: BTreeMap<u16, LocalEndpoint>) {
        let gone: Vec<u16> = self
            .adopted
            .iter()
            .filter(|index| !endpoints.contains_key(index))
            .copied()
            .collect();
        let events = self.source.set_endpoints(endpoints);
        let first = !self.endpoints_known;
        self.endpoints_known = true;
        let close: Vec<MapWrite> = gone
            .iter()
            .map(|index| MapWrite::DeleteEndpoint(*index))
            .collect();
        self.adopted.retain(|index| !gone.contains(index));
        self.apply_after(close, events);
        if first {
            self.prune();
        }
    }

    /// The first comparison, when directory and endpoints are known: removes what the agent before left.
    fn prune(&mut self) {
        if self.endpoints_known && self.source.position().is_some() {
            self.repair();
        }
    }

    fn apply(&mut self, events: Vec<PolicyEvent>) {
        self.apply_after(Vec::new(), events);
    }

    fn apply_after(&mut self, mut writes: Vec<MapWrite>, events: Vec<PolicyEvent>) {
        for event in &events {
            if let PolicyEvent::Endpoint { index, .. } | PolicyEvent::EndpointGone(index) = event {
                self.adopted.remove(index);
            }
        }
        writes.extend(self.engine.apply(events));
        if !self.in_step {
            self.repair();
        } else if !writes.is_empty()
            && let Err(error) = self.execute(&writes)
        {
            tracing::error!(%error, "a policy cannot be written: what it is for stays as it was, or closed");
            self.shared.report().failures.inc();
            self.repair();
        }
        self.forget_flows();
        self.tell();
    }

    /// Carries out writes in order. The revision is raised as soon as all verdicts are the new ones.
    fn execute(&mut self, writes: &[MapWrite]) -> Result<(), Error> {
        let decided = writes
            .iter()
            .position(|step| *step == MapWrite::Grace)
            .unwrap_or(writes.len());
        let (now, later) = writes.split_at(decided);
        let result = self.write_all(now);
        self.raise();
        result?;
        self.write_all(later)
    }

    fn write_all(&mut self, writes: &[MapWrite]) -> Result<(), Error> {
        let shared = self.shared.clone();
        for batch in writes.chunks(BATCH) {
            let mut datapath = shared.programs.lock();
            for step in batch {
                self.entries.count(step)?;
                let result = machine::write_policy(&mut datapath, step);
                self.written(step, result)?;
            }
        }
        Ok(())
    }

    /// Notes what a write did.
    fn written(&mut self, step: &MapWrite, result: Result<(), Error>) -> Result<(), Error> {
        match (step, result) {
            (MapWrite::Grace, Err(error)) => {
                tracing::debug!(%error, "waiting a second instead");
                std::thread::sleep(BLIND_GRACE);
            }
            (_, Err(error)) => return Err(error),
            (MapWrite::SetEndpoint(index, _), Ok(())) => {
                self.shared.report().occupied.insert(*index);
            }
            (MapWrite::DeleteEndpoint(index), Ok(())) => {
                self.forget.insert(*index);
            }
            (_, Ok(())) => {}
        }
        Ok(())
    }

    /// Makes the programs judge all flows again.
    fn raise(&mut self) {
        let raised = self.shared.programs.lock().raise_revision();
        match raised {
            Ok(revision) => self.shared.report().revision = revision,
            Err(error) => {
                tracing::error!(%error, "flows cannot be judged again");
                self.in_step = false;
                self.retry_at.get_or_insert(Instant::now() + FIRST_PAUSE);
                self.shared.report().failing = vec![format!("cannot have flows judged again: {error}")];
            }
        }
    }

    /// The flows of a pod that is gone are nobody's. Only then may its index be another's.
    fn forget_flows(&mut self) {
        for index in std::mem::take(&mut self.forget) {
            let result = self.shared.programs.lock().forget_flows(index);
            match result {
                Ok(()) if self.engine.written(index).is_none() => {
                    self.shared.report().occupied.remove(&index);
                }
                Ok(()) => {}
                Err(error) => {
                    tracing::warn!(%error, index, "the flows of a pod that is gone cannot be forgotten yet");
                    self.forget.insert(index);
                }
            }
        }
    }

    /// Compares the maps with what they should hold, and mends them.
    fn compare(&mut self) {
        let was_in_step = self.in_step;
        let differences = self.repair();
        if was_in_step && differences > 0 {
            tracing::warn!(differences, "policy maps were not as they should be: mended");
            self.shared.report().drift.inc_by(differences as u64);
        }
        self.forget_flows();
        self.tell();
    }

    /// Makes the maps hold what the engine says, one policy at a time. Returns how many entries differed.
    fn repair(&mut self) -> usize {
        self.compare_at = Instant::now() + COMPARE_INTERVAL;
        let contents = self.shared.programs.lock().policy_contents();
        let mut held = match contents {
            Ok(contents) => machine::policy_maps(contents),
            Err(error) => {
                self.failed(vec![format!("cannot read the policy maps: {error}")]);
                return 0;
            }
        };
        let wanted = self.engine.contents();
        let complete = self.endpoints_known && self.source.position().is_some();
        let keep: BTreeSet<u16> = match complete {
            true => self.adopted.clone(),
            false => held.endpoints.keys().copied().collect(),
        };
        let shared = self.shared.clone();
        let mut raised = false;
        let host = room::of_host(&wanted);
        let outcome = repair(&mut held, &wanted, &keep, |held, step| {
            room::check(held, step, &host).map_err(|error| error.to_string())?;
            if *step == MapWrite::Grace && !raised {
                raised = true;
                self.raise();
            }
            let result = machine::write_policy(&mut shared.programs.lock(), step);
            self.written(step, result).map_err(|error| error.to_string())
        });
        if outcome.differences > 0 && !raised {
            self.raise();
        }
        self.settle(&wanted, &held, &outcome.failed, outcome.other);
        self.entries = Entries::of(&held);
        outcome.differences
    }

    /// Notes what came of a repair.
    fn settle(&mut self, wanted: &Maps, held: &Maps, failed: &BTreeMap<u32, String>, other: Option<String>) {
        let is_written = |index: &u16, value| {
            held.endpoints.get(index) == Some(value) && !failed.contains_key(&value.policy)
        };
        self.unwritten = wanted
            .endpoints
            .iter()
            .filter(|(index, value)| !is_written(index, *value))
            .map(|(index, _)| *index)
            .collect();
        let mut sentences = Vec::new();
        for (policy, error) in failed {
            let of: Vec<String> = wanted
                .endpoints
                .iter()
                .filter(|(_, value)| value.policy == *policy)
                .map(|(index, _)| {
                    if *index == 0 {
                        "the host".into()
                    } else {
                        format!("endpoint {index}")
                    }
                })
                .collect();
            sentences.push(format!(
                "cannot write the policy of {}, which stays as it was or closed: {error}",
                of.join(", ")
            ));
        }
        sentences.extend(other.map(|error| format!("cannot write the policy maps: {error}")));
        match sentences.is_empty() {
            true => {
                self.in_step = true;
                self.attempts = 0;
                self.retry_at = None;
                self.shared.report().failing.clear();
            }
            false => self.failed(sentences),
        }
    }

    fn failed(&mut self, sentences: Vec<String>) {
        for sentence in &sentences {
            match self.attempts {
                0 => tracing::error!(reason = %sentence, "policy is not complete"),
                _ => tracing::debug!(reason = %sentence, "policy is not complete"),
            }
        }
        self.in_step = false;
        let pause = FIRST_PAUSE
            .saturating_mul(1 << self.attempts.min(10))
            .min(LONGEST_PAUSE);
        self.attempts = self.attempts.saturating_add(1);
        self.retry_at = Some(Instant::now() + pause);
        let mut report = self.shared.report();
        report.failures.inc();
        report.failing = sentences;
    }

    /// Tells the rest of the agent which endpoints have their policy.
    fn tell(&mut self) {
        let written = self
            .source
            .endpoints()
            .keys()
            .filter(|index| self.source.is_told(**index) && self.is_written(**index))
            .copied()
            .collect();
        self.shared.report().written = written;
    }

    /// Whether the maps hold an endpoint's policy.
    pub(super) fn is_written(&self, index: u16) -> bool {
        self.engine.written(index).is_some() && !self.unwritten.contains(&index)
    }
}
