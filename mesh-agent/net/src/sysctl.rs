//! Kernel settings below `/proc/sys`.

use std::{fs, io, path::PathBuf};

use crate::Error;

/// Where the kernel's settings are. A container sees the first read-only; the chart shows it the host's as the second.
const ROOTS: [&str; 2] = ["/proc/sys", "/host/proc/sys"];

/// Path of a setting whose parts are separated by slashes, such as `net/ipv4/conf/eth0.5/rp_filter`: device names
/// may hold dots.
fn path(key: &str) -> PathBuf {
    PathBuf::from(ROOTS[0]).join(key)
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
    let written = match fs::write(&path, value) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            fs::write(PathBuf::from(ROOTS[1]).join(key), value).map_err(|_| error)
        }
        written => written,
    };
    match written {
        Ok(()) => Ok(true),
        Err(source) => Err(Error::Sysctl { path, source }),
    }
}
