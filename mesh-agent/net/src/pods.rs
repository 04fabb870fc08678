//! Which veth belongs to which pod: for pods that were there before the agent.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
};

use futures::{StreamExt as _, TryStreamExt as _};
use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage},
    nsid::{NsidAttribute, NsidMessage},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteType},
};
use rtnetlink::packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};

use crate::{Error, Link, LinkKind, link, netns};

/// Where the match was seen; the earlier ones are more certain.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum SeenBy {
    /// The pod's own namespace: its device points at the host's end.
    Namespace(PathBuf),
    /// A route to the single address, or a permanent neighbour entry, leads out of the veth.
    Route,
    /// The neighbour table has the address with a MAC address that the bridge learned on the veth's port.
    Bridge,
}

/// The host's end of a pod's veth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodVeth {
    /// Index of the host's end.
    pub ifindex: u32,
    /// MAC address of the pod's end, where it is known.
    pub mac: Option<[u8; 6]>,
    /// The pod's addresses, without link-local ones.
    pub addresses: BTreeSet<IpAddr>,
    /// How it was found.
    pub seen_by: SeenBy,
}

pub(crate) async fn find(handle: &rtnetlink::Handle, netns_dir: &Path) -> Result<Vec<PodVeth>, Error> {
    let links = link::list(handle).await?;
    let veths: BTreeMap<u32, &Link> = links
        .iter()
        .filter(|link| matches!(link.kind, LinkKind::Veth { .. }))
        .map(|link| (link.ifindex, link))
        .collect();
    let mut found: BTreeMap<u32, PodVeth> = BTreeMap::new();
    for pod in by_namespace(handle, netns_dir.to_owned(), &veths).await? {
        found.insert(pod.ifindex, pod);
    }
    let neighbours = neighbours(handle).await?;
    for pod in by_route(handle, &veths)
        .await?
        .into_iter()
        .chain(by_bridge(&neighbours, &veths))
    {
        found.entry(pod.ifindex).or_insert(pod);
    }
    for pod in found.values_mut().filter(|pod| pod.mac.is_none()) {
        pod.mac = neighbours
            .resolved
            .iter()
            .find(|entry| entry.ifindex == pod.ifindex && pod.addresses.contains(&entry.address))
            .map(|entry| entry.mac);
    }
    Ok(found.into_values().collect())
}

/// A device inside a pod's namespace.
struct Inside {
    path: PathBuf,
    ifindex: u32,
    host_ifindex: u32,
    mac: Option<[u8; 6]>,
    addresses: BTreeSet<IpAddr>,
}

async fn by_namespace(
    handle: &rtnetlink::Handle,
    directory: PathBuf,
    veths: &BTreeMap<u32, &Link>,
) -> Result<Vec<PodVeth>, Error> {
    let inside = tokio::task::spawn_blocking(move || look_inside(&directory))
        .await
        .map_err(|error| Error::Netlink {
            what: "look into the pods' namespaces".into(),
            detail: error.to_string(),
        })?;
    let mut found = Vec::new();
    for inside in inside {
        let Some(LinkKind::Veth {
            peer_ifindex: Some(peer),
            peer_netnsid: Some(netnsid),
        }) = veths.get(&inside.host_ifindex).map(|link| &link.kind)
        else {
            continue;
        };
        // Both ends must point at each other, and the other end must be in this very namespace: the numbers alone
        // may be those of another namespace's device.
        if *peer == inside.ifindex && netns_id(handle, &inside.path).await == Some(*netnsid) {
            found.push(PodVeth {
                ifindex: inside.host_ifindex,
                mac: inside.mac,
                addresses: inside.addresses,
                seen_by: SeenBy::Namespace(inside.path),
            });
        }
    }
    Ok(found)
}

/// The number by which this namespace knows the one at `path` (RTM_GETNSID); `None` where it knows none.
async fn netns_id(handle: &rtnetlink::Handle, path: &Path) -> Option<i32> {
    let file = fs::File::open(path).ok()?;
    let mut question = NsidMessage::default();
    question
        .attributes
        .push(NsidAttribute::Fd(u32::try_from(file.as_raw_fd()).ok()?));
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetNsId(question));
    request.header.flags = NLM_F_REQUEST;
    let mut answers = Box::pin(handle.clone().request(request).ok()?);
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNsId(answer)) = answer.payload {
            return answer.attributes.iter().find_map(|attribute| match attribute {
                NsidAttribute::Id(id) => Some(*id).filter(|id| *id >= 0),
                _ => None,
            });
        }
    }
    None
}

/// Every veth in every named namespace. One that vanishes meanwhile, or is no namespace, is passed over.
fn look_inside(directory: &Path) -> Vec<Inside> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    let own = netns::id(Path::new("/proc/thread-self/ns/net")).ok();
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for path in entries.flatten().map(|entry| entry.path()) {
        let Ok(id) = netns::id(&path) else { continue };
        if own == Some(id) || !seen.insert(id) {
            continue;
        }
        let devices = netns::run_in_async(&path, async |net| {
            Ok((net.links().await?, net.addresses().await?))
        });
        match devices {
            Ok((links, addresses)) => found.extend(inside(&path, &links, &addresses)),
            Err(error) => tracing::debug!(%error, "namespace passed over"),
        }
    }
    found
}

fn inside(path: &Path, links: &[Link], addresses: &[(u32, IpNet)]) -> Vec<Inside> {
    let veth = |link: &Link| match link.kind {
        LinkKind::Veth {
            peer_ifindex: Some(host_ifindex),
            peer_netnsid: Some(_),
        } => Some(Inside {
            path: path.to_owned(),
            ifindex: link.ifindex,
            host_ifindex,
            mac: link.mac,
            addresses: addresses
                .iter()
                .filter(|(ifindex, net)| *ifindex == link.ifindex && is_pod_like(net.addr()))
                .map(|(_, net)| net.addr())
                .collect(),
        }),
        _ => None,
    };
    links.iter().filter_map(veth).collect()
}

fn is_pod_like(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !address.is_link_local() && !address.is_loopback(),
        IpAddr::V6(address) => !address.is_unicast_link_local() && !address.is_loopback(),
    }
}

async fn by_route(handle: &rtnetlink::Handle, veths: &BTreeMap<u32, &Link>) -> Result<Vec<PodVeth>, Error> {
    let mut found: BTreeMap<u32, BTreeSet<IpAddr>> = BTreeMap::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        let mut messages = Box::pin(handle.route().get(request).execute());
        while let Ok(Some(message)) = messages.try_next().await {
            if let Some((ifindex, address)) = single_address(&message).filter(|(i, _)| veths.contains_key(i))
            {
                found.entry(ifindex).or_default().insert(address);
            }
        }
    }
    Ok(found
        .into_iter()
        .map(|(ifindex, addresses)| PodVeth {
            ifindex,
            mac: None,
            addresses,
            seen_by: SeenBy::Route,
        })
        .collect())
}

/// The destination of a route to a single address, and its device.
fn single_address(message: &RouteMessage) -> Option<(u32, IpAddr)> {
    if message.header.kind != RouteType::Unicast {
        return None;
    }
    let (mut ifindex, mut address) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => ifindex = Some(*index),
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => address = Some(IpAddr::V4(*ip)),
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => address = Some(IpAddr::V6(*ip)),
            RouteAttribute::Gateway(_) => return None,
            _ => {}
        }
    }
    let address = address?;
    let single = if address.is_ipv4() { 32 } else { 128 };
    (message.header.destination_prefix_length == single && is_pod_like(address))
        .then_some((ifindex?, address))
}

struct Resolved {
    ifindex: u32,
    address: IpAddr,
    mac: [u8; 6],
}

struct Neighbours {
    /// IPv4 and IPv6 neighbours with their MAC address.
    resolved: Vec<Resolved>,
    /// Bridge ports with the MAC addresses learned there.
    learned: Vec<(u32, [u8; 6])>,
}

async fn neighbours(handle: &rtnetlink::Handle) -> Result<Neighbours, Error> {
    let mut result = Neighbours {
        resolved: Vec::new(),
        learned: Vec::new(),
    };
    let mut messages = Box::pin(handle.neighbours().get().execute());
    while let Some(message) = messages
        .try_next()
        .await
        .map_err(Error::netlink("list the neighbours"))?
    {
        result.resolved.extend(resolved(&message));
    }
    // A kernel without bridges has no such table.
    let mut messages = Box::pin(
        handle
            .neighbours()
            .get()
            .set_address_family(AddressFamily::Bridge)
            .execute(),
    );
    while let Ok(Some(message)) = messages.try_next().await {
        result
            .learned
            .extend(mac(&message).map(|mac| (message.header.ifindex, mac)));
    }
    Ok(result)
}

fn mac(message: &NeighbourMessage) -> Option<[u8; 6]> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => bytes.as_slice().try_into().ok(),
        _ => None,
    })
}

fn resolved(message: &NeighbourMessage) -> Option<Resolved> {
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    })?;
    let mac = mac(message)?;
    is_pod_like(address).then_some(Resolved {
        ifindex: message.header.ifindex,
        address,
        mac,
    })
}

/// Veths that are ports of a bridge: the MAC address joins the neighbour of the bridge and the port.
fn by_bridge(neighbours: &Neighbours, veths: &BTreeMap<u32, &Link>) -> Vec<PodVeth> {
    let mut found: BTreeMap<u32, PodVeth> = BTreeMap::new();
    for entry in &neighbours.resolved {
        let port = neighbours.learned.iter().find(|(port, mac)| {
            // A bridge lists the port's own address too; that one is the host's.
            *mac == entry.mac
                && veths
                    .get(port)
                    .is_some_and(|link| link.master == Some(entry.ifindex) && link.mac != Some(*mac))
        });
        if let Some((port, mac)) = port {
            let pod = found.entry(*port).or_insert_with(|| PodVeth {
                ifindex: *port,
                mac: Some(*mac),
                addresses: BTreeSet::new(),
                seen_by: SeenBy::Bridge,
            });
            pod.addresses.insert(entry.address);
        }
    }
    found.into_values().collect()
}
