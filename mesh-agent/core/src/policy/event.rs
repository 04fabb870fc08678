//! What the engine is told, and where its numbers start.

use std::collections::BTreeSet;

use warren_model::{
    IdentityId,
    policy::{NamedPorts, NodeFacts, PolicyRef, Rule, Selector, SelectorId},
};

use super::map::Maps;

/// Where numbers start: above everything that the pinned maps hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FirstNumbers {
    /// First number of a policy.
    pub policy: u32,
    /// First number of a class.
    pub class: u32,
    /// First number of a prefix.
    pub cidr: u32,
    /// Number of the table of prefixes.
    pub cidr_table: u32,
    /// First number of a rule.
    pub rule: u32,
}

impl Default for FirstNumbers {
    fn default() -> Self {
        Self {
            policy: 1,
            class: 1,
            cidr: 1,
            cidr_table: 1,
            rule: 1,
        }
    }
}

impl FirstNumbers {
    /// Above everything that maps hold, the entries of an earlier agent. Once every endpoint has its new policy, whatever
    /// has a lower number can be removed.
    pub fn above(maps: &Maps) -> Self {
        let policies = maps
            .ports
            .keys()
            .map(|key| key.policy)
            .chain(maps.endpoints.values().map(|v| v.policy));
        let classes = maps
            .verdicts
            .keys()
            .map(|key| key.class)
            .chain(maps.ports.values().map(|v| v.class));
        let rules = maps.verdicts.values().map(|value| value.rule);
        Self {
            policy: policies.max().unwrap_or(0) + 1,
            class: classes.max().unwrap_or(0) + 1,
            cidr: maps.cidrs.values().copied().max().unwrap_or(0) + 1,
            cidr_table: maps.cidrs.keys().map(|key| key.table).max().unwrap_or(0) + 1,
            rule: rules.max().unwrap_or(0) + 1,
        }
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PolicyEvent {
    /// A selector with all its members; replaces what was known.
    Selector {
        /// Its number.
        id: SelectorId,
        /// What it asks for.
        selector: Selector,
        /// Who fulfils it.
        members: BTreeSet<IdentityId>,
    },
    /// Members of a selector changed.
    Members {
        /// The selector.
        id: SelectorId,
        /// Who came.
        added: Vec<IdentityId>,
        /// Who went.
        removed: Vec<IdentityId>,
    },
    /// No rule names the selector any more.
    SelectorGone(SelectorId),
    /// All rules of an object; replaces what was known.
    Rules {
        /// The object.
        policy: PolicyRef,
        /// Its rules.
        rules: Vec<Rule<SelectorId>>,
    },
    /// An object is gone.
    RulesGone(PolicyRef),
    /// The named ports of the pods of an identity, anywhere; replaces what was known.
    PeerPorts {
        /// The identity.
        identity: IdentityId,
        /// The ports of its pods; those of several pods where they differ.
        ports: Vec<NamedPorts>,
    },
    /// A local endpoint, new or changed.
    Endpoint {
        /// Its index in the mark, 1 and up.
        index: u16,
        /// Its identity.
        identity: IdentityId,
        /// Its named ports.
        ports: NamedPorts,
        /// Audit mode for this endpoint.
        audit: bool,
    },
    /// A local endpoint is gone.
    EndpointGone(u16),
    /// Facts of the node; replaces what was known.
    Node(NodeFacts),
}

/// Where a statement stands: what a rule number means.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleName {
    /// The object.
    pub policy: PolicyRef,
    /// Where in it, as in `spec.ingress[0].toPorts[1]`.
    pub place: String,
}
