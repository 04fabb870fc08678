//! Where the programs and images are that `cargo xtask setup` and `cargo xtask image` made.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};

use crate::lab::binaries;

/// A program that `setup` built: `${WARREN_CACHE:-${XDG_CACHE_HOME:-~/.cache}/warren}/bin`.
pub(super) fn path(name: &str) -> Result<String> {
    let cache = match (
        env::var_os("WARREN_CACHE"),
        env::var_os("XDG_CACHE_HOME"),
        env::var_os("HOME"),
    ) {
        (Some(cache), _, _) => PathBuf::from(cache),
        (None, Some(cache), _) => PathBuf::from(cache).join("warren"),
        (None, None, Some(home)) => PathBuf::from(home).join(".cache/warren"),
        (None, None, None) => anyhow::bail!("neither WARREN_CACHE nor HOME is set: set WARREN_CACHE"),
    };
    let path = cache.join("bin").join(name);
    ensure!(
        path.is_file(),
        "{} is not there: run `cargo xtask setup` first",
        path.display()
    );
    Ok(path.display().to_string())
}

/// The image archives, Warren's where they are wanted.
pub(super) fn images(warren: bool) -> Result<Vec<PathBuf>> {
    let target = binaries::folder()?;
    let folder = target.parent().context("the build has no folder")?.join("images");
    let ours: &[&str] = if warren { &["mesh-agent", "keyd"] } else { &[] };
    ["pause", "coredns", "lab-app", "cyclonus-worker"]
        .iter()
        .chain(ours)
        .map(|name| {
            let path = folder.join(format!("{name}.tar"));
            ensure!(
                path.is_file(),
                "{} is not there: run `cargo xtask image` first",
                path.display()
            );
            Ok(path)
        })
        .collect()
}

/// The chart in this repository.
pub(super) fn chart() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).join("charts/warren")
}
