//! `cargo xtask image`: container images from what is built here, as OCI archives; no Docker, no registry.
//!
//! `ctr -n k8s.io images import target/images/NAME.tar` loads one.

mod files;
mod oci;

use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail};

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
    /// Only these images (mesh-agent, keyd, lab-app, pause, coredns, cyclonus-worker).
    #[arg(long)]
    only: Vec<String>,
}

/// Makes an image's content from the folder of our binaries and that of the cache's.
type Make = fn(&Path, &Path) -> Result<Image>;

/// Every image: its archive's name, the package that its binaries come from, its content.
const IMAGES: &[(&str, &[&str], Make)] = &[
    (
        "mesh-agent",
        &["mesh-agent", "warren-cni", "warren"],
        |ours, _| agent(ours),
    ),
    ("keyd", &["keyd", "warren"], |ours, _| keyd(ours)),
    ("lab-app", &["warren-e2e"], |ours, _| app(ours)),
    ("pause", &[], |_, cache| single(cache, "pause")),
    ("coredns", &[], |_, cache| single(cache, "coredns")),
    ("cyclonus-worker", &[], |_, cache| cyclonus_worker(cache)),
];

/// Builds the binaries and the images.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    ensure(&[Group::Base, Group::Bpf, Group::Kubernetes])?;
    let profile = if arguments.release {
        Profile::Release
    } else {
        Profile::Dev
    };
    build(&arguments.only, profile)
}

/// How the binaries in an image are built.
#[derive(Clone, Copy)]
pub(crate) enum Profile {
    /// As tests are.
    Dev,
    /// As `cargo xtask bench` measures.
    Fast,
    /// As they are shipped.
    Release,
}

impl Profile {
    /// Its name, and that of its folder below `target`.
    pub(crate) fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Dev => ("dev", "debug"),
            Self::Fast => ("fast", "fast"),
            Self::Release => ("release", "release"),
        }
    }
}

/// Builds images, all of them if none is named; what they need must be set up.
pub(crate) fn build(names: &[String], profile: Profile) -> Result<()> {
    let (profile, folder) = profile.names();
    if let Some(wrong) = names
        .iter()
        .find(|name| !IMAGES.iter().any(|(known, ..)| known == name))
    {
        bail!("there is no image `{wrong}`: see `cargo xtask image --help`");
    }
    let images: Vec<_> = IMAGES
        .iter()
        .filter(|(name, ..)| names.is_empty() || names.iter().any(|wanted| wanted == name))
        .collect();
    if images.iter().any(|(_, packages, _)| !packages.is_empty()) {
        // The whole workspace: another selection of packages would build the dependencies with other features.
        let mut build = cargo();
        build.args(["build", "--workspace", "--bins", "--profile", profile]);
        execute(&mut build)?;
    }
    let directory = paths::images();
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let ours = paths::target().join(folder);
    let cache = paths::bin()?;
    for (name, _, make) in images {
        let image = make(&ours, &cache)?;
        let path = directory.join(format!("{name}.tar"));
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

/// The pods that cyclonus makes, under the name that it asks for.
fn cyclonus_worker(cache: &Path) -> Result<Image> {
    let mut tree = Tree::new();
    tree.program(&cache.join("agnhost"), "agnhost")?;
    tree.program(&cache.join("cyclonus-worker"), "worker")?;
    Ok(Image {
        name: "docker.io/mfenwick100/cyclonus-worker:latest".into(),
        entrypoint: vec!["/worker".into()],
        tree,
    })
}

fn single(cache: &Path, program: &str) -> Result<Image> {
    let mut tree = Tree::new();
    tree.program(&cache.join(program), program)?;
    Ok(Image {
        name: format!("localhost/warren/{program}:dev"),
        entrypoint: vec![format!("/{program}")],
        tree,
    })
}
