//! Reading the node.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr},
    time::{Duration, SystemTime},
};

use anyhow::Result;
use tokio::time::Instant;
use warren_agent_core::{
    Device, Link, LinkKind, Observed, Peer, Programs, State, WireGuard, slot_address, slot_device,
};
use warren_bpf::Role;
use warren_model::PublicKey;
use warren_wireguard::DeviceError;

use super::{Machine, SLOW_CHECK, convert, handshakes::Handshakes};
use crate::clock::boot_ms;

impl Machine {
    /// Reads everything that the agent owns. What cannot be read counts as absent, and is said.
    pub(crate) async fn observe(&mut self) -> Result<Observed> {
        self.faults.clear();
        let found = self.net.links().await?;
        let mut addresses: BTreeMap<u32, Vec<std::net::IpAddr>> = BTreeMap::new();
        for (ifindex, net) in self.net.addresses().await? {
            addresses.entry(ifindex).or_default().push(net.addr());
        }
        let links: Vec<Link> = found
            .iter()
            .map(|link| Link {
                ifindex: link.ifindex,
                name: link.name.clone(),
                kind: convert::link_kind(link),
                master: link.master,
                mtu: link.mtu,
                addresses: addresses.get(&link.ifindex).cloned().unwrap_or_default(),
            })
            .collect();
        let mut state = State::default();
        let attached = self.programs.lock().attached()?;
        self.devices(&found, &links, &attached, &mut state).await;
        self.programs_on(&links, &attached, &mut state);
        self.maps(&mut state)?;
        self.routing(&mut state).await?;
        state.firewall = self.firewall().await;
        let links = links
            .into_iter()
            .filter(|link| !self.unsupported.contains(&link.ifindex))
            .collect();
        Ok(Observed { links, state })
    }

    /// Looks at the tunnel devices and paths alone, for a pair that is about to change; the rest is as it was observed.
    pub(crate) async fn look(&mut self, observed: &mut Observed) -> Result<()> {
        for slot in self.devices.keys() {
            let Some(device) = observed.state.devices.get_mut(slot) else {
                continue;
            };
            match self.wireguard.dump(&slot_device(*slot)).await {
                Ok(found) => {
                    note_key(&mut self.device_keys, *slot, found.public_key);
                    device.wireguard = wireguard(*slot, found, &mut self.handshakes);
                }
                Err(error) => anyhow::bail!("{error}"),
            }
        }
        let paths = self.programs.lock().paths()?;
        observed.state.paths = paths
            .iter()
            .map(|(node, path)| (*node, convert::path_from(path, &self.devices)))
            .collect();
        Ok(())
    }

    async fn devices(
        &mut self,
        found: &[warren_net::Link],
        links: &[Link],
        attached: &[warren_bpf::Attachment],
        state: &mut State,
    ) {
        self.devices.clear();
        self.device_keys.clear();
        for (link, raw) in links.iter().zip(found) {
            let LinkKind::Tunnel(slot) = link.kind else {
                continue;
            };
            self.devices.insert(slot, link.ifindex);
            let programs = attached
                .iter()
                .any(|a| a.ifindex == link.ifindex && a.role == Role::Tunnel { slot } && a.healthy);
            let address = Some(slot_address(slot)).filter(|address| link.addresses.contains(&address.addr()));
            let wireguard = match self.wireguard.dump(&link.name).await {
                Ok(device) => {
                    note_key(&mut self.device_keys, slot, device.public_key);
                    wireguard(slot, device, &mut self.handshakes)
                }
                Err(error) => {
                    self.faults.push(match error {
                        DeviceError::Absent(_) => {
                            format!(
                                "{} has nobody who moves its packets: the tunnel is not running",
                                link.name
                            )
                        }
                        DeviceError::Refused { .. } | DeviceError::Io { .. } => error.to_string(),
                    });
                    WireGuard::default()
                }
            };
            let device = Device {
                exists: true,
                up: raw.up,
                mtu: raw.mtu,
                programs,
                address,
                link: link_local(&link.addresses),
                wireguard,
            };
            state.devices.insert(slot, device);
        }
    }

    fn programs_on(&mut self, links: &[Link], attached: &[warren_bpf::Attachment], state: &mut State) {
        let tunnels: BTreeSet<u32> = self.devices.values().copied().collect();
        let present: BTreeSet<u32> = links.iter().map(|link| link.ifindex).collect();
        self.unsupported.retain(|ifindex| present.contains(ifindex));
        for attachment in attached.iter().filter(|a| !tunnels.contains(&a.ifindex)) {
            let programs = match attachment.role {
                Role::Pod if attachment.healthy => Programs::Pod,
                Role::Barrier if attachment.healthy => Programs::Barrier,
                Role::Pod | Role::Barrier | Role::Tunnel { .. } => Programs::Broken,
            };
            state.programs.insert(attachment.ifindex, programs);
        }
    }

    fn maps(&self, state: &mut State) -> Result<()> {
        let owners = self.programs.lock().owners()?;
        state.owners = owners
            .iter()
            .map(|(prefix, owner)| (*prefix, convert::owner_from(owner)))
            .collect();
        let paths = self.programs.lock().paths()?;
        state.paths = paths
            .iter()
            .map(|(node, path)| (*node, convert::path_from(path, &self.devices)))
            .collect();
        let nodes = self.programs.lock().node_addresses()?;
        state.node_addresses = nodes.into_iter().map(|node| (node.address, node.own)).collect();
        let endpoints = self.programs.lock().endpoints()?;
        state.endpoints = endpoints
            .iter()
            .map(|e| (e.ifindex, convert::endpoint_from(e)))
            .collect();
        Ok(())
    }

    async fn routing(&mut self, state: &mut State) -> Result<()> {
        self.routes = self.net.routes().await?;
        self.rules = self.net.rules().await?;
        state.routes = self
            .routes
            .iter()
            .filter_map(|route| convert::route_from(route, &self.devices))
            .collect();
        state.rules = self.rules.iter().filter_map(convert::rule_from).collect();
        Ok(())
    }

    /// What the packet filter was given, unless somebody took it away meanwhile. Asking costs a process, so that
    /// it is asked only now and then.
    async fn firewall(&mut self) -> Option<warren_agent_core::Firewall> {
        self.firewall.as_ref()?;
        if self.firewall_checked.is_none_or(|at| at.elapsed() >= SLOW_CHECK) {
            match self.net.nft_counters().await {
                Ok(Some(_)) => self.firewall_checked = Some(Instant::now()),
                Ok(None) => self.firewall = None,
                Err(error) => self.faults.push(error.to_string()),
            }
        }
        self.firewall.clone()
    }

    /// How long ago a peer's last handshake was, as of the last look.
    pub(crate) fn handshake_age(&self, slot: u8, peer: warren_model::PublicKey) -> Option<Duration> {
        self.handshakes.age(slot, peer, Duration::from_millis(boot_ms()))
    }

    /// The name of a slot's device as it is now.
    pub(super) fn device(&self, slot: u8) -> Result<u32, String> {
        self.devices
            .get(&slot)
            .copied()
            .ok_or_else(|| format!("{} does not exist", slot_device(slot)))
    }
}

fn note_key(keys: &mut BTreeMap<u8, PublicKey>, slot: u8, key: Option<PublicKey>) {
    match key {
        Some(key) => keys.insert(slot, key),
        None => keys.remove(&slot),
    };
}

/// The only link-local address of a device; where there are more, none is the one that is wanted.
fn link_local(addresses: &[IpAddr]) -> Option<Ipv6Addr> {
    let mut found = addresses.iter().filter_map(|address| match address {
        IpAddr::V6(address) if address.is_unicast_link_local() => Some(*address),
        IpAddr::V4(_) | IpAddr::V6(_) => None,
    });
    found.next().filter(|_| found.next().is_none())
}

fn wireguard(slot: u8, device: warren_wireguard::DeviceState, handshakes: &mut Handshakes) -> WireGuard {
    let boot = Duration::from_millis(boot_ms());
    let told = device
        .peers
        .iter()
        .map(|peer| (peer.public_key, peer.last_handshake));
    handshakes.look(slot, told, SystemTime::now(), boot);
    let peer = |peer: warren_wireguard::PeerState| {
        let age = handshakes.age(slot, peer.public_key, boot);
        let state = Peer {
            pre_shared: peer.pre_shared_key,
            endpoint: peer.endpoint,
            keepalive: peer.keepalive_seconds,
            allowed_ips: peer.allowed_ips.into_iter().collect(),
            endpoint_is_new: false,
            silent: Peer::is_silent(age),
            received: peer.received_bytes,
        };
        (peer.public_key, state)
    };
    WireGuard {
        public_key: device.public_key,
        port: device.listen_port,
        peers: device.peers.into_iter().map(peer).collect(),
    }
}
