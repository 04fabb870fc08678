//! Debian's kernels, unpacked into the cache: installing them would change how the machine boots.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    command::{command, output, run},
    paths,
};

/// An unpacked kernel package.
pub(super) struct Kernel {
    /// What `uname -r` says.
    pub(super) release: String,
    /// Holds `boot` and `lib/modules`.
    root: PathBuf,
}

impl Kernel {
    pub(super) fn image(&self) -> PathBuf {
        self.root.join("boot").join(format!("vmlinuz-{}", self.release))
    }

    pub(super) fn modules(&self) -> PathBuf {
        self.root.join("lib/modules").join(&self.release)
    }
}

/// The newest cloud kernel of a series; one that is in the cache is good enough.
pub(super) fn ensure(series: &str) -> Result<Kernel> {
    if series.is_empty() || !series.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        bail!("`{series}` is no kernel series: use 6.12 or 6.1");
    }
    let root = paths::cache()?.join("vm").join(series);
    if let Some(kernel) = unpacked(&root)? {
        return Ok(kernel);
    }
    println!("setup: download Linux {series} (Debian's cloud kernel, for the virtual machine) ...");
    download(series, &root).with_context(|| {
        format!(
            "setup: Linux {series} cannot be had. Next: run `apt-get update`, check /etc/apt/sources.list"
        )
    })?;
    unpacked(&root)?.with_context(|| format!("{} holds no kernel", root.display()))
}

/// `modules.dep` is the last thing that [`download`] makes.
fn unpacked(root: &Path) -> Result<Option<Kernel>> {
    let Ok(entries) = fs::read_dir(root.join("lib/modules")) else {
        return Ok(None);
    };
    for entry in entries {
        let release = entry?.file_name().to_string_lossy().into_owned();
        let kernel = Kernel {
            release,
            root: root.to_owned(),
        };
        if kernel.modules().join("modules.dep").is_file() && kernel.image().is_file() {
            return Ok(Some(kernel));
        }
    }
    Ok(None)
}

fn download(series: &str, root: &Path) -> Result<()> {
    let package = newest(series)?;
    if root.exists() {
        fs::remove_dir_all(root)?;
    }
    fs::create_dir_all(root)?;
    // apt checks the package against Debian's signed index.
    run(command("apt-get")
        .args(["-q", "download", &package])
        .current_dir(root)
        .stdin(Stdio::null()))?;
    let archive = fs::read_dir(root)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context("apt-get downloaded no package")?;
    run(command("dpkg-deb").arg("-x").arg(&archive).arg(root))?;
    fs::remove_file(&archive)?;
    let release = package.trim_start_matches("linux-image-");
    run(command("depmod").arg("-b").arg(root).arg(release))
}

/// `linux-image-SERIES.*-cloud-amd64` with the highest version, signed ones only.
fn newest(series: &str) -> Result<String> {
    let pattern = format!(
        "^linux-image-{}\\.[0-9].*-cloud-amd64$",
        series.replace('.', "\\.")
    );
    let names = output(command("apt-cache").args(["search", "-n", &pattern]))?;
    names
        .lines()
        .filter_map(|line| line.split(' ').next())
        .max_by_key(|name| numbers(name))
        .map(str::to_owned)
        .with_context(|| format!("apt knows no package linux-image-{series}.*-cloud-amd64"))
}

fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit())
        .filter_map(|part| part.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{ensure, numbers};

    #[test]
    fn the_newest_is_by_number() {
        assert!(
            numbers("linux-image-6.12.117+deb12-cloud-amd64")
                > numbers("linux-image-6.12.74+deb12-cloud-amd64")
        );
        assert!(numbers("linux-image-6.1.0-56-cloud-amd64") > numbers("linux-image-6.1.0-9-cloud-amd64"));
    }

    #[test]
    fn a_series_is_a_number() {
        for bad in ["", "../etc", "6.12; true"] {
            assert!(ensure(bad).is_err(), "{bad}");
        }
    }
}
