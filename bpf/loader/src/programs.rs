//! The loaded programs.

use std::{
    collections::BTreeSet,
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader, VerifierLogLevel,
    maps::MapData,
    programs::{CgroupSkb, Program, RawTracePoint, SchedClassifier},
};
use warren_abi::names;

use crate::{
    Error, Role,
    attach::attached_program,
    sys::{self, Direction, ProgramInfo},
};

/// The object that the build script made.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/datapath.o"));

/// Programs at devices.
const CLASSIFIERS: [&str; 6] = [
    "from_pod",
    "to_pod",
    "tun_in",
    "tun_eg",
    "barrier_in",
    "barrier_out",
];
/// The program that counts the kernel's drops.
pub(crate) const TRACER: &str = "stack_drop";

/// The program at the cgroup of the host.
pub(crate) const TO_HOST: &str = "to_host";

/// The programs, in the kernel and bound to the maps.
#[derive(Debug)]
pub(crate) struct Programs {
    ebpf: Ebpf,
    maps: PathBuf,
    /// Numbers of the pinned maps.
    shared: BTreeSet<u32>,
}

impl Programs {
    /// Loads all programs. Maps that are pinned in the directory are used, the others made and pinned there.
    pub(crate) fn load(maps: &Path) -> Result<Self, Error> {
        let mut loader = EbpfLoader::new();
        // Nothing is relocated against the kernel's types: no need to parse them.
        loader.btf(None).verifier_log_level(VerifierLogLevel::DISABLE);
        for name in names::ALL {
            loader.map_pin_path(name, maps.join(name));
        }
        let mut ebpf = loader.load(OBJECT).map_err(load_error)?;
        for name in CLASSIFIERS {
            let program: &mut SchedClassifier = Self::find(&mut ebpf, name)?;
            program.load().map_err(load_error)?;
        }
        let host: &mut CgroupSkb = Self::find(&mut ebpf, TO_HOST)?;
        host.load().map_err(load_error)?;
        let tracer: &mut RawTracePoint = Self::find(&mut ebpf, TRACER)?;
        tracer.load().map_err(load_error)?;
        Ok(Self {
            ebpf,
            shared: shared_maps(maps)?,
            maps: maps.to_owned(),
        })
    }

    /// Loads another copy: the kernel takes a program only once at a hook.
    pub(crate) fn another(&self) -> Result<Self, Error> {
        Self::load(&self.maps)
    }

    fn find<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut P, Error>
    where
        &'a mut P: TryFrom<&'a mut Program, Error = aya::programs::ProgramError>,
    {
        let program = ebpf.program_mut(name).ok_or_else(|| missing(name))?;
        program.try_into().map_err(load_error)
    }

    /// The object, to take the maps out of.
    pub(crate) fn ebpf(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// Descriptor of a program.
    pub(crate) fn fd(&self, name: &str) -> Result<BorrowedFd<'_>, Error> {
        use std::os::fd::AsFd as _;
        Ok(self.program(name)?.fd().map_err(load_error)?.as_fd())
    }

    /// A program.
    pub(crate) fn program(&self, name: &str) -> Result<&Program, Error> {
        self.ebpf.program(name).ok_or_else(|| missing(name))
    }

    /// Whether the program of this number, wherever it is attached, is ours of this name: the same instructions on the
    /// same pinned maps. Each copy has maps of its own beside these, which hold nothing from packet to packet.
    pub(crate) fn is(&self, name: &str, number: u32) -> Result<bool, Error> {
        let own = sys::program_info(self.fd(name)?).map_err(|source| Error::Kernel {
            operation: format!("query of program {name}"),
            source,
        })?;
        let essence = |mut info: ProgramInfo| {
            info.maps.retain(|map| self.shared.contains(map));
            info
        };
        Ok(attached_program(number)?.is_some_and(|other| essence(other) == essence(own)))
    }
}

/// Numbers of the maps that are pinned in the directory.
fn shared_maps(directory: &Path) -> Result<BTreeSet<u32>, Error> {
    let number = |name: &str| {
        MapData::from_pin(directory.join(name))?
            .info()
            .map(|info| info.id())
    };
    names::ALL
        .into_iter()
        .map(|name| number(name).map_err(load_error))
        .collect()
}

/// The program of a role at a hook.
pub(crate) fn program_of(role: Role, direction: Direction) -> &'static str {
    match (role, direction) {
        (Role::Pod, Direction::Ingress) => "from_pod",
        (Role::Pod, Direction::Egress) => "to_pod",
        (Role::Tunnel { .. }, Direction::Ingress) => "tun_in",
        (Role::Tunnel { .. }, Direction::Egress) => "tun_eg",
        (Role::Barrier, Direction::Ingress) => "barrier_in",
        (Role::Barrier, Direction::Egress) => "barrier_out",
    }
}

fn missing(name: &str) -> Error {
    Error::Invalid(format!("the object has no program {name}"))
}

fn load_error(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Load(Box::new(error))
}
