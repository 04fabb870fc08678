//! Processes in the lab's namespaces.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Output, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::wait::{wait_for, wait_until};
use crate::inside::{Kind, READY};

/// A set of namespaces to run commands in, named by a process that lives there.
#[derive(Debug, Clone)]
pub struct Place {
    /// A process in the namespaces, by its id on the machine.
    pub pid: u32,
    /// Which of its namespaces.
    pub kinds: &'static [Kind],
    /// The lab's tool.
    pub app: PathBuf,
    /// For messages.
    pub name: String,
}

/// All namespaces of a node or a pod.
pub const ALL: &[Kind] = &[Kind::Net, Kind::Mnt, Kind::Uts, Kind::Ipc, Kind::Pid];
/// A network namespace alone; processes and files stay the machine's.
pub const NET: &[Kind] = &[Kind::Net];

impl Place {
    /// A command that runs there.
    pub fn command<S: AsRef<str>>(&self, command: impl IntoIterator<Item = S>) -> Command {
        let mut out = Command::new(&self.app);
        let kinds: Vec<_> = self.kinds.iter().map(|kind| kind.file()).collect();
        out.args([
            "enter",
            "--target",
            &self.pid.to_string(),
            "--with",
            &kinds.join(","),
            "--",
        ]);
        for word in command {
            out.arg(word.as_ref());
        }
        // The lab's binaries (in a node), then the machine's tools; whatever the caller's own path is.
        out.env("PATH", "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        out.stdin(Stdio::null());
        out
    }

    /// Runs a command to its end, whatever the end; after two minutes that is a signal's.
    pub fn output<S: AsRef<str>>(&self, command: impl IntoIterator<Item = S>) -> Result<Output> {
        let mut all: Vec<String> = ["timeout", "-k", "2", "120"].map(str::to_owned).into();
        all.extend(command.into_iter().map(|word| word.as_ref().to_owned()));
        self.command(all)
            .output()
            .with_context(|| format!("cannot run in {}", self.name))
    }

    /// Runs a command that must succeed; returns what it printed.
    pub fn run<S: AsRef<str>>(&self, command: impl IntoIterator<Item = S>) -> Result<String> {
        let command: Vec<String> = command.into_iter().map(|word| word.as_ref().to_owned()).collect();
        let output = self.output(&command)?;
        ensure!(
            output.status.success(),
            "{}: `{}` failed ({}): {}{}",
            self.name,
            command.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim(),
            String::from_utf8_lossy(&output.stdout).trim(),
        );
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Runs `ip` with one command per line.
    pub fn ip(&self, lines: &[String]) -> Result<()> {
        use std::io::Write as _;
        let mut child = self
            .command(["ip", "-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run ip (iproute2)")?;
        let mut stdin = child.stdin.take().context("no pipe")?;
        stdin.write_all(lines.join("\n").as_bytes())?;
        drop(stdin);
        let output = child.wait_with_output()?;
        ensure!(
            output.status.success(),
            "{}: ip: {} (in: {})",
            self.name,
            String::from_utf8_lossy(&output.stderr).trim(),
            lines.join("; ")
        );
        Ok(())
    }

    /// What a person types to get there.
    pub fn how_to_enter(&self) -> String {
        format!("nsenter -t {} -n -m -u -i -p", self.pid)
    }

    /// Starts a long-running command; its output goes to `log`.
    pub fn spawn<S: AsRef<str>>(&self, command: impl IntoIterator<Item = S>, log: &Path) -> Result<Process> {
        let mut command = self.command(command);
        let file = File::options().create(true).append(true).open(log)?;
        command.stdout(file.try_clone()?).stderr(file);
        Process::start(command, &self.name, log)
    }

    /// Starts a namespace's PID 1 through its outer process and waits for its `ready`.
    pub fn spawn_init<S: AsRef<str>>(
        &self,
        command: impl IntoIterator<Item = S>,
        log: &Path,
    ) -> Result<(Process, u32)> {
        let mut command = self.command(command);
        let file = File::options().create(true).append(true).open(log)?;
        command.stdout(Stdio::piped()).stderr(file);
        let mut process = Process::start(command, &self.name, log)?;
        let stdout = process.child.stdout.take().context("no pipe")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        if line.trim() != READY {
            bail!(
                "{}: it did not start: {}",
                self.name,
                fs::read_to_string(log).unwrap_or_default().trim()
            );
        }
        // enter -> outer -> PID 1
        let outer = process.pid()?;
        let init = child_of(outer).context("PID 1 is gone already")?;
        Ok((process, init))
    }
}

/// The first child of a process.
fn child_of(pid: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

/// A process in the lab. Ended when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    released: bool,
    /// Where its output goes.
    pub log: PathBuf,
    /// For messages.
    pub name: String,
}

impl Process {
    fn start(mut command: Command, name: &str, log: &Path) -> Result<Self> {
        use std::os::unix::process::CommandExt as _;
        // Ctrl-C ends the harness; the reaper does the rest in order.
        let child = command
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start in {name}"))?;
        Ok(Self {
            child,
            released: false,
            log: log.to_path_buf(),
            name: name.to_owned(),
        })
    }

    /// Wraps a command that was spawned with pipes of its own.
    pub fn adopt(child: Child, name: &str, log: &Path) -> Self {
        Self {
            child,
            released: false,
            log: log.to_path_buf(),
            name: name.to_owned(),
        }
    }

    /// The id, on the machine, of the process itself (not of the `enter` that waits for it).
    pub fn pid(&mut self) -> Result<u32> {
        let outer = self.child.id();
        wait_until(Duration::from_secs(10), "the process has started", || {
            if let Some(pid) = child_of(outer) {
                return Ok(Ok(pid));
            }
            if let Some(status) = self.child.try_wait()? {
                return Ok(Err(anyhow::anyhow!(
                    "{} ended at once ({status}): {}",
                    self.name,
                    self.tail()
                )));
            }
            bail!("not yet")
        })?
    }

    /// Sends a signal to the process itself.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        let pid = self.pid()?;
        kill(Pid::from_raw(i32::try_from(pid)?), signal)
            .with_context(|| format!("cannot signal {}", self.name))
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) -> Result<()> {
        if self.running() {
            // Its parent ends with it.
            let _ = self.signal(Signal::SIGKILL);
        }
        self.child.wait()?;
        Ok(())
    }

    /// SIGTERM, and waits for the end; SIGKILL after ten seconds is an error.
    pub fn terminate(&mut self) -> Result<()> {
        if self.running() {
            self.signal(Signal::SIGTERM)?;
        }
        wait_for(
            Duration::from_secs(10),
            &format!("{} ends after SIGTERM", self.name),
            || !self.running(),
        )
    }

    /// Is it alive?
    pub fn running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Its standard input, if it was piped.
    pub fn stdin(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// Waits for the end and returns what it printed to a piped stdout.
    pub fn finish(mut self) -> Result<String> {
        use std::io::Read as _;
        drop(self.child.stdin.take());
        let mut text = String::new();
        if let Some(mut stdout) = self.child.stdout.take() {
            stdout.read_to_string(&mut text)?;
        }
        let status = self.child.wait()?;
        ensure!(
            status.success(),
            "{} failed ({status}): {}",
            self.name,
            self.tail()
        );
        Ok(text)
    }

    /// The last lines of its log.
    pub fn tail(&self) -> String {
        tail(&self.log, 8)
    }

    /// From now on it outlives this value.
    pub fn release(&mut self) {
        self.released = true;
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.released {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// The last `lines` lines of a file.
pub fn tail(file: &Path, lines: usize) -> String {
    let text = fs::read(file).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<_> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// The processes on the machine that live in the pid namespace of `init` and whose command line contains all
/// of `words`.
pub fn find(init: u32, words: &[&str]) -> Result<Vec<u32>> {
    let namespace = fs::read_link(format!("/proc/{init}/ns/pid"))?;
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        if fs::read_link(entry.path().join("ns/pid")).ok().as_ref() != Some(&namespace) {
            continue;
        }
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line: Vec<_> = line
            .split(|byte| *byte == 0)
            .map(String::from_utf8_lossy)
            .collect();
        if words.iter().all(|word| {
            line.iter()
                .any(|part| part.as_ref() == *word || part.ends_with(&format!("/{word}")))
        }) {
            found.push(pid);
        }
    }
    Ok(found)
}
