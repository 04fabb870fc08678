//! PID 1 of a pod: the lab's server, so that killing it is the end of the pod.

use std::{fs::File, net::Ipv6Addr, path::PathBuf};

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, setns};

use super::{announce_ready, die_with_parent, mount_fs, private_mounts};
use crate::app::serve;

/// What `warren-lab-app pod` takes.
#[derive(Debug, Clone, clap::Args)]
pub struct PodArgs {
    /// The pod's name: every answer starts with it.
    #[arg(long)]
    pub name: String,
    /// The pod's network namespace, a file on the node.
    #[arg(long)]
    pub netns: PathBuf,
    /// Ports to serve, each for TCP, HTTP and UDP.
    #[arg(long = "port", value_delimiter = ',')]
    pub ports: Vec<u16>,
}

/// Joins the pod's network namespace, makes the others, and waits for the pod's PID 1.
pub fn pod_outer(args: &PodArgs) -> Result<i32> {
    let netns = File::open(&args.netns).with_context(|| format!("no namespace {}", args.netns.display()))?;
    setns(netns, CloneFlags::CLONE_NEWNET).context("cannot join the pod's network namespace")?;
    let ports: Vec<_> = args.ports.iter().map(u16::to_string).collect();
    super::enter::in_new_namespaces(
        CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC,
        &[
            "pod",
            "--name",
            &args.name,
            "--netns",
            args.netns.to_str().context("the namespace's name is no text")?,
            "--port",
            &ports.join(","),
        ],
    )
}

/// Serves until it is killed.
pub fn pod(args: &PodArgs) -> Result<()> {
    die_with_parent()?;
    super::hold_sigchld()?;
    private_mounts()?;
    mount_fs("proc", "/proc", "proc", None)?;
    mount_fs("sysfs", "/sys", "sysfs", None)?;
    nix::unistd::sethostname(&args.name).context("cannot set the host name")?;
    for port in &args.ports {
        serve::start(&args.name, (Ipv6Addr::UNSPECIFIED, *port).into())?;
    }
    announce_ready();
    super::reap_for_ever()
}
