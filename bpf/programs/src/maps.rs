//! The maps as the verdicts see them.

use core::ops::Deref;

use warren_abi::{
    DeviceValue, EndpointValue, Event, FlowKey, FlowState, FlowValue, FragmentKey, FragmentValue, MarkValue,
    NodeValue, OwnerValue, PathValue, PolicyValue, PortKey, PortValue, RepeatKey, RepeatValue, SettingsValue,
    VerdictKey, VerdictValue,
};

use crate::{
    Address,
    cells::{FlowCells, RepeatCells},
};

/// Where a flow is kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Table {
    /// Flows that have not seen a reply.
    #[default]
    New,
    /// Flows that have: never evicted.
    Established,
}

/// The maps of the node, and its clock.
pub trait Maps {
    /// A flow in its map.
    type Flow: Deref<Target = FlowCells>;
    /// An event in its map.
    type Repeat: Deref<Target = RepeatCells>;

    /// Nanoseconds of the monotonic clock.
    fn clock(&self) -> u64;
    /// What holds for all packets; `None` before the loader wrote it.
    fn settings(&self) -> Option<&SettingsValue>;
    /// A tunnel or barrier device.
    fn device(&self, ifindex: u32) -> Option<&DeviceValue>;
    /// The pod at a device.
    fn endpoint(&self, ifindex: u32) -> Option<&EndpointValue>;
    /// The local endpoint with this encoded mark (not judged).
    fn marked(&self, mark: u32) -> Option<&MarkValue>;
    /// Most specific owner of an address.
    fn owner(&self, address: &Address) -> Option<&OwnerValue>;
    /// Path of a node.
    fn path(&self, node: u16) -> Option<&PathValue>;
    /// What the address is by the pool that holds it; `None` where none does.
    fn pool(&self, address: &Address) -> Option<u32>;
    /// The address is a mesh node's.
    fn node(&self, address: &Address) -> Option<&NodeValue>;

    /// Policy of an endpoint, 0 = the host.
    fn policy(&self, endpoint: u16) -> Option<PolicyValue>;
    /// Class of a port.
    fn port(&self, key: PortKey) -> Option<PortValue>;
    /// A verdict.
    fn verdict(&self, key: VerdictKey) -> Option<VerdictValue>;
    /// Number of the most specific prefix of a table that holds an address.
    fn prefix(&self, table: u32, address: &Address) -> Option<u32>;

    /// What holds for all flows.
    fn flow_state(&self) -> Option<&FlowState>;
    /// A flow.
    fn flow(&self, table: Table, key: &FlowKey) -> Option<Self::Flow>;
    /// Stores a flow, over one that is there; `false` where it could not.
    fn insert_flow(&self, table: Table, key: &FlowKey, value: &FlowValue) -> bool;
    /// Removes a flow.
    fn remove_flow(&self, table: Table, key: &FlowKey);
    /// How many flows an endpoint has.
    fn flow_count(&self, endpoint: u16) -> u32;
    /// Counts one more.
    fn add_flow(&self, endpoint: u16);
    /// What the first fragment of a datagram said.
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentValue>;
    /// Notes what the first fragment of a datagram says.
    fn insert_fragment(&self, key: &FragmentKey, value: &FragmentValue);

    /// When an event was last told, and what came since.
    fn repeat(&self, key: &RepeatKey) -> Option<Self::Repeat>;
    /// Notes that an event is told.
    fn insert_repeat(&self, key: &RepeatKey, value: &RepeatValue);
    /// Tells an event, or counts it as lost.
    fn emit(&self, event: &Event);
}

/// A pod's address, by the pool that holds it.
#[inline(always)]
pub(crate) fn is_pod<M: Maps>(maps: &M, address: &Address) -> bool {
    maps.pool(address) == Some(warren_abi::POOL_PODS)
}

/// A service's address, by the pool that holds it.
#[inline(always)]
pub(crate) fn is_service<M: Maps>(maps: &M, address: &Address) -> bool {
    maps.pool(address) == Some(warren_abi::POOL_SERVICES)
}
