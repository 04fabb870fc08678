//! Addresses of the namespace.

use std::net::IpAddr;

use futures::TryStreamExt as _;
use ipnet::IpNet;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};

use crate::Error;

pub(crate) async fn list(handle: &rtnetlink::Handle) -> Result<Vec<(u32, IpNet)>, Error> {
    let mut addresses = Vec::new();
    let mut messages = Box::pin(handle.address().get().execute());
    while let Some(message) = messages
        .try_next()
        .await
        .map_err(Error::netlink("list the addresses"))?
    {
        addresses.extend(parse(&message));
    }
    Ok(addresses)
}

/// The local address: `IFA_LOCAL` where there is one (IPv4, and IPv6 point to point), else `IFA_ADDRESS`.
pub(crate) fn parse(message: &AddressMessage) -> Option<(u32, IpNet)> {
    let mut address: Option<IpAddr> = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(local) => {
                address = Some(*local);
                break;
            }
            AddressAttribute::Address(remote) => address = Some(*remote),
            _ => {}
        }
    }
    let net = IpNet::new(address?, message.header.prefix_len).ok()?;
    Some((message.header.index, net))
}
