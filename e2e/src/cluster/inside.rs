//! What runs inside a cluster's nodes, as hidden subcommands of `warren-cluster`.

use std::{
    fs,
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};
use serde::{Deserialize, Serialize};

use super::cgroup;
use crate::inside::{
    announce_ready, bind, die_with_parent, mount_fs, private_mounts, reap_for_ever, respawn, sysctl,
};

/// What a node's PID 1 needs to know.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeSpec {
    /// The cluster's id.
    pub id: String,
    /// Host name.
    pub name: String,
    /// Folder with the node's own state; survives a reboot.
    pub state: PathBuf,
}

/// Folders of a node that must be its own, at their usual paths, so that hostPath volumes mean what they say.
const STATE: &[&str] = &[
    "/var/lib/kubelet",
    "/var/lib/containerd",
    "/var/lib/cni",
    "/var/lib/warren",
    "/var/log",
    "/etc/cni",
    "/opt/cni",
];

/// kubelet sets these for the whole machine when it starts: it gets plain files instead.
const MACHINE_WIDE: &[(&str, &str)] = &[
    ("vm/overcommit_memory", "1"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

fn namespaces() -> CloneFlags {
    CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWCGROUP
}

fn spec_from(path: &Path) -> Result<NodeSpec> {
    serde_json::from_slice(&fs::read(path)?).with_context(|| format!("{} cannot be read", path.display()))
}

/// Enters the node's control groups, then makes its namespaces (so that the groups become its root) and waits for
/// its PID 1.
pub fn node_outer(path: &Path) -> Result<i32> {
    die_with_parent()?;
    let spec = spec_from(path)?;
    cgroup::enter(&spec.id, &spec.name)?;
    unshare(namespaces()).context("cannot make namespaces (root is needed)")?;
    let path = path.to_str().context("the folder's name is no text")?;
    let status = respawn(&["node", "--spec", path])?
        .wait()
        .context("cannot wait")?;
    Ok(status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}

/// PID 1: builds the node's own file systems and settings, and stays.
pub fn node(path: &Path) -> Result<()> {
    die_with_parent()?;
    let spec = spec_from(path)?;
    private_mounts()?;
    let hierarchies = cgroup::hierarchies()?;
    // Otherwise the machine's mounts of control groups and namespaces stay listed below ours, and kubelet reads them.
    for target in ["/run/netns", "/sys"] {
        while umount2(target, MntFlags::MNT_DETACH).is_ok() {}
    }
    mount_fs("proc", "/proc", "proc", None)?;
    mount_fs("sysfs", "/sys", "sysfs", None)?;
    mount_fs("cgroup", "/sys/fs/cgroup", "tmpfs", Some("mode=755"))?;
    for (folder, option) in hierarchies {
        fs::create_dir(&folder)?;
        let kind = if option.is_some() { "cgroup" } else { "cgroup2" };
        let target = folder.to_str().context("a control group's name is no text")?;
        mount_fs(kind, target, kind, option.as_deref())?;
    }
    mount_fs("bpf", "/sys/fs/bpf", "bpf", Some("mode=700"))?;
    mount_fs("tracefs", "/sys/kernel/tracing", "tracefs", None)?;
    mount_fs("run", "/run", "tmpfs", Some("mode=755"))?;
    for folder in ["/run/netns", "/run/lock", "/run/containerd"] {
        fs::create_dir_all(folder)?;
    }
    own_folders(&spec.state)?;
    machine_wide_settings(&spec.state)?;
    shared_mounts()?;
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

/// Binds the node's folders over the machine's, whose own file systems must not even get a mount point: `/var/lib`,
/// `/etc` and `/opt` become overlays that keep their changes in memory.
fn own_folders(state: &Path) -> Result<()> {
    for folder in ["/var/lib", "/etc", "/opt"] {
        let [upper, work] = ["upper", "work"].map(|part| format!("/run/.lab{folder}/{part}"));
        for part in [&upper, &work] {
            fs::create_dir_all(part)?;
        }
        let options = format!("lowerdir={folder},upperdir={upper},workdir={work}");
        mount_fs("overlay", folder, "overlay", Some(&options))?;
    }
    for folder in STATE {
        let own = state.join(folder.trim_start_matches('/'));
        fs::create_dir_all(&own)?;
        fs::create_dir_all(folder)?;
        bind(&own, folder)?;
    }
    Ok(())
}

fn machine_wide_settings(state: &Path) -> Result<()> {
    for (name, value) in MACHINE_WIDE {
        let file = state.join(name.replace('/', "."));
        fs::write(&file, value)?;
        bind(&file, &format!("/proc/sys/{name}"))?;
    }
    Ok(())
}

/// A mount that a pod makes in a shared folder is seen by the node and by other pods, as on a real node.
fn shared_mounts() -> Result<()> {
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_SHARED,
        None::<&str>,
    )
    .context("cannot share the mounts")
}

/// What `warren-cluster join` takes.
#[derive(Debug, clap::Args)]
pub struct JoinArgs {
    /// The node's description.
    #[arg(long)]
    pub spec: PathBuf,
    /// The node's PID 1, by its id on the machine.
    #[arg(long)]
    pub target: u32,
    /// The command.
    #[arg(trailing_var_arg = true, required = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// Runs a command as a process of the node, control groups included; returns its exit code.
pub fn join(args: &JoinArgs) -> Result<i32> {
    die_with_parent()?;
    let spec = spec_from(&args.spec)?;
    cgroup::enter(&spec.id, &spec.name)?;
    // All files first: /proc is another one after the mount namespace has changed, so that one comes last.
    let mut files = Vec::new();
    for (name, flag) in [
        ("cgroup", CloneFlags::CLONE_NEWCGROUP),
        ("uts", CloneFlags::CLONE_NEWUTS),
        ("ipc", CloneFlags::CLONE_NEWIPC),
        ("net", CloneFlags::CLONE_NEWNET),
        ("pid", CloneFlags::CLONE_NEWPID),
        ("mnt", CloneFlags::CLONE_NEWNS),
    ] {
        let path = format!("/proc/{}/ns/{name}", args.target);
        let file = fs::File::open(&path).with_context(|| format!("{} is down ({path})", spec.name))?;
        files.push((file, name, flag));
    }
    for (file, name, flag) in files {
        setns(file, flag).with_context(|| format!("cannot join the {name} namespace of {}", spec.name))?;
    }
    let status = respawn_exec(&args.command)?;
    Ok(status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}

/// A pid namespace takes effect for children only, and the child must die with this process.
fn respawn_exec(command: &[String]) -> Result<std::process::ExitStatus> {
    let exe = std::env::args_os().next().context("no program name")?;
    Command::new(&exe)
        .args(["exec", "--"])
        .args(command)
        .status()
        .with_context(|| format!("cannot start {} in the node", exe.display()))
}

/// The child of [`join`]: becomes the command.
pub fn exec(command: &[String]) -> Result<()> {
    die_with_parent()?;
    let [program, arguments @ ..] = command else {
        bail!("no command")
    };
    let error = Command::new(program).args(arguments).exec();
    bail!("cannot run {program}: {error}")
}
