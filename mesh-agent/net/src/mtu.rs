//! How large a packet the underlay takes.

use std::{collections::BTreeMap, net::IpAddr};

use futures::TryStreamExt as _;
use netlink_packet_route::route::{RouteAttribute, RouteMetric};
use rtnetlink::RouteMessageBuilder;

use crate::{Error, link};

/// The underlay as the routes to the peers' endpoints see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnderlayMtu {
    /// The smallest MTU on the way to any endpoint, in bytes; `None` where no endpoint is reachable.
    pub mtu: Option<u32>,
    /// Indexes of the devices that carry peers, with their MTU in bytes.
    pub devices: BTreeMap<u32, u32>,
    /// Some endpoint is an IPv6 address.
    pub ipv6: bool,
    /// Endpoints without a route.
    pub unreachable: Vec<IpAddr>,
}

impl UnderlayMtu {
    /// The MTU for the tunnel devices; `None` where the underlay's is not known.
    pub fn tunnel(&self) -> Option<u32> {
        self.mtu.map(|mtu| tunnel_mtu(mtu, self.ipv6))
    }
}

/// The tunnel's MTU over an underlay: 32 bytes of WireGuard, 8 of UDP, 20 or 40 of IP, and 8 that are kept for the
/// identity tag. Never below IPv6's minimum of 1280 (RFC 8200, section 5): smaller underlays fragment the outside.
pub const fn tunnel_mtu(underlay: u32, ipv6: bool) -> u32 {
    let overhead = if ipv6 { 88 } else { 68 };
    let mtu = underlay.saturating_sub(overhead);
    if mtu < 1280 { 1280 } else { mtu }
}

pub(crate) async fn underlay(handle: &rtnetlink::Handle, endpoints: &[IpAddr]) -> Result<UnderlayMtu, Error> {
    let links: BTreeMap<u32, u32> = link::list(handle)
        .await?
        .into_iter()
        .map(|link| (link.ifindex, link.mtu))
        .collect();
    let mut result = UnderlayMtu {
        mtu: None,
        devices: BTreeMap::new(),
        ipv6: endpoints.iter().any(IpAddr::is_ipv6),
        unreachable: Vec::new(),
    };
    for endpoint in endpoints {
        let Some((ifindex, route_mtu)) = look_up(handle, *endpoint).await? else {
            result.unreachable.push(*endpoint);
            continue;
        };
        let Some(device_mtu) = links.get(&ifindex) else {
            continue;
        };
        result.devices.insert(ifindex, *device_mtu);
        let path = route_mtu.unwrap_or(u32::MAX).min(*device_mtu);
        result.mtu = Some(result.mtu.unwrap_or(u32::MAX).min(path));
    }
    Ok(result)
}

/// The device and the MTU that the route itself names; `None` where there is no route.
async fn look_up(handle: &rtnetlink::Handle, endpoint: IpAddr) -> Result<Option<(u32, Option<u32>)>, Error> {
    let length = if endpoint.is_ipv4() { 32 } else { 128 };
    let what = format!("look up the route to {endpoint}");
    let request = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(endpoint, length)
        .map_err(|error| Error::Netlink {
            what: what.clone(),
            detail: error.to_string(),
        })?
        .build();
    // A look-up carries nothing but the destination: strict checking refuses the rest.
    let mut request = handle.route().get(request);
    let header = &mut request.message_mut().header;
    let (family, length) = (header.address_family, header.destination_prefix_length);
    *header = netlink_packet_route::route::RouteHeader::default();
    header.address_family = family;
    header.destination_prefix_length = length;
    let reply = match Box::pin(request.execute()).try_next().await {
        Ok(reply) => reply,
        Err(error) => {
            let error = Error::netlink(what)(error);
            return match error.errno() {
                Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EINVAL | libc::EACCES) => Ok(None),
                _ => Err(error),
            };
        }
    };
    let Some(reply) = reply else { return Ok(None) };
    let (mut ifindex, mut mtu) = (None, None);
    for attribute in &reply.attributes {
        match attribute {
            RouteAttribute::Oif(index) => ifindex = Some(*index),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) if *mtu > 0 => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    Ok(ifindex.map(|ifindex| (ifindex, mtu)))
}
