//! The difference between what is wanted and what is there, as steps in a safe order.
//!
//! ```text
//!  1 barriers, packet filter          nothing leaves in clear while the rest is built
//!  2 throws, blackholes, rules        every remote pod prefix is covered before it is routed
//!  3 node addresses                   the barrier knows new nodes before their peers exist
//!  4 devices                          down -> programs -> address -> key -> up
//!  5 what goes                        path, owner, route (the blackhole stays) ...
//!  6 receive bits                     what a peer may send soon is accepted before it can
//!  7 new peers and their prefixes
//!  8 what comes                       owner, path (a pair moves here), route
//!  9 peers that leave, devices that are emptied, receive bits of both
//! 10 endpoints                        entry, and only then pod programs in place of the barrier
//! 11 covers that are no longer wanted
//! ```
//!
//! Which path a pair has, and when it moves, is decided in [`crate::slots`]; private keys are destroyed by whoever has
//! them, once [`crate::Agent::void_keys`] says that no device has them.

use std::{cmp::Reverse, collections::BTreeMap};

use warren_model::PublicKey;

use crate::{
    action::Action,
    state::{Device, NodePath, Peer, Programs, Route, RouteKey, State, WireGuard},
};

/// The steps from `observed` to `desired`. With `prune` false nothing is removed that a directory might still
/// want: pass it until the first full directory is known.
pub fn plan(desired: &State, observed: &State, prune: bool) -> Vec<Action> {
    let mut steps = Plan {
        desired,
        observed,
        prune,
        actions: Vec::new(),
    };
    steps.protect();
    steps.cover();
    steps.devices();
    if prune {
        steps.unreach();
    }
    steps.widen();
    steps.new_peers();
    steps.reach();
    if prune {
        steps.old_peers();
        steps.narrow();
    }
    steps.endpoints();
    if prune {
        steps.uncover();
    }
    steps.actions
}

struct Plan<'a> {
    desired: &'a State,
    observed: &'a State,
    prune: bool,
    actions: Vec<Action>,
}

impl Plan<'_> {
    fn push(&mut self, action: Action) {
        self.actions.push(action);
    }

    /// Gives programs of a kind to the devices that want them and have not got them.
    fn attach(&mut self, kind: Programs) {
        for (&ifindex, wanted) in &self.desired.programs {
            if *wanted == kind && self.observed.programs.get(&ifindex) != Some(wanted) {
                self.push(Action::Attach(ifindex, kind));
            }
        }
    }

    fn protect(&mut self) {
        self.attach(Programs::Barrier);
        match &self.desired.firewall {
            Some(firewall) if self.observed.firewall.as_ref() != Some(firewall) => {
                self.push(Action::SetFirewall(firewall.clone()));
            }
            _ => {}
        }
    }

    /// The more specific goes first, so that neither a throw opens what a blackhole inside it must cover, nor a
    /// blackhole stops local pods that a throw inside it lets through.
    fn cover(&mut self) {
        let missing = |(key, route): &(&RouteKey, &Route)| {
            !matches!(route, Route::Tunnel { .. }) && self.observed.routes.get(key) != Some(route)
        };
        let mut covers: Vec<_> = self
            .desired
            .routes
            .iter()
            .filter(missing)
            .map(|(k, r)| (*k, *r))
            .collect();
        covers.sort_by_key(|(key, route)| (Reverse(key.prefix.prefix_len()), *route != Route::Throw));
        self.actions.extend(
            covers
                .into_iter()
                .map(|(key, route)| Action::SetRoute(key, route)),
        );
        for rule in self.desired.rules.difference(&self.observed.rules) {
            self.push(Action::AddRule(*rule));
        }
        for (address, own) in &self.desired.node_addresses {
            if self.observed.node_addresses.get(address) != Some(own) {
                self.push(Action::SetNodeAddress(*address, *own));
            }
        }
    }

    fn devices(&mut self) {
        let absent = Device::default();
        for (&slot, wanted) in &self.desired.devices {
            let found = self.observed.devices.get(&slot).unwrap_or(&absent);
            if !found.exists {
                self.push(Action::CreateDevice {
                    slot,
                    mtu: wanted.mtu,
                });
            } else if found.mtu != wanted.mtu {
                self.push(Action::SetMtu {
                    slot,
                    mtu: wanted.mtu,
                });
            }
            if !found.programs {
                self.push(Action::AttachTunnel(slot));
            }
            if let Some(address) = wanted.address.filter(|_| found.address != wanted.address) {
                self.push(Action::SetAddress { slot, address });
            }
            if let Some(address) = wanted.link.filter(|_| found.link != wanted.link) {
                self.push(Action::SetLink { slot, address });
            }
            if !found.up {
                self.push(Action::DeviceUp(slot));
            }
            let WireGuard { public_key, port, .. } = &wanted.wireguard;
            if let Some(public_key) = *public_key
                && (found.wireguard.public_key != Some(public_key) || found.wireguard.port != *port)
            {
                self.push(Action::SetKey {
                    slot,
                    public_key,
                    port: *port,
                });
            }
        }
    }

    /// Cuts off what is no longer reachable; the blackholes still cover it.
    fn unreach(&mut self) {
        for &node in self.observed.paths.keys() {
            if !self.desired.paths.contains_key(&node) {
                self.push(Action::RemovePath(node));
            }
        }
        for &prefix in self.observed.owners.keys() {
            if !self.desired.owners.contains_key(&prefix) {
                self.push(Action::RemoveOwner(prefix));
            }
        }
        for (key, route) in &self.observed.routes {
            if matches!(route, Route::Tunnel { .. }) && !self.desired.routes.contains_key(key) {
                self.push(Action::RemoveRoute(*key, *route));
            }
        }
    }

    /// The path that a node has in the meantime: it sends and receives as before, and receives already on what is new.
    fn meanwhile(&self, node: u16) -> Option<NodePath> {
        let found = self.observed.paths.get(&node)?;
        let device = self.observed.devices.get(&found.slot)?;
        let wanted = self.desired.paths.get(&node)?;
        device.exists.then_some(NodePath {
            slot: found.slot,
            receive: found.receive | wanted.receive,
        })
    }

    fn widen(&mut self) {
        for &node in self.desired.paths.keys() {
            if let Some(path) = self.meanwhile(node)
                && self.observed.paths.get(&node) != Some(&path)
            {
                self.push(Action::WidenPath(node, path));
            }
        }
    }

    fn narrow(&mut self) {
        for (&node, path) in &self.desired.paths {
            if self
                .meanwhile(node)
                .is_some_and(|there| there.receive != path.receive)
            {
                self.push(Action::NarrowPath(node, *path));
            }
        }
    }

    fn new_peers(&mut self) {
        let absent = Device::default();
        for (&slot, wanted) in &self.desired.devices {
            let found = self.observed.devices.get(&slot).unwrap_or(&absent);
            // A new key of the device ends all sessions, but peers and prefixes stay.
            self.add_peers(slot, &wanted.wireguard.peers, &found.wireguard.peers);
        }
    }

    fn old_peers(&mut self) {
        for (&slot, found) in &self.observed.devices {
            let wanted = self
                .desired
                .devices
                .get(&slot)
                .map(|device| &device.wireguard)
                .filter(|wireguard| wireguard.public_key.is_some());
            match wanted {
                Some(wanted) => self.remove_peers(slot, &wanted.peers, &found.wireguard.peers),
                None if found.wireguard.public_key.is_some() || !found.wireguard.peers.is_empty() => {
                    self.push(Action::ClearDevice(slot));
                }
                None => {}
            }
        }
    }

    fn add_peers(&mut self, slot: u8, wanted: &BTreeMap<PublicKey, Peer>, found: &BTreeMap<PublicKey, Peer>) {
        for (&peer, wanted) in wanted {
            let mut found = found.get(&peer);
            let mut endpoint = new_endpoint(wanted, found);
            // Sessions that were made with another pre-shared key, or without one, end.
            if let Some(other) = found.filter(|found| found.pre_shared != wanted.pre_shared) {
                self.push(Action::RemovePeer { slot, peer });
                endpoint = endpoint.or(other.endpoint);
                found = None;
            }
            if found.is_none_or(|found| found.keepalive != wanted.keepalive) || endpoint.is_some() {
                self.push(Action::SetPeer {
                    slot,
                    peer,
                    pre_shared: wanted.pre_shared.filter(|_| found.is_none()),
                    endpoint,
                    keepalive: wanted.keepalive,
                });
            }
            for &prefix in &wanted.allowed_ips {
                if !found.is_some_and(|found| found.allowed_ips.contains(&prefix)) {
                    self.push(Action::AddAllowedIp { slot, peer, prefix });
                }
            }
        }
    }

    /// A prefix that moved has been taken by its new peer already.
    fn remove_peers(
        &mut self,
        slot: u8,
        wanted: &BTreeMap<PublicKey, Peer>,
        found: &BTreeMap<PublicKey, Peer>,
    ) {
        for (&peer, found) in found {
            let Some(keep) = wanted.get(&peer) else {
                self.push(Action::RemovePeer { slot, peer });
                continue;
            };
            for &prefix in found.allowed_ips.difference(&keep.allowed_ips) {
                if !wanted.values().any(|other| other.allowed_ips.contains(&prefix)) {
                    self.push(Action::RemoveAllowedIp { slot, peer, prefix });
                }
            }
        }
    }

    fn reach(&mut self) {
        for (&prefix, owner) in &self.desired.owners {
            if self.observed.owners.get(&prefix) != Some(owner) {
                self.push(Action::SetOwner(prefix, *owner));
            }
        }
        for (&node, wanted) in &self.desired.paths {
            let there = self.meanwhile(node);
            let path = NodePath {
                slot: wanted.slot,
                receive: there.map_or(wanted.receive, |there| there.receive),
            };
            if there != Some(path) {
                self.push(Action::SetPath(node, path));
            }
        }
        for (key, route) in &self.desired.routes {
            if matches!(route, Route::Tunnel { .. }) && self.observed.routes.get(key) != Some(route) {
                self.push(Action::SetRoute(*key, *route));
            }
        }
    }

    fn endpoints(&mut self) {
        for &ifindex in self.observed.endpoints.keys() {
            if self.prune && !self.desired.endpoints.contains_key(&ifindex) {
                self.push(Action::RemoveEndpoint(ifindex));
            }
        }
        for (&ifindex, entry) in &self.desired.endpoints {
            if self.observed.endpoints.get(&ifindex) != Some(entry) {
                self.push(Action::SetEndpoint(ifindex, entry.clone()));
            }
        }
        self.attach(Programs::Pod);
        for &ifindex in self.observed.programs.keys() {
            if !self.desired.programs.contains_key(&ifindex) {
                self.push(Action::Detach(ifindex));
            }
        }
    }

    fn uncover(&mut self) {
        for rule in self.observed.rules.difference(&self.desired.rules) {
            self.push(Action::RemoveRule(*rule));
        }
        // Throws first: a blackhole inside one that goes as well covers until then.
        for kind in [Route::Throw, Route::Blackhole] {
            for (key, route) in &self.observed.routes {
                if *route == kind && !self.desired.routes.contains_key(key) {
                    self.push(Action::RemoveRoute(*key, *route));
                }
            }
        }
        for address in self.observed.node_addresses.keys() {
            if !self.desired.node_addresses.contains_key(address) {
                self.push(Action::RemoveNodeAddress(*address));
            }
        }
        if self.desired.firewall.is_none() && self.observed.firewall.is_some() {
            self.push(Action::RemoveFirewall);
        }
    }
}

/// The endpoint to give to the device, if any: where the directory changed it, where the device has none, or
/// where the one it has leads to no handshake. Otherwise the device keeps what it learned by roaming.
fn new_endpoint(wanted: &Peer, found: Option<&Peer>) -> Option<std::net::SocketAddr> {
    let wanted_endpoint = wanted.endpoint?;
    match found {
        None => Some(wanted_endpoint),
        Some(found) if found.endpoint == Some(wanted_endpoint) => None,
        Some(found) if found.endpoint.is_none() || wanted.endpoint_is_new || found.silent => {
            Some(wanted_endpoint)
        }
        Some(_) => None,
    }
}
