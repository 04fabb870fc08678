//! What differs between what is wanted and what is there, in words, for `encrypt status`.

use std::collections::BTreeMap;

use ipnet::IpNet;
use warren_model::PublicKey;

use crate::{
    action::{RouteText, RuleText},
    desired::slot_device,
    state::{Device, Link, NodePath, Observed, Peer, Programs, State},
};

/// Every difference that matters for encryption, a sentence each. `name` names the node of a peer's key.
pub fn mismatches(desired: &State, observed: &Observed, name: impl Fn(&PublicKey) -> String) -> Vec<String> {
    let mut out = Vec::new();
    let found = &observed.state;
    for (slot, device) in &found.devices {
        if !desired.devices.contains_key(slot) && device.wireguard.public_key.is_some() {
            out.push(format!(
                "{} has a key, although nothing needs it",
                slot_device(*slot)
            ));
        }
    }
    for (&slot, wanted) in &desired.devices {
        match found.devices.get(&slot).filter(|device| device.exists) {
            Some(device) => device_faults(&slot_device(slot), wanted, device, &name, &mut out),
            None => out.push(format!("{} does not exist", slot_device(slot))),
        }
    }
    for (ifindex, wanted) in &desired.programs {
        if found.programs.get(ifindex) != Some(wanted) {
            let what = if *wanted == Programs::Pod {
                "pod programs"
            } else {
                "barrier programs"
            };
            out.push(format!(
                "{} lacks the {what}",
                link_name(&observed.links, *ifindex)
            ));
        }
    }
    for (key, route) in &desired.routes {
        if found.routes.get(key) != Some(route) {
            out.push(format!("route {} is missing", RouteText(key, route)));
        }
    }
    for rule in desired.rules.difference(&found.rules) {
        out.push(format!("{} is missing", RuleText(rule)));
    }
    if desired.firewall != found.firewall {
        out.push("the nftables chains are missing or not as wanted".into());
    }
    map_faults(desired, found, &mut out);
    out
}

fn device_faults(
    device: &str,
    wanted: &Device,
    found: &Device,
    name: &impl Fn(&PublicKey) -> String,
    out: &mut Vec<String>,
) {
    let mut fault = |condition: bool, text: String| {
        if condition {
            out.push(format!("{device} {text}"));
        }
    };
    fault(!found.up, "is down".into());
    fault(!found.programs, "lacks the tunnel programs".into());
    fault(
        found.mtu != wanted.mtu,
        format!("has MTU {} instead of {}", found.mtu, wanted.mtu),
    );
    let (own, wants) = (&found.wireguard, &wanted.wireguard);
    match (own.public_key, wants.public_key) {
        (Some(key), Some(wanted)) if key == wanted => {}
        // One that no path needs has none.
        (None, None) => return,
        (None, Some(_)) => fault(true, "has no key".into()),
        (Some(key), Some(_)) => fault(true, format!("has key {key}, which is not this node's")),
        (Some(key), None) => fault(true, format!("has key {key}, although nothing needs it")),
    }
    fault(
        own.port != wants.port,
        format!("listens on port {} instead of {}", own.port, wants.port),
    );
    if let Some(link) = wanted.link {
        let text = format!("lacks the address {link}, where pre-shared keys are agreed on");
        fault(found.link != wanted.link, text);
    }
    for (key, peer) in &wants.peers {
        match own.peers.get(key) {
            None => fault(true, format!("lacks the peer of node {} ({key})", name(key))),
            Some(there) => {
                for text in peer_faults(&name(key), peer, there) {
                    fault(true, text);
                }
            }
        }
    }
    for key in own.peers.keys().filter(|key| !wants.peers.contains_key(key)) {
        fault(
            true,
            format!("has a peer that the directory does not know ({key})"),
        );
    }
}

fn peer_faults(node: &str, wanted: &Peer, found: &Peer) -> Vec<String> {
    let list = |prefixes: Vec<&IpNet>| {
        prefixes
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(", ")
    };
    let mut out = Vec::new();
    let missing: Vec<_> = wanted.allowed_ips.difference(&found.allowed_ips).collect();
    if !missing.is_empty() {
        out.push(format!(
            "lacks allowed prefixes of node {node}: {}",
            list(missing)
        ));
    }
    let extra: Vec<_> = found.allowed_ips.difference(&wanted.allowed_ips).collect();
    if !extra.is_empty() {
        out.push(format!(
            "allows prefixes to node {node} that are not its own: {}",
            list(extra)
        ));
    }
    if found.pre_shared != wanted.pre_shared {
        out.push(match (found.pre_shared, wanted.pre_shared) {
            (None, _) => format!("lacks the pre-shared key with node {node}"),
            (Some(_), _) => format!("has a pre-shared key with node {node} that was not agreed on"),
        });
    }
    if found.endpoint.is_none() {
        out.push(format!("has no endpoint for node {node}"));
    } else if wanted.keepalive > 0 && found.silent {
        out.push(format!("has no handshake with node {node} within the last 180 s"));
    }
    out
}

fn map_faults(desired: &State, found: &State, out: &mut Vec<String>) {
    for (prefix, owner) in &desired.owners {
        if found.owners.get(prefix) != Some(owner) {
            out.push(format!("the owner of {prefix} in the eBPF map is not as wanted"));
        }
    }
    for prefix in found
        .owners
        .keys()
        .filter(|prefix| !desired.owners.contains_key(prefix))
    {
        out.push(format!(
            "the eBPF map has an owner of {prefix} that the directory does not know"
        ));
    }
    // Which of its slots sends is not a fault: a pair moves when it is ready.
    let receives = |paths: &BTreeMap<u16, NodePath>| -> Vec<(u16, u8, bool)> {
        let path = |(node, path): (&u16, &NodePath)| {
            (
                *node,
                path.receive,
                path.slot < 8 && path.receive & (1 << path.slot) != 0,
            )
        };
        paths.iter().map(path).collect()
    };
    if receives(&desired.paths) != receives(&found.paths) {
        out.push("the paths to nodes in the eBPF map are not as wanted".into());
    }
    if desired.node_addresses != found.node_addresses {
        out.push("the node addresses that the barrier knows are not as wanted".into());
    }
    if desired.endpoints != found.endpoints {
        out.push("the pods in the eBPF map are not as wanted".into());
    }
}

fn link_name(links: &[Link], ifindex: u32) -> String {
    match links.iter().find(|link| link.ifindex == ifindex) {
        Some(link) => link.name.clone(),
        None => format!("interface {ifindex}"),
    }
}
