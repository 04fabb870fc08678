//! From what changed to what is written.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use warren_model::{
    IdentityId,
    policy::{Direction, Directions},
};

use super::{
    super::{
        compile::{EndpointPolicy, Facts, compile},
        diff::{removal, steps},
        event::RuleName,
        flat::{Flat, flatten},
        map::{CidrKey, EndpointValue, MapWrite},
    },
    Dirty, Kind, PolicyEngine,
};

impl PolicyEngine {
    /// Carries out what is to be done again, and returns the writes.
    pub(super) fn rebuild(&mut self, dirty: Dirty) -> Vec<MapWrite> {
        let (wanted, refresh) = self.sort_out(&dirty);
        let structural = !wanted.is_empty()
            || self
                .endpoints
                .values()
                .any(|e| e.kind.identity == IdentityId::UNKNOWN);
        let mut out = Vec::new();
        let mut late = Vec::new();
        // Statements first: they say which prefixes have to be told apart.
        let mut pending = Vec::new();
        for kind in wanted {
            let (default_deny, flats) = self.statements(&kind);
            pending.push((kind, default_deny, flats));
        }
        let new_borders: BTreeSet<IpNet> = pending
            .iter()
            .flat_map(|(_, _, flats)| Direction::ALL.map(|d| flats.of(d)))
            .flatten()
            .flat_map(|flat| flat.cidrs.iter().flat_map(|set| set.borders()))
            .collect();
        self.add_prefixes(&new_borders, &mut out);
        for (kind, identities) in refresh {
            self.refresh(&kind, &identities, &mut out);
        }
        for (kind, default_deny, flats) in pending {
            self.recompile(&kind, default_deny, flats, &mut out, &mut late);
        }
        self.write_endpoints(&mut out);
        if !late.is_empty() {
            out.push(MapWrite::Grace);
            out.append(&mut late);
        }
        if structural {
            self.collect_garbage(&mut out);
        }
        out
    }

    /// Which kinds of endpoints have to be compiled, and for which only some identities change.
    fn sort_out(&self, dirty: &Dirty) -> (BTreeSet<Kind>, BTreeMap<Kind, BTreeSet<IdentityId>>) {
        let mut wanted = BTreeSet::new();
        let mut refresh: BTreeMap<Kind, BTreeSet<IdentityId>> = BTreeMap::new();
        let changed: BTreeSet<IdentityId> = dirty.members.values().flatten().copied().collect();
        let kinds: BTreeSet<&Kind> = self.endpoints.values().map(|endpoint| &endpoint.kind).collect();
        for kind in kinds
            .into_iter()
            .filter(|kind| kind.identity != IdentityId::UNKNOWN)
        {
            let Some(policy) = self.policies.get(kind) else {
                wanted.insert(kind.clone());
                continue;
            };
            let names = !policy.peer_ports.is_disjoint(&dirty.names);
            if dirty.everything || names || dirty.kinds.contains(kind) || changed.contains(&kind.identity) {
                wanted.insert(kind.clone());
                continue;
            }
            let selectors = Direction::ALL
                .into_iter()
                .flat_map(|d| policy.directions.of(d).selectors());
            let identities: BTreeSet<_> = selectors
                .filter_map(|id| dirty.members.get(&id))
                .flatten()
                .copied()
                .collect();
            if !identities.is_empty() {
                refresh.entry(kind.clone()).or_default().extend(identities);
            }
        }
        (wanted, refresh)
    }

    fn statements(&self, kind: &Kind) -> (Directions<bool>, Directions<Vec<Flat>>) {
        let mut default_deny = Directions::<bool>::default();
        let mut flats = Directions::<Vec<Flat>>::default();
        for rule in self.rules_of(kind) {
            default_deny.ingress |= rule.default_deny.ingress;
            default_deny.egress |= rule.default_deny.egress;
            for statement in &rule.statements {
                let name = RuleName {
                    policy: rule.policy.clone(),
                    place: statement.place.clone(),
                };
                let number = self.names.get(&name).copied().unwrap_or(0);
                let parts = flatten(number, statement, &kind.ports, &self.named);
                flats.of_mut(statement.direction).extend(parts);
            }
        }
        (default_deny, flats)
    }

    fn refresh(&mut self, kind: &Kind, identities: &BTreeSet<IdentityId>, out: &mut Vec<MapWrite>) {
        let Some(policy) = self.policies.get_mut(kind) else {
            return;
        };
        self.refreshed += 1;
        let facts = Facts {
            members: &self.members,
            prefixes: &self.cidrs.prefixes,
            host_reaches: kind.identity != IdentityId::HOST && !self.node.closed_to_host,
        };
        for direction in Direction::ALL {
            out.extend(
                policy
                    .directions
                    .of_mut(direction)
                    .refresh(direction, identities, &facts),
            );
        }
    }

    fn recompile(
        &mut self,
        kind: &Kind,
        default_deny: Directions<bool>,
        mut flats: Directions<Vec<Flat>>,
        out: &mut Vec<MapWrite>,
        late: &mut Vec<MapWrite>,
    ) {
        self.compiled += 1;
        let facts = Facts {
            members: &self.members,
            prefixes: &self.cidrs.prefixes,
            host_reaches: kind.identity != IdentityId::HOST && !self.node.closed_to_host,
        };
        let next = &mut self.next_class;
        let mut class = || {
            *next += 1;
            *next - 1
        };
        let mut one = |direction: Direction| {
            let flats = std::mem::take(flats.of_mut(direction));
            compile(direction, *default_deny.of(direction), flats, &facts, &mut class)
        };
        let directions = Directions {
            ingress: one(Direction::Ingress),
            egress: one(Direction::Egress),
        };
        let peer_ports = self.peer_port_names(kind);
        let old = self.policies.get(kind);
        let mut new = EndpointPolicy {
            number: old.map_or(self.next_policy, |old| old.number),
            directions,
            peer_ports,
        };
        if old.is_none() {
            self.next_policy += 1;
        }
        let (now, after) = steps(old, &mut new);
        out.extend(now);
        late.extend(after);
        self.policies.insert(kind.clone(), new);
    }

    /// Tells new prefixes apart. Every class first gets entries for them, which say what held before.
    fn add_prefixes(&mut self, wanted: &BTreeSet<IpNet>, out: &mut Vec<MapWrite>) {
        let new = self.cidrs.add(wanted);
        if new.is_empty() {
            return;
        }
        let facts = Facts {
            members: &self.members,
            prefixes: &new,
            host_reaches: false,
        };
        for policy in self.policies.values_mut() {
            for direction in Direction::ALL {
                out.extend(
                    policy
                        .directions
                        .of_mut(direction)
                        .add_prefixes(direction, &new, &facts),
                );
            }
        }
        let table = self.cidrs.number;
        out.extend(
            new.into_iter()
                .map(|(prefix, n)| MapWrite::SetCidr(CidrKey { table, prefix }, n)),
        );
    }

    /// Leads endpoints to their policies, one write each; takes away those that are gone.
    fn write_endpoints(&mut self, out: &mut Vec<MapWrite>) {
        let gone: Vec<u16> = self
            .endpoints
            .iter()
            .filter(|(_, endpoint)| endpoint.kind.identity == IdentityId::UNKNOWN)
            .map(|(index, _)| *index)
            .collect();
        for index in gone {
            if self
                .endpoints
                .remove(&index)
                .is_some_and(|endpoint| endpoint.written.is_some())
            {
                out.push(MapWrite::DeleteEndpoint(index));
            }
        }
        for (index, endpoint) in &mut self.endpoints {
            let Some(policy) = self.policies.get(&endpoint.kind) else {
                continue;
            };
            let value = EndpointValue {
                policy: policy.number,
                cidr_table: self.cidrs.number,
                audit: endpoint.audit || self.node.audit,
                open: Directions {
                    ingress: policy.directions.ingress.is_open(),
                    egress: policy.directions.egress.is_open(),
                },
            };
            if endpoint.written != Some(value) {
                endpoint.written = Some(value);
                out.push(MapWrite::SetEndpoint(*index, value));
            }
        }
    }

    /// Takes away policies that no endpoint has, and prefixes that no statement names.
    fn collect_garbage(&mut self, out: &mut Vec<MapWrite>) {
        let used: BTreeSet<&Kind> = self.endpoints.values().map(|endpoint| &endpoint.kind).collect();
        let unused: Vec<Kind> = self
            .policies
            .keys()
            .filter(|kind| !used.contains(kind))
            .cloned()
            .collect();
        let mut after: Vec<MapWrite> = unused
            .iter()
            .filter_map(|kind| self.policies.remove(kind))
            .flat_map(|p| removal(&p))
            .collect();
        let policies = self.policies.values();
        let directions = policies.flat_map(|policy| Direction::ALL.map(|d| policy.directions.of(d)));
        let borders: BTreeSet<IpNet> = directions.flat_map(|direction| direction.borders()).collect();
        let gone = self.cidrs.retain(&borders);
        let numbers: BTreeSet<u32> = gone.values().copied().collect();
        let table = self.cidrs.number;
        if !gone.is_empty() {
            // Nobody may go on with a class of before and find a wider prefix.
            out.push(MapWrite::Grace);
        }
        out.extend(
            gone.into_keys()
                .map(|prefix| MapWrite::DeleteCidr(CidrKey { table, prefix })),
        );
        if !numbers.is_empty() {
            for policy in self.policies.values_mut() {
                for direction in Direction::ALL {
                    after.extend(policy.directions.of_mut(direction).remove_prefixes(&numbers));
                }
            }
        }
        if !after.is_empty() {
            out.push(MapWrite::Grace);
            out.append(&mut after);
        }
    }
}
