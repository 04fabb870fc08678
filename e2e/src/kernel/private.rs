//! A thread in namespaces of its own.

use std::{panic, path::Path, thread};

use anyhow::{Context as _, Result};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};

/// Runs something on a thread with a network and a mount namespace of its own, and hands it an empty bpffs. Whatever it
/// makes is gone afterwards.
pub fn private<T: Send>(task: impl FnOnce(&Path) -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| match scope.spawn(|| isolated(task)).join() {
        Ok(result) => result,
        Err(payload) => panic::resume_unwind(payload),
    })
}

fn isolated<T>(task: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)
        .context("cannot make namespaces: run as root")?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context("cannot make mounts private")?;
    let directory = tempfile::tempdir().context("cannot make a directory")?;
    mount(Some("bpf"), directory.path(), Some("bpf"), MsFlags::empty(), none)
        .context("cannot mount a bpffs")?;
    let result = task(directory.path());
    // The directory could not be removed under it.
    umount2(directory.path(), MntFlags::MNT_DETACH).context("cannot unmount the bpffs")?;
    result
}
