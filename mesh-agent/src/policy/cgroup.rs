//! The cgroup that all sockets of the host are below.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The cgroup to attach to: the one that was named, else where cgroup2 is mounted; a sentence where there is none.
pub(crate) fn node_cgroup(named: Option<&Path>) -> Result<PathBuf, String> {
    if let Some(named) = named {
        return Ok(named.to_owned());
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo")
        .map_err(|error| format!("cannot read the list of mounts: {error}"))?;
    find(&mounts).ok_or_else(|| "no cgroup2 is mounted: mount one (mount -t cgroup2 none /sys/fs/cgroup/unified) or name one with --cgroup".into())
}

/// The first mount of a whole cgroup2 hierarchy, else of a part (proc(5): the type stands behind a lone hyphen).
fn find(mounts: &str) -> Option<PathBuf> {
    let parsed = mounts.lines().filter_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        (after.split(' ').next() == Some("cgroup2")).then_some(())?;
        let mut fields = before.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        Some((root == "/", PathBuf::from(unescape(point))))
    });
    let all: Vec<_> = parsed.collect();
    let whole = all.iter().find(|(whole, _)| *whole);
    whole.or(all.first()).map(|(_, point)| point.clone())
}

/// Spaces and the like are written as three octal digits (proc(5)).
fn unescape(text: &str) -> String {
    text.replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\012", "\n")
        .replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_is_found_also_beside_version_1() {
        let hybrid = "30 25 0:26 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro\n\
                      31 30 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      32 30 0:28 / /sys/fs/cgroup/unified rw,relatime shared:10 - cgroup2 cgroup2 rw\n";
        assert_eq!(find(hybrid), Some("/sys/fs/cgroup/unified".into()));
        let pure = "30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(find(pure), Some("/sys/fs/cgroup".into()));
        let parts = "30 25 0:26 /pod /part rw - cgroup2 c rw\n31 25 0:26 / /a\\040b rw - cgroup2 c rw\n";
        assert_eq!(find(parts), Some("/a b".into()));
        assert_eq!(find("30 25 0:26 / /cgroup2 rw - tmpfs cgroup2 rw\n"), None);
        assert_eq!(node_cgroup(Some(Path::new("/x"))), Ok("/x".into()));
    }
}
