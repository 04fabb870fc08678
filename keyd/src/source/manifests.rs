//! The manifest folder: `*.yaml`, `*.yml` and `*.json` files, several documents each, of Nodes, Namespaces, Pods,
//! policies, CiliumCIDRGroups and KeyRotations. Other kinds are somebody else's and are skipped.
//!
//! The folder is read twice a second and compared with what was read before: that works on every file system and
//! needs no event queue that can overflow. Editors and copies are not atomic, so nothing is believed hastily:
//! a file that stops parsing keeps its last good content, a file must have been gone (or a document out of its
//! file) in two readings before its objects are deleted, and an empty file counts as one that is being written.
//!
//! A Node without `metadata.uid` gets one that is derived from its name and its file's name. When it comes back after
//! a deletion it is another node all the same: the core counts incarnations.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::mpsc;
use warren_crds::cilium;
use warren_keyd_api::token::sha256;
use warren_keyd_core::{Namespace, Node, Pod, RotationObject, SourceEvent};
use warren_model::policy::{PolicyError, PolicyRef, Rule};

use super::{feed::Feed, parse};
use crate::{files, rotations};

/// Time between two readings.
const INTERVAL: Duration = Duration::from_millis(500);
/// A larger file is not read.
const MAX_FILE_BYTES: u64 = 16 * 1024 * 1024;

/// One object of the folder.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Object {
    Node(Node),
    Namespace(Namespace),
    Pod(Pod),
    /// A policy that is wrong is told, so that it is shown as what it is.
    Policy(PolicyRef, Result<Vec<Rule>, PolicyError>),
    Group(String, Result<Vec<IpNet>, PolicyError>),
    Rotation(RotationObject),
}

/// What an object is called.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Namespace(String),
    Node(String),
    Pod(String, String),
    Policy(PolicyRef),
    Group(String),
    Rotation(String),
}

impl Object {
    fn key(&self) -> Key {
        match self {
            Self::Node(node) => Key::Node(node.name.to_string()),
            Self::Namespace(namespace) => Key::Namespace(namespace.name.clone()),
            Self::Pod(pod) => Key::Pod(pod.namespace.clone(), pod.name.clone()),
            Self::Policy(policy, _) => Key::Policy(policy.clone()),
            Self::Group(name, _) => Key::Group(name.clone()),
            Self::Rotation(rotation) => Key::Rotation(rotation.name.clone()),
        }
    }

    fn upsert(self) -> SourceEvent {
        match self {
            Self::Node(node) => SourceEvent::NodeUpsert(node),
            Self::Namespace(namespace) => SourceEvent::NamespaceUpsert(namespace),
            Self::Pod(pod) => SourceEvent::PodUpsert(pod),
            Self::Policy(policy, outcome) => SourceEvent::PolicyUpsert { policy, outcome },
            Self::Group(name, outcome) => SourceEvent::CidrGroupUpsert { name, outcome },
            Self::Rotation(rotation) => SourceEvent::RotationUpsert(rotation),
        }
    }
}

impl Key {
    fn delete(self) -> SourceEvent {
        match self {
            Self::Node(name) => SourceEvent::NodeDelete(name.into()),
            Self::Namespace(name) => SourceEvent::NamespaceDelete(name),
            Self::Pod(namespace, name) => SourceEvent::PodDelete { namespace, name },
            Self::Policy(policy) => SourceEvent::PolicyDelete(policy),
            Self::Group(name) => SourceEvent::CidrGroupDelete(name),
            Self::Rotation(name) => SourceEvent::RotationDelete(name),
        }
    }
}

/// A file as it was read last.
#[derive(Debug, Default)]
struct ManifestFile {
    text: String,
    objects: BTreeMap<Key, Object>,
    problems: Vec<String>,
}

/// The folder as it was read last.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    /// A folder of keyd's own with KeyRotations that an operator asked for at the local socket.
    requests: PathBuf,
    /// The cluster's name, which policies may mean.
    cluster: String,
    files: BTreeMap<String, ManifestFile>,
    /// What the core was told.
    told: BTreeMap<Key, Object>,
    /// What was missing in the last reading.
    missing: BTreeSet<Key>,
}

impl Folder {
    /// The folder must exist: a wrong path must not look like an empty cluster.
    pub(crate) fn open(path: PathBuf, requests: PathBuf, cluster: &str) -> anyhow::Result<Self> {
        fs::read_dir(&path).with_context(|| format!("cannot read the manifest folder {}", path.display()))?;
        files::make_dir(&requests).with_context(|| format!("cannot make {}", requests.display()))?;
        Ok(Self {
            path,
            requests,
            cluster: cluster.to_owned(),
            files: BTreeMap::new(),
            told: BTreeMap::new(),
            missing: BTreeSet::new(),
        })
    }

    /// Reads the folder once; returns the changes and all problems.
    fn scan(&mut self) -> (Vec<SourceEvent>, Vec<String>) {
        let mut problems = vec![];
        match self.names() {
            Ok(names) => {
                self.files.retain(|name, _| names.contains(name));
                for name in names {
                    self.read_file(&name);
                }
            }
            // An unreadable folder says nothing about the objects in it.
            Err(error) => {
                problems.push(format!(
                    "cannot read the manifest folder {}: {error}",
                    self.path.display()
                ));
            }
        }
        let wanted = self.merge(&mut problems);
        (self.changes(wanted), problems)
    }

    fn names(&self) -> io::Result<BTreeSet<String>> {
        let mut names = manifests_in(&self.path)?;
        // By their whole path: another folder.
        let requests = manifests_in(&self.requests)?;
        names.extend(
            requests
                .iter()
                .filter_map(|name| self.requests.join(name).into_os_string().into_string().ok()),
        );
        Ok(names)
    }

    fn read_file(&mut self, name: &str) {
        let path = self.path.join(name);
        let file = self.files.entry(name.to_owned()).or_default();
        let text = match read_text(&path) {
            Ok(text) => text,
            Err(error) => {
                file.problems = vec![format!(
                    "manifest {name}: {error}; its last good content stays in force"
                )];
                // So that the next successful reading is not taken for unchanged.
                file.text.clear();
                return;
            }
        };
        if text == file.text && !text.is_empty() {
            return;
        }
        let (objects, problems) = parse_file(name, &text, &self.cluster);
        if problems.is_empty() && !text.trim().is_empty() {
            file.objects = objects;
            file.problems.clear();
        } else {
            // The good documents count; what the bad ones held before stays.
            file.objects.extend(objects);
            file.problems = problems;
        }
        file.text = text;
    }

    /// All objects of all files; the first file (by name) that has an object keeps it.
    fn merge(&self, problems: &mut Vec<String>) -> BTreeMap<Key, Object> {
        let mut wanted: BTreeMap<Key, Object> = BTreeMap::new();
        let mut homes: BTreeMap<&Key, &str> = BTreeMap::new();
        for (name, file) in &self.files {
            problems.extend(file.problems.iter().cloned());
            for (key, object) in &file.objects {
                if let Some(home) = homes.get(key) {
                    problems.push(format!(
                        "manifest {name}: {key} is already in {home}; that one counts"
                    ));
                    continue;
                }
                homes.insert(key, name);
                wanted.insert(key.clone(), object.clone());
            }
        }
        wanted
    }

    fn changes(&mut self, wanted: BTreeMap<Key, Object>) -> Vec<SourceEvent> {
        let mut events = vec![];
        let missing: BTreeSet<_> = self
            .told
            .keys()
            .filter(|key| !wanted.contains_key(key))
            .cloned()
            .collect();
        for key in missing.intersection(&self.missing) {
            self.told.remove(key);
            events.push(key.clone().delete());
        }
        self.missing = missing;
        for (key, object) in wanted {
            if self.told.get(&key) != Some(&object) {
                self.told.insert(key, object.clone());
                events.push(object.upsert());
            }
        }
        events
    }

    /// Reads the folder for ever and passes changes on.
    pub(crate) async fn watch(mut self, feed: mpsc::Sender<Feed>) {
        let mut synced = false;
        let mut last_problems = vec![];
        loop {
            let scanned = tokio::task::spawn_blocking(move || {
                let (events, problems) = self.scan();
                (self, events, problems)
            });
            let Ok((folder, mut events, problems)) = scanned.await else {
                return;
            };
            self = folder;
            if !std::mem::replace(&mut synced, true) {
                events.push(SourceEvent::Synced);
            }
            for event in events {
                if feed.send(Feed::Event(event)).await.is_err() {
                    return;
                }
            }
            if problems != last_problems {
                last_problems.clone_from(&problems);
                if feed.send(Feed::Problems(problems)).await.is_err() {
                    return;
                }
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Node(name) => write!(f, "Node {name}"),
            Self::Namespace(name) => write!(f, "Namespace {name}"),
            Self::Pod(namespace, name) => write!(f, "Pod {namespace}/{name}"),
            Self::Policy(policy) => write!(f, "{policy}"),
            Self::Group(name) => write!(f, "CiliumCIDRGroup {name}"),
            Self::Rotation(name) => write!(f, "KeyRotation {name}"),
        }
    }
}

fn manifests_in(folder: &Path) -> io::Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(folder)? {
        let Ok(name) = entry?.file_name().into_string() else {
            continue;
        };
        let known = [".yaml", ".yml", ".json"].iter().any(|end| name.ends_with(end));
        if known && !name.starts_with('.') {
            names.insert(name);
        }
    }
    Ok(names)
}

fn read_text(path: &Path) -> io::Result<String> {
    let length = fs::metadata(path)?.len();
    if length > MAX_FILE_BYTES {
        return Err(io::Error::other(format!(
            "it is larger than {MAX_FILE_BYTES} bytes"
        )));
    }
    String::from_utf8(fs::read(path)?).map_err(|_| io::Error::other("it is not UTF-8 text"))
}

/// Parses every document by itself, so that a malformed one hides no other.
fn parse_file(name: &str, text: &str, cluster: &str) -> (BTreeMap<Key, Object>, Vec<String>) {
    let mut objects = BTreeMap::new();
    let mut problems = vec![];
    for (first_line, document) in documents(text) {
        match parse_document(name, &document, cluster) {
            Ok(found) => {
                for object in found {
                    let key = object.key();
                    if objects.insert(key.clone(), object).is_some() {
                        problems.push(format!(
                            "manifest {name}, line {first_line}: {key} stands twice in the file"
                        ));
                    }
                }
            }
            Err((line, fault)) => {
                problems.push(format!(
                    "manifest {name}, line {}: {fault}",
                    first_line + line.saturating_sub(1)
                ));
            }
        }
    }
    (objects, problems)
}

/// Splits at lines that start with `---`; yields the number of each document's first line, from 1.
fn documents(text: &str) -> Vec<(usize, String)> {
    let mut out = vec![(1, String::new())];
    for (index, line) in text.lines().enumerate() {
        if line == "---" || line.starts_with("--- ") || line.starts_with("---\t") {
            out.push((index + 2, String::new()));
        } else if let Some((_, document)) = out.last_mut() {
            document.push_str(line);
            document.push('\n');
        }
    }
    let content = |line: &str| !line.trim().is_empty() && !line.trim_start().starts_with('#');
    out.retain(|(_, document)| document.lines().any(content));
    out
}

/// The kind of an object, before the rest of it is looked at.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    kind: String,
    #[serde(default)]
    metadata: HeadMetadata,
    #[serde(default)]
    items: Vec<serde_json::Value>,
}

#[derive(Default, Deserialize)]
struct HeadMetadata {
    #[serde(default)]
    name: String,
}

/// A fault with its line in the document, from 1.
type LineFault = (usize, String);

fn parse_document(file: &str, document: &str, cluster: &str) -> Result<Vec<Object>, LineFault> {
    let head: Head = yaml(document)?;
    if head.kind.is_empty() {
        return Err((1, "kind is missing: it is not a Kubernetes object".into()));
    }
    if head.api_version == "v1" && head.kind == "List" {
        let items = head.items.into_iter().map(|item| {
            let text = item.to_string();
            parse_document(file, &text, cluster).map_err(|(_, fault)| (1, fault))
        });
        return Ok(items
            .collect::<Result<Vec<_>, _>>()?
            .into_iter()
            .flatten()
            .collect());
    }
    // Also for kinds that are not ours: a document that ends early has lost its name or its kind's last letters.
    if head.metadata.name.is_empty() {
        return Err((1, format!("{} has no metadata.name", head.kind)));
    }
    let named = |fault: String| (1, format!("{} is malformed: {fault}", head.kind));
    let derive = |name: &str| derived_uid(name, file);
    Ok(match (head.api_version.as_str(), head.kind.as_str()) {
        ("v1", "Node") => vec![Object::Node(
            parse::node(&yaml(document)?, derive).map_err(named)?,
        )],
        ("v1", "Namespace") => vec![Object::Namespace(
            parse::namespace(&yaml(document)?).map_err(named)?,
        )],
        ("v1", "Pod") => vec![Object::Pod(parse::pod(&yaml(document)?).map_err(named)?)],
        ("cilium.io/v2", "CiliumNetworkPolicy" | "CiliumClusterwideNetworkPolicy")
        | ("networking.k8s.io/v1", "NetworkPolicy") => {
            let value: Value = yaml(document)?;
            let policy = cilium::policy_ref(&value).map_err(|fault| named(fault.to_string()))?;
            vec![Object::Policy(policy, cilium::parse(&value, cluster))]
        }
        ("cilium.io/v2", "CiliumCIDRGroup") => {
            let outcome = cilium::parse_group(&yaml(document)?).map(|(_, prefixes)| prefixes);
            vec![Object::Group(head.metadata.name, outcome)]
        }
        ("warren.dev/v1alpha1", "KeyRotation") => vec![Object::Rotation(
            rotations::parse(&yaml(document)?).map_err(named)?,
        )],
        _ => vec![],
    })
}

fn yaml<T: serde::de::DeserializeOwned>(document: &str) -> Result<T, LineFault> {
    serde_saphyr::from_str(document).map_err(|error| {
        let line = error.location().map_or(1, |location| location.line());
        let text = error.to_string();
        let sentence = text
            .lines()
            .find(|line| !line.trim().is_empty())
            .unwrap_or("not YAML")
            .trim()
            .to_owned();
        (usize::try_from(line).unwrap_or(1), sentence)
    })
}

/// A UID made of the node's name and its file's name, in the shape of a UUID.
fn derived_uid(name: &str, file: &str) -> String {
    let text = serde_json::json!(["warren-node-uid", name, file]).to_string();
    let hex = hex::encode(&sha256(text.as_bytes())[..16]);
    format!(
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )
}

#[cfg(test)]
mod tests;
