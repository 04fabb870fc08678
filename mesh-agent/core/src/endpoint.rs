//! The pods of this node. An endpoint lives from CNI ADD (or adoption) until its veth is gone, not until
//! somebody forgets the pod: a terminating pod still sends.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use serde::{Deserialize, Serialize};
use warren_model::{IdentityId, PodRef};

use crate::state::EndpointEntry;

/// The highest index: the mark has 12 bits for it.
const LAST_INDEX: u16 = warren_abi::MAX_ENDPOINT_INDEX;

/// Identifies a CNI attachment.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointKey {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
}

/// A pod of this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// Its attachment; `None` for a pod that is older than the agent and was found by its veth.
    pub key: Option<EndpointKey>,
    /// The pod, where known.
    pub pod: Option<PodRef>,
    /// The host's end of the veth.
    pub ifindex: u32,
    /// MAC address of the pod's end.
    pub mac: [u8; 6],
    /// Its addresses.
    pub addresses: BTreeSet<IpAddr>,
    /// Its identity; [`IdentityId::INIT`] until `keyd` has told.
    pub identity: IdentityId,
    /// CNI DEL was called; kept until the veth is gone.
    #[serde(default)]
    pub deleted: bool,
}

/// All endpoints by index, 1 to 4095.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoints {
    entries: BTreeMap<u16, Endpoint>,
    /// Order of arrival: the newest endpoint has an address that two of them claim.
    order: Vec<u16>,
    /// Indexes that policy maps may hold something of: not to be given away.
    #[serde(skip)]
    occupied: BTreeSet<u16>,
}

impl Endpoints {
    /// Adds an endpoint, or replaces the one of the same attachment or veth. `held` are the indexes that the map
    /// holds: one of a veth that is gone is not given away before its entry is.
    ///
    /// Returns `None` when all 4095 indexes are in use.
    pub fn add(&mut self, endpoint: Endpoint, held: &BTreeMap<u32, EndpointEntry>) -> Option<u16> {
        let same = |e: &Endpoint| e.ifindex == endpoint.ifindex || (e.key.is_some() && e.key == endpoint.key);
        let known = self
            .entries
            .iter()
            .find(|(_, e)| same(e))
            .map(|(index, _)| *index);
        let adopted = || held.get(&endpoint.ifindex).map(|entry| entry.index);
        let used: BTreeSet<u16> = held.values().map(|entry| entry.index).collect();
        let taken = |i: &u16| self.entries.contains_key(i) || used.contains(i) || self.occupied.contains(i);
        let free = || (1..=LAST_INDEX).find(|index| !taken(index));
        let index = known
            .or_else(|| adopted().filter(|index| !self.entries.contains_key(index)))
            .or_else(free)?;
        self.entries.insert(index, endpoint);
        self.order.retain(|i| *i != index);
        self.order.push(index);
        Some(index)
    }

    /// Policy maps may hold something of these indexes: no other pod may have them until they do not.
    pub fn set_occupied(&mut self, occupied: BTreeSet<u16>) {
        self.occupied = occupied;
    }

    /// CNI DEL: marks the endpoint; returns it where there is one that was not deleted before.
    pub fn delete(&mut self, key: &EndpointKey) -> Option<Endpoint> {
        let endpoint = self
            .entries
            .values_mut()
            .find(|e| e.key.as_ref() == Some(key) && !e.deleted)?;
        endpoint.deleted = true;
        Some(endpoint.clone())
    }

    /// Forgets an endpoint.
    pub fn remove(&mut self, index: u16) -> Option<Endpoint> {
        self.order.retain(|i| *i != index);
        self.entries.remove(&index)
    }

    /// Sets the identity of an endpoint.
    pub fn set_identity(&mut self, index: u16, identity: IdentityId) {
        if let Some(endpoint) = self.entries.get_mut(&index) {
            endpoint.identity = identity;
        }
    }

    /// Sets the pod of an endpoint that was found by its veth.
    pub fn set_pod(&mut self, index: u16, pod: PodRef) {
        if let Some(endpoint) = self.entries.get_mut(&index) {
            endpoint.pod = Some(pod);
        }
    }

    /// Forgets endpoints whose veth is not among `present`. Returns those that were not deleted by the CNI.
    pub fn retain_links(&mut self, present: impl Fn(u32) -> bool) -> Vec<Endpoint> {
        let gone: Vec<u16> = self
            .entries
            .iter()
            .filter(|(_, e)| !present(e.ifindex))
            .map(|(index, _)| *index)
            .collect();
        self.order.retain(|index| !gone.contains(index));
        gone.into_iter()
            .filter_map(|index| self.entries.remove(&index))
            .filter(|e| !e.deleted)
            .collect()
    }

    /// An endpoint by index.
    pub fn get(&self, index: u16) -> Option<&Endpoint> {
        self.entries.get(&index)
    }

    /// The endpoint of an attachment.
    pub fn by_key(&self, key: &EndpointKey) -> Option<(u16, &Endpoint)> {
        self.iter().find(|(_, e)| e.key.as_ref() == Some(key))
    }

    /// The endpoint behind a veth.
    pub fn by_link(&self, ifindex: u32) -> Option<(u16, &Endpoint)> {
        self.iter().find(|(_, e)| e.ifindex == ifindex)
    }

    /// The endpoint that has an address: the newest where several claim it.
    pub fn by_address(&self, address: IpAddr) -> Option<(u16, &Endpoint)> {
        self.order
            .iter()
            .rev()
            .filter_map(|index| self.entries.get(index).map(|e| (*index, e)))
            .find(|(_, e)| e.addresses.contains(&address))
    }

    /// All endpoints by index.
    pub fn iter(&self) -> impl Iterator<Item = (u16, &Endpoint)> {
        self.entries.iter().map(|(index, endpoint)| (*index, endpoint))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(container: &str, ifindex: u32, address: &str) -> Endpoint {
        Endpoint {
            key: Some(EndpointKey {
                container_id: container.into(),
                ifname: "eth0".into(),
            }),
            pod: None,
            ifindex,
            mac: [2, 0, 0, 0, 0, ifindex as u8],
            addresses: [address.parse().unwrap()].into(),
            identity: IdentityId::INIT,
            deleted: false,
        }
    }

    #[test]
    fn an_address_that_comes_back_on_a_new_veth_belongs_to_the_new_one() {
        let mut endpoints = Endpoints::default();
        let none = BTreeMap::new();
        let old = endpoints.add(endpoint("a", 10, "10.244.1.5"), &none).unwrap();
        endpoints
            .delete(&EndpointKey {
                container_id: "a".into(),
                ifname: "eth0".into(),
            })
            .unwrap();
        let new = endpoints.add(endpoint("b", 11, "10.244.1.5"), &none).unwrap();
        assert_ne!(old, new);
        assert_eq!(
            endpoints.by_address("10.244.1.5".parse().unwrap()).unwrap().0,
            new
        );
        assert_eq!(endpoints.retain_links(|ifindex| ifindex == 11), []);
        assert_eq!(endpoints.len(), 1);
    }

    #[test]
    fn adding_twice_is_the_same_as_once_and_a_held_index_is_adopted() {
        let mut endpoints = Endpoints::default();
        let entry = EndpointEntry {
            index: 9,
            mac: [0; 6],
            addresses: BTreeSet::new(),
            identity: IdentityId::UNKNOWN,
        };
        let held = BTreeMap::from([(10, entry.clone()), (77, EndpointEntry { index: 1, ..entry })]);
        assert_eq!(endpoints.add(endpoint("a", 10, "10.244.1.5"), &held), Some(9));
        assert_eq!(endpoints.add(endpoint("a", 10, "10.244.1.5"), &held), Some(9));
        assert_eq!(endpoints.add(endpoint("b", 11, "10.244.1.6"), &held), Some(2));
        assert_eq!(endpoints.len(), 2);
    }

    #[test]
    fn an_index_that_policy_maps_still_hold_is_not_given_away() {
        let mut endpoints = Endpoints::default();
        endpoints.set_occupied([1, 2].into());
        assert_eq!(
            endpoints.add(endpoint("a", 10, "10.244.1.5"), &BTreeMap::new()),
            Some(3)
        );
        endpoints.set_occupied([2].into());
        assert_eq!(
            endpoints.add(endpoint("b", 11, "10.244.1.6"), &BTreeMap::new()),
            Some(1)
        );
        assert_eq!(
            endpoints.add(endpoint("a", 10, "10.244.1.5"), &BTreeMap::new()),
            Some(3)
        );
    }

    #[test]
    fn deleting_twice_reports_once() {
        let mut endpoints = Endpoints::default();
        endpoints.add(endpoint("a", 10, "10.244.1.5"), &BTreeMap::new());
        let key = EndpointKey {
            container_id: "a".into(),
            ifname: "eth0".into(),
        };
        assert!(endpoints.delete(&key).is_some());
        assert!(endpoints.delete(&key).is_none());
        assert!(endpoints.by_link(10).is_some());
    }
}
