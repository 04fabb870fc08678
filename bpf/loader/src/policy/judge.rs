//! The look-up of the programs, done from user space over the same maps: what `policy trace` shows beside the model's
//! answer.

use std::net::IpAddr;

use warren_abi::VerdictValue;

use super::{PolicyDirection, PolicyEndpoint, PolicyPeerKind, PolicyVerdict, PolicyVerdictKey, convert};
use crate::{Datapath, Error};

/// Identities of the world: 2 in general, 9 and 10 by family.
const WORLD: [u32; 3] = [2, 9, 10];

/// A packet that belongs to no known flow, seen from one endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PolicyQuestion {
    /// Index of the endpoint whose policy is asked, 0 = the host.
    pub endpoint: u16,
    /// Which way the connection is opened.
    pub direction: PolicyDirection,
    /// Identity of the other end, 0 where its owner is not known.
    pub peer: u32,
    /// Address of the other end; the pod's own where a mark names it.
    pub address: IpAddr,
    /// IP protocol.
    pub protocol: u8,
    /// Destination port, ICMP type, or 0.
    pub port: u16,
}

/// What the maps say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PolicyOutcome {
    /// The endpoint has no policy: everything is dropped.
    Closed,
    /// The direction is open: no look-up is made.
    Open,
    /// Allowed by a rule, 0 where none had to.
    Allowed {
        /// Its number.
        rule: u32,
    },
    /// Denied by a rule.
    Denied {
        /// Its number.
        rule: u32,
    },
    /// No rule allows it.
    DefaultDeny,
}

impl PolicyOutcome {
    /// The packet passes, audit mode aside.
    pub fn allows(self) -> bool {
        match self {
            Self::Open | Self::Allowed { .. } => true,
            Self::Closed | Self::Denied { .. } | Self::DefaultDeny => false,
        }
    }
}

/// Answer to a [`PolicyQuestion`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PolicyAnswer {
    /// What the maps say.
    pub outcome: PolicyOutcome,
    /// What is denied passes nevertheless, and is reported.
    pub audit: bool,
}

impl Datapath {
    /// Asks the policy maps, step by step as the programs do for the first packet of a flow.
    pub fn judge(&self, question: &PolicyQuestion) -> Result<PolicyAnswer, Error> {
        let Some(value) = self.maps.policy.endpoints.get(question.endpoint)? else {
            return Ok(PolicyAnswer {
                outcome: PolicyOutcome::Closed,
                audit: false,
            });
        };
        let endpoint = PolicyEndpoint::parse(value);
        let open = match question.direction {
            PolicyDirection::Ingress => endpoint.ingress_open,
            PolicyDirection::Egress => endpoint.egress_open,
        };
        let outcome = if open {
            PolicyOutcome::Open
        } else {
            self.look_up(&endpoint, question)?
        };
        Ok(PolicyAnswer {
            outcome,
            audit: endpoint.audit,
        })
    }

    fn look_up(&self, endpoint: &PolicyEndpoint, question: &PolicyQuestion) -> Result<PolicyOutcome, Error> {
        let key = convert::port_question(
            endpoint.policy,
            question.direction,
            question.protocol,
            question.port,
        );
        let Some(port) = self.maps.policy.ports.get(key)? else {
            return Ok(PolicyOutcome::Closed);
        };
        let by_identity = match self.verdict(port.class, PolicyPeerKind::Identity, question.peer)? {
            None => self.verdict(port.class, PolicyPeerKind::Everybody, 0)?,
            found => found,
        };
        let mut by_prefix = None;
        if port.has_cidrs != 0
            && let Some(number) = self
                .maps
                .policy
                .cidrs
                .get(endpoint.cidr_table, question.address)?
        {
            let kind = if WORLD.contains(&question.peer) {
                PolicyPeerKind::WorldPrefix
            } else {
                PolicyPeerKind::MemberPrefix
            };
            by_prefix = self.verdict(port.class, kind, number)?;
        }
        let verdicts = [by_identity, by_prefix].into_iter().flatten();
        let parsed: Vec<PolicyVerdict> = verdicts.map(PolicyVerdict::parse).collect();
        let denied = parsed.iter().find(|verdict| !verdict.allow);
        Ok(match (denied, parsed.first()) {
            (Some(denied), _) => PolicyOutcome::Denied { rule: denied.rule },
            (None, Some(allowed)) => PolicyOutcome::Allowed { rule: allowed.rule },
            (None, None) => PolicyOutcome::DefaultDeny,
        })
    }

    fn verdict(&self, class: u32, kind: PolicyPeerKind, id: u32) -> Result<Option<VerdictValue>, Error> {
        self.maps
            .policy
            .verdicts
            .get(PolicyVerdictKey { class, kind, id }.key())
    }
}
