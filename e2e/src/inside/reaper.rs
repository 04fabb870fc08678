//! The process that removes the lab, whatever happens to the harness.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, setns, unshare},
    sys::{
        signal::{SigSet, Signal},
        signalfd::SignalFd,
    },
};

/// What `warren-lab-app reaper` takes.
#[derive(Debug, clap::Args)]
pub struct ReaperArgs {
    /// The lab's folder, removed at the end.
    #[arg(long)]
    pub dir: PathBuf,
    /// The lab's id.
    #[arg(long)]
    pub id: String,
}

/// Order on the pipe: the harness leaves, the lab stays until a signal comes.
pub const DETACH: u8 = b'd';
/// Order on the pipe: keep the logs when the rest is removed.
pub const KEEP_LOGS: u8 = b'k';

/// Starts the underlay, prints its pid, and waits: until the pipe on stdin closes (the harness is gone, by
/// whatever cause), or a signal. Then kills the underlay's PID 1, and with it every process of the lab, and
/// removes the folder.
pub fn reaper(args: &ReaperArgs) -> Result<()> {
    // A session of its own: Ctrl-C in the terminal must not end the one that cleans up.
    let _ = nix::unistd::setsid();
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGCHLD] {
        signals.add(signal);
    }
    signals.thread_block().context("cannot block signals")?;
    let signals = SignalFd::new(&signals).context("cannot wait for signals")?;
    let machine = File::open("/proc/self/ns/mnt").context("cannot open the own mount namespace")?;
    let mut underlay = start_underlay(args)?;
    std::fs::write(args.dir.join("reaper.pid"), std::process::id().to_string())?;
    std::fs::write(args.dir.join("underlay.pid"), underlay.id().to_string())?;
    writeln!(std::io::stdout(), "{}", underlay.id())?;
    let keep_logs = serve(&signals, &mut underlay);
    // Killing the pid namespace's PID 1 returns only after every process in it is gone.
    let _ = underlay.kill();
    let _ = underlay.wait();
    // Control groups are seen from the machine's mounts only; the underlay has put its own /sys over them.
    setns(machine, CloneFlags::CLONE_NEWNS).context("cannot return to the machine's mounts")?;
    crate::cluster::cgroup::remove(&args.id)?;
    super::cgroup::remove_all(&args.id)?;
    remove(&args.dir, keep_logs?)
}

fn start_underlay(args: &ReaperArgs) -> Result<Child> {
    unshare(
        CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC,
    )
    .context("cannot make the lab's namespaces: run as root")?;
    Command::new(args.dir.join("bin/warren-lab-app"))
        .args(["underlay", "--id", &args.id])
        .stdin(Stdio::null())
        .process_group(0)
        .spawn()
        .context("cannot start the underlay")
}

/// Returns whether logs are to be kept.
fn serve(signals: &SignalFd, underlay: &mut Child) -> Result<bool> {
    let mut stdin = std::io::stdin().lock();
    let (mut detached, mut keep_logs) = (false, false);
    loop {
        let stdin_fd = std::io::stdin();
        let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        if !detached {
            fds.push(PollFd::new(stdin_fd.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            other => other.context("cannot wait")?,
        };
        let ready = |i: usize| {
            fds.get(i)
                .and_then(|fd| fd.revents())
                .is_some_and(|events| !events.is_empty())
        };
        let (signal, order) = (ready(0), ready(1));
        if signal {
            match signals.read_signal()?.map(|info| info.ssi_signo as i32) {
                Some(libc::SIGCHLD) if underlay.try_wait()?.is_none() => {}
                _ => return Ok(keep_logs),
            }
        }
        if order {
            let mut byte = [0];
            match stdin.read(&mut byte)? {
                0 => return Ok(keep_logs),
                _ if byte[0] == DETACH => detached = true,
                _ if byte[0] == KEEP_LOGS => keep_logs = true,
                _ => {}
            }
        }
    }
}

fn remove(dir: &Path, keep_logs: bool) -> Result<()> {
    if !keep_logs {
        return std::fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()));
    }
    for entry in std::fs::read_dir(dir)?.flatten() {
        if entry.file_name() != "logs" {
            let path = entry.path();
            let _ = if path.is_dir() {
                std::fs::remove_dir_all(&path)
            } else {
                std::fs::remove_file(&path)
            };
        }
    }
    Ok(())
}
