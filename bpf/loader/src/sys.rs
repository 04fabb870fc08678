//! System calls that aya does not offer: links by device index, their state, and what a device is.

#![expect(unsafe_code, reason = "raw bpf(2) and ioctl(2) calls")]

use std::{
    ffi::{CStr, CString},
    io,
    os::{
        fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    time::Duration,
};

const OBJ_PIN: u32 = 6;
const OBJ_GET: u32 = 7;
const PROG_GET_FD_BY_ID: u32 = 13;
const OBJ_GET_INFO_BY_FD: u32 = 15;
const PROG_QUERY: u32 = 16;
const RAW_TRACEPOINT_OPEN: u32 = 17;
const MAP_LOOKUP_BATCH: u32 = 24;
const MAP_DELETE_BATCH: u32 = 27;
const LINK_CREATE: u32 = 28;
const LINK_UPDATE: u32 = 29;

const BPF_F_BEFORE: u32 = 1 << 3;
const LINK_TYPE_CGROUP: u32 = 3;
const LINK_TYPE_TCX: u32 = 11;
const CGROUP_INET_INGRESS: u32 = 0;
const MEMBARRIER_CMD_GLOBAL: i32 = 1;
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
const CGROUP2_MAGIC: u64 = 0x6367_7270;
/// More programs at one hook than the kernel allows.
const MAX_PROGRAMS: usize = 64;
/// More maps than any program of ours uses.
const MAX_MAPS: usize = 64;

/// Which way packets go through a hook of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Direction {
    Ingress,
    Egress,
}

impl Direction {
    pub(crate) const BOTH: [Self; 2] = [Self::Ingress, Self::Egress];

    fn attach_type(self) -> u32 {
        match self {
            Self::Ingress => 46,
            Self::Egress => 47,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

/// `union bpf_attr` as words: the calls here use its first 80 bytes.
#[repr(C, align(8))]
struct Attributes([u8; 80]);

impl Attributes {
    fn new() -> Self {
        Self([0; 80])
    }

    fn u32(mut self, offset: usize, value: u32) -> Self {
        self.0[offset..offset + 4].copy_from_slice(&value.to_ne_bytes());
        self
    }

    fn fd(self, offset: usize, fd: &impl AsFd) -> Self {
        self.u32(offset, fd.as_fd().as_raw_fd().cast_unsigned())
    }

    /// The pointer must stay good until the call.
    fn pointer<T: ?Sized>(mut self, offset: usize, value: *const T) -> Self {
        let address = value.cast::<u8>() as u64;
        self.0[offset..offset + 8].copy_from_slice(&address.to_ne_bytes());
        self
    }

    fn call(&mut self, command: u32) -> io::Result<RawFd> {
        // SAFETY: the attributes are as large as said and zero where unused; pointers in them are to buffers that
        // the callers keep alive and that are as large as the attributes say.
        let result = unsafe { libc::syscall(libc::SYS_bpf, command, self.0.as_mut_ptr(), self.0.len()) };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(result as RawFd)
        }
    }

    fn open(&mut self, command: u32) -> io::Result<OwnedFd> {
        let fd = self.call(command)?;
        // SAFETY: the call returned a descriptor that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn read_u32(&self, offset: usize) -> u32 {
        read_u32(&self.0, offset)
    }
}

fn read_u32(bytes: &[u8], offset: usize) -> u32 {
    u32::from_ne_bytes([
        bytes[offset],
        bytes[offset + 1],
        bytes[offset + 2],
        bytes[offset + 3],
    ])
}

fn read_u64(bytes: &[u8], offset: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_ne_bytes(word)
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}

/// Gives a link a name in a bpffs.
pub(crate) fn pin(fd: impl AsFd, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    Attributes::new()
        .pointer(0, path.as_ptr())
        .fd(8, &fd)
        .call(OBJ_PIN)
        .map(drop)
}

/// Opens what is pinned; `None` where nothing is.
pub(crate) fn open_pin(path: &Path) -> io::Result<Option<OwnedFd>> {
    let path = c_path(path)?;
    match Attributes::new().pointer(0, path.as_ptr()).open(OBJ_GET) {
        Ok(fd) => Ok(Some(fd)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Attaches a program before all others at a TCX hook.
pub(crate) fn tcx_attach(program: impl AsFd, ifindex: u32, direction: Direction) -> io::Result<OwnedFd> {
    Attributes::new()
        .fd(0, &program)
        .u32(4, ifindex)
        .u32(8, direction.attach_type())
        .u32(12, BPF_F_BEFORE)
        .open(LINK_CREATE)
}

/// Replaces the program of a link at one moment.
pub(crate) fn link_update(link: impl AsFd, program: impl AsFd) -> io::Result<()> {
    Attributes::new()
        .fd(0, &link)
        .fd(4, &program)
        .call(LINK_UPDATE)
        .map(drop)
}

/// Attaches a program to a raw tracepoint; it stays while the link does.
pub(crate) fn raw_tracepoint_attach(program: impl AsFd, name: &CStr) -> io::Result<OwnedFd> {
    Attributes::new()
        .pointer(0, name.as_ptr())
        .fd(8, &program)
        .open(RAW_TRACEPOINT_OPEN)
}

/// Attaches a program to what sockets of a cgroup and of those below receive; beside other programs that are there.
pub(crate) fn cgroup_attach(program: impl AsFd, cgroup: impl AsFd) -> io::Result<OwnedFd> {
    Attributes::new()
        .fd(0, &program)
        .fd(4, &cgroup)
        .u32(8, CGROUP_INET_INGRESS)
        .open(LINK_CREATE)
}

/// Reads many entries of a map, `None` = from its start. Returns how many there are, and whether these were the last.
pub(crate) fn map_lookup_batch(
    map: impl AsFd,
    after: Option<&[u8]>,
    place: &mut [u8],
    keys: &mut [u8],
    key_size: usize,
    values: &mut [u8],
    value_size: usize,
) -> io::Result<(usize, bool)> {
    assert!(place.len() >= key_size.max(4) && after.is_none_or(|after| after.len() == place.len()));
    let room = (keys.len() / key_size).min(values.len() / value_size);
    let mut attributes = Attributes::new();
    if let Some(after) = after {
        attributes = attributes.pointer(0, after.as_ptr());
    }
    attributes = attributes
        .pointer(8, place.as_mut_ptr())
        .pointer(16, keys.as_mut_ptr())
        .pointer(24, values.as_mut_ptr())
        .u32(32, room as u32)
        .fd(36, &map);
    match attributes.call(MAP_LOOKUP_BATCH) {
        Ok(_) => Ok((attributes.read_u32(32) as usize, false)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok((attributes.read_u32(32) as usize, true)),
        Err(error) => Err(error),
    }
}

/// Deletes keys of a map in order, up to the first that is absent. Returns how many it deleted.
pub(crate) fn map_delete_batch(map: impl AsFd, keys: &mut [u8], key_size: usize) -> io::Result<usize> {
    let mut attributes = Attributes::new()
        .pointer(16, keys.as_ptr())
        .u32(32, (keys.len() / key_size) as u32)
        .fd(36, &map);
    match attributes.call(MAP_DELETE_BATCH) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(_) | Err(_) => Ok(attributes.read_u32(32) as usize),
    }
}

/// Waits for an RCU grace period.
pub(crate) fn membarrier_global() -> io::Result<()> {
    // SAFETY: plain arguments.
    match unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Time of the clock that flows and events are stamped with (`CLOCK_MONOTONIC`), since its start.
pub fn monotonic_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call fills the struct; it cannot fail for a clock that every kernel has.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// The link ids at a TCX hook in the order in which they run; programs without link are 0.
pub(crate) fn tcx_links(ifindex: u32, direction: Direction) -> io::Result<Vec<u32>> {
    let mut programs = [0_u32; MAX_PROGRAMS];
    let mut links = [0_u32; MAX_PROGRAMS];
    let mut attributes = Attributes::new()
        .u32(0, ifindex)
        .u32(4, direction.attach_type())
        .pointer(16, programs.as_mut_ptr())
        .u32(24, MAX_PROGRAMS as u32)
        .pointer(40, links.as_mut_ptr());
    attributes.call(PROG_QUERY)?;
    let count = attributes.read_u32(24) as usize;
    Ok(links[..count.min(MAX_PROGRAMS)].to_vec())
}

/// The kernel has TCX. Loopback is there in every namespace, as device 1.
pub(crate) fn has_tcx() -> io::Result<bool> {
    match tcx_links(1, Direction::Ingress) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(true),
        Err(error) => Err(error),
    }
}

/// State of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LinkInfo {
    pub(crate) id: u32,
    pub(crate) program: u32,
    /// TCX: the device, `None` once it was deleted (the link is severed).
    pub(crate) ifindex: Option<u32>,
    /// Cgroup: its number, `None` once it was removed.
    pub(crate) cgroup: Option<u64>,
}

/// Reads the state of a link.
pub(crate) fn link_info(link: impl AsFd) -> io::Result<LinkInfo> {
    let mut info = [0_u8; 64];
    object_info(link, &mut info)?;
    let ifindex = match (read_u32(&info, 0), read_u32(&info, 16)) {
        (LINK_TYPE_TCX, ifindex) if ifindex != 0 => Some(ifindex),
        _ => None,
    };
    let cgroup = match read_u32(&info, 0) {
        LINK_TYPE_CGROUP => Some(read_u64(&info, 16)).filter(|number| *number != 0),
        _ => None,
    };
    Ok(LinkInfo {
        id: read_u32(&info, 4),
        program: read_u32(&info, 8),
        ifindex,
        cgroup,
    })
}

/// What makes a program: two that are equal here do the same on the same maps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProgramInfo {
    pub(crate) name: String,
    pub(crate) tag: [u8; 8],
    pub(crate) maps: Vec<u32>,
}

/// Reads what a program is.
pub(crate) fn program_info(program: impl AsFd) -> io::Result<ProgramInfo> {
    let mut maps = [0_u32; MAX_MAPS];
    let mut info = [0_u8; 128];
    info[52..56].copy_from_slice(&(MAX_MAPS as u32).to_ne_bytes());
    info[56..64].copy_from_slice(&(maps.as_mut_ptr() as u64).to_ne_bytes());
    object_info(program, &mut info)?;
    let count = read_u32(&info, 52) as usize;
    let mut maps = maps[..count.min(MAX_MAPS)].to_vec();
    maps.sort_unstable();
    let mut tag = [0; 8];
    tag.copy_from_slice(&info[8..16]);
    let name = info[64..80].split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(ProgramInfo {
        name: String::from_utf8_lossy(name).into_owned(),
        tag,
        maps,
    })
}

/// Opens a program by its id; `None` where it is gone.
pub(crate) fn program_by_id(id: u32) -> io::Result<Option<OwnedFd>> {
    match Attributes::new().u32(0, id).open(PROG_GET_FD_BY_ID) {
        Ok(fd) => Ok(Some(fd)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn object_info(object: impl AsFd, info: &mut [u8]) -> io::Result<()> {
    let length = info.len() as u32;
    let pointer = info.as_mut_ptr();
    Attributes::new()
        .fd(0, &object)
        .u32(4, length)
        .pointer(8, pointer)
        .call(OBJ_GET_INFO_BY_FD)
        .map(drop)
}

/// The path lies on a bpffs.
pub(crate) fn is_bpffs(path: &Path) -> io::Result<bool> {
    Ok(file_system(path)? == BPF_FS_MAGIC)
}

/// The path lies on a cgroup2 file system.
pub(crate) fn is_cgroup2(path: &Path) -> io::Result<bool> {
    Ok(file_system(path)? == CGROUP2_MAGIC)
}

/// Number of the kind of file system that a path lies on.
fn file_system(path: &Path) -> io::Result<u64> {
    let path = c_path(path)?;
    // SAFETY: all zero is a valid value of this struct of integers.
    let mut status = unsafe { std::mem::zeroed::<libc::statfs>() };
    // SAFETY: the path ends in a zero byte and the buffer is the struct that the call fills.
    let result = unsafe { libc::statfs(path.as_ptr(), &raw mut status) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(status.f_type as u64)
    }
}

/// ARPHRD number of a device; `None` where there is no such device.
pub(crate) fn link_type(ifindex: u32) -> io::Result<Option<u16>> {
    // SAFETY: all zero is a valid value of this struct of integers.
    let mut request = unsafe { std::mem::zeroed::<libc::ifreq>() };
    // SAFETY: the buffer has the IFNAMSIZ bytes that the call may fill.
    if unsafe { libc::if_indextoname(ifindex, request.ifr_name.as_mut_ptr()) }.is_null() {
        let error = io::Error::last_os_error();
        return if is_no_device(&error) {
            Ok(None)
        } else {
            Err(error)
        };
    }
    // SAFETY: plain arguments.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call returned a descriptor that nobody else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: the request is the struct that this ioctl reads and fills.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR, &raw mut request) } < 0 {
        let error = io::Error::last_os_error();
        return if is_no_device(&error) {
            Ok(None)
        } else {
            Err(error)
        };
    }
    // SAFETY: this ioctl fills the address member; its family is the link type.
    Ok(Some(unsafe { request.ifr_ifru.ifru_hwaddr.sa_family }))
}

/// The error says that the device does not exist.
pub(crate) fn is_no_device(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENODEV))
}
