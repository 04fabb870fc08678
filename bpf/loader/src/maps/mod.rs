//! The maps with their types, and their errors in the words of this crate.

#![expect(
    unsafe_code,
    reason = "aya wants a promise that the shared types are plain data"
)]

mod table;
mod trie;
mod walk;

use std::{
    cell::Cell,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use aya::{
    Ebpf, Pod,
    maps::{Map, MapError},
};
use warren_abi::{
    DeviceValue, EndpointValue, FlowKey, FlowState, FlowValue, FragmentKey, FragmentValue, MarkValue,
    NodeKey, NodeValue, OwnerValue, PathValue, PolicyValue, PortKey, PortValue, SettingsValue, TraceValue,
    VerdictKey, VerdictValue, names,
};

pub(crate) use self::{
    table::{Counters, Numbers, Single, Sites, Table},
    trie::{Prefixes, TablePrefixes, Trie},
};
use crate::Error;

/// A shared type as aya takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Plain<T: Copy + 'static>(pub(crate) T);

// SAFETY: only used with the types of the ABI crate, which asserts that they have no padding; their members are
// integers and arrays of them, so that every pattern of bits is valid.
unsafe impl<T: Copy + 'static> Pod for Plain<T> {}

/// How many entries a map has, where that is known: forgotten with every change.
#[derive(Debug, Default)]
pub(crate) struct Count(Cell<Option<u32>>);

impl Count {
    fn forget(&self) {
        self.0.set(None);
    }

    fn or_else(&self, count: impl FnOnce() -> Result<u32, Error>) -> Result<u32, Error> {
        match self.0.get() {
            Some(known) => Ok(known),
            None => {
                let counted = count()?;
                self.0.set(Some(counted));
                Ok(counted)
            }
        }
    }
}

/// The maps of policy.
pub(crate) struct PolicyMaps {
    pub(crate) endpoints: Table<u16, PolicyValue>,
    pub(crate) ports: Trie<Plain<PortKey>, PortValue>,
    pub(crate) verdicts: Table<Plain<VerdictKey>, VerdictValue>,
    pub(crate) cidrs: TablePrefixes,
}

/// The maps of connection tracking.
pub(crate) struct FlowMaps {
    /// Has seen a reply.
    pub(crate) established: Table<Plain<FlowKey>, FlowValue>,
    /// Has not.
    pub(crate) new: Table<Plain<FlowKey>, FlowValue>,
    pub(crate) counts: Numbers,
    pub(crate) state: Single<FlowState>,
    pub(crate) fragments: Table<Plain<FragmentKey>, FragmentValue>,
}

/// All maps of the node, except the ring buffer.
pub(crate) struct Maps {
    pub(crate) settings: Single<SettingsValue>,
    pub(crate) devices: Table<u32, DeviceValue>,
    pub(crate) endpoints: Table<u32, EndpointValue>,
    pub(crate) identities: Table<u32, MarkValue>,
    pub(crate) owners: Prefixes<OwnerValue>,
    pub(crate) paths: Table<u32, PathValue>,
    pub(crate) pools: Prefixes<u32>,
    pub(crate) nodes: Table<Plain<NodeKey>, NodeValue>,
    pub(crate) drops: Counters,
    pub(crate) trace: Single<TraceValue>,
    pub(crate) stack_drops: Counters,
    pub(crate) stack_sites: Sites,
    pub(crate) policy: PolicyMaps,
    pub(crate) flows: FlowMaps,
    pub(crate) events_lost: Counters,
}

impl Maps {
    /// Takes the maps out of the loaded object.
    pub(crate) fn take(ebpf: &mut Ebpf) -> Result<Self, Error> {
        Ok(Self {
            settings: Single::take(ebpf, names::SETTINGS)?,
            devices: Table::take(ebpf, names::DEVICES)?,
            endpoints: Table::take(ebpf, names::ENDPOINTS)?,
            identities: Table::take(ebpf, names::IDENTITIES)?,
            owners: Prefixes::take(ebpf, names::OWNERS4, names::OWNERS6)?,
            paths: Table::take(ebpf, names::PATHS)?,
            pools: Prefixes::take(ebpf, names::POOLS4, names::POOLS6)?,
            nodes: Table::take(ebpf, names::NODES)?,
            drops: Counters::take(ebpf, names::DROPS)?,
            trace: Single::take(ebpf, names::TRACE)?,
            stack_drops: Counters::take(ebpf, names::STACK_DROPS)?,
            stack_sites: Sites::take(ebpf, names::STACK_SITES)?,
            policy: PolicyMaps {
                endpoints: Table::take(ebpf, names::POLICY_ENDPOINTS)?,
                ports: Trie::take(ebpf, names::POLICY_PORTS)?,
                verdicts: Table::take(ebpf, names::POLICY_VERDICTS)?,
                cidrs: TablePrefixes::take(ebpf)?,
            },
            flows: FlowMaps {
                established: Table::take(ebpf, names::FLOWS)?,
                new: Table::take(ebpf, names::FLOWS_NEW)?,
                counts: Numbers::take(ebpf, names::FLOW_COUNTS)?,
                state: Single::take(ebpf, names::FLOW_STATE)?,
                fragments: Table::take(ebpf, names::FRAGMENTS)?,
            },
            events_lost: Counters::take(ebpf, names::EVENTS_LOST)?,
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
    address(key.address, key.family as u8 == 4)
}

/// An address in a field for both families.
pub(crate) fn address(bytes: [u8; 16], is_v4: bool) -> IpAddr {
    if is_v4 {
        Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into()
    } else {
        Ipv6Addr::from(bytes).into()
    }
}

/// A shared type out of bytes that the kernel gave; `None` where these are too few.
pub(crate) fn read_plain<T: Copy + 'static>(bytes: &[u8]) -> Option<Plain<T>> {
    if bytes.len() < size_of::<T>() {
        return None;
    }
    // SAFETY: there are enough bytes, and every pattern of bits is a value.
    Some(unsafe { bytes.as_ptr().cast::<Plain<T>>().read_unaligned() })
}

/// Takes a map, checking what the kernel says of it: a pin may be older than this version. Returns its limit, too.
fn take<M: TryFrom<Map, Error = MapError>>(
    ebpf: &mut Ebpf,
    name: &'static str,
    key_size: usize,
    value_size: usize,
) -> Result<(M, u32), Error> {
    let map = ebpf
        .take_map(name)
        .ok_or_else(|| Error::Invalid(format!("the object has no map {name}")))?;
    let info = match &map {
        Map::Array(data)
        | Map::HashMap(data)
        | Map::LruHashMap(data)
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
    let map = M::try_from(map).map_err(|error| map_error(name, error))?;
    Ok((map, info.max_entries()))
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

pub(crate) fn map_error(name: &'static str, error: MapError) -> Error {
    match error {
        MapError::SyscallError(error) => access_error(name, error.io_error),
        other => access_error(name, io::Error::other(other)),
    }
}

fn access_error(name: &'static str, source: io::Error) -> Error {
    Error::Kernel {
        operation: format!("access to map {name}"),
        source,
    }
}
