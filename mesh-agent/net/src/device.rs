//! Tunnel devices: making them and keeping their settings.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net};
use netlink_packet_route::{
    AddressFamily,
    address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope},
    link::{LinkFlags, LinkMessage},
};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkWireguard};

use crate::{Error, Link, LinkKind, address, link, sysctl, tun};

/// The transmit queue of a TUN device in packets: the default of 500 drops whole bursts.
const TUN_QUEUE_LENGTH: u32 = 10_000;

/// Length of the prefix of link-local addresses (RFC 4291 section 2.5.6).
const LINK_LOCAL: u8 = 64;

/// What a device should be like; `None` leaves a setting as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LinkConfig {
    /// MTU in bytes.
    pub mtu: Option<u32>,
    /// Administratively up or down. Set last when up, first when down.
    pub up: Option<bool>,
    /// Transmit queue in packets.
    pub txqueuelen: Option<u32>,
    /// An IPv4 address of the device's own, `/32 scope link`: never chosen as a source, but without one loose
    /// reverse path filtering drops what arrives by a route of another device.
    pub link_address: Option<Ipv4Addr>,
    /// An IPv6 address of the device's own in `fe80::/64`, in place of any other there.
    pub link_local: Option<Ipv6Addr>,
    /// `net.ipv4.conf.*.rp_filter`: 0 off, 1 strict, 2 loose.
    pub rp_filter: Option<u8>,
    /// No link-local IPv6 address of the kernel's choice, no router solicitations, no router advertisements, no multicast.
    pub quiet: bool,
}

pub(crate) async fn ensure_tun(handle: &rtnetlink::Handle, name: &str) -> Result<u32, Error> {
    if let Some(link) = existing(handle, name, &LinkKind::Tun).await? {
        return Ok(link.ifindex);
    }
    tun::make_persistent(name)?;
    let link = existing(handle, name, &LinkKind::Tun)
        .await?
        .ok_or_else(|| Error::Netlink {
            what: format!("find the TUN device {name}"),
            detail: "it vanished right after it was made".into(),
        })?;
    let config = LinkConfig {
        txqueuelen: Some(TUN_QUEUE_LENGTH),
        ..LinkConfig::default()
    };
    configure(handle, link.ifindex, &config).await?;
    Ok(link.ifindex)
}

pub(crate) async fn ensure_wireguard(handle: &rtnetlink::Handle, name: &str) -> Result<u32, Error> {
    if let Some(link) = existing(handle, name, &LinkKind::WireGuard).await? {
        return Ok(link.ifindex);
    }
    handle
        .link()
        .add(LinkWireguard::new(name).build())
        .execute()
        .await
        .map_err(Error::netlink(format!("make the WireGuard device {name}")))?;
    let link = existing(handle, name, &LinkKind::WireGuard)
        .await?
        .ok_or_else(|| Error::Netlink {
            what: format!("find the WireGuard device {name}"),
            detail: "it vanished right after it was made".into(),
        })?;
    Ok(link.ifindex)
}

/// The device of that name, which must be of that kind.
async fn existing(handle: &rtnetlink::Handle, name: &str, kind: &LinkKind) -> Result<Option<Link>, Error> {
    check_name(name)?;
    let found = link::list(handle)
        .await?
        .into_iter()
        .find(|link| link.name == name);
    match found {
        Some(link) if link.kind != *kind => Err(Error::WrongKind {
            name: name.to_owned(),
            found: link.kind.name().to_owned(),
            wanted: if *kind == LinkKind::Tun {
                "tun"
            } else {
                "wireguard"
            },
        }),
        found => Ok(found),
    }
}

fn check_name(name: &str) -> Result<(), Error> {
    let bad = name.is_empty()
        || name.len() >= libc::IFNAMSIZ
        || matches!(name, "." | "..")
        || name
            .bytes()
            .any(|byte| matches!(byte, b'/' | b':' | b'%' | 0) || byte.is_ascii_whitespace());
    if bad {
        Err(Error::BadName(name.to_owned()))
    } else {
        Ok(())
    }
}

pub(crate) async fn kernel_has_wireguard(handle: &rtnetlink::Handle) -> Result<bool, Error> {
    // Unique among processes that probe at the same time.
    let name = format!("wgp{}", std::process::id());
    let what = "probe for kernel WireGuard";
    match handle
        .link()
        .add(LinkWireguard::new(&name).build())
        .execute()
        .await
    {
        Ok(()) => {}
        Err(error) => {
            let error = Error::netlink(what)(error);
            return match error.errno() {
                Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT) => Ok(false),
                Some(libc::EEXIST) => Ok(true),
                _ => Err(error),
            };
        }
    }
    if let Some(link) = link::list(handle)
        .await?
        .into_iter()
        .find(|link| link.name == name)
    {
        delete(handle, link.ifindex).await?;
    }
    Ok(true)
}

pub(crate) async fn delete(handle: &rtnetlink::Handle, ifindex: u32) -> Result<(), Error> {
    match handle.link().del(ifindex).execute().await {
        Ok(()) => Ok(()),
        Err(error) => {
            let error = Error::netlink(format!("delete the device with index {ifindex}"))(error);
            if error.errno() == Some(libc::ENODEV) {
                Ok(())
            } else {
                Err(error)
            }
        }
    }
}

pub(crate) async fn configure(
    handle: &rtnetlink::Handle,
    ifindex: u32,
    config: &LinkConfig,
) -> Result<bool, Error> {
    let link = link::list(handle)
        .await?
        .into_iter()
        .find(|link| link.ifindex == ifindex)
        .ok_or(Error::NoSuchLink(ifindex))?;
    let mut changed = false;
    if config.up == Some(false) && link.up {
        set(handle, &link, builder(&link).down().build()).await?;
        changed = true;
    }
    if let Some(mtu) = config.mtu.filter(|mtu| *mtu != link.mtu) {
        set(handle, &link, builder(&link).mtu(mtu).build()).await?;
        changed = true;
    }
    if let Some(length) = config.txqueuelen.filter(|length| *length != link.txqueuelen) {
        set(handle, &link, builder(&link).txqueuelen(length).build()).await?;
        changed = true;
    }
    if config.quiet {
        changed |= quieten(handle, &link).await?;
    }
    if let Some(mode) = config.rp_filter {
        changed |= sysctl::set_sysctl(
            &format!("net/ipv4/conf/{}/rp_filter", link.name),
            &mode.to_string(),
        )?;
    }
    if let Some(address) = config.link_address {
        changed |= add_link_address(handle, &link, address).await?;
    }
    if let Some(address) = config.link_local {
        changed |= set_link_local(handle, &link, address).await?;
    }
    if config.up == Some(true) && !link.up {
        set(handle, &link, builder(&link).up().build()).await?;
        changed = true;
    }
    Ok(changed)
}

fn builder(link: &Link) -> LinkMessageBuilder<LinkUnspec> {
    LinkUnspec::new_with_index(link.ifindex)
}

async fn set(handle: &rtnetlink::Handle, link: &Link, message: LinkMessage) -> Result<(), Error> {
    handle
        .link()
        .set(message)
        .execute()
        .await
        .map_err(Error::netlink(format!("configure the device {}", link.name)))
}

/// Nothing of the kernel's own making may go out of a tunnel.
async fn quieten(handle: &rtnetlink::Handle, link: &Link) -> Result<bool, Error> {
    let mut changed = false;
    if link.multicast {
        let mut message = builder(link).build();
        message.header.flags.remove(LinkFlags::Multicast);
        message.header.change_mask |= LinkFlags::Multicast;
        set(handle, link, message).await?;
        changed = true;
    }
    // 1: IN6_ADDR_GEN_MODE_NONE. A kernel without IPv6 has no such setting, and needs none.
    for (setting, value) in [
        ("addr_gen_mode", "1"),
        ("accept_ra", "0"),
        ("router_solicitations", "0"),
    ] {
        match sysctl::set_sysctl(&format!("net/ipv6/conf/{}/{setting}", link.name), value) {
            Ok(done) => changed |= done,
            Err(Error::Sysctl { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(changed)
}

async fn add_link_address(handle: &rtnetlink::Handle, link: &Link, wanted: Ipv4Addr) -> Result<bool, Error> {
    let net = IpNet::V4(Ipv4Net::from(wanted));
    if address::list(handle).await?.contains(&(link.ifindex, net)) {
        return Ok(false);
    }
    let mut request = handle.address().add(link.ifindex, wanted.into(), 32);
    let message = request.message_mut();
    message.header.scope = AddressScope::Link;
    message
        .attributes
        .retain(|attribute| !matches!(attribute, AddressAttribute::Broadcast(_)));
    match request.execute().await {
        Ok(()) => Ok(true),
        Err(error) => {
            let error = Error::netlink(format!("add {net} to the device {}", link.name))(error);
            if error.errno() == Some(libc::EEXIST) {
                Ok(false)
            } else {
                Err(error)
            }
        }
    }
}

async fn set_link_local(handle: &rtnetlink::Handle, link: &Link, wanted: Ipv6Addr) -> Result<bool, Error> {
    // Whatever holds for new devices: this one needs it.
    let mut changed = sysctl::set_sysctl(&format!("net/ipv6/conf/{}/disable_ipv6", link.name), "0")?;
    let there = address::list(handle).await?;
    let mut there: Vec<Ipv6Addr> = there
        .iter()
        .filter(|(ifindex, _)| *ifindex == link.ifindex)
        .filter_map(|(_, net)| match net.addr() {
            IpAddr::V6(address) if address.is_unicast_link_local() => Some(address),
            IpAddr::V4(_) | IpAddr::V6(_) => None,
        })
        .collect();
    if !there.contains(&wanted) {
        let mut request = handle.address().add(link.ifindex, wanted.into(), LINK_LOCAL);
        // There is nobody on such a device whom duplicate address detection could ask.
        request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        let what = format!("add {wanted} to the device {}", link.name);
        request.execute().await.map_err(Error::netlink(what))?;
        changed = true;
    }
    there.retain(|address| *address != wanted);
    for address in there {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet6;
        message.header.index = link.ifindex;
        message.header.prefix_len = LINK_LOCAL;
        message.attributes.push(AddressAttribute::Address(address.into()));
        match handle.address().del(message).execute().await {
            Ok(()) => changed = true,
            Err(error) => {
                let error = Error::netlink(format!("take {address} from the device {}", link.name))(error);
                if error.errno() != Some(libc::EADDRNOTAVAIL) {
                    return Err(error);
                }
            }
        }
    }
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_are_checked() {
        for good in ["warren0", "eth0.5", "a"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a b", "abcdefghijklmnop", "w%d"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
