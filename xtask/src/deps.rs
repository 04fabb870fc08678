//! `cargo xtask deps`: dependencies point one way (ARCHITECTURE.md, "Crates").

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::command::{cargo, output};

/// Which of our crates each of our crates may use. What is not listed is refused, so a new crate needs a line.
const ALLOWED: &[(&str, &[&str])] = &[
    ("warren-model", &[]),
    ("warren-abi", &[]),
    ("warren-programs", &["warren-abi"]),
    ("warren-agent-core", &["warren-model", "warren-abi"]),
    ("warren-keyd-core", &["warren-model", "warren-abi"]),
    ("warren-crds", &["warren-model"]),
    // Contracts.
    ("warren-keyd-api", &["warren-model"]),
    ("warren-agent-api", &["warren-model"]),
    // Drivers: none knows another, or a core.
    ("warren-wireguard", &["warren-model"]),
    ("warren-net", &["warren-model"]),
    ("warren-bpf", &["warren-model", "warren-abi", "warren-programs"]),
    // Binaries.
    ("warren-cni", &["warren-model", "warren-agent-api"]),
    (
        "mesh-agent",
        &[
            "warren-model",
            "warren-abi",
            "warren-agent-core",
            "warren-agent-api",
            "warren-keyd-api",
            "warren-wireguard",
            "warren-net",
            "warren-bpf",
        ],
    ),
    (
        "keyd",
        &[
            "warren-model",
            "warren-keyd-core",
            "warren-keyd-api",
            "warren-crds",
        ],
    ),
    (
        "warren",
        &[
            "warren-model",
            "warren-keyd-api",
            "warren-agent-api",
            "warren-crds",
        ],
    ),
    ("xtask", &[]),
];

/// Sits on top of everything and may use all of it.
const TOP: &str = "warren-e2e";

/// Crates that must work without a runtime, a cluster, a clock or a socket ...
const PURE: &[&str] = &[
    "warren-model",
    "warren-abi",
    "warren-agent-core",
    "warren-keyd-core",
];

/// ... and what would bring one in, directly or through something else.
const IMPURE: &[&str] = &[
    "async-std",
    "aya",
    "axum",
    "chrono",
    "getrandom",
    "hyper",
    "kube",
    "mio",
    "nix",
    "rand",
    "rtnetlink",
    "rustix",
    "rustls",
    "smol",
    "socket2",
    "time",
    "tokio",
    "tonic",
    "tracing-subscriber",
];

/// Fails with one line per edge that is not allowed.
pub(crate) fn run() -> Result<()> {
    let text = output(cargo().args(["metadata", "--format-version", "1", "--locked"]))?;
    let metadata: Value = serde_json::from_str(&text).context("cannot read the output of cargo metadata")?;
    let graph = Graph::from_metadata(&metadata)?;
    let wrong = graph.violations();
    if wrong.is_empty() {
        println!("deps: {} crates, every edge is allowed", graph.ours.len());
        return Ok(());
    }
    bail!(
        "dependencies that are not allowed (xtask/src/deps.rs, ARCHITECTURE.md):\n  {}",
        wrong.join("\n  ")
    )
}

/// Normal and build dependencies by package id; tests may use what they like.
#[derive(Default)]
struct Graph {
    names: BTreeMap<String, String>,
    ours: BTreeSet<String>,
    edges: BTreeMap<String, BTreeSet<String>>,
}

impl Graph {
    fn from_metadata(metadata: &Value) -> Result<Self> {
        let mut graph = Self::default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        for package in list(&metadata["packages"]) {
            graph.names.insert(text(&package["id"]), text(&package["name"]));
        }
        graph.ours = list(&metadata["workspace_members"]).iter().map(text).collect();
        for node in list(&metadata["resolve"]["nodes"]) {
            let shipped = |edge: &Value| list(&edge["dep_kinds"]).iter().any(|kind| kind["kind"].is_null());
            let edges = list(&node["deps"])
                .iter()
                .filter(|edge| shipped(edge))
                .map(|edge| text(&edge["pkg"]))
                .collect();
            graph.edges.insert(text(&node["id"]), edges);
        }
        if graph.ours.is_empty() || graph.edges.is_empty() {
            bail!("cargo metadata names no crates: its format has changed");
        }
        Ok(graph)
    }

    fn name<'a>(&'a self, id: &'a str) -> &'a str {
        self.names.get(id).map_or(id, String::as_str)
    }

    fn used(&self, id: &str) -> impl Iterator<Item = &String> {
        self.edges.get(id).into_iter().flatten()
    }

    fn violations(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        for id in &self.ours {
            let name = self.name(id);
            if name != TOP {
                match ALLOWED.iter().find(|(from, _)| *from == name) {
                    None => wrong.push(format!("{name} is new: say what it may depend on")),
                    Some((_, allowed)) => {
                        let ours = self
                            .used(id)
                            .filter(|used| self.ours.contains(*used))
                            .map(|used| self.name(used));
                        wrong.extend(
                            ours.filter(|used| !allowed.contains(used))
                                .map(|used| format!("{name} -> {used}")),
                        );
                    }
                }
            }
            if PURE.contains(&name) {
                wrong.extend(self.impure(id));
            }
        }
        wrong
    }

    /// The chains from a pure crate to an impure one, the shortest for each.
    fn impure(&self, start: &str) -> Vec<String> {
        let mut seen: BTreeMap<&str, &str> = BTreeMap::new();
        let mut queue = std::collections::VecDeque::from([start]);
        let mut wrong = Vec::new();
        while let Some(id) = queue.pop_front() {
            for used in self.used(id) {
                if used == start || seen.contains_key(used.as_str()) {
                    continue;
                }
                seen.insert(used, id);
                if IMPURE.contains(&self.name(used)) {
                    let mut chain = vec![self.name(used)];
                    let mut at = used.as_str();
                    while let Some(before) = seen.get(at) {
                        chain.push(self.name(before));
                        at = before;
                    }
                    chain.reverse();
                    wrong.push(format!("{} (must be pure)", chain.join(" -> ")));
                } else {
                    queue.push_back(used);
                }
            }
        }
        wrong
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::Graph;

    fn violations(crates: &[(&str, &[&str])], ours: &[&str]) -> Vec<String> {
        let nodes: Vec<_> = crates
            .iter()
            .map(|(id, uses)| {
                let deps: Vec<_> = uses
                    .iter()
                    .map(|pkg| json!({"pkg": pkg, "dep_kinds": [{"kind": null}]}))
                    .collect();
                json!({"id": id, "deps": deps})
            })
            .collect();
        let packages: Vec<_> = crates
            .iter()
            .map(|(id, _)| json!({"id": id, "name": id}))
            .collect();
        let metadata = json!({"packages": packages, "workspace_members": ours, "resolve": {"nodes": nodes}});
        Graph::from_metadata(&metadata).unwrap().violations()
    }

    #[test]
    fn an_edge_against_the_direction_is_named() {
        let ours = ["warren-model", "warren-net"];
        assert!(violations(&[("warren-model", &[]), ("warren-net", &["warren-model"])], &ours).is_empty());
        let wrong = violations(&[("warren-model", &["warren-net"]), ("warren-net", &[])], &ours);
        assert_eq!(wrong, ["warren-model -> warren-net"]);
    }

    #[test]
    fn a_core_may_not_reach_a_runtime_through_another_crate() {
        let crates: &[(&str, &[&str])] = &[
            ("warren-keyd-core", &["helper"]),
            ("helper", &["tokio"]),
            ("tokio", &[]),
        ];
        let wrong = violations(crates, &["warren-keyd-core"]);
        assert_eq!(wrong, ["warren-keyd-core -> helper -> tokio (must be pure)"]);
    }

    #[test]
    fn an_unknown_crate_needs_a_line() {
        assert_eq!(violations(&[("novel", &[])], &["novel"]).len(), 1);
    }
}
