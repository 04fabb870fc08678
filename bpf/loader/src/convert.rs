//! Between what the agent says and what the maps hold. Values that the maps cannot hold are refused.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use warren_abi::{
    EndpointValue, MAX_ENDPOINT_ADDRESSES, MAX_ENDPOINT_INDEX, MarkCodec, MarkValue, OwnerTag, OwnerValue,
    PathValue,
};

use crate::{Endpoint, Error, Owner, OwnerKind, Path};

/// An endpoint as the programs read it.
pub(crate) fn endpoint_value(endpoint: &Endpoint, marks: MarkCodec) -> Result<EndpointValue, Error> {
    let device = endpoint.ifindex;
    if device == 0 {
        return Err(Error::Invalid("an endpoint needs a device: 0 is none".into()));
    }
    if !(1..=MAX_ENDPOINT_INDEX).contains(&endpoint.index) {
        return Err(Error::Invalid(format!(
            "endpoint index {} of device {device} is not in 1..={MAX_ENDPOINT_INDEX}",
            endpoint.index
        )));
    }
    if endpoint.mac[0] & 1 != 0 || endpoint.mac == [0; 6] {
        return Err(Error::Invalid(format!(
            "the MAC address of the endpoint at device {device} is none of a host"
        )));
    }
    let mut value = EndpointValue {
        mark: marks.encode(endpoint.index),
        identity: endpoint.identity,
        index: endpoint.index,
        mac: endpoint.mac,
        ..EndpointValue::default()
    };
    let (mut used4, mut used6) = (value.v4.iter_mut(), value.v6.iter_mut());
    for address in &endpoint.addresses {
        let place = match address {
            _ if address.is_unspecified() || address.is_multicast() || address.is_loopback() => {
                return Err(Error::Invalid(format!(
                    "{address} cannot be the address of a pod"
                )));
            }
            IpAddr::V4(address) => used4.next().map(|place| *place = address.octets()),
            IpAddr::V6(address) => used6.next().map(|place| *place = address.octets()),
        };
        place.ok_or_else(|| {
            Error::Invalid(format!(
                "the endpoint at device {device} has more than {MAX_ENDPOINT_ADDRESSES} addresses of one family"
            ))
        })?;
    }
    Ok(value)
}

/// What the mark of an endpoint says.
pub(crate) fn mark_value(endpoint: &EndpointValue) -> MarkValue {
    MarkValue {
        identity: endpoint.identity,
        index: endpoint.index,
        padding: [0; 2],
        v4: endpoint.v4[0],
        v6: endpoint.v6[0],
    }
}

/// An endpoint's index as the policy maps take it; 0 is the host.
pub(crate) fn policy_index(index: u16) -> Result<u16, Error> {
    if index > MAX_ENDPOINT_INDEX {
        return Err(Error::Invalid(format!(
            "endpoint index {index} is larger than {MAX_ENDPOINT_INDEX}"
        )));
    }
    Ok(index)
}

/// An endpoint as the agent knows it.
pub(crate) fn endpoint(ifindex: u32, value: &EndpointValue) -> Endpoint {
    let v4 = value
        .v4
        .iter()
        .filter(|a| **a != [0; 4])
        .map(|a| Ipv4Addr::from(*a).into());
    let v6 = value
        .v6
        .iter()
        .filter(|a| **a != [0; 16])
        .map(|a| Ipv6Addr::from(*a).into());
    Endpoint {
        ifindex,
        index: value.index,
        mac: value.mac,
        addresses: v4.chain(v6).collect(),
        identity: value.identity,
    }
}

/// An owner as the programs read it.
pub(crate) fn owner_value(prefix: IpNet, owner: Owner) -> Result<OwnerValue, Error> {
    let (tag, local) = match owner.kind {
        OwnerKind::LocalPod => (OwnerTag::LocalPod, true),
        OwnerKind::RemotePod => (OwnerTag::RemotePod, false),
        OwnerKind::LocalNode => (OwnerTag::LocalNode, true),
        OwnerKind::RemoteNode => (OwnerTag::RemoteNode, false),
    };
    if local != (owner.node == 0) {
        return Err(Error::Invalid(format!(
            "owner of {prefix}: node 0 is this node, and no other; {:?} cannot be of node {}",
            owner.kind, owner.node
        )));
    }
    Ok(OwnerValue {
        identity: owner.identity,
        node: owner.node,
        tag: tag as u8,
        padding: 0,
    })
}

/// An owner as the agent knows it; `None` for a kind that does not exist.
pub(crate) fn owner(value: OwnerValue) -> Option<Owner> {
    let kind = match OwnerTag::parse(value.tag)? {
        OwnerTag::LocalPod => OwnerKind::LocalPod,
        OwnerTag::RemotePod => OwnerKind::RemotePod,
        OwnerTag::LocalNode => OwnerKind::LocalNode,
        OwnerTag::RemoteNode => OwnerKind::RemoteNode,
    };
    Some(Owner {
        kind,
        node: value.node,
        identity: value.identity,
    })
}

/// A path as the programs read it.
pub(crate) fn path_value(node: u16, path: Path) -> Result<PathValue, Error> {
    if node == 0 || path.ifindex == 0 {
        return Err(Error::Invalid(format!(
            "path of node {node} by device {}: neither may be 0",
            path.ifindex
        )));
    }
    Ok(PathValue {
        ifindex: path.ifindex,
        receive_slots: path.receive_slots,
        padding: [0; 3],
    })
}

/// A path as the agent knows it.
pub(crate) fn path(value: PathValue) -> Path {
    Path {
        ifindex: value.ifindex,
        receive_slots: value.receive_slots,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> Endpoint {
        Endpoint {
            ifindex: 7,
            index: 12,
            mac: [2, 0, 0, 0, 0, 1],
            addresses: vec!["10.1.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
            identity: 300,
        }
    }

    fn marks() -> MarkCodec {
        MarkCodec::new(0x3f7f).unwrap()
    }

    #[test]
    fn endpoints_come_back() {
        let value = endpoint_value(&pod(), marks()).unwrap();
        assert_eq!(endpoint(7, &value), pod());
        assert_eq!(value.mark, 12);
    }

    #[test]
    fn endpoints_that_do_not_fit() {
        let refused = |change: fn(&mut Endpoint)| {
            let mut pod = pod();
            change(&mut pod);
            endpoint_value(&pod, marks()).is_err()
        };
        assert!(refused(|pod| pod.index = 0));
        assert!(refused(|pod| pod.index = 0x1000));
        assert!(refused(|pod| pod.ifindex = 0));
        assert!(refused(|pod| pod.mac = [0; 6]));
        assert!(refused(|pod| pod.mac = [0xff; 6]));
        assert!(refused(|pod| pod.addresses = vec!["0.0.0.0".parse().unwrap()]));
        assert!(refused(|pod| pod.addresses = vec!["::1".parse().unwrap()]));
        assert!(refused(|pod| pod.addresses = vec!["10.1.0.2".parse().unwrap(); 5]));
        assert!(!refused(|pod| pod.addresses = vec!["fd00::3".parse().unwrap(); 4]));
    }

    #[test]
    fn node_zero_is_this_node() {
        let prefix = "10.1.0.0/24".parse().unwrap();
        for (kind, node, good) in [
            (OwnerKind::LocalPod, 0, true),
            (OwnerKind::LocalNode, 1, false),
            (OwnerKind::RemotePod, 0, false),
            (OwnerKind::RemoteNode, 65_535, true),
        ] {
            let wanted = Owner {
                kind,
                node,
                identity: 1,
            };
            assert_eq!(
                owner_value(prefix, wanted).ok().and_then(owner),
                good.then_some(wanted)
            );
        }
    }

    #[test]
    fn paths_need_a_node_and_a_device() {
        assert!(
            path_value(
                0,
                Path {
                    ifindex: 1,
                    receive_slots: 1
                }
            )
            .is_err()
        );
        assert!(
            path_value(
                1,
                Path {
                    ifindex: 0,
                    receive_slots: 1
                }
            )
            .is_err()
        );
        assert!(
            path_value(
                1,
                Path {
                    ifindex: 1,
                    receive_slots: 0
                }
            )
            .is_ok()
        );
    }
}
