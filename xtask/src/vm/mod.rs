//! `cargo xtask vm`: what needs a kernel that the machine does not have, in a virtual machine.
//!
//! QEMU emulates every instruction, so it runs anywhere and is slow: no figure from it says anything about speed.
//! The guest sees the machine's own files. What it writes goes to its memory and is gone at its end, except for the
//! directory of results.

mod initramfs;
mod kernel;
mod machine;
mod suite;

use std::{
    fs::{self, File},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use self::machine::{Guest, Machine};
use crate::{
    paths,
    setup::{self, Group},
};

/// Arguments of `vm`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Debian's kernel series: 6.12 (TCX) or 6.1 (clsact). May be given more than once.
    #[arg(long = "kernel", value_name = "SERIES", default_values_t = [String::from("6.12")])]
    kernels: Vec<String>,
    /// Only this step of the suite; may be given more than once. `--list` names them.
    #[arg(long, value_name = "STEP", conflicts_with = "command")]
    only: Vec<String>,
    /// Name the steps of the suite and run none.
    #[arg(long)]
    list: bool,
    /// Seconds until a machine is ended, whatever it does.
    #[arg(long, default_value_t = 1500)]
    limit: u64,
    /// Memory of the machine in MiB; everything that the guest writes lives there too.
    #[arg(long, default_value_t = 4096)]
    memory: u32,
    /// Processors of the machine.
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Runs this instead of the suite: a program and its arguments, in the repository's root.
    #[arg(last = true)]
    command: Vec<String>,
}

/// Runs the suite, or a command, with each kernel.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.list {
        suite::list();
        return Ok(());
    }
    let steps = suite::chosen(&arguments.only)?;
    setup::ensure(&[Group::Vm])?;
    let mut failed = Vec::new();
    for series in &arguments.kernels {
        let kernel = kernel::ensure(series)?;
        let (_lock, results) = results(series)?;
        let script = if arguments.command.is_empty() {
            setup::ensure(&[Group::Base, Group::Bpf])?;
            suite::script(&steps, &results)?
        } else {
            quoted(&arguments.command)
        };
        println!("vm: Linux {} is starting", kernel.release);
        let guest = Guest {
            script: &script,
            results: &results,
            memory: arguments.memory,
            cpus: arguments.cpus,
        };
        let start = Instant::now();
        let machine = Machine::start(&kernel, &guest)?;
        let code = machine.wait(Duration::from_secs(arguments.limit))?;
        println!(
            "vm: Linux {} ended with exit code {code} after {} s",
            kernel.release,
            start.elapsed().as_secs()
        );
        if code != 0 {
            failed.push(format!("{} ({code})", kernel.release));
        }
    }
    if !failed.is_empty() {
        bail!("failed with Linux {}", failed.join(", "));
    }
    Ok(())
}

/// A few minutes of it, for `cargo xtask test`.
pub(crate) fn short() -> Result<()> {
    run(&Arguments {
        kernels: vec!["6.12".into()],
        only: vec![suite::SHORT.into()],
        list: false,
        limit: 300,
        memory: 2048,
        cpus: 2,
        command: Vec::new(),
    })
}

/// An empty directory that the guest may write to, for one run at a time.
fn results(series: &str) -> Result<(File, PathBuf)> {
    let all = paths::target().join("vm");
    fs::create_dir_all(&all).with_context(|| format!("cannot make {}", all.display()))?;
    let all = all.canonicalize()?;
    let lock = File::create(all.join(format!("{series}.lock")))?;
    lock.lock()
        .context("cannot wait for the machine that runs this kernel")?;
    let directory = all.join(series);
    if directory.exists() {
        fs::remove_dir_all(&directory).with_context(|| format!("cannot empty {}", directory.display()))?;
    }
    fs::create_dir(&directory)?;
    Ok((lock, directory))
}

/// Words as a shell reads them back.
fn quoted(words: &[String]) -> String {
    let words: Vec<_> = words
        .iter()
        .map(|word| format!("'{}'", word.replace('\'', r"'\''")))
        .collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn words_stay_what_they_are() {
        let words = ["sh", "-c", "echo 'a b' $HOME"].map(String::from);
        assert_eq!(quoted(&words), r"'sh' '-c' 'echo '\''a b'\'' $HOME'");
    }
}
