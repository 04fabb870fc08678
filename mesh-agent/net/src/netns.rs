//! Other network namespaces, always from a thread that ends with the call.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use nix::sched::{CloneFlags, setns};

use crate::Error;

/// Runs `work` on a scratch thread in the network namespace at `path` and returns what it returns. Blocks.
pub fn run_in<T: Send>(path: &Path, work: impl FnOnce() -> T + Send) -> Result<T, Error> {
    let failed = |source: io::Error| Error::Namespace {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, || {
                setns(&file, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)?;
                Ok(work())
            });
        match thread.map_err(failed)?.join() {
            Ok(result) => result.map_err(failed),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// The network namespace's identity: two paths to the same namespace have the same one.
pub fn id(path: &Path) -> Result<(u64, u64), Error> {
    let metadata = fs::metadata(path).map_err(|source| Error::Namespace {
        path: path.to_owned(),
        source,
    })?;
    Ok((metadata.dev(), metadata.ino()))
}

/// [`run_in`] with a small runtime and a [`crate::Net`] of that namespace. Blocks.
pub fn run_in_async<T, F>(path: &Path, work: impl FnOnce(crate::Net) -> F + Send) -> Result<T, Error>
where
    T: Send,
    F: Future<Output = Result<T, Error>>,
{
    run_in(path, || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(Error::Open)?;
        runtime.block_on(async { work(crate::Net::open().await?).await })
    })?
}
