//! PID 1 of the lab: the underlay's network namespace with its bridge, and the root of all pid namespaces.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::{announce_ready, die_with_parent, mount_fs, private_mounts, reap_for_ever, sysctl};
use crate::lab::net::{BRIDGE, ROUTER_V4, ROUTER_V6};

/// Builds the bridge and stays.
pub fn underlay(id: &str) -> Result<()> {
    die_with_parent()?;
    private_mounts()?;
    mount_fs("proc", "/proc", "proc", None)?;
    mount_fs("sysfs", "/sys", "sysfs", None)?;
    nix::unistd::sethostname(format!("lab-{id}")).context("cannot set the host name")?;
    sysctl("net/ipv6/conf/default/accept_dad", "0")?;
    // The outside world of the nodes: answers at its own address, forwards nothing.
    sysctl("net/ipv4/ip_forward", "0")?;
    for line in [
        "link set lo up".to_owned(),
        format!("link add {BRIDGE} type bridge stp_state 0 mcast_snooping 0 forward_delay 0"),
        format!("addr add {ROUTER_V4}/24 dev {BRIDGE}"),
        format!("addr add {ROUTER_V6}/64 dev {BRIDGE} nodad"),
        format!("link set {BRIDGE} up"),
    ] {
        let output = Command::new("ip")
            .args(line.split(' '))
            .output()
            .context("cannot run ip (iproute2)")?;
        ensure!(
            output.status.success(),
            "ip {line}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    announce_ready();
    reap_for_ever()
}
