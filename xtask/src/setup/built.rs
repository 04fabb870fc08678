//! What is built from source into the cache: the eBPF linker, cargo-deny, WireGuard peers, Kubernetes.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use super::{Group, step};
use crate::{
    command::{cargo, found, output, run, sha256},
    paths,
};

const KUBERNETES: &str = "1.34.4";
const LLVM: &str = "/usr/lib/llvm-22";
/// For a program that runs for a second: its own profile, one unit and optimisation across all crates, takes four minutes.
const QUICK: &[(&str, &str)] = &[
    ("CARGO_PROFILE_RELEASE_LTO", "off"),
    ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16"),
    ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1"),
];

/// Something that is built once and kept.
pub(super) struct Part {
    pub(super) group: Group,
    name: &'static str,
    why: &'static str,
    /// What it leaves behind.
    files: Vec<PathBuf>,
    /// Everything that determines the result, as text.
    recipe: String,
    build: Box<dyn Fn() -> Result<()>>,
}

impl Part {
    /// Builds it unless its stamp says that it is there.
    pub(super) fn ensure(&self) -> Result<()> {
        let stamps = paths::cache()?.join("stamps");
        let stamp = stamps.join(self.name);
        let hash = sha256(self.recipe.as_bytes())?;
        let there = self.files.iter().all(|file| file.is_file());
        if there && fs::read_to_string(&stamp).is_ok_and(|text| text == hash) {
            return Ok(());
        }
        let next = "look at the message above it; a failed download is worth a second try";
        step(&format!("build {}", self.name), self.why, next, || {
            (self.build)()?;
            for file in &self.files {
                if !file.is_file() {
                    bail!("the build succeeded but {} is not there", file.display());
                }
            }
            fs::create_dir_all(&stamps)?;
            fs::write(&stamp, hash).with_context(|| format!("cannot write {}", stamp.display()))
        })
    }
}

/// Everything, in the order in which it is built.
pub(super) fn parts() -> Result<Vec<Part>> {
    let mut parts = vec![
        bpf_linker()?,
        crate_tool(
            Group::Checks,
            "cargo-deny",
            "cargo-deny",
            "0.20.2",
            "licences and sources of dependencies",
            QUICK,
        )?,
        crate_tool(
            Group::Peers,
            "boringtun-cli",
            "boringtun-cli",
            "0.7.1",
            "a WireGuard implementation to talk to",
            &[],
        )?,
        crate_tool(
            Group::Bench,
            "gotatun-cli",
            "gotatun",
            "0.10.2",
            "a WireGuard implementation to measure against",
            &[],
        )?,
        go(
            Group::Peers,
            "wireguard-go",
            "a WireGuard implementation to talk to",
            "wireguard",
            &[("wireguard", "golang.zx2c4.com/wireguard")],
        )?,
        go(
            Group::Kubernetes,
            "pause",
            "holds a pod of the cluster lab open",
            "lab",
            &[("pause", "./pause")],
        )?,
        go(
            Group::Kubernetes,
            "coredns",
            "the cluster lab's DNS",
            "coredns",
            &[("coredns", ".")],
        )?,
        go(
            Group::Kubernetes,
            "helm",
            "installs the chart",
            "helm",
            &[("helm", "helm.sh/helm/v3/cmd/helm")],
        )?,
        go(
            Group::Kubernetes,
            "agnhost",
            "server and client of the network policy suites",
            "agnhost",
            &[("agnhost", ".")],
        )?,
        go(
            Group::Kubernetes,
            "cyclonus",
            "generates network policies and probes what they do",
            "cyclonus",
            &[("cyclonus", "."), ("cyclonus-worker", "./worker")],
        )?,
    ];
    for (name, package) in [
        ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
        (
            "kube-controller-manager",
            "k8s.io/kubernetes/cmd/kube-controller-manager",
        ),
        ("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
        ("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
        ("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
        ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
    ] {
        parts.push(go(
            Group::Kubernetes,
            name,
            "the cluster lab; minutes the first time",
            "control-plane",
            &[(name, package)],
        )?);
    }
    Ok(parts)
}

/// The linker of the eBPF programs, against the LLVM that Debian's Rust was built with.
fn bpf_linker() -> Result<Part> {
    const VERSION: &str = "0.13.0";
    let root = paths::cache()?.join("bpf-linker");
    Ok(Part {
        group: Group::Bpf,
        name: "bpf-linker",
        why: "links the eBPF programs",
        files: vec![root.join("bin/bpf-linker")],
        recipe: format!("bpf-linker {VERSION} llvm-22"),
        build: Box::new(move || {
            let path = format!("{LLVM}/bin:{}", std::env::var("PATH").unwrap_or_default());
            run(cargo_install("bpf-linker", VERSION, &root)
                .args(["--no-default-features", "--features", "llvm-22"])
                .env("LLVM_PREFIX", LLVM)
                .env("PATH", path)
                .env("RUSTFLAGS", format!("-L {LLVM}/lib")))
        }),
    })
}

/// A tool from crates.io, and the program that it is.
fn crate_tool(
    group: Group,
    name: &'static str,
    program: &str,
    version: &'static str,
    why: &'static str,
    profile: &'static [(&str, &str)],
) -> Result<Part> {
    let cache = paths::cache()?;
    Ok(Part {
        group,
        name,
        why,
        files: vec![cache.join("bin").join(program)],
        // How it was optimised makes it no other program.
        recipe: format!("{name} {version} []"),
        build: Box::new(move || {
            let profile = profile.iter().copied();
            run(cargo_install(name, version, &cache).envs(profile))
        }),
    })
}

fn cargo_install(name: &str, version: &str, root: &Path) -> Command {
    let mut command = cargo();
    command
        .args([
            "install",
            name,
            "--version",
            version,
            "--locked",
            "--force",
            "--root",
        ])
        .arg(root);
    // Outside the repository, so that neither its toolchain file nor its configuration is asked twice.
    command.stdin(Stdio::null());
    command
}

/// Programs from a Go module of `e2e/kubernetes`.
fn go(
    group: Group,
    name: &'static str,
    why: &'static str,
    module: &'static str,
    programs: &[(&'static str, &'static str)],
) -> Result<Part> {
    let directory = paths::root().join("e2e/kubernetes").join(module);
    let bin = paths::bin()?;
    let programs: Vec<(PathBuf, &str)> = programs
        .iter()
        .map(|(file, package)| (bin.join(file), *package))
        .collect();
    let mut recipe = format!("{programs:?} {}\n", linker_flags(module));
    for file in sources(&directory)? {
        recipe += &fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    }
    Ok(Part {
        group,
        name,
        why,
        files: programs.iter().map(|(file, _)| file.clone()).collect(),
        recipe,
        build: Box::new(move || {
            check_go()?;
            fs::create_dir_all(paths::bin()?)?;
            for (file, package) in &programs {
                // No -trimpath: it would be another entry in Go's build cache for every package.
                let mut build = Command::new("go");
                build
                    .current_dir(&directory)
                    .env("CGO_ENABLED", "0")
                    .stdin(Stdio::null());
                build
                    .args(["build", "-ldflags", &linker_flags(module), "-o"])
                    .arg(file)
                    .arg(package);
                run(&mut build)?;
            }
            Ok(())
        }),
    })
}

/// Versions that upstream's own build puts in. Kubernetes programs without theirs are refused by kubectl ("could not
/// parse pre-release/metadata"); helm without its renders for Kubernetes 1.20.
fn linker_flags(module: &str) -> String {
    let (major, minor) = KUBERNETES.split_once('.').unwrap_or((KUBERNETES, "0"));
    let minor = minor.split('.').next().unwrap_or(minor);
    match module {
        "control-plane" => {
            let version = "k8s.io/component-base/version";
            format!(
                "-s -w -X {version}.gitVersion=v{KUBERNETES} -X {version}.gitMajor={major} -X {version}.gitMinor={minor}"
            )
        }
        "helm" => {
            let version = "helm.sh/helm/v3/pkg/chartutil";
            format!("-s -w -X {version}.k8sVersionMajor={major} -X {version}.k8sVersionMinor={minor}")
        }
        _ => "-s -w".into(),
    }
}

/// go.mod, go.sum and the Go files of a module, sorted.
fn sources(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(directory) = open.pop() {
        let entries =
            fs::read_dir(&directory).with_context(|| format!("cannot read {}", directory.display()))?;
        for entry in entries {
            let path = entry?.path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if path.is_dir() {
                open.push(path);
            } else if name.ends_with(".go") || name == "go.mod" || name == "go.sum" {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Go must be there and new enough; a newer one that a module asks for is fetched by Go itself.
fn check_go() -> Result<()> {
    if !found("go") {
        bail!("Go is not in PATH: install Go 1.26 or later (https://go.dev/dl)");
    }
    let version = output(Command::new("go").arg("version"))?;
    let minor = version
        .split_whitespace()
        .find_map(|word| word.strip_prefix("go1.")?.split('.').next()?.parse::<u32>().ok());
    match minor {
        Some(minor) if minor >= 21 => Ok(()),
        _ => bail!(
            "`{}` is too old: install Go 1.26 or later (https://go.dev/dl)",
            version.trim()
        ),
    }
}
