//! Runs a command in the namespaces of another process.

use std::{
    fs::File,
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, setns};

use super::{die_with_parent, respawn};

/// A kind of namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// Network.
    Net,
    /// Mounts.
    Mnt,
    /// Host name.
    Uts,
    /// System V and POSIX IPC.
    Ipc,
    /// Processes.
    Pid,
}

impl Kind {
    /// The file below `/proc/PID/ns`.
    pub fn file(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Mnt => "mnt",
            Self::Uts => "uts",
            Self::Ipc => "ipc",
            Self::Pid => "pid",
        }
    }

    fn flag(self) -> CloneFlags {
        match self {
            Self::Net => CloneFlags::CLONE_NEWNET,
            Self::Mnt => CloneFlags::CLONE_NEWNS,
            Self::Uts => CloneFlags::CLONE_NEWUTS,
            Self::Ipc => CloneFlags::CLONE_NEWIPC,
            Self::Pid => CloneFlags::CLONE_NEWPID,
        }
    }
}

/// What `warren-lab-app enter` takes.
#[derive(Debug, clap::Args)]
pub struct EnterArgs {
    /// A process in the wanted namespaces.
    #[arg(long)]
    pub target: u32,
    /// Which namespaces.
    #[arg(long, value_delimiter = ',')]
    pub with: Vec<Kind>,
    /// The command.
    #[arg(trailing_var_arg = true, required = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// What `warren-lab-app exec` takes.
#[derive(Debug, clap::Args)]
pub struct ExecArgs {
    /// The command.
    #[arg(trailing_var_arg = true, required = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// Joins the namespaces, runs the command as a child (a pid namespace takes effect for children only) and
/// returns its exit code; 128 + signal where a signal ended it. The child dies with this process.
pub fn enter(args: &EnterArgs) -> Result<i32> {
    // What runs on a node is in the node's control group, whoever starts it.
    super::cgroup::follow(args.target)?;
    // All files first: /proc is another one after the mount namespace has changed.
    let files = args
        .with
        .iter()
        .map(|kind| {
            let path = format!("/proc/{}/ns/{}", args.target, kind.file());
            File::open(&path)
                .with_context(|| format!("process {} is gone ({path})", args.target))
                .map(|f| (*kind, f))
        })
        .collect::<Result<Vec<_>>>()?;
    // The mount namespace last: it changes the root and the working directory.
    let (mounts, others): (Vec<_>, Vec<_>) = files.into_iter().partition(|(kind, _)| *kind == Kind::Mnt);
    for (kind, file) in others.into_iter().chain(mounts) {
        setns(file, kind.flag()).with_context(|| format!("cannot join the {} namespace", kind.file()))?;
    }
    let exe = std::env::args_os().next().context("no program name")?;
    let status = Command::new(exe)
        .args(["exec", "--"])
        .args(&args.command)
        .status()
        .with_context(|| format!("cannot run {}", args.command[0]))?;
    Ok(status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}

/// The child of [`enter`]: becomes the command.
pub fn exec_child(args: &ExecArgs) -> Result<()> {
    die_with_parent()?;
    let error = Command::new(&args.command[0]).args(&args.command[1..]).exec();
    bail!("cannot run {}: {error}", args.command[0])
}

/// Starts a subcommand of this program in new namespaces of `flags` and waits for it.
pub(super) fn in_new_namespaces(flags: CloneFlags, args: &[&str]) -> Result<i32> {
    die_with_parent()?;
    nix::sched::unshare(flags).context("cannot make namespaces (root is needed)")?;
    let status = respawn(args)?.wait().context("cannot wait")?;
    Ok(status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}
