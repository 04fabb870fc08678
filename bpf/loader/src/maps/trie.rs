//! Longest-prefix-match maps.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsFd as _,
};

use aya::{
    Ebpf, Pod,
    maps::{IterableMap as _, LpmTrie, MapData, MapError, lpm_trie::Key},
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use warren_abi::{Cidr4Key, Cidr6Key, names};

use super::{Count, Plain, absent_is_fine, map_error, take, walk, write_error};
use crate::Error;

/// Bits of a key before the address: the number of the table.
const TABLE_BITS: u32 = 32;

/// A longest-prefix-match map.
pub(crate) struct Trie<K: Pod, V: Copy + 'static> {
    pub(crate) name: &'static str,
    pub(crate) limit: u32,
    map: LpmTrie<MapData, K, Plain<V>>,
    count: Count,
}

impl<K: Pod, V: Copy + 'static> Trie<K, V> {
    pub(super) fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Self, Error> {
        let (map, limit) = take(ebpf, name, size_of::<Key<K>>(), size_of::<V>())?;
        Ok(Self {
            name,
            limit,
            map,
            count: Count::default(),
        })
    }

    pub(crate) fn set(&mut self, key: Key<K>, value: V) -> Result<(), Error> {
        self.count.forget();
        self.map
            .insert(&key, Plain(value), 0)
            .map_err(|error| write_error(self.name, self.limit, error))
    }

    pub(crate) fn remove(&mut self, key: Key<K>) -> Result<(), Error> {
        self.count.forget();
        absent_is_fine(self.name, self.map.remove(&key))
    }

    /// The value of the longest prefix that covers the key.
    pub(crate) fn get(&self, key: Key<K>) -> Result<Option<V>, Error> {
        match self.map.get(&key, 0) {
            Ok(Plain(value)) => Ok(Some(value)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(map_error(self.name, error)),
        }
    }

    pub(crate) fn entries(&self) -> Result<Vec<(Key<K>, V)>, Error> {
        let mut found = Vec::new();
        let fd = self.map.map().fd().as_fd();
        walk::chunks(fd, self.name, |keys: &[Key<K>], values: &[Plain<V>]| {
            found.extend(keys.iter().copied().zip(values.iter().map(|Plain(value)| *value)));
            Ok(true)
        })?;
        Ok(found)
    }

    /// How many entries there are. Counted anew only after a change.
    pub(crate) fn count(&self) -> Result<u32, Error> {
        self.count.or_else(|| Ok(self.entries()?.len() as u32))
    }
}

/// A longest-prefix-match map of both families.
pub(crate) struct Prefixes<V: Copy + 'static> {
    pub(crate) v4: Trie<[u8; 4], V>,
    pub(crate) v6: Trie<[u8; 16], V>,
}

impl<V: Copy + 'static> Prefixes<V> {
    pub(super) fn take(ebpf: &mut Ebpf, name4: &'static str, name6: &'static str) -> Result<Self, Error> {
        Ok(Self {
            v4: Trie::take(ebpf, name4)?,
            v6: Trie::take(ebpf, name6)?,
        })
    }

    pub(crate) fn set(&mut self, prefix: IpNet, value: V) -> Result<(), Error> {
        match prefix.trunc() {
            IpNet::V4(prefix) => self.v4.set(key4(prefix), value),
            IpNet::V6(prefix) => self.v6.set(key6(prefix), value),
        }
    }

    pub(crate) fn remove(&mut self, prefix: IpNet) -> Result<(), Error> {
        match prefix.trunc() {
            IpNet::V4(prefix) => self.v4.remove(key4(prefix)),
            IpNet::V6(prefix) => self.v6.remove(key6(prefix)),
        }
    }

    /// All prefixes, sorted.
    pub(crate) fn entries(&self) -> Result<Vec<(IpNet, V)>, Error> {
        let mut found = Vec::new();
        for (key, value) in self.v4.entries()? {
            let prefix = Ipv4Net::new(Ipv4Addr::from(key.data()), key.prefix_len() as u8);
            found.extend(prefix.ok().map(|prefix| (prefix.into(), value)));
        }
        for (key, value) in self.v6.entries()? {
            let prefix = Ipv6Net::new(Ipv6Addr::from(key.data()), key.prefix_len() as u8);
            found.extend(prefix.ok().map(|prefix| (prefix.into(), value)));
        }
        found.sort_by_key(|(prefix, _)| *prefix);
        Ok(found)
    }
}

fn key4(prefix: Ipv4Net) -> Key<[u8; 4]> {
    Key::new(prefix.prefix_len().into(), prefix.network().octets())
}

fn key6(prefix: Ipv6Net) -> Key<[u8; 16]> {
    Key::new(prefix.prefix_len().into(), prefix.network().octets())
}

/// Numbers of prefixes of both families, in numbered tables.
pub(crate) struct TablePrefixes {
    pub(crate) v4: Trie<Plain<Cidr4Key>, u32>,
    pub(crate) v6: Trie<Plain<Cidr6Key>, u32>,
}

impl TablePrefixes {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, Error> {
        Ok(Self {
            v4: Trie::take(ebpf, names::POLICY_CIDRS4)?,
            v6: Trie::take(ebpf, names::POLICY_CIDRS6)?,
        })
    }

    pub(crate) fn set(&mut self, table: u32, prefix: IpNet, number: u32) -> Result<(), Error> {
        match prefix.trunc() {
            IpNet::V4(prefix) => self.v4.set(cidr4(table, prefix), number),
            IpNet::V6(prefix) => self.v6.set(cidr6(table, prefix), number),
        }
    }

    pub(crate) fn remove(&mut self, table: u32, prefix: IpNet) -> Result<(), Error> {
        match prefix.trunc() {
            IpNet::V4(prefix) => self.v4.remove(cidr4(table, prefix)),
            IpNet::V6(prefix) => self.v6.remove(cidr6(table, prefix)),
        }
    }

    /// The number of the most specific prefix that holds an address.
    pub(crate) fn get(&self, table: u32, address: IpAddr) -> Result<Option<u32>, Error> {
        match IpNet::from(address) {
            IpNet::V4(whole) => self.v4.get(cidr4(table, whole)),
            IpNet::V6(whole) => self.v6.get(cidr6(table, whole)),
        }
    }

    /// Table, prefix and number.
    pub(crate) fn entries(&self) -> Result<Vec<(u32, IpNet, u32)>, Error> {
        let mut found = Vec::new();
        for (key, number) in self.v4.entries()? {
            let Plain(data) = key.data();
            let length = key.prefix_len().checked_sub(TABLE_BITS);
            let prefix = length.and_then(|length| Ipv4Net::new(data.address.into(), length as u8).ok());
            found.extend(prefix.map(|prefix| (u32::from_be_bytes(data.table), prefix.into(), number)));
        }
        for (key, number) in self.v6.entries()? {
            let Plain(data) = key.data();
            let length = key.prefix_len().checked_sub(TABLE_BITS);
            let prefix = length.and_then(|length| Ipv6Net::new(data.address.into(), length as u8).ok());
            found.extend(prefix.map(|prefix| (u32::from_be_bytes(data.table), prefix.into(), number)));
        }
        Ok(found)
    }
}

fn cidr4(table: u32, prefix: Ipv4Net) -> Key<Plain<Cidr4Key>> {
    let data = Cidr4Key {
        table: table.to_be_bytes(),
        address: prefix.network().octets(),
    };
    Key::new(TABLE_BITS + u32::from(prefix.prefix_len()), Plain(data))
}

fn cidr6(table: u32, prefix: Ipv6Net) -> Key<Plain<Cidr6Key>> {
    let data = Cidr6Key {
        table: table.to_be_bytes(),
        address: prefix.network().octets(),
    };
    Key::new(TABLE_BITS + u32::from(prefix.prefix_len()), Plain(data))
}
