//! The machine: events in, outputs out.

use std::collections::{BTreeMap, BTreeSet};

use warren_model::{NodeKeys, NodeName, PublicKey, SlotKey};

use super::{
    event::{Event, Output},
    flight::{Flight, Member, Members, Phase, Step, View, Wish, obstacle},
    readiness::Reports,
    run::{Rotation, jitter},
    spec::{RotationSpec, Stragglers},
    status::{Outcome, Planned, Progress, RotationPhase},
};

/// The rotations of one leadership term.
#[derive(Debug, Default)]
pub struct Machine {
    pub(super) members: Members,
    pub(super) flights: BTreeMap<NodeName, Flight>,
    pub(super) rotations: BTreeMap<String, Rotation>,
    revoking: BTreeSet<NodeName>,
    pub(super) out: Vec<Output>,
}

impl Machine {
    /// Takes one event in; the work is done in [`Self::poll`]. `now`: milliseconds of a clock that only goes forward.
    pub fn handle(&mut self, now: u64, event: Event) {
        match event {
            Event::Keys { node, keys } => self.keys(now, node, keys),
            Event::Labels { node, labels } => {
                if let Some(member) = self.members.get_mut(&node) {
                    member.labels = labels;
                }
            }
            Event::Gone(node) => self.gone(&node),
            Event::Rotation {
                name,
                created,
                spec,
                progress,
            } => self.rotation(name, created, spec, progress),
            Event::RotationGone(name) => drop(self.rotations.remove(&name)),
            Event::Connected(node) => self.session(&node, true),
            Event::Disconnected(node) => self.session(&node, false),
            Event::Held { node, keys } => self.held(now, &node, keys),
            Event::Report { node, pairs } => {
                if let Some(member) = self.members.get_mut(&node).filter(|member| member.connected) {
                    pairs.into_iter().for_each(|pair| member.reports.put(now, pair));
                }
            }
        }
    }

    fn keys(&mut self, now: u64, node: NodeName, keys: NodeKeys) {
        let known = self.members.get(&node);
        if known.is_some_and(|member| member.keys.uid != keys.uid) {
            self.gone(&node);
        }
        let member = self.members.entry(node.clone()).or_insert_with(|| Member {
            keys: NodeKeys::none(keys.uid.clone()),
            labels: BTreeMap::new(),
            connected: false,
            held: None,
            reports: Reports::default(),
            writing: false,
        });
        member.writing = false;
        member.keys = keys;
        let from = member.keys.generations().first().copied().unwrap_or_default();
        let unfinished = member.keys.candidate().is_some() || member.keys.former().is_some();
        if let Some(flight) = self.flights.get_mut(&node) {
            flight.asked = None;
            flight.waiting_for = None;
        } else if unfinished {
            // Somebody else began it: a leader before us, or beside us.
            self.flights.insert(node, Flight::new(now, from));
        }
    }

    fn gone(&mut self, node: &NodeName) {
        self.members.remove(node);
        self.flights.remove(node);
        self.revoking.remove(node);
    }

    fn rotation(&mut self, name: String, created: u64, spec: RotationSpec, progress: Option<Progress>) {
        let rotation = self.rotations.entry(name).or_insert_with(|| Rotation {
            created,
            spec: RotationSpec::default(),
            progress: Progress::default(),
            blocked_since: None,
            dirty: true,
        });
        rotation.created = created;
        rotation.spec = spec;
        rotation.dirty = true;
        if let Some(progress) = progress {
            rotation.progress = progress;
        }
    }

    fn session(&mut self, node: &NodeName, connected: bool) {
        if let Some(member) = self.members.get_mut(node) {
            member.connected = connected;
            member.held = None;
            member.reports.clear();
        }
        if let Some(flight) = self.flights.get_mut(node) {
            flight.asked = None;
        }
    }

    fn held(&mut self, now: u64, node: &NodeName, keys: BTreeMap<u64, PublicKey>) {
        let Some(member) = self.members.get_mut(node).filter(|member| member.connected) else {
            return;
        };
        member.held = Some(keys);
        if member.needs_key() {
            let flight = Flight::new(now, member.keys.active);
            self.flights.entry(node.clone()).or_insert(flight);
        }
    }

    /// An agent proved a key, with both its slots. Once accepted it is written and then published; the sentence says
    /// why it is refused.
    pub fn proved(&mut self, node: &NodeName, slots: &[SlotKey]) -> Result<(), String> {
        let Some(member) = self.members.get_mut(node) else {
            return Err(format!("node {node} does not exist"));
        };
        let lost = member.is_cut_off();
        let keys = member.keys.admit(slots, lost)?;
        if keys == member.keys {
            return Ok(());
        }
        let awaited = self
            .flights
            .get(node)
            .is_some_and(|flight| flight.phase(&member.keys) == Phase::Preparing || lost);
        if member.writing || !(awaited || member.keys.active == 0) {
            return Err(format!("node {node} was not asked for a key now"));
        }
        Self::write(&mut self.out, node, member, keys);
        Ok(())
    }

    fn write(out: &mut Vec<Output>, node: &NodeName, member: &mut Member, keys: NodeKeys) {
        member.writing = true;
        out.push(Output::Write {
            node: node.clone(),
            was: member.keys.clone(),
            keys,
        });
    }

    /// Brings everything up to date. Call after one or more events, and about once a second. `unix_seconds` is for
    /// times that people see, and for schedules; nothing else depends on it.
    pub fn poll(&mut self, now: u64, unix_seconds: u64) -> Vec<Output> {
        let current = self.current(unix_seconds);
        let flying: Vec<NodeName> = self.flights.keys().cloned().collect();
        for node in flying {
            self.advance(now, &node, current.as_deref());
        }
        if let Some(current) = current {
            self.begin_nodes(now, &current);
            self.conclude(&current, unix_seconds);
        }
        self.settle_conflicts(now);
        self.statuses();
        std::mem::take(&mut self.out)
    }

    /// The rotation whose turn it is: the oldest that is not over.
    fn current(&mut self, unix_seconds: u64) -> Option<String> {
        for rotation in self.rotations.values_mut() {
            rotation.wake(unix_seconds);
        }
        let waiting = self.rotations.iter().filter(|(_, r)| !r.progress.phase.is_over());
        let name = waiting
            .min_by_key(|(name, r)| (r.progress.phase != RotationPhase::Running, r.created, *name))
            .map(|(name, _)| name.clone())?;
        let rotation = self.rotations.get_mut(&name)?;
        if rotation.progress.phase == RotationPhase::Pending {
            rotation.begin(&self.members, unix_seconds);
        }
        Some(name)
    }

    fn wish(&self, node: &NodeName, current: Option<&str>) -> Wish {
        let rotation = current.and_then(|name| self.rotations.get(name));
        let planned = rotation.and_then(|rotation| rotation.progress.plan.get(node));
        match (rotation, planned) {
            (Some(rotation), Some(planned)) => Wish {
                rotate: !rotation.spec.abort && planned.outcome.is_none(),
                pace: rotation.spec.pace,
                stragglers: rotation.spec.stragglers,
            },
            _ => Wish::none(),
        }
    }

    fn advance(&mut self, now: u64, node: &NodeName, current: Option<&str>) {
        let wish = self.wish(node, current);
        let (Some(member), Some(flight)) = (self.members.get(node), self.flights.get(node)) else {
            self.flights.remove(node);
            return;
        };
        let members = &self.members;
        let view = View {
            name: node,
            member,
            members,
            wish,
            now,
        };
        let before = flight.phase(&member.keys);
        let step = view.step(flight);
        self.take(now, node, step);
        let after = match (self.flights.get(node), self.members.get(node)) {
            (Some(flight), Some(member)) => Some(flight.phase(&member.keys)),
            _ => None,
        };
        if after != Some(before) {
            self.mark(node);
        }
    }

    fn take(&mut self, now: u64, node: &NodeName, step: Step) {
        let (Some(member), Some(flight)) = (self.members.get_mut(node), self.flights.get_mut(node)) else {
            return;
        };
        if !matches!(step, Step::Quiet | Step::Retire | Step::Wait) {
            flight.quiet_since = None;
        }
        match step {
            Step::Wait => {}
            Step::WaitFor(peer) => flight.waiting_for = Some(peer),
            Step::Stall(peer) => {
                let sentence =
                    format!("node {peer} has not followed: both keys of node {node} go on working");
                flight.waiting_for = Some(peer);
                if !std::mem::replace(&mut flight.stalled, true) {
                    self.fail(node, Outcome::Stalled(sentence));
                }
            }
            Step::Ask(generation) => {
                flight.asked = Some(generation);
                let node = node.clone();
                self.out.push(Output::AskKey { node, generation });
            }
            Step::NotQuiet => {}
            Step::Quiet => {
                flight.quiet_since.get_or_insert(now);
            }
            Step::Commit => {
                let keys = member.keys.commit();
                Self::write(&mut self.out, node, member, keys);
            }
            Step::Retire => {
                let keys = member.keys.only_active();
                Self::write(&mut self.out, node, member, keys);
            }
            Step::GiveUp(reason) => {
                if member.keys.candidate().is_some() {
                    let keys = member.keys.only_active();
                    Self::write(&mut self.out, node, member, keys);
                } else {
                    self.flights.remove(node);
                }
                self.fail(node, reason.map_or(Outcome::Aborted, Outcome::Failed));
            }
            Step::Revoke(peer) => {
                if self.revoking.insert(peer.clone()) {
                    self.out.push(Output::Revoke(peer));
                }
            }
            Step::Finished => self.finish(node),
        }
    }

    fn note(&mut self, node: &NodeName, reason: &'static str, message: String) {
        self.out.push(Output::Note {
            node: node.clone(),
            reason,
            message,
        });
    }

    /// A node has arrived, perhaps long after the rotation that began it.
    fn finish(&mut self, node: &NodeName) {
        let from = self.flights.remove(node).map(|flight| flight.from);
        let Some(active) = self.members.get(node).map(|member| member.keys.active) else {
            return;
        };
        if let Some(from) = from.filter(|from| (1..active).contains(from)) {
            let message = format!(
                "node {node} has a new key: generation {active}; that of generation {from} is destroyed"
            );
            self.note(node, "KeyRotated", message);
        }
        for rotation in self.rotations.values_mut() {
            if let Some(planned) = rotation.progress.plan.get_mut(node) {
                rotation.dirty = true;
                // Also where another leader committed what we wanted to withdraw.
                if active > planned.from && planned.outcome != Some(Outcome::Gone) {
                    planned.outcome = None;
                }
            }
        }
    }

    fn mark(&mut self, node: &NodeName) {
        for rotation in self.rotations.values_mut() {
            rotation.dirty |= rotation.progress.plan.contains_key(node);
        }
    }

    /// Notes how it went for a node of the running rotation; without one it only concerns the node.
    fn fail(&mut self, node: &NodeName, outcome: Outcome) {
        let (reason, message) = match &outcome {
            Outcome::Failed(sentence) => ("KeyRotationFailed", sentence.clone()),
            Outcome::Stalled(sentence) => ("KeyRotationStalled", sentence.clone()),
            Outcome::Aborted => ("KeyRotationAborted", format!("node {node} keeps its key")),
            Outcome::Gone => return,
        };
        self.note(node, reason, message);
        let running = |r: &&mut Rotation| r.progress.phase == RotationPhase::Running;
        for rotation in self.rotations.values_mut().filter(running) {
            if let Some(planned) = rotation.progress.plan.get_mut(node) {
                planned.outcome.get_or_insert(outcome.clone());
                rotation.dirty = true;
            }
        }
    }

    /// Lets nodes begin while there is room.
    fn begin_nodes(&mut self, now: u64, current: &str) {
        let Some(rotation) = self.rotations.get_mut(current) else {
            return;
        };
        let limit = rotation.spec.pace.concurrency.of(rotation.progress.plan.len());
        let counts = |(node, flight): &(&NodeName, &Flight)| {
            !flight.stalled && rotation.progress.plan.contains_key(*node)
        };
        let mut flying = self.flights.iter().filter(counts).count();
        if flying >= limit {
            rotation.blocked_since = None;
            return;
        }
        let is_away = |(_, member): &(&NodeName, &Member)| member.is_published() && !member.connected;
        let away: BTreeSet<_> = self
            .members
            .iter()
            .filter(is_away)
            .map(|(name, _)| name.clone())
            .collect();
        let (stragglers, pace) = (rotation.spec.stragglers, rotation.spec.pace);
        let mut obstacles = Vec::new();
        for (node, planned) in &rotation.progress.plan {
            let Some(member) = self.members.get(node).filter(|m| planned.is_open(m)) else {
                continue;
            };
            if flying >= limit || rotation.spec.abort {
                break;
            }
            match obstacle(node, member, &self.members, &away, stragglers, now) {
                _ if self.flights.contains_key(node) => {}
                Some(peer) => obstacles.push((node.clone(), peer)),
                None => {
                    let began = now + jitter(current, node, pace.jitter_ms);
                    self.flights
                        .insert(node.clone(), Flight::new(began, member.keys.active));
                    flying += 1;
                    rotation.dirty = true;
                    rotation.blocked_since = None;
                }
            }
        }
        if obstacles.is_empty() || flying > 0 {
            rotation.blocked_since = None;
            return;
        }
        let since = *rotation.blocked_since.get_or_insert(now);
        if now.saturating_sub(since) >= pace.deadline_ms {
            self.unblock(obstacles, stragglers);
        }
    }

    /// Nothing could begin for a whole deadline.
    fn unblock(&mut self, obstacles: Vec<(NodeName, NodeName)>, stragglers: Stragglers) {
        for (node, peer) in obstacles {
            if stragglers == Stragglers::Revoke && peer != node {
                if self.revoking.insert(peer.clone()) {
                    self.out.push(Output::Revoke(peer));
                }
            } else {
                let sentence =
                    format!("the agent of node {peer} is not connected: node {node} keeps its key");
                self.fail(&node, Outcome::Failed(sentence));
            }
        }
    }

    /// Ends the rotation where nothing is left to do in it.
    fn conclude(&mut self, current: &str, unix_seconds: u64) {
        let Some(rotation) = self.rotations.get_mut(current) else {
            return;
        };
        let mut open = false;
        for (node, planned) in &mut rotation.progress.plan {
            let member = self
                .members
                .get(node)
                .filter(|member| member.keys.uid == planned.uid);
            match member {
                None => {
                    rotation.dirty |= planned.outcome != Some(Outcome::Gone);
                    planned.outcome = Some(Outcome::Gone);
                }
                Some(member) => {
                    let flying = self.flights.get(node).is_some_and(|flight| !flight.stalled);
                    if rotation.spec.abort && planned.is_open(member) && !flying {
                        planned.outcome = Some(Outcome::Aborted);
                    }
                    open |= flying || planned.is_open(member);
                }
            }
        }
        if open {
            return;
        }
        let bad = |planned: &Planned| !matches!(planned.outcome, None | Some(Outcome::Gone));
        let progress = &mut rotation.progress;
        progress.phase = match progress.plan.values().any(bad) {
            _ if rotation.spec.abort => RotationPhase::Aborted,
            true => RotationPhase::Failed,
            false => RotationPhase::Succeeded,
        };
        progress.completed = unix_seconds;
        rotation.dirty = true;
    }

    fn statuses(&mut self) {
        let dirty = |(name, rotation): (&String, &mut Rotation)| {
            std::mem::take(&mut rotation.dirty).then(|| name.clone())
        };
        let changed: Vec<_> = self.rotations.iter_mut().filter_map(dirty).collect();
        for name in changed {
            let Some(standing) = self.standing(&name) else {
                continue;
            };
            self.out.push(Output::Status {
                rotation: name,
                progress: standing.progress.clone(),
                counts: standing.counts,
            });
        }
    }
}
