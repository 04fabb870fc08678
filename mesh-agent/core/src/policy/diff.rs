//! From one compiled policy to the next, one write at a time.

use std::collections::{BTreeMap, BTreeSet};

use warren_model::policy::Direction;

use super::{
    compile::{ClassTable, DirectionPolicy, EndpointPolicy},
    map::{MapWrite, PeerKind, VerdictKey},
};

/// The writes that turn `old` into `new`, which keeps `old`'s number and whose classes have numbers that `old` does not
/// use. Classes that stay as they were get their old numbers back in `new`. After every write, each verdict is `old`'s
/// or `new`'s: an identity's entry changes in place only where nothing else of its class does; everything else happens
/// behind a fresh number that a port is led to in one write.
pub fn diff(old: Option<&EndpointPolicy>, new: &mut EndpointPolicy) -> Vec<MapWrite> {
    let (mut out, mut after) = steps(old, new);
    if !after.is_empty() {
        out.push(MapWrite::Grace);
        out.append(&mut after);
    }
    out
}

/// The writes after which `new` holds, and those that are left for after a grace period.
pub(super) fn steps(
    old: Option<&EndpointPolicy>,
    new: &mut EndpointPolicy,
) -> (Vec<MapWrite>, Vec<MapWrite>) {
    let nothing = EndpointPolicy {
        number: new.number,
        ..EndpointPolicy::default()
    };
    let old = old.unwrap_or(&nothing);
    let mut before = Vec::new();
    let mut switch = Vec::new();
    let mut after = Vec::new();
    for direction in Direction::ALL {
        let from = old.directions.of(direction);
        let to = new.directions.of_mut(direction);
        keep_numbers(from, to);
        for (class, table) in &to.classes {
            match from.classes.get(class) {
                None => before.extend(table.sets(*class)),
                Some(was) => in_place(*class, was, table, &mut before),
            }
        }
        for (class, table) in &from.classes {
            if !to.classes.contains_key(class) {
                after.extend(table.deletes(*class));
            }
        }
        let (was, is) = (old.port_entries(direction), new.port_entries(direction));
        let mut sets: Vec<_> = is
            .iter()
            .filter(|(key, value)| was.get(key) != Some(value))
            .collect();
        sets.sort_by_key(|(key, _)| std::cmp::Reverse(key.length));
        switch.extend(
            sets.into_iter()
                .map(|(key, value)| MapWrite::SetPort(*key, *value)),
        );
        let mut gone: Vec<_> = was.keys().filter(|key| !is.contains_key(key)).collect();
        gone.sort_by_key(|key| key.length);
        switch.extend(gone.into_iter().map(|key| MapWrite::DeletePort(*key)));
    }
    let mut out = before;
    out.append(&mut switch);
    (out, after)
}

/// The writes that take a policy away after nothing leads to it.
pub(super) fn removal(policy: &EndpointPolicy) -> Vec<MapWrite> {
    let mut out = Vec::new();
    for direction in Direction::ALL {
        out.extend(
            policy
                .port_entries(direction)
                .into_keys()
                .map(MapWrite::DeletePort),
        );
        let of = policy.directions.of(direction);
        out.extend(of.classes.iter().flat_map(|(class, table)| table.deletes(*class)));
    }
    out
}

/// Entries of identities are each one write from the old to the new verdict: new ones first, so that no moment falls
/// back to what holds for everybody, then those that are not needed any more.
fn in_place(class: u32, was: &ClassTable, is: &ClassTable, out: &mut Vec<MapWrite>) {
    let key = |id: u32| VerdictKey {
        class,
        kind: PeerKind::Identity,
        id,
    };
    for (identity, value) in &is.identities {
        if was.identities.get(identity) != Some(value) {
            out.push(MapWrite::SetVerdict(key(identity.0), *value));
        }
    }
    for identity in was
        .identities
        .keys()
        .filter(|identity| !is.identities.contains_key(identity))
    {
        out.push(MapWrite::DeleteVerdict(key(identity.0)));
    }
}

/// Gives classes of `to` the numbers that they had in `from`: those with the very same verdicts always; where no port
/// changes its class, also those that differ only in identities.
fn keep_numbers(from: &DirectionPolicy, to: &mut DirectionPolicy) {
    let mut renamed: BTreeMap<u32, u32> = BTreeMap::new();
    let pairs = pairs(from, to);
    let mut used = BTreeSet::new();
    for (&class, table) in &to.classes {
        let same_entries = |was: &ClassTable| {
            was.everybody == table.everybody
                && was.prefixes == table.prefixes
                && was.identities == table.identities
        };
        let old = match &pairs {
            Some(pairs) => pairs.get(&class).copied().filter(|old| {
                from.classes
                    .get(old)
                    .is_some_and(|was| was.everybody == table.everybody && was.prefixes == table.prefixes)
            }),
            None => from
                .classes
                .iter()
                .find(|(old, was)| !used.contains(*old) && same_entries(was))
                .map(|(old, _)| *old),
        };
        if let Some(old) = old {
            used.insert(old);
            renamed.insert(class, old);
        }
    }
    let name = |class: u32| renamed.get(&class).copied().unwrap_or(class);
    to.classes = std::mem::take(&mut to.classes)
        .into_iter()
        .map(|(class, table)| (name(class), table))
        .collect();
    to.ports.values_mut().for_each(|class| *class = name(*class));
}

/// New class to old class, where the ports are cut as before and classes correspond one to one.
fn pairs(from: &DirectionPolicy, to: &DirectionPolicy) -> Option<BTreeMap<u32, u32>> {
    if !from.ports.keys().eq(to.ports.keys()) {
        return None;
    }
    let mut forward = BTreeMap::new();
    let mut back = BTreeMap::new();
    for (old, new) in from.ports.values().zip(to.ports.values()) {
        if *forward.entry(*new).or_insert(*old) != *old || *back.entry(*old).or_insert(*new) != *new {
            return None;
        }
    }
    Some(forward)
}
