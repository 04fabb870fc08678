//! What really reached a pod, counted by its own network namespace before anything in it can answer or refuse.

use std::{collections::BTreeMap, net::IpAddr};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{process::Place, service::run_with_input};

/// Who reached which port: source, protocol (`tcp`, `udp`), destination port.
pub type Source = (IpAddr, String, u16);

/// Packets of every source that arrived.
pub type Arrivals = BTreeMap<Source, u64>;

const RULES: &str = "\
table inet seen {
  set v4 { type ipv4_addr . inet_proto . inet_service; flags dynamic; counter; size 65535; }
  set v6 { type ipv6_addr . inet_proto . inet_service; flags dynamic; counter; size 65535; }
  chain arrivals {
    type filter hook prerouting priority raw;
    iifname \"lo\" return
    meta l4proto { tcp, udp } update @v4 { ip saddr . meta l4proto . th dport }
    meta l4proto { tcp, udp } update @v6 { ip6 saddr . meta l4proto . th dport }
  }
}
";

/// Starts counting in a network namespace, a file on the node.
pub(super) fn start(node: &Place, netns: &str) -> Result<()> {
    run_with_input(
        node,
        &["nsenter", &format!("--net={netns}"), "nft", "-f", "-"],
        RULES,
    )
}

/// What arrived since.
pub(super) fn read(node: &Place, netns: &str) -> Result<Arrivals> {
    let inside = format!("--net={netns}");
    let text = node.run(["nsenter", &inside, "nft", "-j", "list", "table", "inet", "seen"])?;
    parse(&serde_json::from_str(&text).context("nft's answer is no JSON")?)
}

fn parse(value: &Value) -> Result<Arrivals> {
    let mut arrivals = Arrivals::new();
    let objects = value["nftables"]
        .as_array()
        .context("nft's answer is no ruleset")?;
    let elements = objects
        .iter()
        .filter_map(|object| object["set"]["elem"].as_array())
        .flatten();
    for element in elements {
        let element = &element["elem"];
        let fault = || format!("nft names a source that cannot be read: {element}");
        let [source, protocol, port] = element["val"]["concat"]
            .as_array()
            .map(Vec::as_slice)
            .with_context(fault)?
        else {
            anyhow::bail!(fault());
        };
        let source = source
            .as_str()
            .and_then(|text| text.parse().ok())
            .with_context(fault)?;
        let protocol = match protocol.as_str() {
            Some(name) => name.to_owned(),
            None => protocol.to_string(),
        };
        let port = port
            .as_u64()
            .and_then(|port| u16::try_from(port).ok())
            .with_context(fault)?;
        let packets = element["counter"]["packets"].as_u64().with_context(fault)?;
        *arrivals.entry((source, protocol, port)).or_default() += packets;
    }
    Ok(arrivals)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_per_source() {
        let arrivals = parse(&serde_json::json!({"nftables": [
            {"metainfo": {"version": "1"}},
            {"set": {"name": "v4", "elem": [
                {"elem": {"val": {"concat": ["10.0.0.1", "udp", 53]}, "counter": {"packets": 3, "bytes": 90}}},
            ]}},
            {"set": {"name": "v6"}},
        ]}))
        .unwrap();
        assert_eq!(
            arrivals,
            [(("10.0.0.1".parse().unwrap(), "udp".into(), 53), 3)].into()
        );
        assert!(parse(&serde_json::json!({})).is_err());
    }
}
