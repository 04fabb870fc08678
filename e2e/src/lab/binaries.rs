//! Where the binaries under test are.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

/// The lab's own tool.
pub const LAB_APP: &str = "warren-lab-app";
/// What a lab with Warren needs beside it.
pub const WARREN: [&str; 4] = ["mesh-agent", "keyd", "warren", "warren-cni"];

/// The folder with the built binaries: that of the running program, or its parent for a test.
pub fn folder() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("cannot find the running program")?;
    let dir = exe.parent().context("the running program has no folder")?;
    let dir = if dir.ends_with("deps") {
        dir.parent().unwrap_or(dir)
    } else {
        dir
    };
    Ok(dir.to_path_buf())
}

/// Links the binaries into the lab's own folder, so that a build during a run changes nothing in it.
pub fn gather(into: &Path, names: &[&str]) -> Result<()> {
    let folder = folder()?;
    fs::create_dir_all(into)?;
    for name in names {
        let (from, to) = (folder.join(name), into.join(name));
        if !from.is_file() {
            bail!(
                "{} is not built: run `cargo build` in the workspace first",
                from.display()
            );
        }
        if fs::hard_link(&from, &to).is_err() {
            copy(&from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
        }
    }
    Ok(())
}

/// Copies a program in a process of its own. If this one wrote it, a child that another thread starts at that moment would
/// inherit the open file, and for as long the program could not be executed ("text file busy").
fn copy(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("cp").arg("--").args([from, to]).status()?;
    ensure!(status.success(), "cp: {status}");
    Ok(())
}
