//! Where things are.

use std::{env, path::PathBuf};

use anyhow::{Context as _, Result};

/// The root of the repository.
pub(crate) fn root() -> PathBuf {
    // xtask lies directly below the root.
    let manifest = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().map(PathBuf::from).unwrap_or(manifest)
}

/// `${WARREN_CACHE:-${XDG_CACHE_HOME:-~/.cache}/warren}`: what `setup` builds lives here, outside the repository,
/// so that a new clone does not build it again.
pub(crate) fn cache() -> Result<PathBuf> {
    if let Some(directory) = env::var_os("WARREN_CACHE") {
        return Ok(directory.into());
    }
    if let Some(directory) = env::var_os("XDG_CACHE_HOME") {
        return Ok(PathBuf::from(directory).join("warren"));
    }
    let home = env::var_os("HOME")
        .context("neither WARREN_CACHE nor HOME is set: set WARREN_CACHE to a directory")?;
    Ok(PathBuf::from(home).join(".cache/warren"))
}

/// Programs that `setup` builds.
pub(crate) fn bin() -> Result<PathBuf> {
    Ok(cache()?.join("bin"))
}

/// Cargo's output directory.
pub(crate) fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// The OCI archives of [`crate::image`].
pub(crate) fn images() -> PathBuf {
    target().join("images")
}
