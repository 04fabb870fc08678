//! The core's words <-> the drivers' words.

use std::collections::BTreeMap;

use warren_agent_core::{
    EndpointEntry, LinkKind, NodePath, Owner, Route, RouteKey, Rule, TUNNEL_PREFIX, Table,
};
use warren_model::IdentityId;

/// The number of a table.
pub(super) fn table_number(table: Table) -> u32 {
    match table {
        Table::Pods => 4151,
        Table::Nodes => 4152,
        Table::Main => 254,
    }
}

fn table(number: u32) -> Option<Table> {
    [Table::Pods, Table::Nodes, Table::Main]
        .into_iter()
        .find(|table| table_number(*table) == number)
}

/// A slot that no device of ours has: a route into it is one that nobody wants.
const NO_SLOT: u8 = u8::MAX;

/// A route as the core sees it.
pub(super) fn route_from(
    route: &warren_net::Route,
    devices: &BTreeMap<u8, u32>,
) -> Option<(RouteKey, Route)> {
    let key = RouteKey {
        table: table(route.table)?,
        prefix: route.destination,
        metric: route.metric,
    };
    let kind = match route.kind {
        warren_net::RouteKind::Via { ifindex, src } => {
            let slot = devices
                .iter()
                .find(|(_, device)| **device == ifindex)
                .map_or(NO_SLOT, |(slot, _)| *slot);
            Route::Tunnel { slot, source: src }
        }
        warren_net::RouteKind::Blackhole => Route::Blackhole,
        warren_net::RouteKind::Throw => Route::Throw,
    };
    Some((key, kind))
}

/// A route for the driver; `None` where its device is not there.
pub(super) fn route_to(
    key: &RouteKey,
    route: &Route,
    devices: &BTreeMap<u8, u32>,
) -> Option<warren_net::Route> {
    let kind = match route {
        Route::Tunnel { slot, source } => warren_net::RouteKind::Via {
            ifindex: *devices.get(slot)?,
            src: *source,
        },
        Route::Blackhole => warren_net::RouteKind::Blackhole,
        Route::Throw => warren_net::RouteKind::Throw,
    };
    let table = table_number(key.table);
    Some(warren_net::Route {
        table,
        destination: key.prefix,
        kind,
        metric: key.metric,
    })
}

/// Whether a driver's route is the one of a key.
pub(super) fn same_route(route: &warren_net::Route, key: &RouteKey) -> bool {
    route.table == table_number(key.table) && route.destination == key.prefix && route.metric == key.metric
}

/// A rule as the core sees it.
pub(super) fn rule_from(rule: &warren_net::Rule) -> Option<Rule> {
    if rule.to.is_some() {
        return None;
    }
    let ipv6 = rule.family == warren_net::Family::V6;
    Some(Rule {
        preference: rule.priority,
        ipv6,
        from: rule.from,
        table: table(rule.table)?,
    })
}

/// A rule for the driver.
pub(super) fn rule_to(rule: &Rule) -> warren_net::Rule {
    warren_net::Rule {
        family: if rule.ipv6 {
            warren_net::Family::V6
        } else {
            warren_net::Family::V4
        },
        priority: rule.preference,
        from: rule.from,
        to: None,
        table: table_number(rule.table),
    }
}

/// The kind of a device, as far as the core cares.
pub(super) fn link_kind(link: &warren_net::Link) -> LinkKind {
    match link.kind {
        warren_net::LinkKind::Loopback => LinkKind::Loopback,
        warren_net::LinkKind::Bridge => LinkKind::Bridge,
        warren_net::LinkKind::Veth { .. } => LinkKind::Veth,
        warren_net::LinkKind::Tun | warren_net::LinkKind::WireGuard => {
            slot_of(&link.name).map_or(LinkKind::Other, LinkKind::Tunnel)
        }
        warren_net::LinkKind::Vxlan | warren_net::LinkKind::Physical | warren_net::LinkKind::Other(_) => {
            LinkKind::Other
        }
    }
}

/// The slot of a device of ours.
fn slot_of(name: &str) -> Option<u8> {
    let number = name.strip_prefix(TUNNEL_PREFIX)?;
    let slot: u8 = number.parse().ok()?;
    (slot < warren_model::node::SLOTS && number.len() == 1).then_some(slot)
}

/// An owner for the programs.
pub(super) fn owner_to(owner: &Owner) -> warren_bpf::Owner {
    let kind = match (owner.node, owner.pods) {
        (0, true) => warren_bpf::OwnerKind::LocalPod,
        (0, false) => warren_bpf::OwnerKind::LocalNode,
        (_, true) => warren_bpf::OwnerKind::RemotePod,
        (_, false) => warren_bpf::OwnerKind::RemoteNode,
    };
    warren_bpf::Owner {
        kind,
        node: owner.node,
        identity: owner.identity.0,
    }
}

/// An owner as the core sees it.
pub(super) fn owner_from(owner: &warren_bpf::Owner) -> Owner {
    let pods = match owner.kind {
        warren_bpf::OwnerKind::LocalPod | warren_bpf::OwnerKind::RemotePod => true,
        warren_bpf::OwnerKind::LocalNode | warren_bpf::OwnerKind::RemoteNode => false,
    };
    Owner {
        node: owner.node,
        pods,
        identity: IdentityId(owner.identity),
    }
}

/// A path as the core sees it; one by a device that is no longer ours has a slot that nobody wants.
pub(super) fn path_from(path: &warren_bpf::Path, devices: &BTreeMap<u8, u32>) -> NodePath {
    let slot = devices
        .iter()
        .find(|(_, device)| **device == path.ifindex)
        .map_or(NO_SLOT, |(slot, _)| *slot);
    NodePath {
        slot,
        receive: path.receive_slots,
    }
}

/// A pod for the programs.
pub(super) fn endpoint_to(ifindex: u32, entry: &EndpointEntry) -> warren_bpf::Endpoint {
    warren_bpf::Endpoint {
        ifindex,
        index: entry.index,
        mac: entry.mac,
        addresses: entry.addresses.iter().copied().collect(),
        identity: entry.identity.0,
    }
}

/// A pod as the core sees it.
pub(super) fn endpoint_from(endpoint: &warren_bpf::Endpoint) -> EndpointEntry {
    EndpointEntry {
        index: endpoint.index,
        mac: endpoint.mac,
        addresses: endpoint.addresses.iter().copied().collect(),
        identity: IdentityId(endpoint.identity),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_names_are_slots() {
        assert_eq!(slot_of("warren0"), Some(0));
        assert_eq!(slot_of("warren3"), Some(3));
        for other in ["warren4", "warren", "warren00", "warren+1", "eth0", "warren0.5"] {
            assert_eq!(slot_of(other), None, "{other}");
        }
    }

    #[test]
    fn routes_and_rules_survive_the_way_there_and_back() {
        let devices = BTreeMap::from([(0, 17)]);
        let prefix = "10.244.2.0/24".parse().unwrap();
        for table in [Table::Pods, Table::Nodes, Table::Main] {
            let key = RouteKey {
                table,
                prefix,
                metric: 100,
            };
            for route in [
                Route::Tunnel {
                    slot: 0,
                    source: None,
                },
                Route::Blackhole,
                Route::Throw,
            ] {
                let driver = route_to(&key, &route, &devices).unwrap();
                assert!(same_route(&driver, &key));
                assert_eq!(route_from(&driver, &devices), Some((key, route)));
            }
            let rule = Rule {
                preference: 90,
                ipv6: false,
                from: Some(prefix),
                table,
            };
            assert_eq!(rule_from(&rule_to(&rule)), Some(rule));
        }
        let gone = route_to(
            &RouteKey {
                table: Table::Pods,
                prefix,
                metric: 1,
            },
            &Route::Tunnel {
                slot: 1,
                source: None,
            },
            &devices,
        );
        assert_eq!(gone, None);
    }
}
