//! Programs at devices: TCX links that are pinned by device and hook, or clsact filters.
//!
//! ```text
//!   pin -- absent or severed ------------> new link before all others, pinned
//!    |---- linked, not first ------------> new link before all others takes the name of the pin, then the old goes
//!    |---- linked, first, other program -> program replaced in the link
//!    '---- linked, first, this program --> nothing
//! ```
//!
//! At no step is a hook without a program of ours that had one.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use crate::{
    Error, Role, clsact,
    programs::{Programs, program_of},
    sys::{self, Direction, LinkInfo, ProgramInfo},
};

/// Which kind of attachment is used on this kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Tcx,
    Clsact,
}

/// The attachments of this node.
#[derive(Debug)]
pub(crate) struct Attacher {
    mode: Mode,
    links: PathBuf,
}

/// A link of ours and its state.
struct Pinned {
    link: OwnedFd,
    info: LinkInfo,
}

impl Attacher {
    /// Pins links in a directory, which exists.
    pub(crate) fn new(mode: Mode, links: PathBuf) -> Self {
        Self { mode, links }
    }

    /// Gives a hook of a device the program of a role.
    pub(crate) fn attach(
        &self,
        programs: &Programs,
        ifindex: u32,
        role: Role,
        direction: Direction,
    ) -> Result<(), Error> {
        let name = program_of(role, direction);
        let describe =
            |source| kernel_error(format!("attaching {name} to device {ifindex}"), ifindex, source);
        match self.mode {
            Mode::Tcx => {
                self.attach_tcx(programs, ifindex, name, direction)?;
                clsact::detach(ifindex, direction).map_err(describe)
            }
            Mode::Clsact => {
                if !self.has_filter(programs, ifindex, name, direction)? {
                    clsact::attach(ifindex, direction, programs.fd(name)?, name).map_err(describe)?;
                }
                remove(&self.pin(ifindex, direction))
            }
        }
    }

    fn attach_tcx(
        &self,
        programs: &Programs,
        ifindex: u32,
        name: &str,
        direction: Direction,
    ) -> Result<(), Error> {
        let describe =
            |source| kernel_error(format!("attaching {name} to device {ifindex}"), ifindex, source);
        let program = programs.fd(name)?;
        let path = self.pin(ifindex, direction);
        if let Some(pinned) = self.open(&path)?
            && pinned.info.ifindex == Some(ifindex)
            && is_first(ifindex, direction, pinned.info.id).map_err(describe)?
        {
            if programs.is(name, pinned.info.program)? {
                return Ok(());
            }
            match sys::link_update(&pinned.link, program) {
                Ok(()) => return Ok(()),
                // The device went meanwhile: go on as if it had been gone before.
                Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
                Err(error) => return Err(describe(error)),
            }
        }
        let link = match sys::tcx_attach(program, ifindex, direction) {
            // It is there already, but not first.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                sys::tcx_attach(programs.another()?.fd(name)?, ifindex, direction)
            }
            result => result,
        };
        self.pin_over(&link.map_err(describe)?, &path)
    }

    /// Names a link, taking the name from another; that one is detached by it.
    pub(crate) fn pin_over(&self, link: &OwnedFd, path: &Path) -> Result<(), Error> {
        // No dot: a bpffs keeps names with dots for itself.
        let mut temporary = path.as_os_str().to_owned();
        temporary.push("-new");
        let temporary = PathBuf::from(temporary);
        remove(&temporary)?;
        sys::pin(link, &temporary).map_err(|source| Error::Io {
            path: temporary.clone(),
            source,
        })?;
        fs::rename(&temporary, path).map_err(|source| Error::Io {
            path: path.to_owned(),
            source,
        })
    }

    /// Takes the programs from a device, which may be gone.
    pub(crate) fn detach(&self, ifindex: u32) -> Result<(), Error> {
        for direction in Direction::BOTH {
            remove(&self.pin(ifindex, direction))?;
            clsact::detach(ifindex, direction).map_err(|source| {
                kernel_error(format!("detaching from device {ifindex}"), ifindex, source)
            })?;
        }
        Ok(())
    }

    /// The program of the role is at the hook, first, and of this version.
    pub(crate) fn is_attached(
        &self,
        programs: &Programs,
        ifindex: u32,
        role: Role,
        direction: Direction,
    ) -> Result<bool, Error> {
        let name = program_of(role, direction);
        match self.mode {
            Mode::Clsact => self.has_filter(programs, ifindex, name, direction),
            Mode::Tcx => {
                let Some(pinned) = self.open(&self.pin(ifindex, direction))? else {
                    return Ok(false);
                };
                let describe = |source| kernel_error(format!("query of device {ifindex}"), ifindex, source);
                Ok(pinned.info.ifindex == Some(ifindex)
                    && is_first(ifindex, direction, pinned.info.id).map_err(describe)?
                    && programs.is(name, pinned.info.program)?)
            }
        }
    }

    fn has_filter(
        &self,
        programs: &Programs,
        ifindex: u32,
        name: &str,
        direction: Direction,
    ) -> Result<bool, Error> {
        let filters = clsact::filters(ifindex, direction)
            .map_err(|source| kernel_error(format!("query of device {ifindex}"), ifindex, source))?;
        match filters.as_slice() {
            [only] if only.first => programs.is(name, only.program),
            _ => Ok(false),
        }
    }

    /// Devices and hooks that links are pinned for, with the names of their programs.
    pub(crate) fn pinned(&self) -> Result<Vec<(u32, Direction, Option<ProgramInfo>)>, Error> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.links).map_err(|source| Error::Io {
            path: self.links.clone(),
            source,
        })? {
            let entry = entry.map_err(|source| Error::Io {
                path: self.links.clone(),
                source,
            })?;
            let name = entry.file_name();
            let Some((ifindex, direction)) = name.to_str().and_then(parse_pin) else {
                continue;
            };
            let program = match self.open(&entry.path())? {
                Some(pinned) => attached_program(pinned.info.program)?,
                None => None,
            };
            found.push((ifindex, direction, program));
        }
        Ok(found)
    }

    fn open(&self, path: &Path) -> Result<Option<Pinned>, Error> {
        let io_error = |source| Error::Io {
            path: path.to_owned(),
            source,
        };
        let Some(link) = sys::open_pin(path).map_err(io_error)? else {
            return Ok(None);
        };
        let info = sys::link_info(&link).map_err(io_error)?;
        Ok(Some(Pinned { link, info }))
    }

    fn pin(&self, ifindex: u32, direction: Direction) -> PathBuf {
        self.links.join(format!("{ifindex}-{}", direction.name()))
    }
}

fn parse_pin(name: &str) -> Option<(u32, Direction)> {
    let (ifindex, hook) = name.split_once('-')?;
    let direction = Direction::BOTH
        .into_iter()
        .find(|direction| direction.name() == hook)?;
    Some((ifindex.parse().ok()?, direction))
}

/// What a program that is attached somewhere is; `None` where it is gone meanwhile.
pub(crate) fn attached_program(id: u32) -> Result<Option<ProgramInfo>, Error> {
    let describe = |source| Error::Kernel {
        operation: format!("query of program {id}"),
        source,
    };
    match sys::program_by_id(id).map_err(describe)? {
        Some(program) => sys::program_info(program).map(Some).map_err(describe),
        None => Ok(None),
    }
}

/// A program of others before ours could let packets pass it.
fn is_first(ifindex: u32, direction: Direction, link: u32) -> io::Result<bool> {
    match sys::tcx_links(ifindex, direction) {
        Ok(links) => Ok(links.first() == Some(&link)),
        Err(error) if sys::is_no_device(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes a pin; one that is absent is no error.
pub(crate) fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Io {
            path: path.to_owned(),
            source,
        }),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn kernel_error(operation: String, ifindex: u32, source: io::Error) -> Error {
    if sys::is_no_device(&source) {
        Error::NoDevice(ifindex)
    } else {
        Error::Kernel { operation, source }
    }
}
