//! Settings: read once, checked once, a value from then on.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail};
use warren_model::{ClusterConfig, Datapath, DatapathChoice, NodeName};

use crate::{cli::RunOptions, files::StateDir};

/// What an agent is run with.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub(crate) cluster: ClusterConfig,
    pub(crate) node: NodeName,
    pub(crate) options: RunOptions,
}

impl Config {
    /// Reads the cluster's file; every error is one sentence that names it.
    pub(crate) fn load(options: RunOptions) -> Result<Self> {
        let cluster = read_cluster(&options.config)?;
        let node = node_name(&options.node_name)?;
        if options.trust_dir.is_some() != options.token_file.is_some() {
            bail!(
                "--trust-dir and --token-file belong together: name both (Kubernetes) or none (stand-alone)"
            );
        }
        Ok(Self {
            cluster,
            node,
            options,
        })
    }

    /// Whether new keys of this node come with pre-shared keys.
    pub(crate) fn pre_shared_keys(&self) -> bool {
        self.cluster.pre_shared_keys && warren_net::has_ipv6()
    }
}

fn read_cluster(path: &Path) -> Result<ClusterConfig> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let config: ClusterConfig = serde_saphyr::from_str(&text)
        .map_err(|error| anyhow::anyhow!("{}: {}", path.display(), first_line(&error.to_string())))?;
    config
        .validate()
        .map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
    Ok(config)
}

/// Parsers append the offending lines: one sentence is enough.
fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or(text)
}

/// A DNS subdomain name (RFC 1123), as Kubernetes asks of a Node.
fn node_name(text: &str) -> Result<NodeName> {
    let label = |part: &str| {
        !part.is_empty()
            && part
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    if text.len() > 253 || !text.split('.').all(label) {
        bail!("{text:?} cannot be the name of a node: use lower-case letters, digits, '-' and '.'");
    }
    Ok(text.into())
}

/// Which datapath this node uses. A node that has run before keeps its kind unless the configuration names
/// the other one. Returns also whether the kind changed.
pub(crate) async fn choose_datapath(
    choice: DatapathChoice,
    state: &StateDir,
    net: &warren_net::Net,
) -> Result<(Datapath, bool)> {
    let before = state.read_datapath()?;
    let chosen = match (choice, before) {
        (DatapathChoice::Userspace, _) => Datapath::Userspace,
        (DatapathChoice::Auto, Some(before)) => before,
        (DatapathChoice::Kernel, _) => {
            if !net.kernel_has_wireguard().await? {
                bail!(
                    "datapath is set to kernel, but this kernel has no WireGuard: load the module or use userspace"
                );
            }
            Datapath::Kernel
        }
        (DatapathChoice::Auto, None) => match net.kernel_has_wireguard().await? {
            true => Datapath::Kernel,
            false => Datapath::Userspace,
        },
    };
    state.write_datapath(chosen)?;
    Ok((chosen, before.is_some_and(|before| before != chosen)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_names_are_checked() {
        for good in ["node1", "node-1.example.org", "0"] {
            assert!(node_name(good).is_ok(), "{good}");
        }
        for bad in ["", "Node", "a..b", "-a", "a_b", "a/b", "a b"] {
            assert!(node_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_bad_cluster_file_is_one_sentence_with_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cluster.yaml");
        for text in [
            "",
            "podPools: 5",
            "podPools: []\nnodePools: []",
            "nonsense: 1\npodPools: [10.0.0.0/8]",
            "{",
        ] {
            fs::write(&path, text).unwrap();
            let error = format!("{:#}", read_cluster(&path).unwrap_err());
            assert!(error.contains("cluster.yaml") && !error.contains('\n'), "{error}");
        }
        let error = format!(
            "{:#}",
            read_cluster(&directory.path().join("absent")).unwrap_err()
        );
        assert!(error.contains("absent"), "{error}");
    }
}
