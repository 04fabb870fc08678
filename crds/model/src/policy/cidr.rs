//! Sets of addresses.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Which addresses a CIDR can match at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum AddressScope {
    /// Only addresses without a workload or node identity: CIDRs of Cilium's objects.
    World,
    /// Every address, pods and nodes included: `ipBlock` of Kubernetes NetworkPolicy.
    Any,
}

/// Where the prefixes of a set come from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum CidrSource {
    /// One prefix, host bits zero.
    Prefix(IpNet),
    /// All prefixes of the CiliumCIDRGroup of this name; none where it does not exist.
    Group(String),
}

/// A prefix, or a named group of them, less some prefixes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CidrSet {
    /// The prefixes.
    pub source: CidrSource,
    /// What is taken out; host bits zero.
    pub except: Vec<IpNet>,
    /// Which addresses count.
    pub scope: AddressScope,
}

impl CidrSet {
    /// Whether the set holds every address of a prefix, scope aside. A group holds nothing until it is resolved.
    pub fn covers(&self, prefix: &IpNet) -> bool {
        match &self.source {
            CidrSource::Prefix(own) => {
                own.contains(prefix) && !self.except.iter().any(|e| e.contains(prefix))
            }
            CidrSource::Group(_) => false,
        }
    }

    /// Whether the set holds an address, scope aside.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.covers(&IpNet::from(address))
    }

    /// Every prefix at whose border the answer can change.
    pub fn borders(&self) -> impl Iterator<Item = IpNet> + '_ {
        let own = match &self.source {
            CidrSource::Prefix(own) => Some(*own),
            CidrSource::Group(_) => None,
        };
        own.into_iter()
            .chain(own.into_iter().flat_map(|_| self.except.iter().copied()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exception_is_a_hole() {
        let set = CidrSet {
            source: CidrSource::Prefix("10.0.0.0/8".parse().unwrap()),
            except: vec!["10.96.0.0/12".parse().unwrap()],
            scope: AddressScope::World,
        };
        assert!(set.contains("10.1.2.3".parse().unwrap()));
        assert!(!set.contains("10.97.2.3".parse().unwrap()));
        assert!(!set.contains("11.0.0.1".parse().unwrap()));
        assert!(!set.contains("fd00::1".parse().unwrap()));
        assert_eq!(set.borders().count(), 2);
    }
}
