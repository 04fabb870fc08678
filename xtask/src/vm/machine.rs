//! The virtual machine's processes: QEMU, and virtiofsd, which serves it the machine's files.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::{initramfs, kernel::Kernel};
use crate::paths;

/// Where Debian 12 and later ones have it.
const VIRTIOFSD: &[&str] = &["/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd"];

/// What a machine is to do.
pub(super) struct Guest<'a> {
    /// A shell script.
    pub(super) script: &'a str,
    /// The directory that the guest may write to; logs are left there too.
    pub(super) results: &'a Path,
    /// MiB.
    pub(super) memory: u32,
    pub(super) cpus: u32,
}

/// A running machine. Dropping it ends both processes; so does the end of this one.
pub(super) struct Machine {
    qemu: Child,
    files: Child,
    results: PathBuf,
}

impl Machine {
    pub(super) fn start(kernel: &Kernel, guest: &Guest<'_>) -> Result<Self> {
        let results = guest.results.to_owned();
        fs::write(results.join("work.sh"), guest.script)?;
        fs::write(results.join("stage.sh"), stage(kernel, &results)?)?;
        let archive = results.join("initramfs");
        fs::write(&archive, initramfs::build(kernel, &results)?)?;
        let socket = results.join("files.sock");
        let files = serve_files(&socket, &results)?;
        let qemu = qemu(kernel, guest, &archive, &socket).spawn();
        match qemu {
            Ok(qemu) => Ok(Self { qemu, files, results }),
            Err(error) => {
                end(files);
                Err(error).context("cannot start qemu-system-x86_64 (package qemu-system-x86)")
            }
        }
    }

    /// Shows what the work prints and returns its exit code. A machine that is still there after `limit` is ended.
    pub(super) fn wait(mut self, limit: Duration) -> Result<i32> {
        let deadline = Instant::now() + limit;
        let stdout = self.qemu.stdout.take().context("qemu has no stdout")?;
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).split(b'\n') {
                let Ok(line) = line else { return };
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        loop {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => println!("{}", String::from_utf8_lossy(&line).trim_end_matches('\r')),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => bail!(
                    "the virtual machine was ended after {} s: raise --limit, or look at {}",
                    limit.as_secs(),
                    self.console().display()
                ),
            }
        }
        // Its end of the pipe closes when it ends.
        self.qemu.wait()?;
        match fs::read_to_string(self.results.join("exit-code")) {
            Ok(code) => code.trim().parse().context("the guest left no exit code"),
            Err(_) => bail!(
                "the virtual machine ended before its work: {}; all of it is in {}",
                last_line(&self.console()),
                self.console().display()
            ),
        }
    }

    fn console(&self) -> PathBuf {
        self.results.join("console.log")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for child in [&mut self.qemu, &mut self.files] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn end(mut child: Child) {
    let _ = child.kill();
    let _ = child.wait();
}

fn last_line(path: &Path) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let line = text.lines().rfind(|line| !line.trim().is_empty());
    line.unwrap_or("its console is empty").trim().to_owned()
}

/// The script after the initial RAM disk's.
fn stage(kernel: &Kernel, results: &Path) -> Result<String> {
    let home = std::env::var("HOME").unwrap_or_else(|_| "/root".into());
    let modules = kernel.modules().canonicalize()?;
    let quoted = |path: &Path| super::quoted(&[path.display().to_string()]);
    Ok(include_str!("stage.sh")
        .replace("@HOME@", &super::quoted(&[home]))
        .replace("@RESULTS@", &quoted(results))
        .replace("@MODULES@", &quoted(&modules))
        .replace("@ROOT@", &quoted(&paths::root())))
}

/// Ends with its parent, however that ends.
fn dependent(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", program]);
    command.stdin(Stdio::null());
    command
}

/// Starts virtiofsd and waits until QEMU can connect to it.
fn serve_files(socket: &Path, results: &Path) -> Result<Child> {
    let program = VIRTIOFSD
        .iter()
        .find(|path| Path::new(path).is_file())
        .context("virtiofsd is missing: install qemu-system-common (Debian 12) or virtiofsd")?;
    let log = File::create(results.join("virtiofsd.log"))?;
    let mut child = dependent(program)
        .arg(format!("--socket-path={}", socket.display()))
        .args([
            "-o",
            "source=/",
            "-o",
            "cache=auto",
            "-o",
            "sandbox=chroot",
            "-o",
            "log_level=warn",
        ])
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("cannot start virtiofsd")?;
    let start = Instant::now();
    // It takes one connection only, so none is tried.
    while !socket.exists() {
        if let Some(status) = child.try_wait()? {
            bail!(
                "virtiofsd ended ({status}): {}",
                last_line(&results.join("virtiofsd.log"))
            );
        }
        if start.elapsed() > Duration::from_secs(30) {
            end(child);
            bail!("virtiofsd made no socket within 30 s");
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(child)
}

fn qemu(kernel: &Kernel, guest: &Guest<'_>, archive: &Path, socket: &Path) -> Command {
    let mut command = dependent("qemu-system-x86_64");
    let memory = format!("{}M", guest.memory);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    command.args(["-machine", "q35,memory-backend=mem", "-cpu", "max"]);
    command.args(["-accel", "tcg,thread=multi"]);
    command.args(["-smp", &guest.cpus.to_string(), "-m", &memory]);
    // virtiofsd reads and writes the guest's memory.
    command.args([
        "-object",
        &format!("memory-backend-memfd,id=mem,size={memory},share=on"),
    ]);
    command.args(["-chardev", &format!("socket,id=files,path={}", socket.display())]);
    command.args(["-device", "vhost-user-fs-pci,chardev=files,tag=rootfs"]);
    // The first port is the kernel's, the second one the work's.
    command.args([
        "-serial",
        &format!("file:{}", guest.results.join("console.log").display()),
    ]);
    command.args(["-chardev", "stdio,id=work,signal=off", "-serial", "chardev:work"]);
    command.arg("-kernel").arg(kernel.image());
    command.arg("-initrd").arg(archive);
    command.args([
        "-append",
        "console=ttyS0 loglevel=5 panic=-1 mitigations=off nowatchdog",
    ]);
    command.stdout(Stdio::piped());
    command
}
