//! Hash maps, arrays and counters.

use std::os::fd::{AsFd as _, BorrowedFd};

use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap, IterableMap as _, MapData, MapError, PerCpuArray, PerCpuHashMap},
};

use super::{Count, Plain, absent_is_fine, access_error, map_error, take, walk, write_error};
use crate::Error;

/// A hash map.
pub(crate) struct Table<K: Pod, V: Copy + 'static> {
    pub(crate) name: &'static str,
    pub(crate) limit: u32,
    map: HashMap<MapData, K, Plain<V>>,
    count: Count,
}

impl<K: Pod, V: Copy + 'static> Table<K, V> {
    pub(super) fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Self, Error> {
        let (map, limit) = take(ebpf, name, size_of::<K>(), size_of::<V>())?;
        Ok(Self {
            name,
            limit,
            map,
            count: Count::default(),
        })
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.map.map().fd().as_fd()
    }

    pub(crate) fn set(&mut self, key: K, value: V) -> Result<(), Error> {
        self.count.forget();
        self.map
            .insert(key, Plain(value), 0)
            .map_err(|error| write_error(self.name, self.limit, error))
    }

    pub(crate) fn remove(&mut self, key: K) -> Result<(), Error> {
        self.count.forget();
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
        let mut found = Vec::new();
        self.chunks(|keys, values| {
            found.extend(keys.iter().copied().zip(values.iter().copied()));
            Ok(true)
        })?;
        Ok(found)
    }

    /// Hands all entries out, some thousands at a time, until `each` wants no more.
    pub(crate) fn chunks(
        &self,
        mut each: impl FnMut(&[K], &[V]) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        walk::chunks(self.fd(), self.name, |keys: &[K], values: &[Plain<V>]| {
            let values: Vec<V> = values.iter().map(|Plain(value)| *value).collect();
            each(keys, &values)
        })
    }

    /// Removes many; those that are absent do not matter.
    pub(crate) fn remove_all(&self, keys: &[K]) -> Result<(), Error> {
        self.count.forget();
        walk::delete(self.fd(), keys).map_err(|source| access_error(self.name, source))
    }

    /// How many entries there are. Counted anew only after a change by this process.
    pub(crate) fn count(&self) -> Result<u32, Error> {
        self.count.or_else(|| self.count_now())
    }

    /// How many entries there are in a map that programs write to.
    pub(crate) fn count_now(&self) -> Result<u32, Error> {
        let mut count = 0;
        self.chunks(|keys, _| {
            count += keys.len() as u32;
            Ok(true)
        })?;
        Ok(count)
    }
}

/// Counters, one per CPU and index.
pub(crate) struct Counters {
    name: &'static str,
    map: PerCpuArray<MapData, u64>,
}

impl Counters {
    pub(super) fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Self, Error> {
        Ok(Self {
            name,
            map: take(ebpf, name, 4, 8)?.0,
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
    pub(super) fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Self, Error> {
        Ok(Self {
            name,
            map: take(ebpf, name, 8, 8)?.0,
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

/// Numbers by index, which programs add to.
pub(crate) struct Numbers {
    name: &'static str,
    map: Array<MapData, u32>,
}

impl Numbers {
    pub(super) fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Self, Error> {
        Ok(Self {
            name,
            map: take(ebpf, name, 4, 4)?.0,
        })
    }

    /// All of them, by index.
    pub(crate) fn all(&self) -> Result<Vec<u32>, Error> {
        let mut found = Vec::new();
        let fd = self.map.map().fd().as_fd();
        walk::chunks(fd, self.name, |_: &[u32], values: &[u32]| {
            found.extend_from_slice(values);
            Ok(true)
        })?;
        Ok(found)
    }

    pub(crate) fn set(&mut self, index: u32, number: u32) -> Result<(), Error> {
        self.map
            .set(index, number, 0)
            .map_err(|error| map_error(self.name, error))
    }
}

/// One value.
pub(crate) struct Single<V: Copy + 'static> {
    name: &'static str,
    map: Array<MapData, Plain<V>>,
}

impl<V: Copy + 'static> Single<V> {
    pub(super) fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Self, Error> {
        Ok(Self {
            name,
            map: take(ebpf, name, 4, size_of::<V>())?.0,
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
