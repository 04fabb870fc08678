//! The initial RAM disk: a shell, the modules that reach the machine's files, and a script.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context as _, Result, ensure};

use super::kernel::Kernel;
use crate::command::command;

/// Debian's package `busybox-static`.
const SHELL: &str = "/bin/busybox";
/// What the kernel may have as modules and needs before it sees its root.
const MODULES: &[&str] = &["virtio_pci", "virtiofs", "overlay"];

/// The archive. `results` is the directory that stays writable.
pub(super) fn build(kernel: &Kernel, results: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for directory in ["bin", "dev", "proc", "modules", "machine", "memory", "root"] {
        archive.add(directory, 0o040_755, &[]);
    }
    let shell = fs::read(SHELL).with_context(|| format!("cannot read {SHELL} (package busybox-static)"))?;
    archive.add("bin/busybox", 0o100_755, &shell);
    archive.add("init", 0o100_755, include_bytes!("init.sh"));
    let mut order = Vec::new();
    for path in needed(kernel)? {
        let (name, content) = module(&kernel.modules().join(path))?;
        archive.add(&format!("modules/{name}"), 0o100_644, &content);
        order.push(name);
    }
    archive.add("modules.order", 0o100_644, (order.join("\n") + "\n").as_bytes());
    let results = results.to_str().context("the directory's name is no text")?;
    archive.add("results", 0o100_644, format!("{results}\n").as_bytes());
    Ok(archive.finish())
}

/// The files of [`MODULES`] and of what these need, in the order in which they are loaded. What is not among the
/// modules is built in.
fn needed(kernel: &Kernel) -> Result<Vec<String>> {
    let index = fs::read_to_string(kernel.modules().join("modules.dep"))?;
    let mut files = Vec::new();
    for wanted in MODULES {
        let line = index.lines().find(|line| {
            let file = line.split(':').next().unwrap_or_default();
            file.rsplit('/')
                .next()
                .is_some_and(|name| name.split('.').next() == Some(wanted))
        });
        let Some((file, dependencies)) = line.and_then(|line| line.split_once(':')) else {
            continue;
        };
        // depmod lists what is loaded first at the end.
        files.extend(dependencies.split_whitespace().rev().map(str::to_owned));
        files.push(file.to_owned());
    }
    let mut seen = BTreeSet::new();
    files.retain(|file| seen.insert(file.clone()));
    Ok(files)
}

/// A module's name and content; busybox loads them uncompressed.
fn module(path: &Path) -> Result<(String, Vec<u8>)> {
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let Some(plain) = name.strip_suffix(".xz") else {
        return Ok((name, fs::read(path)?));
    };
    let output = command("xz")
        .args(["--decompress", "--stdout"])
        .arg(path)
        .output()
        .context("cannot start xz (package xz-utils)")?;
    ensure!(output.status.success(), "xz cannot read {}", path.display());
    Ok((plain.to_owned(), output.stdout))
}

/// A cpio archive in the `newc` format (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: usize,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        // inode, mode, uid, gid, links, time, size, device and special device (two numbers each), name, checksum.
        let fields = [
            self.entries,
            mode as usize,
            0,
            0,
            1,
            0,
            content.len(),
            0,
            0,
            0,
            0,
            name.len() + 1,
            0,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").into_bytes());
        }
        self.bytes.extend(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::Archive;

    #[test]
    fn an_archive_is_aligned_and_ends() {
        let mut archive = Archive::default();
        archive.add("a", 0o100_644, b"hello");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.starts_with(b"07070100000001000081a4"));
        // 6 + 13 * 8 bytes, the name and its end, then the content.
        assert_eq!(&bytes[112..117], b"hello");
        assert!(bytes.windows(10).any(|window| window == b"TRAILER!!!"));
    }
}
