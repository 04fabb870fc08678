//! The datapath of a node: programs, links and maps.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::{Attachment, Config, DropCount, Endpoint, Error, NodeAddress, Owner, Path, Role};

/// The programs and maps of this node, loaded and pinned. Dropping the value leaves everything in place.
///
/// It works on the network namespace of the calling thread, and is neither `Sync` nor cheap to clone: one task
/// owns it. All changes are idempotent; removing what is absent succeeds.
#[derive(Debug)]
pub struct Datapath {
    config: Config,
}

fn pending<T>() -> Result<T, Error> {
    Err(Error::Invalid("the datapath is not built yet".into()))
}

impl Datapath {
    /// Loads the programs and pins their maps, or adopts the maps that are pinned already (same ABI version):
    /// entries, links and counters stay. A link with another program keeps it until [`attach`](Self::attach).
    pub fn open(config: &Config) -> Result<Self, Error> {
        let _ = Self { config: config.clone() };
        pending()
    }

    /// Gives a device the programs of a role; no change where it has them. Programs of another role or version
    /// are replaced in place, and a link whose device was deleted by a new one.
    pub fn attach(&mut self, ifindex: u32, role: Role) -> Result<(), Error> {
        let _ = (&self.config, ifindex, role);
        pending()
    }

    /// Takes all programs of ours from a device, which may be gone.
    pub fn detach(&mut self, ifindex: u32) -> Result<(), Error> {
        let _ = ifindex;
        pending()
    }

    /// All devices with programs of ours, also those whose device is gone (then not healthy), by ifindex.
    pub fn attached(&self) -> Result<Vec<Attachment>, Error> {
        pending()
    }

    /// Sets a pod; replaces what was there for the device at one moment.
    pub fn set_endpoint(&mut self, endpoint: &Endpoint) -> Result<(), Error> {
        let _ = endpoint;
        pending()
    }

    /// Removes the pod of a device: all its packets are dropped from now on.
    pub fn remove_endpoint(&mut self, ifindex: u32) -> Result<(), Error> {
        let _ = ifindex;
        pending()
    }

    /// All pods, by ifindex.
    pub fn endpoints(&self) -> Result<Vec<Endpoint>, Error> {
        pending()
    }

    /// Sets the owner of a prefix; the most specific prefix of an address decides.
    pub fn set_owner(&mut self, prefix: IpNet, owner: Owner) -> Result<(), Error> {
        let _ = (prefix, owner);
        pending()
    }

    /// Removes the owner of a prefix.
    pub fn remove_owner(&mut self, prefix: IpNet) -> Result<(), Error> {
        let _ = prefix;
        pending()
    }

    /// All owners, by prefix.
    pub fn owners(&self) -> Result<Vec<(IpNet, Owner)>, Error> {
        pending()
    }

    /// Sets the path of a node (1 and up): one map write, the next packet takes it.
    pub fn set_path(&mut self, node: u16, path: Path) -> Result<(), Error> {
        let _ = (node, path);
        pending()
    }

    /// Removes the path of a node: packets to and from it are dropped.
    pub fn remove_path(&mut self, node: u16) -> Result<(), Error> {
        let _ = node;
        pending()
    }

    /// All paths, by node.
    pub fn paths(&self) -> Result<Vec<(u16, Path)>, Error> {
        pending()
    }

    /// Tells the barrier an address of a mesh node; `own`: it is this node's.
    pub fn set_node_address(&mut self, address: IpAddr, own: bool) -> Result<(), Error> {
        let _ = (address, own);
        pending()
    }

    /// Removes an address of a node from the barrier.
    pub fn remove_node_address(&mut self, address: IpAddr) -> Result<(), Error> {
        let _ = address;
        pending()
    }

    /// All addresses of nodes that the barrier knows.
    pub fn node_addresses(&self) -> Result<Vec<NodeAddress>, Error> {
        pending()
    }

    /// Dropped packets by reason, over all places, the kernel's own drops included. Reasons that never occurred
    /// are listed with 0, except the kernel's.
    pub fn drops(&self) -> Result<Vec<(String, u64)>, Error> {
        pending()
    }

    /// Dropped packets by place and reason; only those that occurred.
    pub fn drops_by_hook(&self) -> Result<Vec<DropCount>, Error> {
        pending()
    }
}
