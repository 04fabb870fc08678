//! TUN devices: the few system calls on `/dev/net/tun`.
#![expect(
    unsafe_code,
    reason = "ioctl(2) on TUN and socket descriptors has no safe wrapper"
)]

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    os::unix::fs::OpenOptionsExt as _,
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::TUN_FLAGS;

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
        let mut request = request(name)?;
        request.ifr_ifru.ifru_flags = TUN_FLAGS as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one ifreq, which lives through the call.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
        // An engine before us may have switched offloads on, which need the virtio header that we do not speak.
        // SAFETY: TUNSETOFFLOAD and TUNSETPERSIST take a plain integer.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, 0 as libc::c_ulong) })?;
        // SAFETY: as above.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETPERSIST, 1 as libc::c_ulong) })?;
        let inquiry = socket(
            AddressFamily::Inet,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        let tun = Self {
            file,
            name: name.into(),
            inquiry,
        };
        tun.lengthen_queue()?;
        Ok(tun)
    }

    fn lengthen_queue(&self) -> io::Result<()> {
        let mut request = request(&self.name)?;
        request.ifr_ifru.ifru_metric = QUEUE_LENGTH;
        // SAFETY: SIOCSIFTXQLEN reads one ifreq, whose value is an integer at the place of every other.
        check(unsafe { libc::ioctl(self.inquiry.as_raw_fd(), libc::SIOCSIFTXQLEN, &raw mut request) })
    }

    /// Packets that the kernel dropped because the engine did not read them in time, since the link was made.
    pub(super) fn overflows(&self) -> io::Result<u64> {
        // The thread's own network namespace, wherever /sys is from.
        let table = std::fs::read_to_string("/proc/thread-self/net/dev")?;
        let line = table
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(name, _)| name.trim() == self.name);
        // Eight figures of reception, then bytes, packets, errors and drops of transmission.
        let drops = line.and_then(|(_, figures)| figures.split_whitespace().nth(11)?.parse().ok());
        drops.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
    }

    /// Reads one packet; `WouldBlock` when there is none.
    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buffer)
    }

    /// Writes one packet.
    pub(super) fn write(&self, packet: &[u8]) -> io::Result<()> {
        (&self.file).write(packet).map(drop)
    }

    /// The link's MTU in bytes.
    pub(super) fn mtu(&self) -> io::Result<usize> {
        let mut request = request(&self.name)?;
        // SAFETY: SIOCGIFMTU reads and writes one ifreq, which lives through the call.
        check(unsafe { libc::ioctl(self.inquiry.as_raw_fd(), libc::SIOCGIFMTU, &raw mut request) })?;
        // SAFETY: SIOCGIFMTU has filled this member.
        let mtu = unsafe { request.ifr_ifru.ifru_mtu };
        usize::try_from(mtu).map_err(io::Error::other)
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
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
