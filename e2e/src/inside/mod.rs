//! What runs inside the lab's namespaces, as subcommands of `warren-lab-app`.
//!
//! ```text
//! harness ── pipe ──> reaper (machine's namespaces; removes the lab when the pipe closes)
//!                       └ underlay   PID 1 of the lab's pid namespace, owns the underlay network namespace
//!                           └ node-outer ─ node     PID 1 of a node
//!                               └ pod-outer ─ pod   PID 1 of a pod, also its server
//! ```
//!
//! All pid namespaces are nested below the underlay's: when its PID 1 dies the kernel kills the rest, and with
//! the last process go the network and mount namespaces. No name in `/run/netns`, no mount and no device
//! of the machine is ever used, so nothing can be forgotten.

pub(crate) mod cgroup;
mod enter;
mod node;
mod pod;
mod reaper;
mod sandbox;
mod underlay;

use std::{
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sys::{
        prctl::set_pdeathsig,
        signal::{SigSet, Signal},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
};

pub use enter::{EnterArgs, ExecArgs, Kind, enter, exec_child};
pub use node::{NodeSpec, node, node_outer};
pub use pod::{PodArgs, pod, pod_outer};
pub use reaper::{DETACH, KEEP_LOGS, ReaperArgs, reaper};
pub use sandbox::{SandboxArgs, sandbox};
pub use underlay::underlay;

/// The line that a PID 1 prints when its namespace is ready.
pub const READY: &str = "ready";

/// Dies with the parent: nothing of the lab outlives what started it.
pub(crate) fn die_with_parent() -> Result<()> {
    set_pdeathsig(Signal::SIGKILL).context("cannot ask for a signal at the parent's death")
}

/// Mounts one file system.
pub(crate) fn mount_fs(source: &str, target: &str, kind: &str, data: Option<&str>) -> Result<()> {
    mount(Some(source), target, Some(kind), MsFlags::empty(), data)
        .with_context(|| format!("cannot mount {kind} on {target}"))
}

/// Shows one directory at another place.
pub(crate) fn bind(source: &Path, target: &str) -> Result<()> {
    mount(
        Some(source),
        target,
        None::<&str>,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        None::<&str>,
    )
    .with_context(|| format!("cannot bind {} to {target}", source.display()))
}

/// Cuts the mount namespace off from the machine's: no mount made here is seen outside.
pub(crate) fn private_mounts() -> Result<()> {
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .context("cannot make the mounts private")
}

/// Starts this very program with another subcommand; it inherits stdout for its `ready`.
pub(crate) fn respawn(args: &[&str]) -> Result<Child> {
    let exe = std::env::args_os().next().context("no program name")?;
    Command::new(&exe)
        .args(args)
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {} {}", exe.display(), args.join(" ")))
}

/// Tells whoever waits on stdout that the namespace is ready.
pub(crate) fn announce_ready() {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    // A reader that is gone is no reason to fail: the reaper decides about life and death.
    let _ = writeln!(out, "{READY}").and_then(|()| out.flush());
}

/// Holds SIGCHLD back for [`reap_for_ever`]; before any thread is started, which would swallow it.
fn hold_sigchld() -> Result<SigSet> {
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    children.thread_block().context("cannot block SIGCHLD")?;
    Ok(children)
}

/// A PID 1's only duty: collects orphans, for ever.
pub(crate) fn reap_for_ever() -> Result<()> {
    let children = hold_sigchld()?;
    loop {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => break,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error).context("cannot wait for children"),
            }
        }
        children.wait().context("cannot wait for a signal")?;
    }
}

/// Writes a kernel setting of the caller's network namespace.
pub(crate) fn sysctl(name: &str, value: &str) -> Result<()> {
    std::fs::write(format!("/proc/sys/{name}"), value)
        .with_context(|| format!("cannot set {name} to {value}"))
}
