//! Of an old key nothing is left: no device, no disk, no memory.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::lab::{
    Lab, Node,
    secrets::{Finder, PreShared, Secret},
    wait::wait_until,
};

/// How long the last traces may take to go after a rotation is over.
const LIMIT: Duration = Duration::from_secs(20);

/// The keys before a rotation.
#[derive(Debug)]
pub struct Former {
    /// The node's number, the generation, the key.
    keys: Vec<(u8, u64, Secret)>,
    /// Of all nodes, with the node's number.
    shared: Vec<(u8, PreShared)>,
    public: Vec<String>,
}

impl Former {
    /// Notes the keys of these nodes. With `prove`, every way of looking for them must find them now, so that finding nothing
    /// later means something.
    pub fn note(lab: &Lab, nodes: &[u8], prove: bool) -> Result<Self> {
        let public = lab.public_keys()?;
        let mut keys = Vec::new();
        for number in nodes {
            let node = lab.node(*number);
            for (generation, secret) in node.private_keys()? {
                if prove {
                    found_everywhere(&node, &secret)?;
                }
                keys.push((*number, generation, secret));
            }
        }
        ensure!(!keys.is_empty(), "the nodes have no keys");
        let mut shared = Vec::new();
        for node in lab.nodes() {
            for key in node.pre_shared_keys()? {
                if prove {
                    found_everywhere(&node, &key.secret)?;
                }
                shared.push((node.number, key));
            }
        }
        Ok(Self { keys, shared, public })
    }

    /// How many pre-shared keys the nodes have, each end counted.
    pub fn shared(&self) -> usize {
        self.shared.len()
    }

    /// Waits until nothing is left of the keys that were replaced. Returns how many these are.
    pub fn gone(&self, lab: &Lab) -> Result<usize> {
        let listed = lab.public_keys()?;
        let old: Vec<&String> = self.public.iter().filter(|key| !listed.contains(key)).collect();
        for node in lab.nodes() {
            wait_until(LIMIT, "no device has an old public key", || {
                let dump = node.device_dump()?;
                match old.iter().find(|key| dump.contains(key.as_str())) {
                    Some(key) => bail!("{} still has {key}", node.name),
                    None => Ok(()),
                }
            })?;
        }
        for (number, generation, secret) in &self.keys {
            let node = lab.node(*number);
            wait_until(LIMIT, &format!("{} is gone", secret.name), || {
                let kept = node.private_keys()?;
                ensure!(kept.iter().all(|(kept, _)| kept != generation), "it is on disk");
                found_nowhere(&node, [secret.clone()])
            })?;
        }
        self.shared_gone(lab, &old)?;
        Ok(old.len())
    }

    /// Waits until nothing is left of the pre-shared keys of paths that had an old key at either end.
    fn shared_gone(&self, lab: &Lab, old: &[&String]) -> Result<()> {
        for node in lab.nodes() {
            let of_node = self.shared.iter().filter(|(number, _)| *number == node.number);
            let void: Vec<_> = of_node
                .filter(|(number, key)| {
                    old.contains(&&key.peer)
                        || self
                            .keys
                            .iter()
                            .any(|(owner, generation, _)| (owner, *generation) == (number, key.generation))
                })
                .map(|(_, key)| key.secret.clone())
                .collect();
            if void.is_empty() {
                continue;
            }
            wait_until(LIMIT, &format!("{void:?} are gone"), || {
                found_nowhere(&node, void.clone())
            })?;
        }
        Ok(())
    }
}

fn found_everywhere(node: &Node, secret: &Secret) -> Result<()> {
    let finder = Finder::new([secret.clone()]);
    let seen = |where_: &str, found: &[String]| {
        ensure!(
            !found.is_empty(),
            "{} is in use and not found in {where_}: the search proves nothing",
            secret.name
        );
        Ok(())
    };
    seen("the device dump", &finder.find(node.device_dump()?.as_bytes()))?;
    seen(
        "the files",
        &finder.in_files(&node.dir().join("state"), &|_| false)?,
    )?;
    let agent = node.key_holders()?;
    let agent = agent.first().context("no agent")?;
    seen("the agent's memory", &finder.in_process(*agent)?)
}

fn found_nowhere(node: &Node, secrets: impl IntoIterator<Item = Secret>) -> Result<()> {
    let finder = Finder::new(secrets);
    let mut found = finder.find(node.device_dump()?.as_bytes());
    found.extend(finder.in_files(&node.dir().join("state"), &|_| false)?);
    for pid in node.key_holders()? {
        let program = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let verb = program.split(|byte| *byte == 0).nth(1).unwrap_or_default();
        let verb = String::from_utf8_lossy(verb);
        found.extend(
            finder
                .in_process(pid)?
                .into_iter()
                .map(|found| format!("{verb}: {found}")),
        );
    }
    ensure!(found.is_empty(), "{}: {found:?}", node.name);
    Ok(())
}
