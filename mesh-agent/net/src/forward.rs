//! Somebody else's FORWARD chains that drop by default. An accept elsewhere does not override a drop: it has to
//! stand in the very chain that drops, and be put there by the tool that owns the chain.

use serde_json::{Value, json};

use crate::{Error, nft, tool};

/// Marks what we inserted.
const COMMENT: &str = "warren";

/// An address family of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForwardFamily {
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
    /// Both (nft's `inet`).
    Both,
}

impl ForwardFamily {
    /// The family's name in nft.
    fn keyword(self) -> &'static str {
        match self {
            Self::V4 => "ip",
            Self::V6 => "ip6",
            Self::Both => "inet",
        }
    }
}

/// The tool that owns a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForwardTool {
    /// `iptables-nft` or `ip6tables-nft`.
    IptablesNft,
    /// `iptables-legacy` or `ip6tables-legacy`.
    IptablesLegacy,
    /// `nft`.
    Nft,
}

/// A chain on the forward hook that drops what nothing accepts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForwardBlock {
    /// Family of the chain.
    pub family: ForwardFamily,
    /// Whose it is.
    pub tool: ForwardTool,
    /// Its table.
    pub table: String,
    /// Its name.
    pub chain: String,
}

impl std::fmt::Display for ForwardBlock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tool = match self.tool {
            ForwardTool::IptablesNft => "iptables-nft",
            ForwardTool::IptablesLegacy => "iptables-legacy",
            ForwardTool::Nft => "nft",
        };
        write!(
            f,
            "chain {} of table {} {} ({tool})",
            self.chain,
            self.family.keyword(),
            self.table
        )
    }
}

pub(crate) async fn blocks() -> Result<Vec<ForwardBlock>, Error> {
    let mut found = in_nft(&nft::list(&["list", "ruleset"]).await?);
    for family in [ForwardFamily::V4, ForwardFamily::V6] {
        found.extend(in_legacy(family).await?);
    }
    Ok(found)
}

pub(crate) async fn allow() -> Result<Vec<ForwardBlock>, Error> {
    let blocks = blocks().await?;
    for block in &blocks {
        match block.tool {
            ForwardTool::Nft => insert_nft(block).await?,
            ForwardTool::IptablesNft if tool::exists(iptables(block)) => iptables_rule(block, "-I").await?,
            // Its tool is not here: nft writes the same expressions that it would have written.
            ForwardTool::IptablesNft => insert_nft(block).await?,
            ForwardTool::IptablesLegacy => iptables_rule(block, "-I").await?,
        }
    }
    Ok(blocks)
}

/// As JSON, in which any name will do: some cannot be written in nft's own language.
async fn insert_nft(block: &ForwardBlock) -> Result<(), Error> {
    let insert = ["iifname", "oifname"].map(|key| {
        let matches = json!({ "op": "==", "left": { "meta": { "key": key } }, "right": "warren*" });
        json!({ "insert": { "rule": {
            "family": block.family.keyword(), "table": block.table, "chain": block.chain, "comment": COMMENT,
            "expr": [{ "match": matches }, { "counter": null }, { "accept": null }],
        }}})
    });
    run_json(&json!({ "nftables": insert })).await
}

async fn run_json(commands: &Value) -> Result<(), Error> {
    tool::run("nft", &["-j", "-f", "-"], Some(&commands.to_string()))
        .await
        .map(drop)
}

fn iptables(block: &ForwardBlock) -> &'static str {
    match (block.tool, block.family) {
        (ForwardTool::IptablesLegacy, ForwardFamily::V6) => "ip6tables-legacy",
        (ForwardTool::IptablesLegacy, _) => "iptables-legacy",
        (_, ForwardFamily::V6) => "ip6tables-nft",
        (_, _) => "iptables-nft",
    }
}

/// `-I` or `-D` of our two rules; `+` is what iptables writes for nft's `*`.
async fn iptables_rule(block: &ForwardBlock, action: &str) -> Result<(), Error> {
    for direction in ["-i", "-o"] {
        let arguments = [
            "-w",
            "5",
            "-t",
            &block.table,
            action,
            &block.chain,
            direction,
            "warren+",
        ];
        let rest = ["-m", "comment", "--comment", COMMENT, "-j", "ACCEPT"];
        let arguments: Vec<&str> = arguments.into_iter().chain(rest).collect();
        tool::run(iptables(block), &arguments, None).await?;
    }
    Ok(())
}

/// Chains on the forward hook that drop, and have no accept of ours.
fn in_nft(ruleset: &Value) -> Vec<ForwardBlock> {
    forward_chains(ruleset)
        .filter(|(chain, block)| {
            let rules: Vec<&Value> = rules(ruleset, chain).collect();
            let drops =
                chain["policy"] == "drop" || rules.last().is_some_and(|rule| refuses_everything(rule));
            drops && !accepts_both(&rules) && block.table != nft::TABLE
        })
        .map(|(_, block)| block)
        .collect()
}

fn forward_chains(ruleset: &Value) -> impl Iterator<Item = (&Value, ForwardBlock)> {
    nft::objects(ruleset, "chain")
        .filter(|chain| chain["hook"] == "forward" && chain["type"] == "filter")
        .filter_map(|chain| {
            let family = match chain["family"].as_str()? {
                "ip" => ForwardFamily::V4,
                "ip6" => ForwardFamily::V6,
                "inet" => ForwardFamily::Both,
                _ => return None,
            };
            let (table, name) = (chain["table"].as_str()?, chain["name"].as_str()?);
            let iptables = family != ForwardFamily::Both && table == "filter" && name == "FORWARD";
            let tool = if iptables {
                ForwardTool::IptablesNft
            } else {
                ForwardTool::Nft
            };
            Some((
                chain,
                ForwardBlock {
                    family,
                    tool,
                    table: table.to_owned(),
                    chain: name.to_owned(),
                },
            ))
        })
}

fn rules<'a>(ruleset: &'a Value, chain: &'a Value) -> impl Iterator<Item = &'a Value> {
    nft::objects(ruleset, "rule").filter(move |rule| {
        rule["family"] == chain["family"] && rule["table"] == chain["table"] && rule["chain"] == chain["name"]
    })
}

fn expressions(rule: &Value) -> impl Iterator<Item = &Value> {
    rule["expr"].as_array().into_iter().flatten()
}

/// A rule without condition that drops or rejects, as firewalld ends its chains.
fn refuses_everything(rule: &Value) -> bool {
    let is = |expression: &Value, name: &str| expression.get(name).is_some();
    expressions(rule).all(|e| {
        ["counter", "log", "drop", "reject"]
            .iter()
            .any(|name| is(e, name))
    }) && expressions(rule).any(|e| is(e, "drop") || is(e, "reject"))
}

fn accepts_both(rules: &[&Value]) -> bool {
    ["iifname", "oifname"]
        .iter()
        .all(|key| rules.iter().any(|rule| accepts(rule, key)))
}

/// An accept of everything that comes in, or goes out, by `warren*`, whichever tool wrote it.
fn accepts(rule: &Value, key: &str) -> bool {
    let matches = |e: &Value| {
        e["match"]["left"]["meta"]["key"] == key
            && e["match"]["op"] == "=="
            && e["match"]["right"] == "warren*"
    };
    expressions(rule).any(matches)
        && expressions(rule).filter(|e| e.get("match").is_some()).count() == 1
        && expressions(rule).any(|e| e.get("accept").is_some())
}

/// The legacy tables. Listing one that is not there would make the kernel create it: ask the kernel first.
async fn in_legacy(family: ForwardFamily) -> Result<Option<ForwardBlock>, Error> {
    let Some(block) = legacy_block(family) else {
        return Ok(None);
    };
    let listing = tool::run(
        iptables(&block),
        &["-w", "5", "-t", "filter", "-S", "FORWARD"],
        None,
    )
    .await?;
    Ok(legacy_drops(&listing).then_some(block))
}

/// The legacy filter table of a family, where it exists and its tool is installed.
fn legacy_block(family: ForwardFamily) -> Option<ForwardBlock> {
    let names = if family == ForwardFamily::V6 {
        "ip6_tables_names"
    } else {
        "ip_tables_names"
    };
    let names = std::fs::read_to_string(format!("/proc/thread-self/net/{names}")).unwrap_or_default();
    let block = ForwardBlock {
        family,
        tool: ForwardTool::IptablesLegacy,
        table: "filter".into(),
        chain: "FORWARD".into(),
    };
    (names.lines().any(|name| name == "filter") && tool::exists(iptables(&block))).then_some(block)
}

fn legacy_drops(listing: &str) -> bool {
    let lines = || listing.lines();
    let drops = lines().any(|line| line == "-P FORWARD DROP")
        || lines().next_back().is_some_and(|line| {
            line.starts_with("-A FORWARD -j DROP") || line.starts_with("-A FORWARD -j REJECT")
        });
    let ours = |direction: &&str| {
        lines().any(|line| {
            line.starts_with(&format!("-A FORWARD {direction} warren+ ")) && line.ends_with("-j ACCEPT")
        })
    };
    drops && !["-i", "-o"].iter().all(ours)
}

pub(crate) async fn revoke() -> Result<(), Error> {
    let ruleset = nft::list(&["-a", "list", "ruleset"]).await?;
    for (chain, block) in forward_chains(&ruleset) {
        let ours = rules(&ruleset, chain).filter(|rule| accepts(rule, "iifname") || accepts(rule, "oifname"));
        let delete: Vec<Value> = ours
            .filter_map(|rule| rule["handle"].as_u64())
            .map(|handle| {
                json!({ "delete": { "rule": {
                    "family": block.family.keyword(), "table": block.table, "chain": block.chain, "handle": handle,
                }}})
            })
            .collect();
        if !delete.is_empty() {
            run_json(&json!({ "nftables": delete })).await?;
        }
    }
    for family in [ForwardFamily::V4, ForwardFamily::V6] {
        let Some(block) = legacy_block(family) else {
            continue;
        };
        let listing = tool::run(
            iptables(&block),
            &["-w", "5", "-t", "filter", "-S", "FORWARD"],
            None,
        )
        .await?;
        if listing.contains(" warren+ ") {
            iptables_rule(&block, "-D").await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn legacy_listing() {
        let drop = "-P FORWARD DROP\n";
        let ours = "-A FORWARD -o warren+ -m comment --comment warren -j ACCEPT\n\
                    -A FORWARD -i warren+ -m comment --comment warren -j ACCEPT\n";
        assert!(legacy_drops(drop));
        assert!(!legacy_drops("-P FORWARD ACCEPT\n"));
        assert!(legacy_drops(
            "-P FORWARD ACCEPT\n-A FORWARD -j REJECT --reject-with icmp-host-prohibited\n"
        ));
        assert!(!legacy_drops(&format!("{drop}{ours}")));
        assert!(legacy_drops(&format!("{drop}-A FORWARD -o warren+ -j ACCEPT\n")));
    }

    #[test]
    fn only_unconditional_refusals_count() {
        let rule = |expr: Value| serde_json::json!({ "expr": expr });
        assert!(refuses_everything(&rule(serde_json::json!([{ "reject": {} }]))));
        assert!(refuses_everything(&rule(
            serde_json::json!([{ "counter": {} }, { "drop": null }])
        )));
        assert!(!refuses_everything(&rule(
            serde_json::json!([{ "match": {} }, { "drop": null }])
        )));
        assert!(!refuses_everything(&rule(
            serde_json::json!([{ "accept": null }])
        )));
        assert!(!refuses_everything(&rule(serde_json::json!([]))));
    }
}
