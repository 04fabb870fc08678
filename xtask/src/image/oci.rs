//! OCI image archives of one layer (image-spec 1.1: image layout, manifest, configuration).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tar::{Builder, EntryType, Header};

use super::files::{Entry, Tree};
use crate::command::sha256;

/// An image: the same input gives the same bytes.
pub(super) struct Image {
    /// As containerd shall know it, with tag.
    pub(super) name: String,
    /// The program and its first arguments.
    pub(super) entrypoint: Vec<String>,
    /// Its files.
    pub(super) tree: Tree,
}

impl Image {
    /// Writes the archive and returns the size of its layer in bytes.
    pub(super) fn write(&self, path: &Path) -> Result<usize> {
        let mut blobs = Blobs::default();
        let layer = layer(&self.tree)?;
        let size = layer.len();
        let layer = blobs.add(layer)?;
        let config = blobs.add(serde_json::to_vec(&json!({
            "architecture": "amd64",
            "os": "linux",
            "config": {"Entrypoint": self.entrypoint, "Env": ["PATH=/usr/bin:/usr/sbin:/bin:/sbin"]},
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
        }))?)?;
        let manifest = blobs.add(serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": typed(config, "application/vnd.oci.image.config.v1+json"),
            "layers": [typed(layer, "application/vnd.oci.image.layer.v1.tar")],
        }))?)?;
        let mut manifest = typed(manifest, "application/vnd.oci.image.manifest.v1+json");
        // containerd names the image by the first, other tools by the second.
        let tag = self.name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
        manifest["annotations"] =
            json!({"io.containerd.image.name": self.name, "org.opencontainers.image.ref.name": tag});
        let index = json!({"schemaVersion": 2, "manifests": [manifest]});

        // Beside it first: a reader never sees half an archive.
        let partial = path.with_extension("partial");
        let file =
            fs::File::create(&partial).with_context(|| format!("cannot write {}", partial.display()))?;
        let mut archive = Builder::new(std::io::BufWriter::new(file));
        append(
            &mut archive,
            "oci-layout",
            br#"{"imageLayoutVersion":"1.0.0"}"#,
            0o644,
        )?;
        append(&mut archive, "index.json", &serde_json::to_vec(&index)?, 0o644)?;
        for (digest, content) in &blobs.0 {
            append(&mut archive, &format!("blobs/sha256/{digest}"), content, 0o644)?;
        }
        archive
            .into_inner()?
            .into_inner()
            .map_err(std::io::IntoInnerError::into_error)?;
        fs::rename(&partial, path)?;
        Ok(size)
    }
}

/// Content by its digest.
#[derive(Default)]
struct Blobs(BTreeMap<String, Vec<u8>>);

impl Blobs {
    /// Adds it and returns its descriptor without a media type.
    fn add(&mut self, content: Vec<u8>) -> Result<Value> {
        let digest = sha256(&content)?;
        let descriptor = json!({"digest": format!("sha256:{digest}"), "size": content.len()});
        self.0.insert(digest, content);
        Ok(descriptor)
    }
}

fn typed(mut descriptor: Value, media_type: &str) -> Value {
    descriptor["mediaType"] = media_type.into();
    descriptor
}

fn layer(tree: &Tree) -> Result<Vec<u8>> {
    let mut archive = Builder::new(Vec::new());
    let mut directories: BTreeSet<String> = ["dev", "proc", "sys", "tmp", "run"].map(String::from).into();
    for path in tree.files.keys() {
        let mut ancestors = Path::new(path)
            .ancestors()
            .skip(1)
            .map(|path| path.to_string_lossy().into_owned());
        directories.extend(ancestors.by_ref().filter(|path| !path.is_empty()));
    }
    // Sorted, so that a directory comes before what is in it.
    for path in &directories {
        let mut header = header(
            EntryType::Directory,
            0,
            if path == "tmp" { 0o1777 } else { 0o755 },
        );
        archive.append_data(&mut header, format!("{path}/"), std::io::empty())?;
    }
    for (path, entry) in &tree.files {
        match entry {
            Entry::File { content, executable } => {
                append(
                    &mut archive,
                    path,
                    content,
                    if *executable { 0o755 } else { 0o644 },
                )?;
            }
            Entry::Link(target) => {
                let mut header = header(EntryType::Symlink, 0, 0o777);
                archive.append_link(&mut header, path, target)?;
            }
        }
    }
    Ok(archive.into_inner()?)
}

fn append<W: std::io::Write>(archive: &mut Builder<W>, path: &str, content: &[u8], mode: u32) -> Result<()> {
    let mut header = header(EntryType::Regular, content.len(), mode);
    archive
        .append_data(&mut header, path, content)
        .with_context(|| format!("cannot add {path}"))
}

fn header(kind: EntryType, size: usize, mode: u32) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size as u64);
    header.set_mode(mode);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}
