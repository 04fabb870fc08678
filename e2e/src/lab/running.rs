//! Labs that run on this machine, found by their folders.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};

use super::{PREFIX, wait::wait_until};

/// A lab that runs, as its folder shows it.
#[derive(Debug, Clone)]
pub struct RunningLab {
    /// Its id.
    pub id: String,
    /// The process whose end removes it.
    pub reaper: u32,
    /// Its folder.
    pub dir: PathBuf,
}

/// The labs that run on this machine.
pub fn running() -> Result<Vec<RunningLab>> {
    let mut labs = Vec::new();
    for entry in fs::read_dir(std::env::temp_dir())?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(id) = name.strip_prefix(PREFIX) else {
            continue;
        };
        let Ok(pid) = fs::read_to_string(entry.path().join("reaper.pid")) else {
            continue;
        };
        let Ok(reaper) = pid.trim().parse::<u32>() else {
            continue;
        };
        // The number may have been given to another process since.
        let line = fs::read(format!("/proc/{reaper}/cmdline")).unwrap_or_default();
        if line.split(|byte| *byte == 0).any(|word| word == id.as_bytes()) {
            labs.push(RunningLab {
                id: id.to_owned(),
                reaper,
                dir: entry.path(),
            });
        }
    }
    Ok(labs)
}

impl RunningLab {
    /// Removes it and waits until it is gone.
    pub fn remove(&self) -> Result<()> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.reaper)?);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).context("cannot signal the reaper")?;
        wait_until(
            Duration::from_secs(20),
            &format!("lab {} is removed", self.id),
            || {
                // Not its entry in /proc: nobody may have collected it yet.
                let line = fs::read(format!("/proc/{}/cmdline", self.reaper)).unwrap_or_default();
                ensure!(line.is_empty(), "its reaper still works");
                Ok(())
            },
        )
    }
}
