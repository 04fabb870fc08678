//! `cargo xtask image`: container images from what is built here, as OCI archives; no Docker, no registry.
//!
//! `ctr -n k8s.io images import target/images/NAME.tar` loads one.

mod files;
mod oci;

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use self::{files::Tree, oci::Image};
use crate::{
    command::{cargo, relative, run as execute},
    paths,
    setup::{Group, ensure},
};

/// Arguments of `image`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Optimised binaries.
    #[arg(long)]
    release: bool,
}

/// Builds the binaries and the images.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    ensure(&[Group::Base, Group::Bpf, Group::Kubernetes])?;
    let mut build = cargo();
    build.args([
        "build",
        "-p",
        "mesh-agent",
        "-p",
        "warren-cni",
        "-p",
        "keyd",
        "-p",
        "warren",
    ]);
    if arguments.release {
        build.arg("--release");
    }
    execute(&mut build)?;
    write(if arguments.release { "release" } else { "debug" })
}

/// Builds the images from the binaries in `target/debug`.
pub(crate) fn build() -> Result<()> {
    write("debug")
}

fn write(profile: &str) -> Result<()> {
    let directory = paths::images();
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let ours = paths::target().join(profile);
    let cache = paths::bin()?;
    for (file, image) in [
        ("mesh-agent", agent(&ours)?),
        ("keyd", keyd(&ours)?),
        ("lab-app", app(&ours)?),
        ("pause", single("localhost/warren/pause:dev", &cache, "pause")?),
        (
            "coredns",
            single("localhost/warren/coredns:dev", &cache, "coredns")?,
        ),
    ] {
        let path = directory.join(format!("{file}.tar"));
        let size = image.write(&path)?;
        println!(
            "image: {} -> {} ({} MiB)",
            image.name,
            relative(&path),
            size >> 20
        );
    }
    Ok(())
}

/// The agent, the tunnel and the CNI plugin, with the firewall tools that the agent calls: it speaks to the tables
/// that are there, with the tool that made them.
fn agent(ours: &Path) -> Result<Image> {
    let mut tree = Tree::new();
    for program in ["mesh-agent", "warren-cni", "warren"] {
        tree.program(&ours.join(program), &format!("usr/bin/{program}"))?;
    }
    tree.program(Path::new("/usr/sbin/nft"), "usr/sbin/nft")?;
    tree.program(
        Path::new("/usr/sbin/xtables-nft-multi"),
        "usr/sbin/xtables-nft-multi",
    )?;
    for name in ["iptables", "iptables-save", "ip6tables", "ip6tables-save"] {
        tree.link(&format!("usr/sbin/{name}"), "xtables-nft-multi")?;
    }
    tree.plugins(Path::new("/usr/lib/x86_64-linux-gnu/xtables"))?;
    Ok(Image {
        name: "localhost/warren/mesh-agent:dev".into(),
        entrypoint: vec!["/usr/bin/mesh-agent".into()],
        tree,
    })
}

fn keyd(ours: &Path) -> Result<Image> {
    let mut tree = Tree::new();
    tree.program(&ours.join("keyd"), "usr/bin/keyd")?;
    tree.program(&ours.join("warren"), "usr/bin/warren")?;
    Ok(Image {
        name: "localhost/warren/keyd:dev".into(),
        entrypoint: vec!["/usr/bin/keyd".into()],
        tree,
    })
}

/// The pods of the cluster tests: the lab's own server and clients, and busybox for a shell and DNS questions.
fn app(ours: &Path) -> Result<Image> {
    let mut tree = Tree::new();
    tree.program(&ours.join("warren-lab-app"), "usr/bin/warren-lab-app")?;
    tree.program(Path::new("/bin/busybox"), "bin/busybox")?;
    for applet in ["sh", "nslookup", "sleep", "cat", "ip", "ls"] {
        tree.link(&format!("bin/{applet}"), "busybox")?;
    }
    Ok(Image {
        name: "localhost/warren/lab-app:dev".into(),
        entrypoint: vec!["/usr/bin/warren-lab-app".into()],
        tree,
    })
}

fn single(name: &str, cache: &Path, program: &str) -> Result<Image> {
    let mut tree = Tree::new();
    tree.program(&cache.join(program), program)?;
    Ok(Image {
        name: name.into(),
        entrypoint: vec![format!("/{program}")],
        tree,
    })
}
