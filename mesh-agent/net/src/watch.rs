//! Changes as they happen.

use std::pin::Pin;

use futures::{Stream, StreamExt as _};
use ipnet::IpNet;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{
    MulticastGroup,
    packet_core::{NetlinkMessage, NetlinkPayload},
};

use crate::{Error, Link, address, link, route, rule};

/// Something changed in the namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkEvent {
    /// A device appeared or changed.
    Changed(Link),
    /// A device is gone: deleted, or moved to another namespace.
    Removed(u32),
    /// A device got an address.
    AddressAdded(u32, IpNet),
    /// A device lost an address.
    AddressRemoved(u32, IpNet),
    /// A route or rule of ours was removed, by us or by somebody else: apply them again.
    RoutingChanged,
    /// Events were lost: list everything again.
    Resync,
}

const GROUPS: [MulticastGroup; 7] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
];

pub(crate) fn watch() -> Result<impl Stream<Item = LinkEvent> + Send + Unpin + use<>, Error> {
    let first = subscribe()?;
    // The stream of a socket ends when it was overrun, or cannot be read or decoded: open another one in its place,
    // and say that something was missed. An overrun socket goes on losing events in silence until its queue was
    // empty once, so listing again while it is in use would still miss some. Where no socket can be opened, the
    // stream ends for good.
    let stream = futures::stream::unfold(Some(first), |state| async move {
        let mut messages = state?;
        match messages.next().await {
            Some(event) => Some((event, Some(messages))),
            None => match subscribe() {
                Ok(fresh) => Some((LinkEvent::Resync, Some(fresh))),
                Err(error) => {
                    tracing::error!(%error, "network changes can no longer be watched");
                    Some((LinkEvent::Resync, None))
                }
            },
        }
    });
    Ok(Box::pin(stream))
}

fn subscribe() -> Result<Pin<Box<dyn Stream<Item = LinkEvent> + Send>>, Error> {
    let (connection, handle, messages) = rtnetlink::new_multicast_connection(&GROUPS).map_err(Error::Open)?;
    tokio::spawn(connection);
    let intact = |(message, _): &(NetlinkMessage<RouteNetlinkMessage>, _)| {
        std::future::ready(!matches!(message.payload, NetlinkPayload::Overrun(_)))
    };
    Ok(Box::pin(messages.take_while(intact).filter_map(
        move |(message, _)| {
            // The connection ends with its last handle: keep it as long as the stream.
            let _keep = &handle;
            std::future::ready(event(&message))
        },
    )))
}

fn event(message: &NetlinkMessage<RouteNetlinkMessage>) -> Option<LinkEvent> {
    let NetlinkPayload::InnerMessage(inner) = &message.payload else {
        return None;
    };
    match inner {
        RouteNetlinkMessage::NewLink(message) => link::parse(message).map(LinkEvent::Changed),
        // A port that leaves a bridge is reported by a message of the bridge family: the device lives on.
        RouteNetlinkMessage::DelLink(message) if message.header.interface_family == AddressFamily::Unspec => {
            Some(LinkEvent::Removed(message.header.index))
        }
        RouteNetlinkMessage::NewAddress(message) => {
            address::parse(message).map(|(ifindex, net)| LinkEvent::AddressAdded(ifindex, net))
        }
        RouteNetlinkMessage::DelAddress(message) => {
            address::parse(message).map(|(ifindex, net)| LinkEvent::AddressRemoved(ifindex, net))
        }
        RouteNetlinkMessage::DelRoute(message) => route::parse(message).map(|_| LinkEvent::RoutingChanged),
        RouteNetlinkMessage::DelRule(message) => rule::parse(message).map(|_| LinkEvent::RoutingChanged),
        _ => None,
    }
}
