//! Requests whose flags rtnetlink does not offer.

use futures::StreamExt as _;
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};

use crate::Error;

/// Sends one request that asks for an acknowledgement, and waits for it. `what` says in an error what was tried.
pub(crate) async fn acknowledged(
    handle: &rtnetlink::Handle,
    request: NetlinkMessage<RouteNetlinkMessage>,
    what: String,
) -> Result<(), Error> {
    let mut responses = handle
        .clone()
        .request(request)
        .map_err(|error| Error::netlink(what.clone())(error))?;
    while let Some(response) = responses.next().await {
        if let NetlinkPayload::Error(error) = response.payload {
            return Err(Error::netlink(what)(rtnetlink::Error::NetlinkError(error)));
        }
    }
    Ok(())
}
