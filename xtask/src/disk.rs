//! Room on the disk: asked for at the start, because a full disk shows itself late and as something else. A kubelet, for
//! one, evicts every pod of its node.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};

use crate::{
    command::{command, output},
    paths,
};

const GIB: u64 = 1 << 30;

/// Bytes of [`paths::target`] after a whole `cargo xtask test` from nothing.
const BUILT: u64 = 10 * GIB;

/// Bytes that tests need besides: unpacked images of three nodes, captures, logs. A kubelet wants some of it left free.
const ROOM: u64 = 3 * GIB;

/// Refuses to begin what a full disk would end. Asks `du` and `df`.
pub(crate) fn ensure_room() -> Result<()> {
    let target = paths::target();
    fs::create_dir_all(&target).with_context(|| format!("cannot create {}", target.display()))?;
    let (built, free) = (size(&target)?, free(&target)?);
    let needed = BUILT.saturating_sub(built) + ROOM;
    ensure!(
        free >= needed,
        "{} GiB are free on the disk of {} and {} GiB are needed: make room, or set CARGO_TARGET_DIR to a folder on a larger disk",
        free / GIB,
        target.display(),
        needed.div_ceil(GIB)
    );
    Ok(())
}

/// Bytes of a folder and everything below it.
fn size(folder: &Path) -> Result<u64> {
    let said = output(command("du").args(["--summarize", "--block-size=1"]).arg(folder))?;
    number(said.split_whitespace().next(), "du")
}

/// Bytes that are left for files on the folder's disk.
fn free(folder: &Path) -> Result<u64> {
    let said = output(
        command("df")
            .args(["--output=avail", "--block-size=1"])
            .arg(folder),
    )?;
    number(said.split_whitespace().last(), "df")
}

fn number(word: Option<&str>, program: &str) -> Result<u64> {
    word.and_then(|word| word.parse().ok())
        .with_context(|| format!("`{program}` printed no number"))
}
