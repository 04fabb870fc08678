//! What goes into an image: programs with the shared libraries they need.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::command::output;

/// The content of an image; paths are relative to its root.
#[derive(Default)]
pub(super) struct Tree {
    pub(super) files: BTreeMap<String, Entry>,
}

/// A file of an image.
pub(super) enum Entry {
    /// Its content; everything in our images is read by all, programs and libraries run by all.
    File { content: Vec<u8>, executable: bool },
    /// A symbolic link and its target.
    Link(String),
}

impl Tree {
    pub(super) fn new() -> Self {
        let mut tree = Self::default();
        for (path, content) in [
            (
                "etc/passwd",
                "root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
            ),
            ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
        ] {
            tree.files.insert(
                path.into(),
                Entry::File {
                    content: content.into(),
                    executable: false,
                },
            );
        }
        tree
    }

    /// A program, without its debug information, and every library it is linked with.
    pub(super) fn program(&mut self, source: &Path, path: &str) -> Result<()> {
        if !source.is_file() {
            bail!(
                "{} is not there: `cargo build` and `cargo xtask setup` make what images hold",
                source.display()
            );
        }
        self.files.insert(
            path.into(),
            Entry::File {
                content: stripped(source)?,
                executable: true,
            },
        );
        self.libraries(source)
    }

    /// A directory of loadable modules, at its own path, and what they need.
    pub(super) fn plugins(&mut self, directory: &Path) -> Result<()> {
        let entries =
            fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
        for entry in entries {
            let source = entry?.path();
            self.file(&source)?;
            self.libraries(&source)?;
        }
        Ok(())
    }

    /// A symbolic link.
    pub(super) fn link(&mut self, path: &str, target: &str) -> Result<()> {
        if self
            .files
            .insert(path.into(), Entry::Link(target.into()))
            .is_some()
        {
            bail!("{path} is in the image already");
        }
        Ok(())
    }

    fn libraries(&mut self, program: &Path) -> Result<()> {
        for library in needed(program)? {
            self.file(&library)?;
        }
        Ok(())
    }

    /// A file at its own path. `/lib` and `/lib64` are real directories in the image, so what the loader's name
    /// leads to is copied, not the link.
    fn file(&mut self, source: &Path) -> Result<()> {
        let path = source.to_string_lossy().trim_start_matches('/').to_owned();
        if let btree_map::Entry::Vacant(free) = self.files.entry(path) {
            let content = fs::read(source).with_context(|| format!("cannot read {}", source.display()))?;
            free.insert(Entry::File {
                content,
                executable: true,
            });
        }
        Ok(())
    }
}

/// The libraries and the loader that `ldd` names; none for a static program.
fn needed(program: &Path) -> Result<BTreeSet<PathBuf>> {
    let text = match output(Command::new("ldd").arg(program)) {
        Ok(text) => text,
        Err(error) if error.to_string().contains("not a dynamic executable") => return Ok(BTreeSet::new()),
        Err(error) => return Err(error),
    };
    parse(&text).with_context(|| format!("{} cannot run on this machine", program.display()))
}

/// Lines like `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x..)` and `/lib64/ld-linux-x86-64.so.2 (0x..)`.
fn parse(text: &str) -> Result<BTreeSet<PathBuf>> {
    let mut libraries = BTreeSet::new();
    for line in text.lines().map(str::trim) {
        if line.ends_with("not found") {
            bail!("missing library: {line}");
        }
        let path = line.split_whitespace().find(|word| word.starts_with('/'));
        libraries.extend(path.map(PathBuf::from));
    }
    Ok(libraries)
}

fn stripped(source: &Path) -> Result<Vec<u8>> {
    let copy = crate::paths::images().join(".stripped");
    output(
        Command::new("strip")
            .arg("--strip-debug")
            .arg("-o")
            .arg(&copy)
            .arg(source),
    )?;
    let content = fs::read(&copy)?;
    fs::remove_file(&copy)?;
    Ok(content)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::parse;

    #[test]
    fn libraries_and_loader_are_found() {
        let text = "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/libc.so.6 (0x2)\n\t/lib64/ld-linux-x86-64.so.2 (0x3)\n";
        let found: Vec<_> = parse(text).unwrap().into_iter().collect();
        assert_eq!(
            found,
            [
                PathBuf::from("/lib/libc.so.6"),
                PathBuf::from("/lib64/ld-linux-x86-64.so.2")
            ]
        );
        assert!(parse("\tstatically linked\n").unwrap().is_empty());
        assert!(parse("\tlibx.so => not found\n").is_err());
    }
}
