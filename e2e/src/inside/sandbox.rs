//! A pod's network namespace as a file on its node, as a container runtime makes it.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};

use super::sysctl;

/// What `warren-lab-app sandbox` takes.
#[derive(Debug, clap::Args)]
pub struct SandboxArgs {
    /// The file.
    #[arg(long)]
    pub netns: PathBuf,
    /// Remove it instead.
    #[arg(long)]
    pub remove: bool,
}

/// Makes the namespace, or removes the file (the namespace lives on while a process is in it).
pub fn sandbox(args: &SandboxArgs) -> Result<()> {
    let path = &args.netns;
    if args.remove {
        umount2(path, MntFlags::MNT_DETACH).with_context(|| format!("cannot unmount {}", path.display()))?;
        return fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()));
    }
    fs::File::create_new(path).with_context(|| format!("cannot make {}", path.display()))?;
    unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
    mount(
        Some("/proc/self/ns/net"),
        path,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .context("cannot give the namespace a name")?;
    // Addresses are usable at once: plugins would otherwise wait for duplicate address detection.
    for scope in ["all", "default"] {
        sysctl(&format!("net/ipv6/conf/{scope}/accept_dad"), "0")?;
    }
    let status = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status()
        .context("cannot run ip (iproute2)")?;
    ensure!(status.success(), "cannot bring up the loopback");
    Ok(())
}
