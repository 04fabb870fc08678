//! The maps with their types, and their errors in the words of this crate.

#![expect(
    unsafe_code,
    reason = "aya wants a promise that the shared types are plain data"
)]

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, PerCpuHashMap, lpm_trie::Key},
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use warren_abi::{
    DeviceValue, EndpointValue, NodeKey, NodeValue, OwnerValue, PathValue, SettingsValue, TraceValue, limits,
    names,
};

use crate::Error;

/// A shared type as aya takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Plain<T: Copy + 'static>(pub(crate) T);

// SAFETY: only used with the types of the ABI crate, which asserts that they have no padding; their members are
// integers and arrays of them, so that every pattern of bits is valid.
unsafe impl<T: Copy + 'static> Pod for Plain<T> {}

/// A hash map.
pub(crate) struct Table<K: Pod, V: Copy + 'static> {
    name: &'static str,
    limit: u32,
    map: HashMap<MapData, K, Plain<V>>,
}

impl<K: Pod, V: Copy + 'static> Table<K, V> {
    fn take(ebpf: &mut Ebpf, name: &'static str, limit: u32) -> Result<Self, Error> {
        let map = take::<HashMap<MapData, K, Plain<V>>>(ebpf, name, size_of::<K>(), size_of::<V>())?;
        Ok(Self { name, limit, map })
    }

    pub(crate) fn set(&mut self, key: K, value: V) -> Result<(), Error> {
        self.map
            .insert(key, Plain(value), 0)
            .map_err(|error| write_error(self.name, self.limit, error))
    }

    pub(crate) fn remove(&mut self, key: K) -> Result<(), Error> {
        absent_is_fine(self.name, self.map.remove(&key))
    }

    pub(crate) fn get(&self, key: K) -> Result<Option<V>, Error> {
        match self.map.get(&key, 0) {
            Ok(Plain(value)) => Ok(Some(value)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(map_error(self.name, error)),
        }
    }

    pub(crate) fn entries(&self) -> Result<Vec<(K, V)>, Error> {
        let entries = self
            .map
            .iter()
            .map(|entry| entry.map(|(key, Plain(value))| (key, value)));
        entries
            .collect::<Result<_, _>>()
            .map_err(|error| map_error(self.name, error))
    }
}

/// A longest-prefix-match map of both families.
pub(crate) struct Prefixes<V: Copy + 'static> {
    name4: &'static str,
    name6: &'static str,
    limit: u32,
    v4: LpmTrie<MapData, [u8; 4], Plain<V>>,
    v6: LpmTrie<MapData, [u8; 16], Plain<V>>,
}

impl<V: Copy + 'static> Prefixes<V> {
    fn take(ebpf: &mut Ebpf, name4: &'static str, name6: &'static str, limit: u32) -> Result<Self, Error> {
        let v4 = take(ebpf, name4, 8, size_of::<V>())?;
        let v6 = take(ebpf, name6, 20, size_of::<V>())?;
        Ok(Self {
            name4,
            name6,
            limit,
            v4,
            v6,
        })
    }

    pub(crate) fn set(&mut self, prefix: IpNet, value: V) -> Result<(), Error> {
        match prefix.trunc() {
            IpNet::V4(prefix) => self
                .v4
                .insert(&key4(prefix), Plain(value), 0)
                .map_err(|error| write_error(self.name4, self.limit, error)),
            IpNet::V6(prefix) => self
                .v6
                .insert(&key6(prefix), Plain(value), 0)
                .map_err(|error| write_error(self.name6, self.limit, error)),
        }
    }

    pub(crate) fn remove(&mut self, prefix: IpNet) -> Result<(), Error> {
        match prefix.trunc() {
            IpNet::V4(prefix) => absent_is_fine(self.name4, self.v4.remove(&key4(prefix))),
            IpNet::V6(prefix) => absent_is_fine(self.name6, self.v6.remove(&key6(prefix))),
        }
    }

    /// All prefixes, sorted.
    pub(crate) fn entries(&self) -> Result<Vec<(IpNet, V)>, Error> {
        let mut found = Vec::new();
        for entry in self.v4.iter() {
            let (key, Plain(value)) = entry.map_err(|error| map_error(self.name4, error))?;
            let prefix = Ipv4Net::new(Ipv4Addr::from(key.data()), key.prefix_len() as u8);
            found.extend(prefix.ok().map(|prefix| (prefix.into(), value)));
        }
        for entry in self.v6.iter() {
            let (key, Plain(value)) = entry.map_err(|error| map_error(self.name6, error))?;
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

/// Counters, one per CPU and index.
pub(crate) struct Counters {
    name: &'static str,
    map: PerCpuArray<MapData, u64>,
}

impl Counters {
    fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Self, Error> {
        Ok(Self {
            name,
            map: take(ebpf, name, 4, 8)?,
        })
    }

    /// Sum over all CPUs.
    pub(crate) fn total(&self, index: u32) -> Result<u64, Error> {
        let values = self
            .map
            .get(&index, 0)
            .map_err(|error| map_error(self.name, error))?;
        Ok(values.iter().sum())
    }
}

/// Counters by place in the kernel, one per CPU.
pub(crate) struct Sites {
    name: &'static str,
    map: PerCpuHashMap<MapData, u64, u64>,
}

impl Sites {
    fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Self, Error> {
        Ok(Self {
            name,
            map: take(ebpf, name, 8, 8)?,
        })
    }

    /// Places and sums over all CPUs.
    pub(crate) fn totals(&self) -> Result<Vec<(u64, u64)>, Error> {
        let entries = self
            .map
            .iter()
            .map(|entry| entry.map(|(site, values)| (site, values.iter().sum())));
        entries
            .collect::<Result<_, _>>()
            .map_err(|error| map_error(self.name, error))
    }
}

/// One value.
pub(crate) struct Single<V: Copy + 'static> {
    name: &'static str,
    map: Array<MapData, Plain<V>>,
}

impl<V: Copy + 'static> Single<V> {
    fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Self, Error> {
        Ok(Self {
            name,
            map: take(ebpf, name, 4, size_of::<V>())?,
        })
    }

    pub(crate) fn get(&self) -> Result<V, Error> {
        self.map
            .get(&0, 0)
            .map(|Plain(value)| value)
            .map_err(|error| map_error(self.name, error))
    }

    pub(crate) fn set(&mut self, value: V) -> Result<(), Error> {
        self.map
            .set(0, Plain(value), 0)
            .map_err(|error| map_error(self.name, error))
    }
}

/// All maps of the node.
pub(crate) struct Maps {
    pub(crate) settings: Single<SettingsValue>,
    pub(crate) devices: Table<u32, DeviceValue>,
    pub(crate) endpoints: Table<u32, EndpointValue>,
    pub(crate) identities: Table<u32, u32>,
    pub(crate) owners: Prefixes<OwnerValue>,
    pub(crate) paths: Table<u32, PathValue>,
    pub(crate) pools: Prefixes<u32>,
    pub(crate) nodes: Table<Plain<NodeKey>, NodeValue>,
    pub(crate) drops: Counters,
    pub(crate) trace: Single<TraceValue>,
    pub(crate) stack_drops: Counters,
    pub(crate) stack_sites: Sites,
}

impl Maps {
    /// Takes the maps out of the loaded object.
    pub(crate) fn take(ebpf: &mut Ebpf) -> Result<Self, Error> {
        Ok(Self {
            settings: Single::take(ebpf, names::SETTINGS)?,
            devices: Table::take(ebpf, names::DEVICES, limits::DEVICES)?,
            endpoints: Table::take(ebpf, names::ENDPOINTS, limits::ENDPOINTS)?,
            identities: Table::take(ebpf, names::IDENTITIES, limits::ENDPOINTS)?,
            owners: Prefixes::take(ebpf, names::OWNERS4, names::OWNERS6, limits::OWNERS)?,
            paths: Table::take(ebpf, names::PATHS, limits::PATHS)?,
            pools: Prefixes::take(ebpf, names::POOLS4, names::POOLS6, limits::POOLS)?,
            nodes: Table::take(ebpf, names::NODES, limits::NODES)?,
            drops: Counters::take(ebpf, names::DROPS)?,
            trace: Single::take(ebpf, names::TRACE)?,
            stack_drops: Counters::take(ebpf, names::STACK_DROPS)?,
            stack_sites: Sites::take(ebpf, names::STACK_SITES)?,
        })
    }
}

/// Key of a node's address.
pub(crate) fn node_key(address: IpAddr) -> Plain<NodeKey> {
    Plain(match address {
        IpAddr::V4(address) => NodeKey::v4(address.octets()),
        IpAddr::V6(address) => NodeKey::v6(address.octets()),
    })
}

/// The address of a key.
pub(crate) fn node_address(Plain(key): Plain<NodeKey>) -> IpAddr {
    let a = key.address;
    if key.family == 4 {
        Ipv4Addr::new(a[0], a[1], a[2], a[3]).into()
    } else {
        Ipv6Addr::from(a).into()
    }
}

/// Takes a map, checking what the kernel says of it: a pin may be older than this version.
fn take<M: TryFrom<Map, Error = MapError>>(
    ebpf: &mut Ebpf,
    name: &'static str,
    key_size: usize,
    value_size: usize,
) -> Result<M, Error> {
    let map = ebpf
        .take_map(name)
        .ok_or_else(|| Error::Invalid(format!("the object has no map {name}")))?;
    let info = match &map {
        Map::Array(data)
        | Map::HashMap(data)
        | Map::LpmTrie(data)
        | Map::PerCpuArray(data)
        | Map::PerCpuHashMap(data) => data.info(),
        other => return Err(Error::Invalid(format!("map {name} has another type: {other:?}"))),
    };
    let info = info.map_err(|error| map_error(name, error))?;
    if info.key_size() as usize != key_size || info.value_size() as usize != value_size {
        return Err(Error::Invalid(format!(
            "the pinned map {name} has keys of {} and values of {} bytes, this version needs {key_size} and \
             {value_size}: remove the pin directory and restart the agent",
            info.key_size(),
            info.value_size()
        )));
    }
    M::try_from(map).map_err(|error| map_error(name, error))
}

fn absent_is_fine(name: &'static str, result: Result<(), MapError>) -> Result<(), Error> {
    match result {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(map_error(name, error)),
    }
}

fn write_error(name: &'static str, limit: u32, error: MapError) -> Error {
    match &error {
        MapError::SyscallError(call)
            if matches!(call.io_error.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC)) =>
        {
            Error::Full { map: name, limit }
        }
        _ => map_error(name, error),
    }
}

fn map_error(name: &'static str, error: MapError) -> Error {
    let source = match error {
        MapError::SyscallError(error) => error.io_error,
        other => io::Error::other(other),
    };
    Error::Kernel {
        operation: format!("access to map {name}"),
        source,
    }
}
