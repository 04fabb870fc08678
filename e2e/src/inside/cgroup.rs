//! A control group (version 2) per node, so that programs on a node's group see that node's sockets and no other's.
//!
//! Together with the cluster's groups the one thing of a lab that is not inside its own namespaces: removed by name.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use crate::lab::wait::wait_for;

/// The group of all nodes of a lab, below the root of the hierarchy.
pub(crate) fn tree(id: &str) -> String {
    format!("warren-{id}")
}

/// Where the hierarchy is mounted.
fn root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read the mounts")?;
    mounts
        .lines()
        .find_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let folder = fields.next()?;
            (fields.next()? == "cgroup2").then(|| PathBuf::from(folder))
        })
        .context("no cgroup2 is mounted: mount one, as in `mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified`")
}

/// The group of a process, from the root; itself starts with a slash.
fn of(process: &str) -> Result<String> {
    let text = fs::read_to_string(format!("/proc/{process}/cgroup"))
        .with_context(|| format!("process {process} is gone"))?;
    let group = text.lines().find_map(|line| line.strip_prefix("0::"));
    Ok(group.unwrap_or("/").to_owned())
}

/// Moves the calling process into a group (`warren-ID/node1`), which is made.
pub(super) fn enter(group: &str) -> Result<()> {
    let folder = root()?.join(group);
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    join(&folder)
}

/// Moves the calling process to where another one is.
pub(super) fn follow(process: u32) -> Result<()> {
    let group = of(&process.to_string())?;
    if group == of("self")? {
        return Ok(());
    }
    join(&root()?.join(group.trim_start_matches('/')))
}

fn join(folder: &Path) -> Result<()> {
    fs::write(folder.join("cgroup.procs"), "0").with_context(|| format!("cannot enter {}", folder.display()))
}

/// Removes a node's group; its processes must be gone.
pub(crate) fn remove_node(id: &str, node: &str) -> Result<()> {
    remove(&root()?.join(tree(id)).join(node))
}

/// Removes all groups of a lab; its processes must be gone.
pub(super) fn remove_all(id: &str) -> Result<()> {
    remove(&root()?.join(tree(id)))
}

fn remove(group: &Path) -> Result<()> {
    // The kernel frees the groups of the dead a moment after they are gone.
    wait_for(
        Duration::from_secs(10),
        &format!("{} can be removed", group.display()),
        || remove_tree(group),
    )
}

/// Only folders: the files in a control group are the kernel's.
fn remove_tree(group: &Path) -> bool {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    fs::remove_dir(group).is_ok() || !group.exists()
}

/// Shows the group that is the root of the own cgroup namespace as `/sys/fs/cgroup`.
pub(super) fn mount_own() -> Result<()> {
    super::mount_fs("cgroup2", "/sys/fs/cgroup", "cgroup2", None)?;
    ensure!(
        Path::new("/sys/fs/cgroup/cgroup.procs").exists(),
        "/sys/fs/cgroup is no control group"
    );
    Ok(())
}
