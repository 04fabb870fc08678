//! Policy on the agent's side: rules of local endpoints to map entries, and the verdict as eBPF computes it.
//!
//! # Maps
//!
//! Every number is a `u32` that is never used twice while the maps live: a new agent starts above the highest that
//! it finds ([`FirstNumbers`]). All maps are node-wide.
//!
//! | map | type | key | value |
//! |---|---|---|---|
//! | `POLICY_ENDPOINTS` | hash | endpoint index `u16` (0 = the host) | `{policy u32, cidr_table u32, flags u32}`: audit, open at ingress, open at egress |
//! | `POLICY_PORTS` | LPM trie | `{policy u32, direction u8, protocol u8, port u16}` in network order; prefix length 40 (direction), 48 (protocol) to 64 | `{class u32, has_cidrs u32}` |
//! | `POLICY_VERDICTS` | hash | `{class u32, kind u32, id u32}` | `{allow u32, rule u32}` |
//! | `POLICY_CIDRS4` | LPM trie | `{table u32, address [u8; 4]}`, prefix length 32 + n | number of the prefix `u32` |
//! | `POLICY_CIDRS6` | LPM trie | `{table u32, address [u8; 16]}`, prefix length 32 + n | number of the prefix `u32` |
//!
//! `direction` is 0 for ingress, 1 for egress. `port` is the destination port of TCP, UDP and SCTP, the type of ICMP
//! and ICMPv6, else 0. `kind` is 0 for an identity, 1 for every identity (`id` 0), 2 for the number of a prefix that
//! holds an address of the world, 3 for one that holds the address of a pod or a node.
//!
//! # Verdict
//!
//! [`lookup`] is the program, with at most five look-ups, whatever the number of rules:
//!
//! 1. `POLICY_ENDPOINTS[endpoint]`; nothing there = drop (an endpoint is closed until its policy is complete); where
//!    the direction is open (no default deny, no statement that denies), allow;
//! 2. `POLICY_PORTS[policy, direction, protocol, port]` = the port's class: the exact set of statements that cover it;
//! 3. `POLICY_VERDICTS[class, 0, identity of the peer]`, else `POLICY_VERDICTS[class, 1, 0]`;
//! 4. where the class has prefixes: `POLICY_CIDRS[table, address of the peer]` = the most specific prefix, which stands
//!    for all that cover it, then `POLICY_VERDICTS[class, 2 or 3, prefix]`;
//! 5. deny, if either says deny; else allow, if either says allow; else drop (default deny).
//!
//! Deny precedence is resolved when an entry is made: one entry already weighs all statements that cover it.
//!
//! The peer's identity is 0 where its owner is not known yet. Such a peer, and one whose labels are not known
//! ([`IdentityId::INIT`](warren_model::IdentityId::INIT)), is denied wherever some deny statement could mean it. The
//! identity follows from the mark before the address (a pod behind masquerade is still a pod), and the address is
//! then the pod's own, not the one in the packet. An address without any owner has the identity 2 (world).
//!
//! # Changes
//!
//! [`PolicyEngine::apply`] turns events into [`MapWrite`]s, to be carried out in order. After every single write, every
//! verdict is either the old or the new one. New classes are written before a port leads to them, more specific
//! ports first; old ones are removed after nothing leads there, less specific ports first. Between the two stands
//! [`MapWrite::Grace`]: wait until every program that may still hold an old number has ended (an RCU grace period). At
//! the first of them, or at the end, every verdict is the new one: what follows only clears up.
//! A write that fails ends the list: what was written before is consistent, the rest stays closed or old; carry out
//! [`PolicyEngine::contents`] anew later.

mod cidr;
mod compile;
mod diff;
mod engine;
mod event;
mod explain;
mod flat;
mod map;
mod port;
mod repair;
mod source;

pub use compile::{ClassTable, DirectionPolicy, EndpointPolicy};
pub use diff::diff;
pub use engine::PolicyEngine;
pub use event::{FirstNumbers, PolicyEvent, RuleName};
pub use explain::{ExplainedEntry, ExplainedPeer, PortPrefixes};
pub use map::{
    CidrKey, DropCause, EndpointValue, MapWrite, Maps, Packet, PeerKind, PortKey, PortValue, Verdict,
    VerdictKey, VerdictValue, lookup,
};
pub use repair::{Repaired, repair};
pub use source::{LocalEndpoint, PolicySource, named_ports};

#[cfg(test)]
mod tests;
