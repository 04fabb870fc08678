//! PID 1 of a node.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use nix::sched::CloneFlags;
use serde::{Deserialize, Serialize};

use super::{announce_ready, bind, die_with_parent, mount_fs, private_mounts, reap_for_ever, sysctl};

/// What a node's PID 1 needs to know.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeSpec {
    /// Host name.
    pub name: String,
    /// Its control group, from the root of the hierarchy.
    pub cgroup: String,
    /// Folder that survives a reboot: shown as `/var/lib/warren`.
    pub state: PathBuf,
    /// Shown as `/etc/warren`.
    pub etc: PathBuf,
    /// The lab's binaries: shown as `/usr/local/bin`.
    pub bin: PathBuf,
}

fn read_spec(file: &Path) -> Result<NodeSpec> {
    serde_json::from_slice(&fs::read(file)?).context("the node's description cannot be read")
}

/// Makes a node's control group and its namespaces (so that the group becomes its root), and waits for its PID 1.
pub fn node_outer(spec: &Path) -> Result<i32> {
    super::cgroup::enter(&read_spec(spec)?.cgroup)?;
    let spec = spec.to_str().context("the folder's name is no text")?;
    super::enter::in_new_namespaces(
        CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWCGROUP,
        &["node", "--spec", spec],
    )
}

/// Builds the node's own file systems and settings, and stays. Devices are put in from outside.
pub fn node(spec: &Path) -> Result<()> {
    die_with_parent()?;
    let spec = read_spec(spec)?;
    private_mounts()?;
    mount_fs("proc", "/proc", "proc", None)?;
    mount_fs("sysfs", "/sys", "sysfs", None)?;
    super::cgroup::mount_own()?;
    mount_fs("bpf", "/sys/fs/bpf", "bpf", Some("mode=700"))?;
    mount_fs("tracefs", "/sys/kernel/tracing", "tracefs", None)?;
    mount_fs("run", "/run", "tmpfs", Some("mode=755"))?;
    for dir in ["/run/netns", "/run/warren", "/run/wireguard", "/run/lock"] {
        fs::create_dir_all(dir)?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?;
    }
    overlay_dir("/var/lib", &["warren", "cni"])?;
    overlay_dir("/etc", &["warren"])?;
    bind(&spec.state, "/var/lib/warren")?;
    bind(&spec.etc, "/etc/warren")?;
    bind(&spec.bin, "/usr/local/bin")?;
    nix::unistd::sethostname(&spec.name).context("cannot set the host name")?;
    for (name, value) in [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        ("net/ipv6/conf/default/forwarding", "1"),
        ("net/ipv6/conf/default/accept_dad", "0"),
        ("net/ipv6/conf/all/accept_dad", "0"),
    ] {
        sysctl(name, value)?;
    }
    announce_ready();
    reap_for_ever()
}

/// An overlay over `dir` with empty folders of the given names, so that mount points exist without writing to
/// the machine's own file system.
fn overlay_dir(dir: &str, names: &[&str]) -> Result<()> {
    let [upper, work] = ["upper", "work"].map(|part| format!("/run/.lab{dir}/{part}"));
    for part in [&upper, &work] {
        fs::create_dir_all(part)?;
    }
    mount_fs(
        "overlay",
        dir,
        "overlay",
        Some(&format!("lowerdir={dir},upperdir={upper},workdir={work}")),
    )?;
    for name in names {
        let path = format!("{dir}/{name}");
        fs::create_dir_all(&path)?;
        mount_fs("lab", &path, "tmpfs", Some("mode=755"))?;
    }
    Ok(())
}
