//! The program for what reaches sockets of the host: `to_host` at a cgroup.

use std::{fs, os::unix::fs::MetadataExt as _, path::Path};

use crate::{Datapath, Error, attach::remove, programs::TO_HOST, sys};

impl Datapath {
    /// Attaches `to_host` to a directory of a cgroup2 file system: it judges what sockets of processes there and below
    /// receive. Nothing changes where it is there already; another version is replaced in place, and one at another
    /// directory moves without a gap. Programs of others at the same place stay.
    pub fn attach_host(&mut self, cgroup: &Path) -> Result<(), Error> {
        let describe = |source| Error::Kernel {
            operation: format!("attaching {TO_HOST} to the cgroup {}", cgroup.display()),
            source,
        };
        let number = cgroup_number(cgroup)?;
        let path = self.links_dir.join(TO_HOST);
        let io_error = |source| Error::Io {
            path: path.clone(),
            source,
        };
        if let Some(link) = sys::open_pin(&path).map_err(io_error)? {
            let info = sys::link_info(&link).map_err(io_error)?;
            if info.cgroup == Some(number) {
                if !self.programs.is(TO_HOST, info.program)? {
                    sys::link_update(&link, self.programs.fd(TO_HOST)?).map_err(describe)?;
                }
                return self.retire_old_versions();
            }
        }
        let directory = fs::File::open(cgroup).map_err(|source| Error::Io {
            path: cgroup.to_owned(),
            source,
        })?;
        let link = sys::cgroup_attach(self.programs.fd(TO_HOST)?, &directory).map_err(describe)?;
        self.attacher.pin_over(&link, &path)?;
        self.retire_old_versions()
    }

    /// `to_host` is at this directory, in this version.
    pub fn host_attached(&self, cgroup: &Path) -> Result<bool, Error> {
        let number = cgroup_number(cgroup)?;
        Ok(self.host_program()? == Some((Some(number), true)))
    }

    /// Takes `to_host` away: what reaches the host is no longer judged.
    pub fn detach_host(&mut self) -> Result<(), Error> {
        remove(&self.links_dir.join(TO_HOST))?;
        self.retire_old_versions()
    }

    /// Where the pinned link is, and whether its program is this version's; `None` where no link is pinned.
    pub(crate) fn host_program(&self) -> Result<Option<(Option<u64>, bool)>, Error> {
        let path = self.links_dir.join(TO_HOST);
        let io_error = |source| Error::Io {
            path: path.clone(),
            source,
        };
        let Some(link) = sys::open_pin(&path).map_err(io_error)? else {
            return Ok(None);
        };
        let info = sys::link_info(&link).map_err(io_error)?;
        let current = self.programs.is(TO_HOST, info.program)?;
        Ok(Some((info.cgroup, current)))
    }
}

/// The kernel numbers cgroups as their directories.
fn cgroup_number(cgroup: &Path) -> Result<u64, Error> {
    let io_error = |source| Error::Io {
        path: cgroup.to_owned(),
        source,
    };
    if !sys::is_cgroup2(cgroup).map_err(io_error)? {
        return Err(Error::Invalid(format!(
            "{} is no directory of a cgroup2 file system: name one (mount -t cgroup2 none <directory>)",
            cgroup.display()
        )));
    }
    Ok(fs::metadata(cgroup).map_err(io_error)?.ino())
}
