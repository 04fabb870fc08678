//! Statements of an endpoint to tables.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use warren_model::{
    IdentityId,
    policy::{Action, Direction, Directions, SelectorId},
};

use super::{
    flat::{Flat, PortName, UNSETTLED},
    map::{MapWrite, PeerKind, PortKey, PortValue, VerdictKey, VerdictValue},
    port::{Prefix, classify},
};

/// The verdicts of a class of ports.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClassTable {
    /// The statements that cover the ports, by their place among the direction's.
    pub(super) statements: Vec<usize>,
    /// For every identity without an entry of its own; `None`: denied by default.
    pub everybody: Option<VerdictValue>,
    /// For identities whose verdict differs.
    pub identities: BTreeMap<IdentityId, VerdictValue>,
    /// For prefixes by number: of the world, and of pods and nodes.
    pub prefixes: BTreeMap<(PeerKind, u32), VerdictValue>,
}

impl ClassTable {
    pub(super) fn entries(&self) -> impl Iterator<Item = (PeerKind, u32, VerdictValue)> + '_ {
        let everybody = self.everybody.map(|value| (PeerKind::Everybody, 0, value));
        let identities = self
            .identities
            .iter()
            .map(|(id, value)| (PeerKind::Identity, id.0, *value));
        let prefixes = self
            .prefixes
            .iter()
            .map(|((kind, number), value)| (*kind, *number, *value));
        everybody.into_iter().chain(identities).chain(prefixes)
    }

    /// Writes that make the table.
    pub(super) fn sets(&self, class: u32) -> impl Iterator<Item = MapWrite> + '_ {
        self.entries()
            .map(move |(kind, id, value)| MapWrite::SetVerdict(VerdictKey { class, kind, id }, value))
    }

    /// Writes that take it away.
    pub(super) fn deletes(&self, class: u32) -> impl Iterator<Item = MapWrite> + '_ {
        self.entries()
            .map(move |(kind, id, _)| MapWrite::DeleteVerdict(VerdictKey { class, kind, id }))
    }
}

/// One direction of an endpoint's policy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DirectionPolicy {
    /// Whether what nothing allows is denied.
    pub default_deny: bool,
    /// Classes by prefix of protocol and port (bits, length).
    pub ports: BTreeMap<(u32, u8), u32>,
    /// The classes' verdicts.
    pub classes: BTreeMap<u32, ClassTable>,
    pub(super) flats: Vec<Flat>,
}

/// The compiled policy of endpoints with the same identity and named ports.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EndpointPolicy {
    /// Its number.
    pub number: u32,
    /// Its two directions.
    pub directions: Directions<DirectionPolicy>,
    /// Names of peers' ports that it depends on.
    pub(super) peer_ports: BTreeSet<PortName>,
}

impl EndpointPolicy {
    /// Entries of `POLICY_PORTS`.
    pub(super) fn port_entries(&self, direction: Direction) -> BTreeMap<PortKey, PortValue> {
        let of = self.directions.of(direction);
        let entry = |(&(bits, length), &class): (&Prefix, &u32)| {
            let key = PortKey {
                policy: self.number,
                direction,
                bits,
                length,
            };
            let has_cidrs = of
                .classes
                .get(&class)
                .is_some_and(|table| !table.prefixes.is_empty());
            (key, PortValue { class, has_cidrs })
        };
        of.ports.iter().map(entry).collect()
    }
}

/// What compiling needs to know beside the statements.
pub(super) struct Facts<'a> {
    /// Members of the selectors, the own host included where it matches.
    pub(super) members: &'a BTreeMap<SelectorId, BTreeSet<IdentityId>>,
    /// All prefixes of the node's table.
    pub(super) prefixes: &'a BTreeMap<IpNet, u32>,
    /// The host reaches the endpoint whatever rules allow: it is a pod of this node, and not configured otherwise.
    pub(super) host_reaches: bool,
}

impl Facts<'_> {
    fn member(&self, selector: SelectorId, identity: IdentityId) -> bool {
        self.members
            .get(&selector)
            .is_some_and(|members| members.contains(&identity))
    }
}

/// Compiles one direction. Classes get the numbers that `number` returns.
pub(super) fn compile(
    direction: Direction,
    default_deny: bool,
    flats: Vec<Flat>,
    facts: &Facts<'_>,
    mut number: impl FnMut() -> u32,
) -> DirectionPolicy {
    let mut out = DirectionPolicy {
        default_deny,
        ..DirectionPolicy::default()
    };
    let mut known: BTreeMap<Vec<usize>, u32> = BTreeMap::new();
    for (prefix, statements) in classify(flats.iter().map(|flat| &flat.cover)) {
        let class = *known.entry(statements.clone()).or_insert_with(|| {
            let class = number();
            out.classes.insert(
                class,
                ClassTable {
                    statements,
                    ..ClassTable::default()
                },
            );
            class
        });
        out.ports.insert(prefix, class);
    }
    out.flats = flats;
    let DirectionPolicy { classes, flats, .. } = &mut out;
    for table in classes.values_mut() {
        let judge = Judge {
            table_statements: &table.statements.clone(),
            flats,
            direction,
            default_deny,
            facts,
        };
        table.everybody = judge.everybody();
        let mut identities: BTreeSet<IdentityId> = judge
            .statements()
            .flat_map(|flat| {
                flat.selectors
                    .iter()
                    .filter_map(|id| facts.members.get(id))
                    .flatten()
            })
            .copied()
            .collect();
        identities.extend(judge.statements().flat_map(|flat| flat.only.iter().flatten()));
        identities.extend(UNSETTLED.into_iter().chain([IdentityId::HOST]));
        for identity in identities {
            if let Some(value) = judge.exception(identity, table.everybody) {
                table.identities.insert(identity, value);
            }
        }
        for (prefix, number) in facts.prefixes {
            judge.add_prefix(prefix, *number, &mut table.prefixes);
        }
    }
    out
}

impl DirectionPolicy {
    /// The selectors that its statements name.
    pub(super) fn selectors(&self) -> impl Iterator<Item = SelectorId> + '_ {
        self.flats.iter().flat_map(|flat| flat.selectors.iter().copied())
    }

    /// Whether everything is allowed: nothing denies, be it by default or by a statement.
    pub fn is_open(&self) -> bool {
        !self.default_deny && self.flats.iter().all(|flat| flat.action == Action::Allow)
    }

    /// The prefixes at which its statements' answers change.
    pub(super) fn borders(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.flats
            .iter()
            .flat_map(|flat| flat.cidrs.iter().flat_map(|set| set.borders()))
    }

    /// Judges some identities anew and returns the writes; everything else stays.
    pub(super) fn refresh(
        &mut self,
        direction: Direction,
        identities: &BTreeSet<IdentityId>,
        facts: &Facts<'_>,
    ) -> Vec<MapWrite> {
        let mut out = Vec::new();
        for (&class, table) in &mut self.classes {
            let statements = std::mem::take(&mut table.statements);
            let judge = Judge {
                table_statements: &statements,
                flats: &self.flats,
                direction,
                default_deny: self.default_deny,
                facts,
            };
            for &identity in identities {
                let key = VerdictKey {
                    class,
                    kind: PeerKind::Identity,
                    id: identity.0,
                };
                match judge.exception(identity, table.everybody) {
                    Some(value) => {
                        if table.identities.insert(identity, value) != Some(value) {
                            out.push(MapWrite::SetVerdict(key, value));
                        }
                    }
                    None => {
                        if table.identities.remove(&identity).is_some() {
                            out.push(MapWrite::DeleteVerdict(key));
                        }
                    }
                }
            }
            table.statements = statements;
        }
        out
    }

    /// Adds entries for prefixes that nothing leads to yet.
    pub(super) fn add_prefixes(
        &mut self,
        direction: Direction,
        prefixes: &BTreeMap<IpNet, u32>,
        facts: &Facts<'_>,
    ) -> Vec<MapWrite> {
        let mut out = Vec::new();
        for (&class, table) in &mut self.classes {
            let statements = std::mem::take(&mut table.statements);
            let judge = Judge {
                table_statements: &statements,
                flats: &self.flats,
                direction,
                default_deny: self.default_deny,
                facts,
            };
            let mut added = BTreeMap::new();
            for (prefix, number) in prefixes {
                judge.add_prefix(prefix, *number, &mut added);
            }
            table.statements = statements;
            for (&(kind, id), &value) in &added {
                out.push(MapWrite::SetVerdict(VerdictKey { class, kind, id }, value));
            }
            table.prefixes.extend(added);
        }
        out
    }

    /// Removes entries of prefixes that nothing leads to any more.
    pub(super) fn remove_prefixes(&mut self, numbers: &BTreeSet<u32>) -> Vec<MapWrite> {
        let mut out = Vec::new();
        for (&class, table) in &mut self.classes {
            table.prefixes.retain(|&(kind, id), _| {
                let gone = numbers.contains(&id);
                if gone {
                    out.push(MapWrite::DeleteVerdict(VerdictKey { class, kind, id }));
                }
                !gone
            });
        }
        out
    }
}

/// Weighs the statements of one class.
struct Judge<'a> {
    table_statements: &'a [usize],
    flats: &'a [Flat],
    direction: Direction,
    default_deny: bool,
    facts: &'a Facts<'a>,
}

impl Judge<'_> {
    fn statements(&self) -> impl Iterator<Item = &Flat> {
        self.table_statements
            .iter()
            .filter_map(|index| self.flats.get(*index))
    }

    /// The first statement of an action that covers something.
    fn first(&self, action: Action, covers: impl Fn(&Flat) -> bool) -> Option<VerdictValue> {
        let flat = self
            .statements()
            .find(|flat| flat.action == action && covers(flat))?;
        Some(VerdictValue {
            allow: action == Action::Allow,
            rule: flat.rule,
        })
    }

    fn without_rule(&self, allow: bool) -> Option<VerdictValue> {
        allow.then_some(VerdictValue { allow: true, rule: 0 })
    }

    fn everybody(&self) -> Option<VerdictValue> {
        self.first(Action::Deny, Flat::covers_everybody)
            .or_else(|| self.first(Action::Allow, Flat::covers_everybody))
            .or_else(|| self.without_rule(!self.default_deny))
    }

    fn identity(&self, identity: IdentityId) -> Option<VerdictValue> {
        let covers = |flat: &Flat| flat.covers(identity, &|selector, id| self.facts.member(selector, id));
        let unsettled = UNSETTLED.contains(&identity);
        let host =
            identity == IdentityId::HOST && self.direction == Direction::Ingress && self.facts.host_reaches;
        self.first(Action::Deny, |flat| unsettled || covers(flat))
            .or_else(|| self.first(Action::Allow, covers))
            .or_else(|| self.without_rule(host || !self.default_deny))
    }

    /// The entry of an identity, where it decides otherwise than for everybody.
    fn exception(&self, identity: IdentityId, everybody: Option<VerdictValue>) -> Option<VerdictValue> {
        let value = self.identity(identity)?;
        (everybody.map(|everybody| everybody.allow) != Some(value.allow)).then_some(value)
    }

    fn add_prefix(&self, prefix: &IpNet, number: u32, out: &mut BTreeMap<(PeerKind, u32), VerdictValue>) {
        for (kind, world) in [(PeerKind::WorldPrefix, true), (PeerKind::MemberPrefix, false)] {
            let covers = |flat: &Flat| flat.covers_prefix(prefix, world);
            if let Some(value) = self
                .first(Action::Deny, covers)
                .or_else(|| self.first(Action::Allow, covers))
            {
                out.insert((kind, number), value);
            }
        }
    }
}
