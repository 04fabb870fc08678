//! Executing a plan. Steps for the same driver that follow each other are handed over together.

use std::{collections::BTreeSet, time::Duration};

use tokio::time::Instant;
use warren_agent_core::{Action, Agent, Programs, Rule, psk::Ends, slot_device};
use warren_bpf::Role;
use warren_model::{Datapath, PreSharedKey, PrivateKey, PskId, PublicKey};
use warren_net::{LinkConfig, NftConfig, nft};
use warren_wireguard::DeviceChange;

use super::{Machine, WireGuard, convert};

/// The transmit queue of a tunnel device, packets.
const QUEUE: u32 = 10_000;

/// Steps that one driver call takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Batch {
    Routes,
    Rules,
    Peers(u8),
    Single,
}

impl Batch {
    fn of(step: &Action) -> Self {
        match step {
            Action::SetRoute(..) | Action::RemoveRoute(..) => Self::Routes,
            Action::AddRule(_) | Action::RemoveRule(_) => Self::Rules,
            Action::SetPeer { slot, .. }
            | Action::RemovePeer { slot, .. }
            | Action::AddAllowedIp { slot, .. }
            | Action::RemoveAllowedIp { slot, .. } => Self::Peers(*slot),
            _ => Self::Single,
        }
    }
}

impl Machine {
    /// Executes steps in order and reports each result to the core. `clock` is the core's clock.
    pub(crate) async fn execute(
        &mut self,
        agent: &mut Agent,
        steps: &[Action],
        clock: impl Fn() -> Duration,
    ) {
        let mut rest = steps;
        while let Some(first) = rest.first() {
            let batch = Batch::of(first);
            let length = match batch {
                Batch::Single => 1,
                _ => rest.iter().take_while(|step| Batch::of(step) == batch).count(),
            };
            let (now, later) = rest.split_at(length);
            rest = later;
            let now: Vec<&Action> = now.iter().filter(|step| agent.may_run(step)).collect();
            if now.is_empty() {
                continue;
            }
            let results = match batch {
                Batch::Routes => self.routes_step(&now).await,
                Batch::Rules => self.rules_step(&now).await,
                Batch::Peers(slot) => self.peers_step(slot, &now).await,
                Batch::Single => vec![self.single(now[0]).await],
            };
            for (step, result) in now.into_iter().zip(results) {
                match &result {
                    Ok(()) => tracing::debug!(%step, "done"),
                    // Some things take a moment, such as the tunnel process at the start.
                    Err(reason) if !agent.has_failed(step) => {
                        tracing::info!(%step, %reason, "not yet possible")
                    }
                    Err(reason) => tracing::warn!(%step, %reason, "failed again"),
                }
                agent.report(step, result, clock());
            }
        }
    }

    async fn routes_step(&mut self, steps: &[&Action]) -> Vec<Result<(), String>> {
        let mut wanted = self.routes.clone();
        let mut results = vec![Ok(()); steps.len()];
        for (step, result) in steps.iter().zip(&mut results) {
            let (Action::SetRoute(key, _) | Action::RemoveRoute(key, _)) = step else {
                continue;
            };
            wanted.retain(|route| !convert::same_route(route, key));
            if let Action::SetRoute(key, route) = step {
                match convert::route_to(key, route, &self.devices) {
                    Some(route) => wanted.push(route),
                    None => *result = Err("its device does not exist".into()),
                }
            }
        }
        let failed = match self.net.apply_routes(&wanted).await {
            Ok(changes) => changes.failed,
            Err(error) => return vec![Err(error.to_string()); steps.len()],
        };
        for (step, result) in steps.iter().zip(&mut results) {
            let (Action::SetRoute(key, _) | Action::RemoveRoute(key, _)) = step else {
                continue;
            };
            if let Some((_, error)) = failed.iter().find(|(route, _)| convert::same_route(route, key)) {
                *result = Err(error.to_string());
            }
        }
        let refused = |route: &warren_net::Route| failed.iter().any(|(other, _)| other == route);
        self.routes = wanted.into_iter().filter(|route| !refused(route)).collect();
        results
    }

    async fn rules_step(&mut self, steps: &[&Action]) -> Vec<Result<(), String>> {
        let mut wanted = self.rules.clone();
        for step in steps {
            match step {
                Action::AddRule(rule) => wanted.push(convert::rule_to(rule)),
                Action::RemoveRule(rule) => wanted.retain(|there| *there != convert::rule_to(rule)),
                _ => {}
            }
        }
        let failed = match self.net.apply_rules(&wanted).await {
            Ok(changes) => changes.failed,
            Err(error) => return vec![Err(error.to_string()); steps.len()],
        };
        let of = |rule: &Rule| failed.iter().find(|(other, _)| *other == convert::rule_to(rule));
        let results = steps.iter().map(|step| match step {
            Action::AddRule(rule) | Action::RemoveRule(rule) => {
                of(rule).map_or(Ok(()), |(_, error)| Err(error.to_string()))
            }
            _ => Ok(()),
        });
        let results = results.collect();
        self.rules = wanted;
        results
    }

    /// All at once; where that fails, one by one, so that one bad peer does not hold back the others.
    async fn peers_step(&mut self, slot: u8, steps: &[&Action]) -> Vec<Result<(), String>> {
        let device = slot_device(slot);
        let changes: Option<Vec<DeviceChange>> = steps.iter().map(|step| self.change(step)).collect();
        if let Some(changes) = changes
            && self.wireguard.apply(&device, &changes).await.is_ok()
        {
            return vec![Ok(()); steps.len()];
        }
        let mut results = Vec::with_capacity(steps.len());
        // What follows for a peer rests on what came before.
        let mut failed = BTreeSet::new();
        for step in steps {
            let peer = peer_of(step);
            let result = match self.change(step) {
                _ if failed.contains(&peer) => Err("the step before it failed".to_owned()),
                None => Err("this node does not have the pre-shared key".to_owned()),
                Some(change) => self
                    .wireguard
                    .apply(&device, &[change])
                    .await
                    .map_err(|error| error.to_string()),
            };
            if result.is_err() {
                failed.insert(peer);
            }
            results.push(result);
        }
        results
    }

    fn pre_shared_key(&self, slot: u8, peer: PublicKey, id: PskId) -> Option<PreSharedKey> {
        let own = *self.device_keys.get(&slot)?;
        self.keys.shared(&Ends { own, peer }, id)
    }

    fn change(&self, step: &Action) -> Option<DeviceChange> {
        Some(match *step {
            Action::SetKey { public_key, port, .. } => DeviceChange::SetDevice {
                private_key: PrivateKey::clone(&self.keys.private(&public_key)?.1),
                listen_port: port,
            },
            Action::SetPeer {
                slot,
                peer,
                pre_shared,
                endpoint,
                keepalive,
            } => DeviceChange::SetPeer {
                public_key: peer,
                pre_shared_key: match pre_shared {
                    Some(id) => Some(self.pre_shared_key(slot, peer, id)?),
                    None => None,
                },
                endpoint,
                keepalive_seconds: keepalive,
            },
            Action::RemovePeer { peer, .. } => DeviceChange::RemovePeer(peer),
            Action::AddAllowedIp { peer, prefix, .. } => DeviceChange::AddAllowedIp {
                public_key: peer,
                prefix,
            },
            Action::RemoveAllowedIp { peer, prefix, .. } => DeviceChange::RemoveAllowedIp {
                public_key: peer,
                prefix,
            },
            Action::ClearDevice(_) => DeviceChange::Clear,
            _ => return None,
        })
    }

    async fn single(&mut self, step: &Action) -> Result<(), String> {
        match step {
            Action::Attach(..)
            | Action::Detach(_)
            | Action::SetNodeAddress(..)
            | Action::RemoveNodeAddress(_)
            | Action::SetOwner(..)
            | Action::RemoveOwner(_)
            | Action::SetPath(..)
            | Action::WidenPath(..)
            | Action::NarrowPath(..)
            | Action::RemovePath(_)
            | Action::SetEndpoint(..)
            | Action::RemoveEndpoint(_)
            | Action::AttachTunnel(_) => self.program_step(step),
            Action::SetFirewall(firewall) => {
                self.net
                    .apply_nft(&self.nft(firewall))
                    .await
                    .map_err(|error| error.to_string())?;
                self.firewall = Some(firewall.clone());
                self.firewall_checked = Some(Instant::now());
                Ok(())
            }
            Action::RemoveFirewall => {
                self.net.remove_nft().await.map_err(|error| error.to_string())?;
                self.firewall = None;
                Ok(())
            }
            Action::CreateDevice { slot, mtu } => self.create(*slot, *mtu).await,
            Action::SetMtu { slot, mtu } => {
                self.configure(
                    *slot,
                    LinkConfig {
                        mtu: Some(*mtu),
                        ..quiet()
                    },
                )
                .await
            }
            Action::SetAddress { slot, address } => {
                let std::net::IpAddr::V4(address) = address.addr() else {
                    return Err("a link-scope address must be IPv4".into());
                };
                self.configure(
                    *slot,
                    LinkConfig {
                        link_address: Some(address),
                        ..quiet()
                    },
                )
                .await
            }
            Action::SetLink { slot, address } => {
                self.configure(
                    *slot,
                    LinkConfig {
                        link_local: Some(*address),
                        ..quiet()
                    },
                )
                .await
            }
            Action::DeviceUp(slot) => {
                self.configure(
                    *slot,
                    LinkConfig {
                        up: Some(true),
                        ..quiet()
                    },
                )
                .await
            }
            Action::SetKey { slot, .. } | Action::ClearDevice(slot) => {
                let change = self
                    .change(step)
                    .ok_or("this node does not have the private key")?;
                self.apply_to_device(*slot, change)
                    .await
                    .map_err(|error| error.to_string())?;
                match step {
                    Action::SetKey { public_key, .. } => self.device_keys.insert(*slot, *public_key),
                    _ => self.device_keys.remove(slot),
                };
                Ok(())
            }
            Action::SetRoute(..)
            | Action::RemoveRoute(..)
            | Action::AddRule(_)
            | Action::RemoveRule(_)
            | Action::SetPeer { .. }
            | Action::RemovePeer { .. }
            | Action::AddAllowedIp { .. }
            | Action::RemoveAllowedIp { .. } => Err("is executed in batches".into()),
        }
    }

    /// An engine that was started anew may not serve the device yet.
    async fn apply_to_device(
        &self,
        slot: u8,
        change: DeviceChange,
    ) -> Result<(), warren_wireguard::DeviceError> {
        let device = slot_device(slot);
        let changes = [change];
        match (self.wireguard.apply(&device, &changes).await, &self.wireguard) {
            (Err(warren_wireguard::DeviceError::Absent(_)), WireGuard::Userspace(driver)) => {
                driver.attach(&device).await?;
                self.wireguard.apply(&device, &changes).await
            }
            (result, _) => result,
        }
    }

    fn program_step(&mut self, step: &Action) -> Result<(), String> {
        let result = match step {
            Action::Attach(ifindex, programs) => return self.attach(*ifindex, *programs),
            Action::Detach(ifindex) => self.programs.lock().detach(*ifindex),
            Action::AttachTunnel(slot) => {
                let device = self.device(*slot)?;
                self.programs.lock().attach(device, Role::Tunnel { slot: *slot })
            }
            Action::SetNodeAddress(address, own) => self.programs.lock().set_node_address(*address, *own),
            Action::RemoveNodeAddress(address) => self.programs.lock().remove_node_address(*address),
            Action::SetOwner(prefix, owner) => {
                self.programs.lock().set_owner(*prefix, convert::owner_to(owner))
            }
            Action::RemoveOwner(prefix) => self.programs.lock().remove_owner(*prefix),
            Action::SetPath(node, path) | Action::WidenPath(node, path) | Action::NarrowPath(node, path) => {
                let path = warren_bpf::Path {
                    ifindex: self.device(path.slot)?,
                    receive_slots: path.receive,
                };
                self.programs.lock().set_path(*node, path)
            }
            Action::RemovePath(node) => self.programs.lock().remove_path(*node),
            Action::SetEndpoint(ifindex, entry) => self
                .programs
                .lock()
                .set_endpoint(&convert::endpoint_to(*ifindex, entry)),
            Action::RemoveEndpoint(ifindex) => self.programs.lock().remove_endpoint(*ifindex),
            other => return Err(format!("{other} is not about programs")),
        };
        result.map_err(|error| error.to_string())
    }

    fn attach(&mut self, ifindex: u32, programs: Programs) -> Result<(), String> {
        let role = match programs {
            Programs::Pod => Role::Pod,
            Programs::Barrier => Role::Barrier,
            Programs::Broken => return Err("nobody wants broken programs".into()),
        };
        let attached = self.programs.lock().attach(ifindex, role);
        match attached {
            Ok(()) => Ok(()),
            // The device went while the plan was on its way: the next plan knows.
            Err(warren_bpf::Error::NoDevice(_)) if role == Role::Barrier => Ok(()),
            Err(error @ warren_bpf::Error::UnsupportedDevice { .. }) if role == Role::Barrier => {
                tracing::warn!(%error, "no barrier there: routes and packet filter alone keep mesh traffic off it");
                self.unsupported.insert(ifindex);
                Ok(())
            }
            Err(error) => Err(error.to_string()),
        }
    }

    async fn create(&mut self, slot: u8, mtu: u32) -> Result<(), String> {
        let name = slot_device(slot);
        let ifindex = match self.ensure(&name).await {
            Err(warren_net::Error::WrongKind { found, wanted, .. })
                if matches!(found.as_str(), "tun" | "wireguard") =>
            {
                tracing::warn!(device = %name, %found, %wanted, "the datapath was changed: replacing the device");
                let link = self
                    .net
                    .link_by_name(&name)
                    .await
                    .map_err(|error| error.to_string())?;
                if let Some(link) = link {
                    self.net
                        .delete_link(link.ifindex)
                        .await
                        .map_err(|error| error.to_string())?;
                }
                self.ensure(&name).await
            }
            other => other,
        };
        let ifindex = ifindex.map_err(|error| error.to_string())?;
        self.devices.insert(slot, ifindex);
        let config = LinkConfig {
            mtu: Some(mtu),
            up: Some(false),
            txqueuelen: Some(QUEUE),
            ..quiet()
        };
        self.configure(slot, config).await
    }

    async fn ensure(&self, name: &str) -> Result<u32, warren_net::Error> {
        match self.wireguard {
            WireGuard::Kernel(_) => self.net.ensure_wireguard(name).await,
            WireGuard::Userspace(_) => self.net.ensure_tun(name).await,
        }
    }

    async fn configure(&self, slot: u8, config: LinkConfig) -> Result<(), String> {
        let ifindex = self.device(slot)?;
        self.net
            .configure_link(ifindex, &config)
            .await
            .map(drop)
            .map_err(|error| error.to_string())
    }

    fn nft(&self, firewall: &warren_agent_core::Firewall) -> NftConfig {
        NftConfig {
            tunnels: (0..warren_model::node::SLOTS).map(slot_device).collect(),
            safe: firewall.safe.clone(),
            pods: firewall.pod_pools.clone(),
            nodes: firewall.node_addresses.iter().copied().collect(),
            source_v4: firewall.source_v4,
            source_v6: firewall.source_v6,
            mark_mask: self.codec.mask(),
            tunnel_mark: self.codec.encode(warren_abi::TUNNEL_MARK),
            masquerade_mark: nft::KUBE_PROXY_MARK,
            barrier: self.encryption,
        }
    }

    /// What moves this node's packets.
    pub(crate) fn datapath(&self) -> Datapath {
        match self.wireguard {
            WireGuard::Kernel(_) => Datapath::Kernel,
            WireGuard::Userspace(_) => Datapath::Userspace,
        }
    }

    /// Reads a tunnel device with its counters.
    pub(crate) async fn dump(&self, slot: u8) -> Result<warren_wireguard::DeviceState, String> {
        self.wireguard
            .dump(&slot_device(slot))
            .await
            .map_err(|error| error.to_string())
    }

    /// Pods that are older than the agent, by their devices.
    pub(crate) async fn pod_veths(&self, netns_dir: &std::path::Path) -> Vec<warren_net::PodVeth> {
        self.net.pod_veths(netns_dir).await.unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot look for pods that are older than the agent");
            Vec::new()
        })
    }
}

/// The peer that a step is about.
fn peer_of(step: &Action) -> Option<PublicKey> {
    match step {
        Action::SetPeer { peer, .. }
        | Action::RemovePeer { peer, .. }
        | Action::AddAllowedIp { peer, .. }
        | Action::RemoveAllowedIp { peer, .. } => Some(*peer),
        _ => None,
    }
}

/// What every tunnel device is like.
fn quiet() -> LinkConfig {
    LinkConfig {
        rp_filter: Some(2),
        quiet: true,
        ..LinkConfig::default()
    }
}
