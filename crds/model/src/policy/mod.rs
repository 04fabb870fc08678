//! Network policy after parsing: what CiliumNetworkPolicy, CiliumClusterwideNetworkPolicy and Kubernetes
//! NetworkPolicy have in common.
//!
//! A [`Rule`] selects workloads or nodes, says in which directions they are in default deny, and lists
//! [`Statement`]s. A statement covers the packets whose peer is one of its [`Peers`] *and* whose protocol and
//! port is one of its [`Ports`]. The verdict for a packet, over the statements of all rules that select the
//! endpoint: denied where any deny statement covers it; else allowed where any allow statement covers it, or
//! where no rule puts the endpoint in default deny; else denied.

mod cidr;
mod error;
mod label;
mod port;
mod resolved;
mod rule;

pub use cidr::{AddressScope, CidrSet, CidrSource};
pub use error::PolicyError;
pub use label::{Entity, LabelKey, LabelSource, Operator, Requirement, Selector, keys, reserved_labels};
pub use port::{NamedPorts, PortMatch, PortSpec, Protocol};
pub use resolved::{NodeFacts, SelectorId, Validity};
pub use rule::{
    Action, Direction, Directions, Peer, Peers, PolicyKind, PolicyRef, Ports, Rule, Statement, Subject,
    Unenforced,
};
