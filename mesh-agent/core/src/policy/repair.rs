//! From what maps hold to what they should, one policy at a time: what finds no room leaves the others alone.

use std::collections::{BTreeMap, BTreeSet};

use super::map::{CidrKey, MapWrite, Maps, PeerKind, PortKey, VerdictKey};

/// What came of a repair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repaired<E> {
    /// How many entries were other than they should be.
    pub differences: usize,
    /// Policies that could not be written, by number: their endpoints are as they were.
    pub failed: BTreeMap<u32, E>,
    /// What else failed.
    pub other: Option<E>,
}

impl<E> Repaired<E> {
    /// Whether the maps hold what they should.
    pub fn is_complete(&self) -> bool {
        self.failed.is_empty() && self.other.is_none()
    }
}

/// Turns what the maps hold into what they should, by way of `write`, in an order in which every verdict is always the old
/// or the new one. A policy with a write that fails stays as it was for its endpoints, and so does everything that rests
/// on it; all others go on. `held` follows the writes.
///
/// `write` is told what the maps hold before the step.
///
/// Entries of endpoints that `wanted` does not know are removed, those of `keep` excepted: endpoints that are there but
/// whose policy is not known yet. Not to be used before the first whole directory.
pub fn repair<E: Clone>(
    held: &mut Maps,
    wanted: &Maps,
    keep: &BTreeSet<u16>,
    mut write: impl FnMut(&Maps, &MapWrite) -> Result<(), E>,
) -> Repaired<E> {
    let bridged = bridge(held, wanted);
    let mut run = Run {
        held,
        wanted: bridged.as_ref().unwrap_or(wanted),
        write: &mut write,
        out: Repaired {
            differences: 0,
            failed: BTreeMap::new(),
            other: None,
        },
    };
    run.verdicts();
    let prefixes = run.prefixes();
    run.switch(prefixes);
    run.close(keep);
    run.wanted = wanted;
    run.clear_up();
    run.out
}

/// What is wanted for as long as prefixes are found that are to go: such an address has the verdict of the next wider
/// prefix. `None` where none is to go.
fn bridge(held: &Maps, wanted: &Maps) -> Option<Maps> {
    let tables: BTreeSet<u32> = wanted.endpoints.values().map(|value| value.cidr_table).collect();
    let going: Vec<(CidrKey, u32)> = held
        .cidrs
        .iter()
        .filter(|(key, _)| tables.contains(&key.table) && !wanted.cidrs.contains_key(key))
        .map(|(key, number)| (*key, *number))
        .collect();
    if going.is_empty() {
        return None;
    }
    let mut bridged = wanted.clone();
    for (key, number) in going {
        let around = wanted
            .cidrs
            .iter()
            .filter(|(other, _)| other.table == key.table && other.prefix.contains(&key.prefix));
        let Some((_, wider)) = around.max_by_key(|(other, _)| other.prefix.prefix_len()) else {
            continue;
        };
        for (of, verdict) in &wanted.verdicts {
            if matches!(of.kind, PeerKind::WorldPrefix | PeerKind::MemberPrefix) && of.id == *wider {
                bridged
                    .verdicts
                    .insert(VerdictKey { id: number, ..*of }, *verdict);
            }
        }
    }
    Some(bridged)
}

struct Run<'a, E, W> {
    held: &'a mut Maps,
    wanted: &'a Maps,
    write: &'a mut W,
    out: Repaired<E>,
}

impl<E: Clone, W: FnMut(&Maps, &MapWrite) -> Result<(), E>> Run<'_, E, W> {
    fn one(&mut self, step: MapWrite) -> Result<(), E> {
        if step != MapWrite::Grace {
            self.out.differences += 1;
        }
        (self.write)(self.held, &step)?;
        self.held.apply(&step);
        Ok(())
    }

    /// The verdicts of every policy. Nothing leads to new ones yet; those of classes in use change in place, one
    /// identity at a time.
    fn verdicts(&mut self) {
        let wanted = self.wanted;
        let owner: BTreeMap<u32, u32> = wanted
            .ports
            .iter()
            .map(|(key, value)| (value.class, key.policy))
            .collect();
        let (mut sets, mut deletes): (BTreeMap<u32, Vec<MapWrite>>, BTreeMap<u32, Vec<MapWrite>>) =
            Default::default();
        for (key, value) in &wanted.verdicts {
            let policy = owner.get(&key.class).copied().unwrap_or(0);
            if self.held.verdicts.get(key) != Some(value) {
                sets.entry(policy)
                    .or_default()
                    .push(MapWrite::SetVerdict(*key, *value));
            }
        }
        // Of classes that stay. Others go when nothing leads to them.
        for key in self.held.verdicts.keys() {
            if let Some(policy) = owner.get(&key.class)
                && !wanted.verdicts.contains_key(key)
                && matches!(key.kind, PeerKind::Identity)
            {
                deletes
                    .entry(*policy)
                    .or_default()
                    .push(MapWrite::DeleteVerdict(*key));
            }
        }
        // Small ones first: who needs too much must not take what others need little of.
        let mut sets: Vec<(u32, Vec<MapWrite>)> = sets.into_iter().collect();
        sets.sort_by_key(|(_, steps)| steps.len());
        let used: BTreeSet<u32> = self.held.ports.values().map(|value| value.class).collect();
        for (policy, steps) in sets {
            self.of_policy(policy, steps.clone());
            if self.out.failed.contains_key(&policy) {
                self.give_back(&steps, &used);
            }
        }
        for (policy, steps) in deletes {
            if !self.out.failed.contains_key(&policy) {
                self.of_policy(policy, steps);
            }
        }
    }

    /// Takes away what was written of a policy that found no room. Nothing has ever led to these classes.
    fn give_back(&mut self, steps: &[MapWrite], used: &BTreeSet<u32>) {
        for step in steps {
            if let MapWrite::SetVerdict(key, _) = step
                && !used.contains(&key.class)
                && self.held.verdicts.contains_key(key)
                && let Err(error) = self.one(MapWrite::DeleteVerdict(*key))
            {
                self.out.other = Some(error);
                return;
            }
        }
    }

    fn of_policy(&mut self, policy: u32, steps: Vec<MapWrite>) {
        for step in steps {
            if let Err(error) = self.one(step) {
                self.out.failed.insert(policy, error);
                return;
            }
        }
    }

    /// New prefixes. Where a class lacks its verdict for one, it must not be found: the verdict of the wider prefix would
    /// be lost. Returns whether all are there.
    fn prefixes(&mut self) -> bool {
        let wanted = self.wanted;
        let new: Vec<(CidrKey, u32)> = wanted
            .cidrs
            .iter()
            .filter(|(key, number)| self.held.cidrs.get(key) != Some(number))
            .map(|(key, number)| (*key, *number))
            .collect();
        if new.is_empty() {
            return true;
        }
        if !self.out.failed.is_empty() {
            return false;
        }
        for (key, number) in new {
            if let Err(error) = self.one(MapWrite::SetCidr(key, number)) {
                self.out.other = Some(error);
                return false;
            }
        }
        true
    }

    /// Leads ports to their classes and endpoints to their policies.
    fn switch(&mut self, prefixes: bool) {
        let wanted = self.wanted;
        if !prefixes {
            self.hold_back();
        }
        let mut ports: BTreeMap<u32, Vec<PortKey>> = BTreeMap::new();
        for (key, value) in &wanted.ports {
            if self.held.ports.get(key) != Some(value) {
                ports.entry(key.policy).or_default().push(*key);
            }
        }
        for (policy, mut keys) in ports {
            if self.out.failed.contains_key(&policy) {
                continue;
            }
            keys.sort_by_key(|key| std::cmp::Reverse(key.length));
            let steps = keys
                .into_iter()
                .map(|key| MapWrite::SetPort(key, wanted.ports[&key]))
                .collect();
            self.of_policy(policy, steps);
        }
        let gone: Vec<PortKey> = {
            let known: BTreeSet<u32> = wanted.ports.keys().map(|key| key.policy).collect();
            let mut gone: Vec<_> = self
                .held
                .ports
                .keys()
                .filter(|key| known.contains(&key.policy) && !wanted.ports.contains_key(key))
                .copied()
                .collect();
            gone.sort_by_key(|key| key.length);
            gone
        };
        for key in gone {
            if !self.out.failed.contains_key(&key.policy) {
                self.of_policy(key.policy, vec![MapWrite::DeletePort(key)]);
            }
        }
        for (index, value) in &wanted.endpoints {
            if self.held.endpoints.get(index) != Some(value) && !self.out.failed.contains_key(&value.policy) {
                self.of_policy(value.policy, vec![MapWrite::SetEndpoint(*index, *value)]);
            }
        }
    }

    /// Without all prefixes, policies that rest on some stay as they are.
    fn hold_back(&mut self) {
        let error = self.out.other.clone();
        let Some(error) = error.or_else(|| self.out.failed.values().next().cloned()) else {
            return;
        };
        let wanted = self.wanted;
        let ports = wanted.ports.iter().filter(|(_, value)| value.has_cidrs);
        let resting: BTreeSet<u32> = ports.map(|(key, _)| key.policy).collect();
        let ports = wanted
            .ports
            .iter()
            .filter(|(key, value)| self.held.ports.get(key) != Some(value))
            .map(|(key, _)| key.policy);
        let endpoints = wanted
            .endpoints
            .iter()
            .filter(|(index, value)| self.held.endpoints.get(index) != Some(value))
            .map(|(_, value)| value.policy);
        for policy in ports.chain(endpoints).filter(|policy| resting.contains(policy)) {
            self.out.failed.entry(policy).or_insert_with(|| error.clone());
        }
    }

    /// Closes endpoints that are gone.
    fn close(&mut self, keep: &BTreeSet<u16>) {
        let gone: Vec<u16> = self
            .held
            .endpoints
            .keys()
            .filter(|index| !self.wanted.endpoints.contains_key(index) && !keep.contains(index))
            .copied()
            .collect();
        for index in gone {
            if let Err(error) = self.one(MapWrite::DeleteEndpoint(index)) {
                self.out.other = Some(error);
            }
        }
    }

    /// Removes what nothing leads to any more.
    fn clear_up(&mut self) {
        let mut policies: BTreeSet<u32> = self.held.endpoints.values().map(|value| value.policy).collect();
        policies.extend(self.out.failed.keys());
        let tables: BTreeSet<u32> = self
            .held
            .endpoints
            .values()
            .map(|value| value.cidr_table)
            .collect();
        let stays_old = !self.out.is_complete();
        let ports: Vec<PortKey> = self
            .held
            .ports
            .keys()
            .filter(|key| !self.wanted.ports.contains_key(key) && !policies.contains(&key.policy))
            .copied()
            .collect();
        let going: BTreeSet<&PortKey> = ports.iter().collect();
        let staying = self.held.ports.iter().filter(|(key, _)| !going.contains(key));
        let classes: BTreeSet<u32> = staying.map(|(_, value)| value.class).collect();
        let cidrs: Vec<CidrKey> = self
            .held
            .cidrs
            .keys()
            .filter(|key| !self.wanted.cidrs.contains_key(key))
            .filter(|key| !tables.contains(&key.table) || (self.is_table(key.table) && !stays_old))
            .copied()
            .collect();
        let owners: BTreeMap<u32, u32> = self
            .wanted
            .ports
            .iter()
            .map(|(key, value)| (value.class, key.policy))
            .collect();
        // Half of a policy that found no room is nobody's: what it took is for others.
        let is_part = |class: &u32| {
            owners
                .get(class)
                .is_some_and(|policy| self.out.failed.contains_key(policy))
        };
        let known: BTreeSet<u32> = self.wanted.ports.values().map(|value| value.class).collect();
        let verdicts: Vec<VerdictKey> = self
            .held
            .verdicts
            .keys()
            .filter(|key| {
                !self.wanted.verdicts.contains_key(key)
                    || (is_part(&key.class) && !classes.contains(&key.class))
            })
            .filter(|key| {
                let stays = classes.contains(&key.class);
                !stays || (!stays_old && known.contains(&key.class))
            })
            .copied()
            .collect();
        let mut steps = Vec::new();
        if !(ports.is_empty() && cidrs.is_empty() && verdicts.is_empty()) {
            steps.push(MapWrite::Grace);
        }
        steps.extend(ports.into_iter().map(MapWrite::DeletePort));
        steps.extend(cidrs.into_iter().map(MapWrite::DeleteCidr));
        if !verdicts.is_empty() {
            steps.push(MapWrite::Grace);
        }
        steps.extend(verdicts.into_iter().map(MapWrite::DeleteVerdict));
        for step in steps {
            if let Err(error) = self.one(step) {
                self.out.other = Some(error);
                return;
            }
        }
    }

    /// Whether this agent's own prefixes are in a table, so that it knows all of it.
    fn is_table(&self, table: u32) -> bool {
        self.wanted
            .endpoints
            .values()
            .any(|value| value.cidr_table == table)
    }
}
