//! Control groups of the nodes: one tree per cluster in every hierarchy of the machine.
//!
//! The one thing of a cluster that is not inside its own namespaces, so it must be removed by name.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::lab::wait::wait_for;

const ROOT: &str = "/sys/fs/cgroup";

/// The name of a cluster's tree.
pub(super) fn tree(id: &str) -> String {
    format!("warren-{id}")
}

/// The v1 hierarchies of this machine (folder, mount option), and the v2 one beside them.
///
/// Kubelet and runc of these releases are content with either; two hierarchies at once is what was measured to work.
pub(super) fn hierarchies() -> Result<Vec<(PathBuf, Option<String>)>> {
    let mut found: Vec<(PathBuf, Option<String>)> = Vec::new();
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    for line in mounts.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let [_, folder, kind, options, ..] = fields[..] else {
            continue;
        };
        if !folder.starts_with("/sys/fs/cgroup/") {
            continue;
        }
        match kind {
            "cgroup" => {
                let option = folder.rsplit('/').next().unwrap_or_default();
                let named = options.split(',').find(|option| option.starts_with("name="));
                let option = named.map_or(option.to_owned(), |named| format!("none,{named}"));
                found.push((folder.into(), Some(option)));
            }
            "cgroup2" => found.push((folder.into(), None)),
            _ => {}
        }
    }
    if !found.iter().any(|(folder, _)| folder.ends_with("memory")) {
        bail!(
            "the cluster lab needs cgroup v1 hierarchies below {ROOT} (boot with systemd.unified_cgroup_hierarchy=0)"
        );
    }
    Ok(found)
}

/// Where a node has the v2 hierarchy.
pub(super) fn unified() -> Result<PathBuf> {
    let found = hierarchies()?
        .into_iter()
        .find_map(|(folder, option)| option.is_none().then_some(folder));
    found.context("no cgroup2 is mounted: mount one, as in `mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified`")
}

/// Makes the node's groups and moves the calling process into them.
pub(super) fn enter(id: &str, node: &str) -> Result<()> {
    for (folder, _) in hierarchies()? {
        let group = folder.join(tree(id)).join(node);
        fs::create_dir_all(&group).with_context(|| format!("cannot create {}", group.display()))?;
        if folder.ends_with("cpuset") {
            // A new cpuset is empty, and nothing may enter an empty one.
            for group in [folder.join(tree(id)), group.clone()] {
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    fs::write(group.join(file), fs::read(folder.join(file))?)?;
                }
                fs::write(group.join("cgroup.clone_children"), "1")?;
            }
        }
        fs::write(group.join("cgroup.procs"), "0")
            .with_context(|| format!("cannot enter {}", group.display()))?;
    }
    Ok(())
}

/// Removes one node's groups; its processes must be gone.
pub(super) fn remove_node(id: &str, node: &str) -> Result<()> {
    remove_below(&format!("{}/{node}", tree(id)))
}

/// Removes all groups of a cluster; its processes must be gone. Does nothing for a lab without a cluster.
pub(crate) fn remove(id: &str) -> Result<()> {
    remove_below(&tree(id))
}

fn remove_below(name: &str) -> Result<()> {
    let Ok(entries) = fs::read_dir(ROOT) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        let group = entry.path().join(name);
        if group.is_dir() {
            // The kernel frees the groups of the dead a moment after they are gone.
            wait_for(
                Duration::from_secs(60),
                &format!("{} can be removed", group.display()),
                || remove_tree(&group),
            )?;
        }
    }
    Ok(())
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
