//! The node's drivers behind two operations: read everything, execute a plan. One task owns it.

mod convert;
mod execute;
mod handshakes;
mod observe;
mod policy;

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result};
use tokio::time::Instant;
use warren_abi::MarkCodec;
use warren_agent_core::{Firewall, Settings};
use warren_model::{Datapath, PublicKey};
use warren_net::Net;
use warren_wireguard::{DeviceChange, DeviceError, DeviceState, Kernel, Userspace, WgDevice};

use crate::{cli::RunOptions, keys::KeyStore, policy::node_cgroup};

pub(crate) use policy::{
    Programs, direction_from as policy_direction, judge as judge_policy, maps as policy_maps,
    write as write_policy,
};

/// How often things are looked at that send no event.
const SLOW_CHECK: std::time::Duration = std::time::Duration::from_secs(10);

/// The drivers, and what they do not tell about themselves.
pub(crate) struct Machine {
    net: Net,
    programs: Programs,
    /// Where the host's sockets are judged, or why nowhere.
    cgroup: Result<std::path::PathBuf, String>,
    /// Why the host's sockets are not judged.
    host_fault: Option<String>,
    wireguard: WireGuard,
    keys: KeyStore,
    codec: MarkCodec,
    encryption: bool,
    /// What the packet filter was last given; it cannot be read back in this form.
    firewall: Option<Firewall>,
    firewall_checked: Option<Instant>,
    /// As of the last observation, with the changes since.
    devices: BTreeMap<u8, u32>,
    device_keys: BTreeMap<u8, PublicKey>,
    routes: Vec<warren_net::Route>,
    rules: Vec<warren_net::Rule>,
    /// Devices whose packets no program can judge: said once.
    unsupported: BTreeSet<u32>,
    handshakes: handshakes::Handshakes,
    /// What could not be observed: a sentence each.
    faults: Vec<String>,
}

/// The WireGuard driver of this node's kind.
enum WireGuard {
    Kernel(Kernel),
    Userspace(Userspace),
}

impl WireGuard {
    async fn dump(&self, device: &str) -> Result<DeviceState, DeviceError> {
        match self {
            Self::Kernel(driver) => driver.dump(device).await,
            Self::Userspace(driver) => driver.dump(device).await,
        }
    }

    async fn apply(&self, device: &str, changes: &[DeviceChange]) -> Result<(), DeviceError> {
        match self {
            Self::Kernel(driver) => driver.apply(device, changes).await,
            Self::Userspace(driver) => driver.apply(device, changes).await,
        }
    }
}

impl Machine {
    /// Opens all drivers. The programs and maps of an agent before are adopted.
    pub(crate) fn open(
        net: Net,
        datapath: Datapath,
        settings: &Settings,
        keys: KeyStore,
        options: &RunOptions,
    ) -> Result<Self> {
        let config = &settings.config;
        let programs = warren_bpf::Datapath::open(&warren_bpf::Config {
            pin_dir: options.bpffs.clone(),
            mark_mask: config.mark_mask,
            pod_pools: config.pod_pools.clone(),
            attach: warren_bpf::AttachMode::Auto,
            encryption: config.encryption,
            service_cidrs: config.service_cidrs.clone(),
            node_ports: config.node_ports,
            wireguard_ports: (
                config.slot_port(0),
                config.slot_port(warren_model::node::SLOTS - 1),
            ),
        })
        .context("cannot open the eBPF datapath")?;
        let wireguard = match datapath {
            Datapath::Kernel => {
                WireGuard::Kernel(Kernel::connect().context("cannot reach the kernel's WireGuard")?)
            }
            Datapath::Userspace => WireGuard::Userspace(Userspace::new(&options.wireguard_dir)),
        };
        Ok(Self {
            net,
            programs: Programs::new(programs),
            cgroup: node_cgroup(options.cgroup.as_deref()),
            host_fault: None,
            wireguard,
            keys,
            codec: MarkCodec::new(config.mark_mask).context("markMask has fewer than 13 bits")?,
            encryption: config.encryption,
            firewall: None,
            firewall_checked: None,
            devices: BTreeMap::new(),
            device_keys: BTreeMap::new(),
            routes: Vec::new(),
            rules: Vec::new(),
            unsupported: BTreeSet::new(),
            handshakes: handshakes::Handshakes::default(),
            faults: Vec::new(),
        })
    }

    /// Things that send no event are looked at again with the next observation.
    pub(crate) fn look_closely(&mut self) {
        self.firewall_checked = None;
    }

    /// What could not be read at the last observation.
    pub(crate) fn faults(&self) -> &[String] {
        &self.faults
    }

    /// The interface index of a slot's device.
    pub(crate) fn ifindex(&self, slot: u8) -> Option<u32> {
        self.devices.get(&slot).copied()
    }

    /// The programs and maps.
    pub(crate) fn programs(&self) -> Programs {
        self.programs.clone()
    }

    /// Sees to it that what reaches sockets of the host is judged.
    pub(crate) fn attach_host(&mut self) {
        let result = self.cgroup.clone().and_then(|cgroup| {
            let mut programs = self.programs.lock();
            match programs.host_attached(&cgroup) {
                Ok(true) => Ok(()),
                Ok(false) | Err(_) => programs.attach_host(&cgroup).map_err(|error| error.to_string()),
            }
        });
        let fault = result.err().map(|error| {
            format!(
                "connections to this node's own sockets are not judged (neither by host policies, nor by the egress \
                 policies of its pods): {error}"
            )
        });
        if let Some(fault) = fault.as_ref().filter(|_| self.host_fault.is_none()) {
            tracing::error!(%fault, "policy is not complete");
        }
        self.host_fault = fault;
    }

    /// Why what reaches the host's sockets is not judged; `None` where it is.
    pub(crate) fn host_fault(&self) -> Option<&String> {
        self.host_fault.as_ref()
    }

    /// What the kernel and the CPU do for a device of the tunnel process, a line.
    pub(crate) async fn offloads(&self, slot: u8) -> Option<String> {
        match &self.wireguard {
            WireGuard::Kernel(_) => None,
            WireGuard::Userspace(driver) => {
                let stats = driver.stats(&warren_agent_core::slot_device(slot)).await;
                stats.ok().map(|stats| stats.offloads.to_string())
            }
        }
    }

    /// Dropped packets by reason: the programs', the stack's, the packet filter's and the engine's.
    pub(crate) async fn drops(&self) -> BTreeMap<String, u64> {
        let mut drops: BTreeMap<String, u64> = BTreeMap::new();
        let counts = self.programs.lock().drops();
        match counts {
            Ok(counts) => counts
                .into_iter()
                .for_each(|(reason, count)| *drops.entry(reason).or_default() += count),
            Err(error) => tracing::warn!(%error, "the programs' drop counters cannot be read"),
        }
        if self.encryption
            && let Ok(Some(counters)) = self.net.nft_counters().await
        {
            for counter in counters {
                drops.insert(format!("nft-{}", counter.name.replace('_', "-")), counter.packets);
            }
        }
        if let WireGuard::Userspace(driver) = &self.wireguard {
            for slot in self.devices.keys() {
                let Ok(stats) = driver.stats(&warren_agent_core::slot_device(*slot)).await else {
                    continue;
                };
                for (reason, count) in stats.drops {
                    *drops.entry(format!("tunnel-{reason}")).or_default() += count;
                }
            }
        }
        drops
    }

    /// Makes sure that no FORWARD chain of somebody else's drops what the tunnel carries.
    pub(crate) async fn allow_forward(&self) {
        let result = if self.encryption {
            self.net.allow_forward().await
        } else {
            Ok(Vec::new())
        };
        match result {
            Ok(done) => done
                .iter()
                .for_each(|block| tracing::info!(%block, "accept inserted: its policy drops")),
            Err(error) => tracing::warn!(%error, "cannot see to FORWARD chains that drop"),
        }
    }
}
