//! Links, addresses, routes, rules, nftables, MTU and network namespaces of the node.
//!
//! Everything is level-triggered: the caller hands over the whole desired state, this crate changes the difference,
//! and doing it twice is harmless. What this crate puts into the kernel carries its own mark (routing protocol
//! [`PROTOCOL`], nft tables named [`nft::TABLE`], rule comments), and only what carries it is ever removed.
//!
//! This crate knows neither the directory, nor WireGuard's configuration, nor eBPF, and never enters a network
//! namespace on a thread that lives longer than one call.

mod address;
mod device;
mod error;
mod forward;
mod link;
mod mtu;
pub mod netns;
pub mod nft;
mod pods;
mod request;
mod route;
mod rule;
mod sysctl;
mod tool;
mod tun;
mod watch;

use std::{net::IpAddr, path::Path};

use futures::Stream;
use ipnet::IpNet;

pub use device::LinkConfig;
pub use error::Error;
pub use forward::{ForwardBlock, ForwardFamily, ForwardTool};
pub use link::{Link, LinkKind};
pub use mtu::{UnderlayMtu, tunnel_mtu};
pub use nft::{Counter, NftConfig};
pub use pods::{PodVeth, SeenBy};
pub use route::{Route, RouteChanges, RouteKind};
pub use rule::{Family, Rule, RuleChanges};
pub use sysctl::{set_sysctl, sysctl};
pub use watch::LinkEvent;

/// The routing protocol number ("warren") on every route and rule that this crate owns.
pub const PROTOCOL: u8 = 141;

/// Whether the kernel has IPv6. It may still be off for devices, where it can be turned on.
pub fn has_ipv6() -> bool {
    sysctl("net/ipv6/conf/all/disable_ipv6").is_ok()
}

/// A handle on the network namespace in which [`Net::open`] was called. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Net {
    handle: rtnetlink::Handle,
}

impl Net {
    /// Opens the route netlink socket in the calling thread's network namespace and spawns the task that serves it
    /// on the current tokio runtime.
    pub async fn open() -> Result<Self, Error> {
        let (connection, handle, _) = rtnetlink::new_connection_with_strict_check().map_err(Error::Open)?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// Every network device of the namespace.
    pub async fn links(&self) -> Result<Vec<Link>, Error> {
        link::list(&self.handle).await
    }

    /// The device of that name, if there is one.
    pub async fn link_by_name(&self, name: &str) -> Result<Option<Link>, Error> {
        Ok(self.links().await?.into_iter().find(|link| link.name == name))
    }

    /// Changes of devices, addresses and of our own routes and rules from now on. Subscribe first, then list, so
    /// that nothing is missed. After [`LinkEvent::Resync`] events were lost: list again.
    pub fn watch(&self) -> Result<impl Stream<Item = LinkEvent> + Send + Unpin + use<>, Error> {
        watch::watch()
    }

    /// Every address of the namespace with its device index; the prefix length is the address's own.
    pub async fn addresses(&self) -> Result<Vec<(u32, IpNet)>, Error> {
        address::list(&self.handle).await
    }

    /// Whether the kernel can make WireGuard devices: makes one under a scratch name and deletes it at once.
    pub async fn kernel_has_wireguard(&self) -> Result<bool, Error> {
        device::kernel_has_wireguard(&self.handle).await
    }

    /// Makes the persistent TUN device `name` (layer 3, no packet information header), down, or keeps the one there
    /// is. Returns its index. A device of that name but another kind is an error.
    pub async fn ensure_tun(&self, name: &str) -> Result<u32, Error> {
        device::ensure_tun(&self.handle, name).await
    }

    /// Makes the kernel WireGuard device `name`, down, or keeps the one there is. Returns its index.
    pub async fn ensure_wireguard(&self, name: &str) -> Result<u32, Error> {
        device::ensure_wireguard(&self.handle, name).await
    }

    /// Deletes a device; one that is gone already is no error.
    pub async fn delete_link(&self, ifindex: u32) -> Result<(), Error> {
        device::delete(&self.handle, ifindex).await
    }

    /// Brings a device to what `config` says, changing only what differs. Returns whether anything changed.
    pub async fn configure_link(&self, ifindex: u32, config: &LinkConfig) -> Result<bool, Error> {
        device::configure(&self.handle, ifindex, config).await
    }

    /// The routes of ours (protocol [`PROTOCOL`]) in all tables.
    pub async fn routes(&self) -> Result<Vec<Route>, Error> {
        route::list(&self.handle).await
    }

    /// Makes our routes exactly `desired`: adds what is missing, replaces in place what differs, deletes what is
    /// surplus, in an order in which a destination is never without cover (blackholes first, deleted last). A route
    /// that the kernel refuses is reported in [`RouteChanges::failed`] and does not keep the others back.
    pub async fn apply_routes(&self, desired: &[Route]) -> Result<RouteChanges, Error> {
        route::apply(&self.handle, desired).await
    }

    /// The routing rules of ours (protocol [`PROTOCOL`]), both families.
    pub async fn rules(&self) -> Result<Vec<Rule>, Error> {
        rule::list(&self.handle).await
    }

    /// Makes our rules exactly `desired`; like [`Net::apply_routes`].
    pub async fn apply_rules(&self, desired: &[Rule]) -> Result<RuleChanges, Error> {
        rule::apply(&self.handle, desired).await
    }

    /// Makes the nft tables what `config` says in one transaction; counters keep their values. Needs the `nft` tool.
    pub async fn apply_nft(&self, config: &NftConfig) -> Result<(), Error> {
        nft::apply(config).await
    }

    /// The nft tables' named counters; `None` where the tables are not there (never applied, or flushed by others).
    pub async fn nft_counters(&self) -> Result<Option<Vec<Counter>>, Error> {
        nft::counters().await
    }

    /// Deletes the nft tables; absent ones are no error.
    pub async fn remove_nft(&self) -> Result<(), Error> {
        nft::remove().await
    }

    /// Every FORWARD chain that drops by default and has no accept of ours yet.
    pub async fn forward_policy(&self) -> Result<Vec<ForwardBlock>, Error> {
        forward::blocks().await
    }

    /// Inserts an accept for `warren*` into each chain of [`Net::forward_policy`], with the chain's own tool, and
    /// returns what was done. Idempotent.
    pub async fn allow_forward(&self) -> Result<Vec<ForwardBlock>, Error> {
        forward::allow().await
    }

    /// Takes back what [`Net::allow_forward`] inserted. Idempotent.
    pub async fn revoke_forward(&self) -> Result<(), Error> {
        forward::revoke().await
    }

    /// Looks up the route to every endpoint: the smallest MTU on the way out, and by which devices.
    pub async fn underlay_mtu(&self, endpoints: &[IpAddr]) -> Result<UnderlayMtu, Error> {
        mtu::underlay(&self.handle, endpoints).await
    }

    /// The host ends of pods' veths with the pods' addresses, from the named network namespaces in `netns_dir`
    /// (`/run/netns`), from host routes to single addresses, and from neighbour and bridge tables: for pods that
    /// are older than the agent.
    pub async fn pod_veths(&self, netns_dir: &Path) -> Result<Vec<PodVeth>, Error> {
        pods::find(&self.handle, netns_dir).await
    }
}
