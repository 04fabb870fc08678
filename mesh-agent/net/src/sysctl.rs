//! Kernel settings below `/proc/sys`.

use std::{fs, path::PathBuf};

use crate::Error;

/// Path of a setting whose parts are separated by slashes, such as `net/ipv4/conf/eth0.5/rp_filter`: device names
/// may hold dots.
fn path(key: &str) -> PathBuf {
    PathBuf::from("/proc/sys").join(key)
}

/// Reads a setting; `key` has slashes between its parts. The namespace is the calling thread's.
pub fn sysctl(key: &str) -> Result<String, Error> {
    let path = path(key);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(text.trim_end().to_owned()),
        Err(source) => Err(Error::Sysctl { path, source }),
    }
}

/// Sets a setting where it differs and returns whether it did; `key` has slashes between its parts.
pub fn set_sysctl(key: &str, value: &str) -> Result<bool, Error> {
    if sysctl(key)? == value {
        return Ok(false);
    }
    let path = path(key);
    match fs::write(&path, value) {
        Ok(()) => Ok(true),
        Err(source) => Err(Error::Sysctl { path, source }),
    }
}
