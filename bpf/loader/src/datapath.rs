//! The datapath of a node: programs, links and maps.

use std::{
    collections::{BTreeMap, HashMap},
    fmt, fs, io,
    net::IpAddr,
    path::{Path as FilePath, PathBuf},
};

use ipnet::IpNet;
use warren_abi::{
    DeviceValue, DropReason, Hook, MarkCodec, NodeValue, POOL_PODS, POOL_SERVICES, RoleTag, SettingsValue,
    TUNNEL_MARK, VERSION, limits,
};

use crate::{
    AttachMode, Attachment, Config, DropCount, Endpoint, Error, NodeAddress, Owner, Path, Role,
    attach::{Attacher, Mode},
    convert,
    maps::{Maps, node_address, node_key},
    programs::{Programs, program_of},
    sys::{self, Direction},
    trace::{self, Reasons},
};

/// The programs and maps of this node, loaded and pinned. Dropping the value leaves everything in place.
///
/// It works on the network namespace of the calling thread, and is neither `Sync` nor cheap to clone: one task
/// owns it. All changes are idempotent; removing what is absent succeeds.
///
/// # Pins
///
/// `v<ABI>/<map>` and `links/<ifindex>-<ingress|egress>`, `links/stack_drop`, `links/to_host`. Maps of another ABI version are
/// never adopted: the new ones start empty beside them, the links keep the old programs (and these the old
/// maps) until [`attach`](Self::attach) is called for their devices. So fill the maps first. The old maps are
/// removed with the last link that used them.
pub struct Datapath {
    pin_dir: PathBuf,
    marks: MarkCodec,
    pub(crate) maps_dir: PathBuf,
    pub(crate) links_dir: PathBuf,
    pub(crate) programs: Programs,
    pub(crate) maps: Maps,
    pub(crate) attacher: Attacher,
    reasons: Reasons,
    /// Device of each endpoint index in use.
    indexes: HashMap<u16, u32>,
    /// Maps of other ABI versions are still pinned.
    old_versions: bool,
}

impl Datapath {
    /// Loads the programs and pins their maps, or adopts the maps that are pinned already (same ABI version):
    /// entries, links and counters stay. A link with another program keeps it until [`attach`](Self::attach).
    pub fn open(config: &Config) -> Result<Self, Error> {
        let marks = MarkCodec::new(config.mark_mask).ok_or_else(|| {
            Error::Invalid(format!(
                "mark mask {:#x} has fewer than 13 bits: choose one with more",
                config.mark_mask
            ))
        })?;
        let maps_dir = config.pin_dir.join(format!("v{VERSION}"));
        let links_dir = config.pin_dir.join("links");
        create_directory(&config.pin_dir)?;
        if !sys::is_bpffs(&config.pin_dir).map_err(|source| io_error(&config.pin_dir, source))? {
            return Err(Error::NotBpffs(config.pin_dir.clone()));
        }
        create_directory(&maps_dir)?;
        create_directory(&links_dir)?;
        let mut programs = Programs::load(&maps_dir)?;
        let mut maps = Maps::take(programs.ebpf())?;
        let attacher = Attacher::new(mode(config.attach)?, links_dir.clone());
        let reasons = trace::start(&mut maps, &programs, &attacher, &links_dir)?;
        let mut datapath = Self {
            pin_dir: config.pin_dir.clone(),
            marks,
            maps_dir,
            links_dir,
            programs,
            maps,
            attacher,
            reasons,
            indexes: HashMap::new(),
            old_versions: true,
        };
        datapath.set_pools(config)?;
        datapath.set_settings(config.encryption)?;
        datapath.set_flow_state(config)?;
        datapath.retire_old_versions()?;
        Ok(datapath)
    }

    /// Makes the pools of pods and services those of the configuration. Additions come first.
    fn set_pools(&mut self, config: &Config) -> Result<(), Error> {
        let of =
            |pools: &[IpNet], kind| -> Vec<_> { pools.iter().map(|pool| (pool.trunc(), kind)).collect() };
        let mut wanted: BTreeMap<IpNet, u32> = BTreeMap::new();
        wanted.extend(of(&config.service_cidrs, POOL_SERVICES));
        wanted.extend(of(&config.pod_pools, POOL_PODS));
        let present: BTreeMap<IpNet, u32> = self.maps.pools.entries()?.into_iter().collect();
        for (prefix, kind) in &wanted {
            if present.get(prefix) != Some(kind) {
                self.maps.pools.set(*prefix, *kind)?;
            }
        }
        for prefix in present.keys().filter(|prefix| !wanted.contains_key(*prefix)) {
            self.maps.pools.remove(*prefix)?;
        }
        Ok(())
    }

    /// Writes the settings. Where the mask changed, the marks of the endpoints are encoded anew; packets under
    /// way in that moment may be dropped.
    fn set_settings(&mut self, encryption: bool) -> Result<(), Error> {
        let endpoints = self.endpoints()?;
        self.indexes = endpoints
            .iter()
            .map(|endpoint| (endpoint.index, endpoint.ifindex))
            .collect();
        let settings = SettingsValue {
            version: VERSION,
            mark_mask: self.marks.mask(),
            tunnel_mark: self.marks.encode(TUNNEL_MARK),
            encryption: encryption.into(),
        };
        let before = self.maps.settings.get()?;
        if before == settings {
            return Ok(());
        }
        self.maps.settings.set(settings)?;
        if before.version != 0 && before.mark_mask != settings.mark_mask {
            for (mark, _) in self.maps.identities.entries()? {
                self.maps.identities.remove(mark)?;
            }
            for endpoint in &endpoints {
                self.set_endpoint(endpoint)?;
            }
            // Flows remember marks.
            self.raise_revision()?;
        }
        Ok(())
    }

    /// Gives a device the programs of a role; no change where it has them. Programs of another role or version
    /// are replaced in place, and a link whose device was deleted by a new one. Ours run before all others.
    pub fn attach(&mut self, ifindex: u32, role: Role) -> Result<(), Error> {
        let value = device_value(ifindex, role)?;
        if self.maps.devices.get(ifindex)? != Some(value) {
            self.maps.devices.set(ifindex, value)?;
        }
        for direction in Direction::BOTH {
            self.attacher.attach(&self.programs, ifindex, role, direction)?;
        }
        self.retire_old_versions()
    }

    /// Takes all programs of ours from a device, which may be gone. One that stays is open from now on: only for
    /// devices that were deleted, and for good reasons.
    pub fn detach(&mut self, ifindex: u32) -> Result<(), Error> {
        self.attacher.detach(ifindex)?;
        self.maps.devices.remove(ifindex)?;
        self.retire_old_versions()
    }

    /// All devices with programs of ours, also those whose device is gone (then not healthy), by ifindex.
    pub fn attached(&self) -> Result<Vec<Attachment>, Error> {
        let mut roles = BTreeMap::new();
        for (ifindex, direction, program) in self.attacher.pinned()? {
            let name = program.map(|program| program.name).unwrap_or_default();
            let role = [Role::Pod, Role::Tunnel { slot: 0 }, Role::Barrier]
                .into_iter()
                .find(|role| program_of(*role, direction) == name);
            roles.insert(ifindex, role.unwrap_or(Role::Barrier));
        }
        for (ifindex, device) in self.maps.devices.entries()? {
            roles.insert(ifindex, role_of(device));
        }
        let mut found = Vec::new();
        for (ifindex, role) in roles {
            let mut healthy = self.maps.devices.get(ifindex)?.is_some();
            for direction in Direction::BOTH {
                healthy = healthy
                    && self
                        .attacher
                        .is_attached(&self.programs, ifindex, role, direction)?;
            }
            found.push(Attachment {
                ifindex,
                role,
                healthy,
            });
        }
        Ok(found)
    }

    /// Sets a pod; replaces what was there for the device at one moment.
    pub fn set_endpoint(&mut self, endpoint: &Endpoint) -> Result<(), Error> {
        let value = convert::endpoint_value(endpoint, self.marks)?;
        match self.indexes.get(&endpoint.index) {
            Some(other) if *other != endpoint.ifindex => {
                return Err(Error::Invalid(format!(
                    "endpoint index {} of device {} is in use by device {other}",
                    endpoint.index, endpoint.ifindex
                )));
            }
            Some(_) | None => {}
        }
        let before = self.maps.endpoints.get(endpoint.ifindex)?;
        self.maps
            .identities
            .set(value.mark, convert::mark_value(&value))?;
        self.maps.endpoints.set(endpoint.ifindex, value)?;
        self.indexes.insert(endpoint.index, endpoint.ifindex);
        match before {
            Some(before) if before.index != endpoint.index => self.release_index(before.index),
            Some(_) | None => Ok(()),
        }
    }

    /// Removes the pod of a device: all its packets are dropped from now on.
    pub fn remove_endpoint(&mut self, ifindex: u32) -> Result<(), Error> {
        let before = self.maps.endpoints.get(ifindex)?;
        self.maps.endpoints.remove(ifindex)?;
        before.map_or(Ok(()), |before| self.release_index(before.index))
    }

    fn release_index(&mut self, index: u16) -> Result<(), Error> {
        self.indexes.remove(&index);
        self.maps.identities.remove(self.marks.encode(index))
    }

    /// All pods, by ifindex.
    pub fn endpoints(&self) -> Result<Vec<Endpoint>, Error> {
        let mut found: Vec<_> = self
            .maps
            .endpoints
            .entries()?
            .into_iter()
            .map(|(ifindex, value)| convert::endpoint(ifindex, &value))
            .collect();
        found.sort_by_key(|endpoint| endpoint.ifindex);
        Ok(found)
    }

    /// Sets the owner of a prefix; the most specific prefix of an address decides.
    pub fn set_owner(&mut self, prefix: IpNet, owner: Owner) -> Result<(), Error> {
        self.maps.owners.set(prefix, convert::owner_value(prefix, owner)?)
    }

    /// Removes the owner of a prefix.
    pub fn remove_owner(&mut self, prefix: IpNet) -> Result<(), Error> {
        self.maps.owners.remove(prefix)
    }

    /// All owners, by prefix.
    pub fn owners(&self) -> Result<Vec<(IpNet, Owner)>, Error> {
        let entries = self.maps.owners.entries()?;
        Ok(entries
            .into_iter()
            .filter_map(|(prefix, value)| Some((prefix, convert::owner(value)?)))
            .collect())
    }

    /// Sets the path of a node (1 and up): one map write, the next packet takes it.
    pub fn set_path(&mut self, node: u16, path: Path) -> Result<(), Error> {
        self.maps.paths.set(node.into(), convert::path_value(node, path)?)
    }

    /// Removes the path of a node: packets to and from it are dropped.
    pub fn remove_path(&mut self, node: u16) -> Result<(), Error> {
        self.maps.paths.remove(node.into())
    }

    /// All paths, by node.
    pub fn paths(&self) -> Result<Vec<(u16, Path)>, Error> {
        let mut found: Vec<_> = self
            .maps
            .paths
            .entries()?
            .into_iter()
            .map(|(node, value)| (node as u16, convert::path(value)))
            .collect();
        found.sort_by_key(|(node, _)| *node);
        Ok(found)
    }

    /// Tells the barrier an address of a mesh node; `own`: it is this node's.
    pub fn set_node_address(&mut self, address: IpAddr, own: bool) -> Result<(), Error> {
        if address.is_unspecified() {
            return Err(Error::Invalid(format!("{address} is no address of a node")));
        }
        self.maps
            .nodes
            .set(node_key(address), NodeValue { own: own.into() })
    }

    /// Removes an address of a node from the barrier.
    pub fn remove_node_address(&mut self, address: IpAddr) -> Result<(), Error> {
        self.maps.nodes.remove(node_key(address))
    }

    /// All addresses of nodes that the barrier knows.
    pub fn node_addresses(&self) -> Result<Vec<NodeAddress>, Error> {
        let entries = self.maps.nodes.entries()?.into_iter();
        let mut found: Vec<_> = entries
            .map(|(key, value)| NodeAddress {
                address: node_address(key),
                own: value.own != 0,
            })
            .collect();
        found.sort_by_key(|node| node.address);
        Ok(found)
    }

    /// Dropped packets by reason, over all places, the kernel's own drops included. Reasons that never occurred
    /// are listed with 0, except the kernel's.
    pub fn drops(&self) -> Result<Vec<(String, u64)>, Error> {
        let mut sums: BTreeMap<String, u64> = DropReason::ALL
            .iter()
            .map(|reason| (reason.name().to_owned(), 0))
            .collect();
        for count in self.drops_by_hook()? {
            *sums.entry(count.reason).or_default() += count.packets;
        }
        Ok(sums.into_iter().collect())
    }

    /// Dropped packets by place and reason; only those that occurred.
    pub fn drops_by_hook(&self) -> Result<Vec<DropCount>, Error> {
        let mut found = Vec::new();
        for hook in Hook::ALL {
            for reason in DropReason::ALL {
                let packets = self
                    .maps
                    .drops
                    .total(*hook as u32 * limits::REASONS + *reason as u32)?;
                if packets > 0 {
                    found.push(DropCount {
                        hook: hook.name().into(),
                        reason: reason.name().into(),
                        packets,
                    });
                }
            }
        }
        for number in 0..limits::STACK_REASONS {
            let packets = self.maps.stack_drops.total(number)?;
            if packets > 0 {
                found.push(DropCount {
                    hook: "stack".into(),
                    reason: self.reasons.name(number),
                    packets,
                });
            }
        }
        self.add_stack_sites(&mut found)?;
        Ok(found)
    }

    /// Adds the kernel's drops without a reason, by place; places with one name are one reason.
    fn add_stack_sites(&self, found: &mut Vec<DropCount>) -> Result<(), Error> {
        let totals = self.maps.stack_sites.totals()?;
        let places: Vec<u64> = totals.iter().map(|(place, _)| *place).collect();
        for (reason, (_, packets)) in self.reasons.place_names(&places).into_iter().zip(totals) {
            match found
                .iter_mut()
                .find(|count| count.hook == "stack" && count.reason == reason)
            {
                Some(count) => count.packets += packets,
                None => found.push(DropCount {
                    hook: "stack".into(),
                    reason,
                    packets,
                }),
            }
        }
        Ok(())
    }

    /// Unpins the maps of other ABI versions once no link runs a program that uses them.
    pub(crate) fn retire_old_versions(&mut self) -> Result<(), Error> {
        if !self.old_versions {
            return Ok(());
        }
        let old = old_versions(&self.pin_dir)?;
        if old.is_empty() {
            self.old_versions = false;
            return Ok(());
        }
        for attachment in self.attached()? {
            if !attachment.healthy {
                return Ok(());
            }
        }
        if self.host_program()?.is_some_and(|(_, current)| !current) {
            return Ok(());
        }
        for directory in old {
            remove_pins(&directory)?;
        }
        self.old_versions = false;
        Ok(())
    }
}

impl fmt::Debug for Datapath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Datapath")
            .field("pin_dir", &self.pin_dir)
            .finish_non_exhaustive()
    }
}

fn mode(wanted: AttachMode) -> Result<Mode, Error> {
    let describe = |source| Error::Kernel {
        operation: "query for TCX".into(),
        source,
    };
    match wanted {
        AttachMode::Clsact => Ok(Mode::Clsact),
        AttachMode::Auto | AttachMode::Tcx if sys::has_tcx().map_err(describe)? => Ok(Mode::Tcx),
        AttachMode::Auto => Ok(Mode::Clsact),
        AttachMode::Tcx => Err(Error::Invalid(
            "this kernel has no TCX (6.6 and later): use clsact".into(),
        )),
    }
}

/// ARPHRD numbers that libc lacks: packets without a header, GRE over IPv6.
const ARPHRD_RAWIP: u16 = 519;
const ARPHRD_IP6GRE: u16 = 823;

/// Link types by ARPHRD number: Ethernet and loopback have a header of 14 bytes; those without one are TUN and
/// WireGuard (none, raw IP), tunnels (IPIP, IP6IP6, SIT, GRE, GRE over IPv6) and PPP.
fn l2_length(ifindex: u32) -> Result<u8, Error> {
    let describe = |source| Error::Kernel {
        operation: format!("query of device {ifindex}"),
        source,
    };
    match sys::link_type(ifindex)
        .map_err(describe)?
        .ok_or(Error::NoDevice(ifindex))?
    {
        libc::ARPHRD_ETHER | libc::ARPHRD_LOOPBACK => Ok(14),
        libc::ARPHRD_NONE
        | ARPHRD_RAWIP
        | libc::ARPHRD_TUNNEL
        | libc::ARPHRD_TUNNEL6
        | libc::ARPHRD_SIT
        | libc::ARPHRD_IPGRE
        | ARPHRD_IP6GRE
        | libc::ARPHRD_PPP => Ok(0),
        link_type => Err(Error::UnsupportedDevice { ifindex, link_type }),
    }
}

fn device_value(ifindex: u32, role: Role) -> Result<DeviceValue, Error> {
    let l2_length = l2_length(ifindex)?;
    let (tag, slot, slot_bit) = match role {
        Role::Pod if l2_length != 14 => {
            return Err(Error::Invalid(format!(
                "device {ifindex} is no Ethernet device: it cannot be a pod's"
            )));
        }
        Role::Pod => (RoleTag::Pod, 0, 0),
        Role::Tunnel { slot } if slot >= warren_abi::MAX_SLOTS => {
            return Err(Error::Invalid(format!(
                "slot {slot} is none: there are {}",
                warren_abi::MAX_SLOTS
            )));
        }
        Role::Tunnel { slot } => (RoleTag::Tunnel, slot, 1 << slot),
        Role::Barrier => (RoleTag::Barrier, 0, 0),
    };
    Ok(DeviceValue {
        l2_length,
        slot_bit,
        slot,
        role: tag as u8,
    })
}

fn role_of(device: DeviceValue) -> Role {
    match RoleTag::parse(device.role) {
        Some(RoleTag::Pod) => Role::Pod,
        Some(RoleTag::Tunnel) => Role::Tunnel { slot: device.slot },
        Some(RoleTag::Barrier) | None => Role::Barrier,
    }
}

fn create_directory(path: &FilePath) -> Result<(), Error> {
    fs::create_dir_all(path).map_err(|source| io_error(path, source))
}

/// Directories of maps of other ABI versions.
fn old_versions(pin_dir: &FilePath) -> Result<Vec<PathBuf>, Error> {
    let mut found = Vec::new();
    for entry in fs::read_dir(pin_dir).map_err(|source| io_error(pin_dir, source))? {
        let entry = entry.map_err(|source| io_error(pin_dir, source))?;
        let version = entry
            .file_name()
            .to_str()
            .and_then(|name| name.strip_prefix('v')?.parse::<u32>().ok());
        if version.is_some_and(|version| version != VERSION) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

fn remove_pins(directory: &FilePath) -> Result<(), Error> {
    match fs::remove_dir_all(directory) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(io_error(directory, source)),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn io_error(path: &FilePath, source: io::Error) -> Error {
    Error::Io {
        path: path.to_owned(),
        source,
    }
}
