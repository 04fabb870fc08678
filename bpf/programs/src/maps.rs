//! The maps as the verdicts see them.

use warren_abi::{DeviceValue, EndpointValue, NodeValue, OwnerValue, PathValue, SettingsValue};

use crate::Address;

/// Lookups in the maps of the node.
pub trait Maps {
    /// What holds for all packets; `None` before the loader wrote it.
    fn settings(&self) -> Option<&SettingsValue>;
    /// A tunnel or barrier device.
    fn device(&self, ifindex: u32) -> Option<&DeviceValue>;
    /// The pod at a device.
    fn endpoint(&self, ifindex: u32) -> Option<&EndpointValue>;
    /// Identity of the endpoint with this encoded mark, 0 where there is none.
    fn endpoint_identity(&self, mark: u32) -> u32;
    /// Most specific owner of an address.
    fn owner(&self, address: &Address) -> Option<&OwnerValue>;
    /// Path of a node.
    fn path(&self, node: u16) -> Option<&PathValue>;
    /// The address lies in a pod pool.
    fn is_pod(&self, address: &Address) -> bool;
    /// The address is a mesh node's.
    fn node(&self, address: &Address) -> Option<&NodeValue>;
}
