//! For tests: is a key somewhere in this process's memory?

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    sync::{Mutex, PoisonError},
};

use zeroize::Zeroizing;

/// Bytes of a key's middle: whoever frees memory overwrites the beginning.
const MIDDLE: std::ops::Range<usize> = 1..16;

/// Bytes that are read at once.
const CHUNK: usize = 64 * 1024;

/// What one search reads, another would find.
static ALONE: Mutex<()> = Mutex::new(());

/// How often the middle of the key whose complement this is occurs in this process's memory. The complement, so that the
/// question is not found itself.
pub(crate) fn occurrences(complement: &[u8; 32]) -> usize {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let wanted = &complement[MIDDLE];
    let is_wanted = |window: &[u8]| window.iter().zip(wanted).all(|(byte, wanted)| *byte == !wanted);
    let memory = File::open("/proc/self/mem").unwrap();
    let mut bytes = Zeroizing::new(vec![0; CHUNK + MIDDLE.end]);
    let own = bytes.as_ptr_range();
    let own = own.start as u64..own.end as u64;
    let mut found = 0;
    for line in fs::read_to_string("/proc/self/maps").unwrap().lines() {
        let (range, rest) = line.split_once(' ').unwrap();
        if !rest.starts_with("rw") {
            continue;
        }
        let (start, end) = range.split_once('-').unwrap();
        let address = |text| u64::from_str_radix(text, 16).unwrap();
        let (start, end) = (address(start), address(end));
        // Without what was read itself.
        for part in [start..end.min(own.start), start.max(own.end)..end] {
            for at in part.clone().step_by(CHUNK) {
                // A window that begins in this chunk may end in the next.
                let length = (part.end - at).min((CHUNK + wanted.len() - 1) as u64);
                let bytes = &mut bytes[..length as usize];
                // A neighbour's stack may be gone by now.
                if memory.read_exact_at(bytes, at).is_ok() {
                    let windows = bytes.windows(wanted.len());
                    found += windows.filter(|window| is_wanted(window)).count();
                }
            }
        }
    }
    found
}
