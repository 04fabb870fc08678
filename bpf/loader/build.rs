//! Builds the eBPF object and puts it where the crate embeds it from.
//!
//! The programs need `core` for a target that no toolchain ships, hence the sources of the standard library and
//! unstable options. Toolchains are tried in this order: rustup's nightly with `rust-src`; the distribution's
//! `/usr/bin/cargo` with its sources; the toolchain that builds this crate, where it has the sources.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

const PACKAGE: &str = "warren-programs";
const BINARY: &str = "warren-datapath";
const LINKER: &str = "bpf-linker";

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: cannot build the eBPF programs: {message}");
            eprintln!("run `cargo xtask setup`: it installs the eBPF toolchain");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let bpf = directory("CARGO_MANIFEST_DIR")?.join("..");
    let out = directory("OUT_DIR")?;
    for path in [
        "programs/src",
        "programs/Cargo.toml",
        "abi/src",
        "abi/Cargo.toml",
        "loader/build.rs",
    ] {
        println!("cargo:rerun-if-changed={}", bpf.join(path).display());
    }
    let linker = linker()?;
    let target = target()?;
    let toolchains = toolchains();
    if toolchains.is_empty() {
        return Err("no Rust toolchain with the sources of the standard library (rust-src) was found".into());
    }
    let mut failures = Vec::new();
    for toolchain in &toolchains {
        match toolchain.build(&bpf, &out, &linker, &target) {
            Ok(object) => return install(&object, &out),
            Err(message) => failures.push(format!("with {}: {message}", toolchain.name)),
        }
    }
    Err(failures.join("\n"))
}

fn install(object: &Path, out: &Path) -> Result<(), String> {
    let installed = out.join("datapath.o");
    fs::copy(object, &installed).map_err(|error| format!("{}: {error}", object.display()))?;
    Ok(())
}

fn directory(variable: &str) -> Result<PathBuf, String> {
    env::var_os(variable)
        .map(PathBuf::from)
        .ok_or_else(|| format!("{variable} is not set: build with cargo"))
}

/// The eBPF target with the byte order of the machine that it will run on.
fn target() -> Result<String, String> {
    match env::var("CARGO_CFG_TARGET_ENDIAN").as_deref() {
        Ok("little") => Ok("bpfel-unknown-none".into()),
        Ok("big") => Ok("bpfeb-unknown-none".into()),
        other => Err(format!("byte order {other:?} is not known")),
    }
}

/// `bpf-linker` from the search path, else from where `cargo xtask setup` puts it.
fn linker() -> Result<PathBuf, String> {
    let searched = env::var_os("PATH")
        .map(|path| env::split_paths(&path).collect())
        .unwrap_or_default();
    let cache = env::var_os("XDG_CACHE_HOME")
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    let own = cache.map(|cache| cache.join("warren/bpf-linker/bin"));
    let directories: Vec<PathBuf> = Vec::into_iter(searched).chain(own).collect();
    directories
        .into_iter()
        .map(|directory| directory.join(LINKER))
        .find(|path| path.is_file())
        .ok_or_else(|| format!("{LINKER} was not found in PATH or ~/.cache/warren/bpf-linker/bin"))
}

/// A target directory of its own, as the outer cargo holds the lock of the usual one; but inside that, so that
/// check, clippy, test and release share one build of the programs. `OUT_DIR` is
/// `<target>/<profile>/build/<package>/out`.
fn target_directory(out: &Path) -> PathBuf {
    match out.ancestors().nth(2) {
        Some(build) if build.ends_with("build") => out.ancestors().nth(4).unwrap_or(out).join("ebpf"),
        _ => out.join("ebpf"),
    }
}

/// A way to run cargo and rustc.
struct Toolchain {
    name: String,
    cargo: Vec<PathBuf>,
    rustc: Option<PathBuf>,
    /// Stable compilers need leave to take unstable options.
    bootstrap: bool,
}

fn toolchains() -> Vec<Toolchain> {
    let mut found = Vec::new();
    let nightly = ["rustup", "run", "nightly"].map(PathBuf::from).to_vec();
    if has_sources([&nightly[..], &["rustc".into()]].concat()) {
        let cargo = [&nightly[..], &["cargo".into()]].concat();
        found.push(Toolchain {
            name: "rustup's nightly".into(),
            cargo,
            rustc: None,
            bootstrap: false,
        });
    }
    let (cargo, rustc) = (PathBuf::from("/usr/bin/cargo"), PathBuf::from("/usr/bin/rustc"));
    if cargo.is_file() && has_sources(vec![rustc.clone()]) {
        let name = cargo.display().to_string();
        found.push(Toolchain {
            name,
            cargo: vec![cargo],
            rustc: Some(rustc),
            bootstrap: true,
        });
    }
    if let (Some(cargo), Some(rustc)) = (env::var_os("CARGO"), env::var_os("RUSTC"))
        && let Some(rustc) = absolute(Path::new(&cargo), &rustc.into())
        && has_sources(vec![rustc.clone()])
    {
        let name = rustc.display().to_string();
        found.push(Toolchain {
            name,
            cargo: vec![cargo.into()],
            rustc: Some(rustc),
            bootstrap: true,
        });
    }
    found
}

/// `RUSTC` is often a bare name that would resolve to a proxy: the compiler lies beside cargo.
fn absolute(cargo: &Path, rustc: &PathBuf) -> Option<PathBuf> {
    if rustc.is_absolute() {
        return Some(rustc.clone());
    }
    let beside = cargo.parent()?.join(rustc);
    beside.is_file().then_some(beside)
}

fn has_sources(rustc: Vec<PathBuf>) -> bool {
    let mut command = clean(&rustc);
    let Ok(output) = command.args(["--print", "sysroot"]).output() else {
        return false;
    };
    let sysroot = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    output.status.success()
        && Path::new(&sysroot)
            .join("lib/rustlib/src/rust/library/core/Cargo.toml")
            .is_file()
}

/// A command without what the outer cargo, rustup, clippy or a user's build settings put into the environment.
fn clean(words: &[PathBuf]) -> Command {
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]);
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let kept = ["CARGO_HOME", "RUSTUP_HOME"].contains(&&*text)
            || [
                "CARGO_NET_",
                "CARGO_HTTP_",
                "CARGO_REGISTRIES_",
                "CARGO_REGISTRY_",
                "CARGO_SOURCE_",
            ]
            .iter()
            .any(|prefix| text.starts_with(prefix));
        let dropped = [
            "CARGO",
            "RUSTC",
            "RUSTDOC",
            "RUSTFLAGS",
            "RUSTUP_",
            "CLIPPY_",
            "MAKEFLAGS",
            "MFLAGS",
        ]
        .iter()
        .any(|prefix| text.starts_with(prefix))
            || [
                "LD_LIBRARY_PATH",
                "TARGET",
                "HOST",
                "PROFILE",
                "OPT_LEVEL",
                "DEBUG",
            ]
            .contains(&&*text);
        if dropped && !kept {
            command.env_remove(&name);
        }
    }
    command
}

impl Toolchain {
    fn build(&self, bpf: &Path, out: &Path, linker: &Path, target: &str) -> Result<PathBuf, String> {
        let target_dir = target_directory(out);
        let architecture = env::var("CARGO_CFG_TARGET_ARCH").map_err(|error| error.to_string())?;
        let flags = [
            format!("--cfg=bpf_target_arch=\"{architecture}\""),
            "-Cdebuginfo=2".into(),
            "-Clink-arg=--btf".into(),
            format!("-Clinker={}", linker.display()),
        ];
        let mut command = clean(&self.cargo);
        command
            .args([
                "build",
                "--release",
                "--locked",
                "-Z",
                "build-std=core",
                "--package",
                PACKAGE,
                "--bins",
            ])
            .args(["--target", target, "--target-dir"])
            .arg(&target_dir)
            .current_dir(bpf)
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
            .env("CARGO_PROFILE_RELEASE_LTO", "false")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1");
        if let Some(rustc) = &self.rustc {
            command.env("RUSTC", rustc);
        }
        if self.bootstrap {
            command.env("RUSTC_BOOTSTRAP", "1");
        }
        let output = command
            .output()
            .map_err(|error| format!("{}: {error}", self.cargo[0].display()))?;
        if !output.status.success() {
            return Err(format!(
                "{command:?}\n{}",
                String::from_utf8_lossy(&output.stderr)
            ));
        }
        Ok(target_dir.join(target).join("release").join(BINARY))
    }
}
