//! Which peer owns an address: the longest prefix over all peers of a device.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use prefix_trie::PrefixMap;

/// Prefixes of both families and their owners.
#[derive(Debug)]
pub(super) struct Table<T> {
    v4: PrefixMap<Ipv4Net, T>,
    v6: PrefixMap<Ipv6Net, T>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self {
            v4: PrefixMap::new(),
            v6: PrefixMap::new(),
        }
    }
}

impl<T> Table<T> {
    /// The owner of the most specific prefix that holds the address.
    pub(super) fn owner(&self, address: IpAddr) -> Option<&T> {
        match address {
            IpAddr::V4(address) => self.v4.get_lpm(&Ipv4Net::from(address)).map(|(_, owner)| owner),
            IpAddr::V6(address) => self.v6.get_lpm(&Ipv6Net::from(address)).map(|(_, owner)| owner),
        }
    }

    /// The owner of exactly this prefix.
    pub(super) fn exact(&self, prefix: &IpNet) -> Option<&T> {
        match prefix {
            IpNet::V4(prefix) => self.v4.get(prefix),
            IpNet::V6(prefix) => self.v6.get(prefix),
        }
    }

    /// Gives a prefix to an owner, taking it from its last one.
    pub(super) fn insert(&mut self, prefix: IpNet, owner: T) {
        match prefix {
            IpNet::V4(prefix) => drop(self.v4.insert(prefix, owner)),
            IpNet::V6(prefix) => drop(self.v6.insert(prefix, owner)),
        }
    }

    /// Takes a prefix away from whoever owns it.
    pub(super) fn remove(&mut self, prefix: &IpNet) {
        match prefix {
            IpNet::V4(prefix) => drop(self.v4.remove(prefix)),
            IpNet::V6(prefix) => drop(self.v6.remove(prefix)),
        }
    }

    /// Keeps the prefixes of the owners that `keep` names.
    pub(super) fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        self.v4.retain(|_, owner| keep(owner));
        self.v6.retain(|_, owner| keep(owner));
    }

    /// All prefixes, by family in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (IpNet, &T)> {
        let v4 = self.v4.iter().map(|(prefix, owner)| (IpNet::V4(prefix), owner));
        v4.chain(self.v6.iter().map(|(prefix, owner)| (IpNet::V6(prefix), owner)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_most_specific_prefix_wins() {
        let mut table = Table::default();
        table.insert("10.0.0.0/8".parse().unwrap(), 'a');
        table.insert("10.1.0.0/16".parse().unwrap(), 'b');
        table.insert("0.0.0.0/0".parse().unwrap(), 'd');
        table.insert("fd00::/8".parse().unwrap(), 'c');
        for (address, owner) in [
            ("10.2.0.1", Some('a')),
            ("10.1.0.1", Some('b')),
            ("192.0.2.1", Some('d')),
            ("fd00::1", Some('c')),
            ("fe80::1", None),
        ] {
            assert_eq!(table.owner(address.parse().unwrap()).copied(), owner, "{address}");
        }
        table.remove(&"10.1.0.0/16".parse().unwrap());
        assert_eq!(table.owner([10, 1, 0, 1].into()), Some(&'a'));
        table.retain(|owner| *owner != 'a');
        assert_eq!(table.owner([10, 1, 0, 1].into()), Some(&'d'));
    }

    proptest! {
        /// Against a list searched from end to end.
        #[test]
        fn agrees_with_a_linear_search(
            changes in prop::collection::vec((any::<u16>(), 0u8..=32, prop::option::of(0u8..8)), 0..60),
            looks in prop::collection::vec(any::<u16>(), 20),
        ) {
            let spread = |bits: u16| std::net::Ipv4Addr::from(u32::from(bits) << 16 | u32::from(bits));
            let mut table = Table::default();
            let mut list: Vec<(Ipv4Net, u8)> = Vec::new();
            for (bits, length, owner) in changes {
                let prefix = Ipv4Net::new(spread(bits), length).unwrap().trunc();
                list.retain(|(other, _)| *other != prefix);
                match owner {
                    Some(owner) => {
                        table.insert(prefix.into(), owner);
                        list.push((prefix, owner));
                    }
                    None => table.remove(&prefix.into()),
                }
                prop_assert_eq!(table.exact(&prefix.into()).copied(), owner);
            }
            for bits in looks {
                let address = spread(bits);
                let best = list.iter().filter(|(prefix, _)| prefix.contains(&address)).max_by_key(|(prefix, _)| prefix.prefix_len());
                prop_assert_eq!(table.owner(address.into()), best.map(|(_, owner)| owner));
            }
            prop_assert_eq!(table.iter().count(), list.len());
        }
    }
}
