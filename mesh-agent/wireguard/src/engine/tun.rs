//! TUN devices: the few system calls on `/dev/net/tun`.
#![expect(
    unsafe_code,
    reason = "ioctl(2) on TUN and socket descriptors has no safe wrapper"
)]

use std::{
    fs::{File, OpenOptions},
    io::{self, IoSlice, Read as _, Write as _},
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    os::unix::fs::OpenOptionsExt as _,
};

use nix::{
    sched::{CloneFlags, setns},
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};

use crate::TunOffloads;

use super::{
    TUN_FLAGS,
    image::{Reader, Writer},
    merge::{Merging, Write},
    virtio::{self, Virtio},
};

/// What the stack may leave to the engine (`TUN_F_*` of `linux/if_tun.h`), the most first: checksums, TCP segmentation
/// (also with congestion notification), UDP segmentation (Linux 6.2).
const CHECKSUM: libc::c_uint = 0x01;
const TSO: libc::c_uint = 0x02 | 0x04 | 0x08;
const USO: libc::c_uint = 0x20 | 0x40;
const OFFLOADS: [libc::c_uint; 4] = [CHECKSUM | TSO | USO, CHECKSUM | TSO, CHECKSUM, 0];

/// Packets that wait for the engine: TUN's own 500 overflow in the first moment that its thread waits for a CPU.
const QUEUE_LENGTH: libc::c_int = 10_000;

/// Where the kernel counts drops in `SO_MEMINFO` (`SK_MEMINFO_DROPS`), and how many figures there are.
const MEMINFO_DROPS: usize = 8;
const MEMINFO_VARS: usize = 9;

/// An open TUN device. Closing it leaves the device, which is persistent.
#[derive(Debug)]
pub(super) struct Tun {
    file: File,
    name: String,
    /// Whether a virtio header stands in front of every packet.
    headers: bool,
    /// What the kernel took of [`OFFLOADS`].
    offloads: libc::c_uint,
    /// For questions about links, which any socket answers.
    inquiry: OwnedFd,
}

impl Tun {
    /// Attaches to the device, creating it when absent, and makes it persistent.
    pub(super) fn open(name: &str) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")?;
        let headers = match attach(&file, name, TUN_FLAGS | libc::IFF_VNET_HDR) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                attach(&file, name, TUN_FLAGS)?;
                false
            }
            result => {
                result?;
                set_header_size(&file)?;
                true
            }
        };
        let offloads = set_offloads(&file, headers)?;
        // SAFETY: TUNSETPERSIST takes a plain integer.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETPERSIST, 1 as libc::c_ulong) })?;
        let tun = Self {
            file,
            name: name.into(),
            headers,
            offloads,
            inquiry: inquiry()?,
        };
        tun.lengthen_queue()?;
        Ok(tun)
    }

    /// Takes over a descriptor of [`Self::descriptor`], and what the predecessor found out about it.
    pub(super) fn adopt(name: &str, descriptor: OwnedFd, from: &mut Reader<'_>) -> io::Result<Self> {
        Ok(Self {
            file: descriptor.into(),
            name: name.into(),
            headers: from.flag().map_err(io::Error::other)?,
            offloads: from.u32().map_err(io::Error::other)?,
            inquiry: inquiry()?,
        })
    }

    /// The device for a successor, and what there is to know about it.
    pub(super) fn descriptor(&self, out: &mut Writer) -> io::Result<OwnedFd> {
        out.flag(self.headers);
        out.u32(self.offloads);
        self.file.as_fd().try_clone_to_owned()
    }

    fn lengthen_queue(&self) -> io::Result<()> {
        let mut request = request(&self.name)?;
        request.ifr_ifru.ifru_metric = QUEUE_LENGTH;
        // SAFETY: SIOCSIFTXQLEN reads one ifreq, whose value is an integer at the place of every other.
        check(unsafe { libc::ioctl(self.inquiry.as_raw_fd(), libc::SIOCSIFTXQLEN, &raw mut request) })
    }

    /// Packets that the kernel dropped because the engine did not read them in time, since the link was made.
    pub(super) fn overflows(&self) -> io::Result<u64> {
        self.or_elsewhere(dropped(&self.name), dropped)
    }

    /// What was found here, or where the device is if it was moved: in another network namespace, perhaps with another
    /// name.
    fn or_elsewhere<T: Send>(
        &self,
        here: io::Result<T>,
        ask: impl FnOnce(&str) -> io::Result<T> + Send,
    ) -> io::Result<T> {
        match here {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
            result => return result,
        }
        let (name, namespace) = (self.present_name()?, self.namespace()?);
        // By a thread that ends there.
        let asked = std::thread::scope(|scope| {
            let there = scope.spawn(|| {
                setns(namespace, CloneFlags::CLONE_NEWNET)?;
                ask(&name)
            });
            there.join()
        });
        asked.unwrap_or_else(|_| Err(io::Error::other("the thread that asked panicked")))
    }

    fn present_name(&self) -> io::Result<String> {
        let mut request = request(&self.name)?;
        // SAFETY: TUNGETIFF writes one ifreq, which lives through the call.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNGETIFF, &raw mut request) })?;
        let name = request.ifr_name.iter().take_while(|byte| **byte != 0);
        let name: Vec<u8> = name.map(|byte| *byte as u8).collect();
        String::from_utf8(name).map_err(io::Error::other)
    }

    /// The network namespace that the device is in (Linux 5.6).
    fn namespace(&self) -> io::Result<OwnedFd> {
        // SAFETY: TUNGETDEVNETNS has no argument.
        let number = unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNGETDEVNETNS) };
        check(number)?;
        // SAFETY: the kernel has just made this descriptor for us, and nobody else has its number.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    }

    /// Reads what is one packet to the stack, up to 64 KiB, to the beginning of `buffer`; `WouldBlock` when there is none.
    /// `None` for something that was not asked for.
    pub(super) fn read<'a>(&self, buffer: &'a mut [u8]) -> io::Result<Option<(Virtio, &'a mut [u8])>> {
        let len = (&self.file).read(buffer)?;
        let bytes = &mut buffer[..len];
        if !self.headers {
            return Ok(Some((Virtio::SINGLE, bytes)));
        }
        let Some((header, packet)) = bytes.split_first_chunk_mut::<{ virtio::HEADER }>() else {
            return Ok(None);
        };
        Ok(Virtio::parse(*header).map(|header| (header, packet)))
    }

    /// What may be put together for [`Self::write`].
    pub(super) fn merging(&self) -> Merging {
        Merging {
            tcp: self.headers,
            // Who hands over UDP that is to be cut also takes it.
            udp: self.offloads & USO != 0,
        }
    }

    /// Writes packets that were put together, or one.
    pub(super) fn write(&self, write: &Write<'_>) -> io::Result<()> {
        write.slices(|slices| {
            let slices = if self.headers { slices } else { &slices[1..] };
            (&self.file).write_vectored(slices).map(drop)
        })
    }

    /// Writes one packet.
    pub(super) fn write_one(&self, packet: &[u8]) -> io::Result<()> {
        let header = Virtio::SINGLE.bytes();
        let slices = [IoSlice::new(&header), IoSlice::new(packet)];
        let slices = if self.headers { &slices[..] } else { &slices[1..] };
        (&self.file).write_vectored(slices).map(drop)
    }

    /// What the stack leaves to the engine.
    pub(super) fn offloads(&self) -> TunOffloads {
        let has = |offload| self.offloads & offload == offload;
        TunOffloads {
            checksum: has(CHECKSUM),
            tso: has(TSO),
            uso: has(USO),
        }
    }

    /// The link's MTU in bytes.
    pub(super) fn mtu(&self) -> io::Result<usize> {
        let here = link_mtu(&self.inquiry, &self.name);
        self.or_elsewhere(here, |name| link_mtu(&inquiry()?, name))
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn inquiry() -> io::Result<OwnedFd> {
    let (family, kind) = (AddressFamily::Inet, SockType::Datagram);
    Ok(socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?)
}

fn link_mtu(inquiry: &OwnedFd, name: &str) -> io::Result<usize> {
    let mut request = request(name)?;
    // SAFETY: SIOCGIFMTU reads and writes one ifreq, which lives through the call.
    check(unsafe { libc::ioctl(inquiry.as_raw_fd(), libc::SIOCGIFMTU, &raw mut request) })?;
    // SAFETY: SIOCGIFMTU has filled this member.
    let mtu = unsafe { request.ifr_ifru.ifru_mtu };
    usize::try_from(mtu).map_err(io::Error::other)
}

/// What the kernel dropped of what the link should have sent.
fn dropped(name: &str) -> io::Result<u64> {
    // The thread's own network namespace, wherever /sys is from.
    let table = std::fs::read_to_string("/proc/thread-self/net/dev")?;
    let line = table
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(device, _)| device.trim() == name);
    // Eight figures of reception, then bytes, packets, errors and drops of transmission.
    let drops = line.and_then(|(_, figures)| figures.split_whitespace().nth(11)?.parse().ok());
    drops.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
}

/// Takes the device, creating it when absent. `EINVAL` for flags that the kernel does not know.
fn attach(file: &File, name: &str, flags: libc::c_int) -> io::Result<()> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives through the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
}

/// An engine before us may have chosen another header.
fn set_header_size(file: &File) -> io::Result<()> {
    let size = virtio::HEADER as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ reads one integer.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) })
}

/// Takes over as much as the kernel can leave to us, which is nothing where there is no header to say so.
fn set_offloads(file: &File, headers: bool) -> io::Result<libc::c_uint> {
    let wanted = if headers { &OFFLOADS[..] } else { &OFFLOADS[3..] };
    let mut refused = io::Error::from_raw_os_error(libc::EINVAL);
    for offloads in wanted {
        // SAFETY: TUNSETOFFLOAD takes a plain integer.
        let result = check(unsafe {
            libc::ioctl(
                file.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(*offloads),
            )
        });
        match result {
            Ok(()) => return Ok(*offloads),
            Err(error) => refused = error,
        }
    }
    Err(refused)
}

/// Datagrams that the kernel dropped because nobody read a socket in time.
pub(super) fn socket_overflows(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut figures = [0u32; MEMINFO_VARS];
    let mut size = size_of_val(&figures) as libc::socklen_t;
    // SAFETY: SO_MEMINFO writes at most `size` bytes, all of which belong to `figures`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            figures.as_mut_ptr().cast(),
            &raw mut size,
        )
    };
    check(result)?;
    Ok(figures[MEMINFO_DROPS].into())
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is plain data for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a device name has 1 to 15 characters",
        ));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
