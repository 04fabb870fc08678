//! Our nft tables: a drop for mesh traffic in clear that does not depend on any program being attached, and the
//! source address translation that keeps others' masquerade off mesh traffic.
//!
//! Tables `inet warren` and `bridge warren`; chains are filled anew in one transaction, counters keep their values.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use serde_json::Value;

use crate::{Error, tool};

/// Name of our tables, in the families `inet` and `bridge`.
pub const TABLE: &str = "warren";

/// Mesh traffic that was about to leave in clear.
pub const CLEAR_OUT: &str = "clear_out";
/// Traffic from outside that claims to be the mesh's.
pub const FORGED_IN: &str = "forged_in";
/// Mesh traffic that was about to leave in clear by a port of a bridge.
pub const CLEAR_BRIDGE: &str = "clear_bridge";

/// The mark of packets that kube-proxy wants masqueraded.
pub const KUBE_PROXY_MARK: u32 = 0x4000;

/// What the tables should do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NftConfig {
    /// Names of the tunnel devices.
    pub tunnels: Vec<String>,
    /// Indexes of the devices, besides the tunnels and loopback, by which mesh traffic may leave in clear and come
    /// in: pods' veths and CNI bridges. Whatever is not listed is outside.
    pub safe: BTreeSet<u32>,
    /// All addresses that pods may have.
    pub pods: Vec<IpNet>,
    /// Addresses of the nodes that are members of the mesh.
    pub nodes: Vec<IpAddr>,
    /// This node's own IPv4 address: the source of what kube-proxy masquerades into the tunnel.
    pub source_v4: Option<Ipv4Addr>,
    /// This node's own IPv6 address: likewise. The kernel would choose the pod gateway's, which has no identity.
    pub source_v6: Option<Ipv6Addr>,
    /// The bits of the packet mark that are ours.
    pub mark_mask: u32,
    /// The value of those bits on packets that came out of the tunnel and were checked.
    pub tunnel_mark: u32,
    /// The mark of packets that somebody (kube-proxy) wants masqueraded; [`KUBE_PROXY_MARK`].
    pub masquerade_mark: u32,
    /// Drop mesh traffic in clear. `false` only where encryption is off.
    pub barrier: bool,
}

/// A named counter of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counter {
    /// [`CLEAR_OUT`], [`FORGED_IN`] or [`CLEAR_BRIDGE`].
    pub name: String,
    /// Packets dropped.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

pub(crate) async fn apply(config: &NftConfig) -> Result<(), Error> {
    let script = script(config);
    match tool::run("nft", &["-f", "-"], Some(&script)).await {
        Ok(_) => Ok(()),
        Err(Error::NoTool { tool, source }) => Err(Error::NoTool { tool, source }),
        Err(error) => {
            // Another version of us may have left chains of another shape, which cannot be changed in place.
            // Replacing the tables is still one transaction, but costs the counters.
            tracing::warn!(%error, "nft tables cannot be updated in place: replacing them");
            tool::run("nft", &["-f", "-"], Some(&format!("{DELETE}{script}")))
                .await
                .map(drop)
        }
    }
}

/// Deleting what is not there is an error to nft: declare it first.
const DELETE: &str =
    "table inet warren\ndelete table inet warren\ntable bridge warren\ndelete table bridge warren\n";

pub(crate) async fn remove() -> Result<(), Error> {
    tool::run("nft", &["-f", "-"], Some(DELETE)).await.map(drop)
}

pub(crate) async fn counters() -> Result<Option<Vec<Counter>>, Error> {
    let listing = list(&["list", "counters"]).await?;
    let mut counters: Vec<Counter> = objects(&listing, "counter")
        .filter(|counter| counter["table"] == TABLE)
        .filter_map(|counter| {
            Some(Counter {
                name: counter["name"].as_str()?.to_owned(),
                packets: counter["packets"].as_u64()?,
                bytes: counter["bytes"].as_u64()?,
            })
        })
        .collect();
    counters.sort_by(|a, b| a.name.cmp(&b.name));
    Ok((!counters.is_empty()).then_some(counters))
}

/// `nft -j` with a listing command.
pub(crate) async fn list(arguments: &[&str]) -> Result<Value, Error> {
    let mut all = vec!["-j"];
    all.extend_from_slice(arguments);
    let text = tool::run("nft", &all, None).await?;
    serde_json::from_str(&text).map_err(|error| Error::Tool {
        tool: format!("nft {}", all.join(" ")),
        message: error.to_string(),
    })
}

/// The objects of one kind in an nft listing.
pub(crate) fn objects<'a>(listing: &'a Value, kind: &'a str) -> impl Iterator<Item = &'a Value> {
    listing["nftables"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(move |object| object.get(kind))
}

/// The whole transaction. Priorities: the first drop stands before any source translation, which may hide a pod
/// behind the node's address, and the second one after all of it, which may bring a client behind the node's.
fn script(config: &NftConfig) -> String {
    let mut text = String::from(
        "table inet warren {\n\
         \tcounter clear_out { }\n\
         \tcounter forged_in { }\n\
         \tset safe { type iface_index; }\n\
         \tchain outside_out { }\n\
         \tchain outside_in { }\n\
         \tchain out_before { type filter hook postrouting priority 90; policy accept; }\n\
         \tchain nat { type nat hook postrouting priority 95; policy accept; }\n\
         \tchain out_after { type filter hook postrouting priority 110; policy accept; }\n\
         \tchain in { type filter hook prerouting priority -300; policy accept; }\n\
         }\n\
         table bridge warren {\n\
         \tcounter clear_bridge { }\n\
         \tset safe { type iface_index; }\n\
         \tchain outside { }\n\
         \tchain out { type filter hook postrouting priority 300; policy accept; }\n\
         }\n\
         flush table inet warren\n\
         flush table bridge warren\n\
         flush set inet warren safe\n\
         flush set bridge warren safe\n",
    );
    if !config.safe.is_empty() {
        let indexes = config
            .safe
            .iter()
            .map(u32::to_string)
            .collect::<Vec<_>>()
            .join(", ");
        for family in ["inet", "bridge"] {
            let _ = writeln!(text, "add element {family} warren safe {{ {indexes} }}");
        }
    }
    let mut rule = |chain: &str, rule: &str| {
        let _ = writeln!(text, "add rule {chain} {rule}");
    };
    let tunnels = config
        .tunnels
        .iter()
        .map(|name| format!("\"{name}\""))
        .collect::<Vec<_>>()
        .join(", ");
    if config.barrier {
        let inside = if tunnels.is_empty() {
            "\"lo\"".to_owned()
        } else {
            format!("\"lo\", {tunnels}")
        };
        for chain in ["out_before", "out_after"] {
            rule(&format!("inet warren {chain}"), "meta oif @safe accept");
            rule(
                &format!("inet warren {chain}"),
                &format!("meta oifname {{ {inside} }} accept"),
            );
            rule(&format!("inet warren {chain}"), "jump outside_out");
        }
        rule("inet warren in", "meta iif @safe accept");
        rule("inet warren in", &format!("meta iifname {{ {inside} }} accept"));
        rule("inet warren in", "jump outside_in");
        rule("bridge warren out", "meta oif @safe accept");
        rule("bridge warren out", "jump outside");
        for family in [Family4or6::V4, Family4or6::V6] {
            barrier(config, family, &mut rule);
        }
    }
    if !tunnels.is_empty() {
        translation(config, &tunnels, &mut rule);
    }
    text
}

#[derive(Clone, Copy)]
enum Family4or6 {
    V4,
    V6,
}

impl Family4or6 {
    fn keyword(self) -> &'static str {
        match self {
            Self::V4 => "ip",
            Self::V6 => "ip6",
        }
    }

    fn has(self, net: &IpNet) -> bool {
        matches!((self, net), (Self::V4, IpNet::V4(_)) | (Self::V6, IpNet::V6(_)))
    }
}

/// An anonymous set of the family's prefixes; `None` where there is none.
fn set(family: Family4or6, prefixes: impl IntoIterator<Item = IpNet>) -> Option<String> {
    let mine: Vec<IpNet> = prefixes.into_iter().filter(|net| family.has(net)).collect();
    let merged = IpNet::aggregate(&mine);
    if merged.is_empty() {
        return None;
    }
    Some(format!(
        "{{ {} }}",
        merged.iter().map(IpNet::to_string).collect::<Vec<_>>().join(", ")
    ))
}

fn barrier(config: &NftConfig, family: Family4or6, rule: &mut impl FnMut(&str, &str)) {
    let ip = family.keyword();
    let nodes = || config.nodes.iter().map(|address| IpNet::from(*address));
    let Some(pods) = set(family, config.pods.iter().copied()) else {
        return;
    };
    let Some(members) = set(family, config.pods.iter().copied().chain(nodes())) else {
        return;
    };
    for (chain, counter) in [
        ("inet warren outside_out", CLEAR_OUT),
        ("bridge warren outside", CLEAR_BRIDGE),
    ] {
        let drop = format!("counter name {counter} drop");
        rule(chain, &format!("{ip} saddr {pods} {ip} daddr {members} {drop}"));
        rule(chain, &format!("{ip} daddr {pods} {ip} saddr {members} {drop}"));
    }
    let drop = format!("counter name {FORGED_IN} drop");
    rule("inet warren outside_in", &format!("{ip} saddr {pods} {drop}"));
    if let Some(nodes) = set(family, nodes()) {
        rule(
            "inet warren outside_in",
            &format!("{ip} daddr {pods} {ip} saddr {nodes} {drop}"),
        );
    }
}

/// The first chain that binds a connection's source decides; ours stands before everybody else's masquerade.
fn translation(config: &NftConfig, tunnels: &str, rule: &mut impl FnMut(&str, &str)) {
    let chain = "inet warren nat";
    let wanted = format!("meta mark & {0:#x} == {0:#x}", config.masquerade_mark);
    if let Some(source) = config.source_v4 {
        rule(
            chain,
            &format!("meta oifname {{ {tunnels} }} meta nfproto ipv4 {wanted} snat ip to {source}"),
        );
    }
    if let Some(source) = config.source_v6 {
        rule(
            chain,
            &format!("meta oifname {{ {tunnels} }} meta nfproto ipv6 {wanted} snat ip6 to {source}"),
        );
    }
    rule(chain, &format!("{wanted} return"));
    for family in [Family4or6::V4, Family4or6::V6] {
        let ip = family.keyword();
        let keep = format!("snat {ip} to {ip} saddr");
        let Some(pods) = set(family, config.pods.iter().copied()) else {
            continue;
        };
        // A pod's source stays on the way into the tunnel, and whatever came out of it stays on the way to a pod.
        rule(
            chain,
            &format!("meta oifname {{ {tunnels} }} {ip} saddr {pods} {keep}"),
        );
        let from_tunnel = format!("meta mark & {:#x} == {:#x}", config.mark_mask, config.tunnel_mark);
        rule(chain, &format!("{from_tunnel} {ip} daddr {pods} {keep}"));
    }
}
