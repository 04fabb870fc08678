//! Debian packages.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use anyhow::{Context as _, Result, bail};

use super::{Group, step};
use crate::command::{command, found, output, run};

impl Group {
    /// The Debian packages that the group needs.
    fn packages(self) -> &'static [&'static str] {
        match self {
            Self::Base => &[
                "build-essential",
                "ca-certificates",
                "cmake",
                "containernetworking-plugins",
                "git",
                "iproute2",
                "iptables",
                "iputils-ping",
                "libfaketime",
                "nftables",
                "pkg-config",
                "procps",
                "tcpdump",
                "util-linux",
                "wireguard-tools",
            ],
            // Debian's own Rust has the sources of core that the BPF target is built from; rustup's may lack them.
            // LLVM is the version that this Rust was built with: the linker reads its bitcode.
            Self::Bpf => &[
                "bpftool",
                "cargo-web",
                "clang-22",
                "libpolly-22-dev",
                "libzstd-dev",
                "llvm-22-dev",
                "rust-web-src",
                "rustc-web",
            ],
            Self::Checks | Self::Bench => &[],
            Self::Peers => &["ethtool", "iperf3"],
            Self::Kubernetes => &[
                "busybox-static",
                "conntrack",
                "containerd",
                "etcd-server",
                "openssl",
                "runc",
                "socat",
            ],
            // virtiofsd comes with qemu-system-common. The kernels themselves are only unpacked, see vm/kernel.rs.
            Self::Vm => &["busybox-static", "kmod", "qemu-system-x86", "xz-utils"],
        }
    }
}

/// Installs the packages that are missing.
pub(super) fn install(groups: &[Group]) -> Result<()> {
    if !Path::new("/etc/debian_version").exists() {
        bail!("this is not Debian: install what xtask/src/setup/packages.rs lists by hand, or use Debian 12");
    }
    let wanted = groups.iter().flat_map(|group| group.packages()).copied();
    let missing = missing(wanted)?;
    if missing.is_empty() {
        return Ok(());
    }
    if !root()? {
        bail!(
            "packages are missing: as root, run `apt-get install {}`",
            missing.join(" ")
        );
    }
    let what = format!("install {}", missing.join(" "));
    let next = "look at apt's message above; check the network and /etc/apt/sources.list, then run it again";
    step(&what, "Debian packages", next, || {
        let _guard = NoServices::new()?;
        let apt = |arguments: &[&str]| {
            run(command("apt-get")
                .env("DEBIAN_FRONTEND", "noninteractive")
                .args(arguments)
                .stdin(std::process::Stdio::null()))
        };
        apt(&["update", "-qq"])?;
        let mut arguments = vec![
            "install",
            "-y",
            "-qq",
            "--no-install-recommends",
            "-o",
            "Dpkg::Use-Pty=0",
        ];
        arguments.extend(&missing);
        apt(&arguments)
    })
}

fn missing<'a>(wanted: impl Iterator<Item = &'a str>) -> Result<Vec<&'a str>> {
    let listed = output(command("dpkg-query").args(["-W", "-f", "${Package} ${db:Status-Status}\n"]))?;
    let installed: std::collections::BTreeSet<&str> = listed
        .lines()
        .filter_map(|line| line.strip_suffix(" installed"))
        .collect();
    Ok(wanted.filter(|package| !installed.contains(package)).collect())
}

fn root() -> Result<bool> {
    Ok(output(command("id").arg("-u"))?.trim() == "0")
}

/// While it lives, a package that brings a service (etcd, containerd) does not start it.
struct NoServices {
    ours: bool,
}

const POLICY: &str = "/usr/sbin/policy-rc.d";

impl NoServices {
    fn new() -> Result<Self> {
        if Path::new(POLICY).exists() {
            return Ok(Self { ours: false });
        }
        fs::write(POLICY, "#!/bin/sh\nexit 101\n").with_context(|| format!("cannot write {POLICY}"))?;
        fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755))?;
        Ok(Self { ours: true })
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours {
            let _ = fs::remove_file(POLICY);
            // With systemd they would start at the next boot: the labs bring their own.
            for service in ["etcd", "containerd"] {
                if found("systemctl") {
                    let _ = output(command("systemctl").args(["disable", service]));
                }
            }
        }
    }
}
