//! Many entries with one system call: `BPF_MAP_LOOKUP_BATCH` and its like, since Linux 5.6 (tries: 5.13).

use std::{io, mem::zeroed, os::fd::BorrowedFd};

use aya::Pod;

use super::access_error;
use crate::{Error, sys};

/// Entries that are asked for at once. The kernel gives out whole buckets of a hash; more room is made for larger ones.
const CHUNK: usize = 4_096;

/// Hands out the entries of a map, a chunk at a time, until `each` says `false`. Entries that come or go meanwhile may be
/// missed; those that stay are handed out once.
pub(super) fn chunks<K: Pod, V: Pod>(
    fd: BorrowedFd<'_>,
    name: &'static str,
    mut each: impl FnMut(&[K], &[V]) -> Result<bool, Error>,
) -> Result<(), Error> {
    // Where the kernel goes on: a number of a bucket, or a key.
    let mut place = vec![0_u8; size_of::<K>().max(4)];
    let mut started = false;
    // SAFETY: plain data: every pattern of bits is a value.
    let (no_key, no_value) = unsafe { (zeroed::<K>(), zeroed::<V>()) };
    let mut keys = vec![no_key; CHUNK];
    let mut values = vec![no_value; CHUNK];
    loop {
        let before = started.then(|| place.clone());
        let (count, end) = match sys::map_lookup_batch(
            fd,
            before.as_deref(),
            &mut place,
            bytes(&mut keys),
            size_of::<K>(),
            bytes(&mut values),
            size_of::<V>(),
        ) {
            Ok(found) => found,
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                let room = keys.len() * 2;
                keys.resize(room, no_key);
                values.resize(room, no_value);
                continue;
            }
            Err(source) => return Err(access_error(name, source)),
        };
        started = true;
        if count > 0 && !each(&keys[..count], &values[..count])? {
            return Ok(());
        }
        if end {
            return Ok(());
        }
    }
}

/// Deletes keys; those that are absent do not matter.
pub(super) fn delete<K: Pod>(fd: BorrowedFd<'_>, keys: &[K]) -> io::Result<()> {
    let mut rest = keys.to_vec();
    let mut done = 0;
    while done < rest.len() {
        // One that is absent ends the call: it is skipped.
        done += sys::map_delete_batch(fd, bytes(&mut rest[done..]), size_of::<K>())? + 1;
    }
    Ok(())
}

/// Plain data as bytes.
fn bytes<T: Pod>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: plain data without padding, as many bytes as the slice has; every pattern written is a value.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}
