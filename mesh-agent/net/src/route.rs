//! Our routes: level-triggered, and never a moment without cover.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures::TryStreamExt as _;
use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType},
};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
};

use crate::{Error, PROTOCOL};

/// The metric that the kernel gives an IPv6 route without one.
const IPV6_DEFAULT_METRIC: u32 = 1024;

/// Where a route leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteKind {
    /// Out of a device, without gateway.
    Via {
        /// Index of the device.
        ifindex: u32,
        /// The preferred source address, which must be an address of the node.
        src: Option<IpAddr>,
    },
    /// Dropped without a word (no ICMP, so that no connection attempt is broken by it).
    Blackhole,
    /// The table does not know: the next rule decides.
    Throw,
}

/// One of our routes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Routing table.
    pub table: u32,
    /// Which destinations.
    pub destination: IpNet,
    /// Where to.
    pub kind: RouteKind,
    /// Smaller is preferred. 0 means the kernel's default, which is 1024 for IPv6.
    pub metric: u32,
}

/// What identifies a route to the kernel.
type Key = (u32, IpNet, u32);

impl Route {
    fn normalised(&self) -> Self {
        let metric = match (&self.destination, self.metric) {
            (IpNet::V6(_), 0) => IPV6_DEFAULT_METRIC,
            (_, metric) => metric,
        };
        Self {
            destination: self.destination.trunc(),
            metric,
            ..self.clone()
        }
    }

    fn key(&self) -> Key {
        (self.table, self.destination, self.metric)
    }
}

impl std::fmt::Display for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.kind {
            RouteKind::Via { ifindex, src: None } => write!(f, "{} dev {ifindex}", self.destination)?,
            RouteKind::Via {
                ifindex,
                src: Some(src),
            } => {
                write!(f, "{} dev {ifindex} src {src}", self.destination)?;
            }
            RouteKind::Blackhole => write!(f, "blackhole {}", self.destination)?,
            RouteKind::Throw => write!(f, "throw {}", self.destination)?,
        }
        write!(f, " table {} metric {}", self.table, self.metric)
    }
}

/// What [`crate::Net::apply_routes`] did.
#[derive(Debug, Default)]
pub struct RouteChanges {
    /// Were missing.
    pub added: Vec<Route>,
    /// Were there with another target or source.
    pub replaced: Vec<Route>,
    /// Were surplus.
    pub removed: Vec<Route>,
    /// Refused by the kernel, and why. `EEXIST` (17): a route that is not ours has the same table, destination and
    /// metric. `EINVAL` (22): often a source address that the node does not have (yet).
    pub failed: Vec<(Route, Error)>,
}

impl RouteChanges {
    /// Nothing was to be done, and nothing failed.
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.replaced.is_empty() && self.removed.is_empty() && self.failed.is_empty()
    }
}

pub(crate) async fn list(handle: &rtnetlink::Handle) -> Result<Vec<Route>, Error> {
    Ok(dump(handle).await?.iter().filter_map(parse).collect())
}

pub(crate) async fn apply(handle: &rtnetlink::Handle, desired: &[Route]) -> Result<RouteChanges, Error> {
    let present: BTreeMap<Key, Route> = list(handle)
        .await?
        .into_iter()
        .map(|route| (route.key(), route))
        .collect();
    let plan = plan(&present, desired);
    let mut changes = RouteChanges::default();
    for route in plan.set {
        let replace = present.contains_key(&route.key());
        match set(handle, &route, replace).await {
            Ok(()) if replace => changes.replaced.push(route),
            Ok(()) => changes.added.push(route),
            Err(error) => changes.failed.push((route, error)),
        }
    }
    for route in plan.delete {
        match delete(handle, &route).await {
            Ok(()) => changes.removed.push(route),
            Err(error) => changes.failed.push((route, error)),
        }
    }
    Ok(changes)
}

/// Routes to set and to delete, each in the order in which it is safe.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    set: Vec<Route>,
    delete: Vec<Route>,
}

/// Sets blackholes and throws before routes to devices, the more specific ones first: no throw opens what a
/// blackhole inside it covers, no blackhole swallows what a throw inside it hands on. At equal length blackholes
/// first: a node's own prefix is covered in `main` before another table throws it there. Deletes throws first (they
/// open), then routes to devices, and blackholes last, the more specific ones first.
fn plan(present: &BTreeMap<Key, Route>, desired: &[Route]) -> Plan {
    let desired: BTreeMap<Key, Route> = desired
        .iter()
        .map(Route::normalised)
        .map(|route| (route.key(), route))
        .collect();
    let mut set: Vec<Route> = desired
        .iter()
        .filter(|(key, route)| present.get(key) != Some(route))
        .map(|(_, r)| r.clone())
        .collect();
    set.sort_by_key(|route| {
        let via = matches!(route.kind, RouteKind::Via { .. });
        (
            via,
            u8::MAX - route.destination.prefix_len(),
            route.table,
            route.kind != RouteKind::Throw,
        )
    });
    let mut delete: Vec<Route> = present
        .iter()
        .filter(|(key, _)| !desired.contains_key(key))
        .map(|(_, r)| r.clone())
        .collect();
    delete.sort_by_key(|route| {
        let rank = match route.kind {
            RouteKind::Throw => 0,
            RouteKind::Via { .. } => 1,
            RouteKind::Blackhole => 2,
        };
        (rank, u8::MAX - route.destination.prefix_len())
    });
    Plan { set, delete }
}

async fn dump(handle: &rtnetlink::Handle) -> Result<Vec<RouteMessage>, Error> {
    let mut found = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        // With strict checking the kernel filters by protocol: a node may hold a whole routing feed.
        let mut filter = RouteMessage::default();
        filter.header.address_family = family;
        filter.header.protocol = RouteProtocol::Other(PROTOCOL);
        let mut messages = Box::pin(handle.route().get(filter).execute());
        loop {
            match messages.try_next().await {
                Ok(Some(message)) => found.push(message),
                Ok(None) => break,
                Err(error) => {
                    let error = Error::netlink("list the routes")(error);
                    // No route of ours in any table, or no such family in this kernel.
                    if matches!(
                        error.errno(),
                        Some(libc::ENOENT | libc::EAFNOSUPPORT | libc::EOPNOTSUPP)
                    ) {
                        break;
                    }
                    return Err(error);
                }
            }
        }
    }
    Ok(found)
}

pub(crate) fn parse(message: &RouteMessage) -> Option<Route> {
    let header = &message.header;
    if header.protocol != RouteProtocol::Other(PROTOCOL) {
        return None;
    }
    let mut destination = match header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let (mut table, mut metric, mut ifindex, mut src) = (u32::from(header.table), 0, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip(address)?,
            RouteAttribute::Table(id) => table = *id,
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::Oif(index) => ifindex = Some(*index),
            RouteAttribute::PrefSource(address) => src = ip(address),
            _ => {}
        }
    }
    let kind = match header.kind {
        RouteType::Unicast => RouteKind::Via {
            ifindex: ifindex?,
            src,
        },
        RouteType::BlackHole => RouteKind::Blackhole,
        RouteType::Throw => RouteKind::Throw,
        _ => return None,
    };
    let destination = IpNet::new(destination, header.destination_prefix_length).ok()?;
    Some(Route {
        table,
        destination,
        kind,
        metric,
    })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

fn address(ip: IpAddr) -> RouteAddress {
    match ip {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    }
}

fn message(route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = match route.destination {
        IpNet::V4(_) => AddressFamily::Inet,
        IpNet::V6(_) => AddressFamily::Inet6,
    };
    header.destination_prefix_length = route.destination.prefix_len();
    header.protocol = RouteProtocol::Other(PROTOCOL);
    header.table = u8::try_from(route.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    header.kind = match route.kind {
        RouteKind::Via { .. } => RouteType::Unicast,
        RouteKind::Blackhole => RouteType::BlackHole,
        RouteKind::Throw => RouteType::Throw,
    };
    header.scope = match (&route.kind, route.destination) {
        (RouteKind::Via { .. }, IpNet::V4(_)) => RouteScope::Link,
        _ => RouteScope::Universe,
    };
    message.attributes.push(RouteAttribute::Table(route.table));
    message
        .attributes
        .push(RouteAttribute::Destination(address(route.destination.network())));
    if route.metric != 0 {
        message.attributes.push(RouteAttribute::Priority(route.metric));
    }
    if let RouteKind::Via { ifindex, src } = route.kind {
        message.attributes.push(RouteAttribute::Oif(ifindex));
        if let Some(src) = src {
            message.attributes.push(RouteAttribute::PrefSource(address(src)));
        }
    }
    message
}

/// Adds a route, or replaces one of ours in place. A new one is exclusive: what is not ours is never replaced.
async fn set(handle: &rtnetlink::Handle, route: &Route, replace: bool) -> Result<(), Error> {
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewRoute(message(route)));
    let mode = if replace { NLM_F_REPLACE } else { NLM_F_EXCL };
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | mode;
    let what = format!("set the route {route}");
    crate::request::acknowledged(handle, request, what).await
}

/// A route that is gone already is no error.
async fn delete(handle: &rtnetlink::Handle, route: &Route) -> Result<(), Error> {
    match handle.route().del(message(route)).execute().await {
        Ok(()) => Ok(()),
        Err(error) => {
            let error = Error::netlink(format!("delete the route {route}"))(error);
            match error.errno() {
                Some(libc::ESRCH | libc::ENODEV) => Ok(()),
                _ => Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(destination: &str, kind: RouteKind, metric: u32) -> Route {
        Route {
            table: 4151,
            destination: destination.parse().expect("prefix"),
            kind,
            metric,
        }
    }

    fn via(destination: &str) -> Route {
        route(
            destination,
            RouteKind::Via {
                ifindex: 7,
                src: None,
            },
            0,
        )
    }

    #[test]
    fn blackholes_cover_before_and_after() {
        let hole = route("10.2.0.0/24", RouteKind::Blackhole, 4_000_000_000);
        let old_hole = route("10.3.0.0/24", RouteKind::Blackhole, 4_000_000_000);
        let old = via("10.3.0.0/24");
        let present = [&old_hole, &old].map(|route| (route.key(), route.clone())).into();
        let plan = plan(&present, &[via("10.2.0.0/24"), hole.clone()]);
        assert_eq!(plan.set, [hole, via("10.2.0.0/24")]);
        assert_eq!(plan.delete, [old, old_hole]);
    }

    #[test]
    fn throws_come_before_the_blackholes_of_their_table() {
        let throw = route("10.1.0.0/24", RouteKind::Throw, 0);
        let pool = route("10.0.0.0/8", RouteKind::Blackhole, 4_000_000_001);
        let own = Route {
            table: 254,
            ..route("10.1.0.0/24", RouteKind::Blackhole, 4_000_000_000)
        };
        let plan = plan(&BTreeMap::new(), &[pool.clone(), throw.clone(), own.clone()]);
        assert_eq!(plan.set, [own, throw, pool]);
    }

    #[test]
    fn what_is_there_is_left_alone() {
        let six = via("fd00::/64").normalised();
        assert_eq!(six.metric, IPV6_DEFAULT_METRIC);
        let present = [(six.key(), six)].into();
        let plan = plan(&present, &[via("fd00::/64")]);
        assert_eq!(
            plan,
            Plan {
                set: vec![],
                delete: vec![]
            }
        );
    }
}
