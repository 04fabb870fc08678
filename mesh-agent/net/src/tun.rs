//! Making a persistent TUN device: the only thing here that netlink cannot do.
#![expect(unsafe_code, reason = "TUN devices are made by ioctl")]

use std::{fs::OpenOptions, io, os::fd::AsRawFd as _};

use crate::Error;

nix::ioctl_write_ptr_bad!(set_interface, libc::TUNSETIFF, libc::ifreq);
nix::ioctl_write_int_bad!(set_persistent, libc::TUNSETPERSIST);

/// Makes the persistent TUN device `name` without packet information header, or attaches to it for a moment.
pub(crate) fn make_persistent(name: &str) -> Result<(), Error> {
    let failed = |what| {
        move |source: io::Error| Error::Tun {
            name: name.to_owned(),
            what,
            source,
        }
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .map_err(failed("open /dev/net/tun"))?;
    // SAFETY: ifreq is plain data for which all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request
        .ifr_name
        .iter_mut()
        .take(libc::IFNAMSIZ - 1)
        .zip(name.bytes())
    {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the descriptor is open, and the request is a whole ifreq that outlives the call.
    unsafe { set_interface(file.as_raw_fd(), &raw const request) }
        .map_err(|errno| failed("attach")(errno.into()))?;
    // SAFETY: the descriptor is open and attached; the argument is a plain integer.
    unsafe { set_persistent(file.as_raw_fd(), 1) }
        .map_err(|errno| failed("make it persistent")(errno.into()))?;
    Ok(())
}
