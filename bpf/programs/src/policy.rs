//! Policy: the one place that decides whether an endpoint may talk to a peer. The look-ups are those of the policy
//! engine (`mesh-agent/core/src/policy`), in its order.

use warren_abi::{
    DropReason, EGRESS, OwnerTag, PEER_EVERYBODY, PEER_FORWARDED, PEER_IDENTITY, PEER_MEMBER_PREFIX,
    PEER_WORLD_PREFIX, POLICY_AUDIT, POLICY_EGRESS_OPEN, POLICY_INGRESS_OPEN, PolicyValue, PortKey,
    VerdictKey,
};

use crate::{Address, Maps, Scratch, maps::is_pod};

/// Identity of the host.
pub(crate) const HOST: u32 = 1;
const WORLD: u32 = 2;
const WORLD_V4: u32 = 9;
const WORLD_V6: u32 = 10;
/// Nobody knows who it is: no selector matches.
const UNKNOWN: u32 = 0;

/// What policy says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Answer {
    /// It is dropped.
    Denied(DropReason),
    /// It would be dropped, but passes.
    Audited(DropReason),
    /// It passes.
    Allowed,
}

/// Asks whether the flow of `scratch.key` may be opened in the direction and with the port of `scratch.asked`; leaves
/// the peer's identity and the rule that decided there, and the answer in `scratch.answer`: through memory, so that the
/// verifier does not follow what comes then for each answer by itself.
///
/// A function of its own in the kernel too: it is called from several places, and the stack is small.
#[inline(never)]
pub(crate) fn judge<M: Maps>(maps: &M, scratch: &mut Scratch) {
    scratch.answer = answer(maps, scratch);
}

#[inline(always)]
fn answer<M: Maps>(maps: &M, scratch: &mut Scratch) -> Answer {
    scratch.asked.rule = 0;
    find_peer(maps, scratch);
    let Some(policy) = maps.policy(scratch.key.endpoint) else {
        return Answer::Denied(DropReason::NoPolicy);
    };
    let open = if scratch.asked.direction == EGRESS {
        POLICY_EGRESS_OPEN
    } else {
        POLICY_INGRESS_OPEN
    };
    if policy.flags & open != 0 {
        return Answer::Allowed;
    }
    match decide(maps, scratch, &policy) {
        Ok(()) => Answer::Allowed,
        Err(reason) if policy.flags & POLICY_AUDIT != 0 => Answer::Audited(reason),
        Err(reason) => Answer::Denied(reason),
    }
}

#[inline(always)]
fn decide<M: Maps>(maps: &M, scratch: &mut Scratch, policy: &PolicyValue) -> Result<(), DropReason> {
    let port = maps.port(PortKey {
        policy: policy.policy.to_be_bytes(),
        direction: scratch.asked.direction,
        protocol: scratch.key.protocol,
        port: scratch.asked.port.to_be_bytes(),
    });
    let port = port.ok_or(DropReason::NoPolicy)?;
    let mut allowed = false;
    let mut found = Found::in_class(maps, port.class, PEER_IDENTITY, scratch.asked.peer);
    if found.says == NOTHING {
        found = Found::in_class(maps, port.class, PEER_EVERYBODY, 0);
    }
    allowed |= found.is_allowed(scratch)?;
    if port.has_cidrs != 0 {
        let address = Address::of(scratch.key.family, &scratch.asked.address);
        if let Some(number) = maps.prefix(policy.cidr_table, &address) {
            let kind = match scratch.asked.peer {
                WORLD | WORLD_V4 | WORLD_V6 => PEER_WORLD_PREFIX,
                _ => PEER_MEMBER_PREFIX,
            };
            let rule = scratch.asked.rule;
            let by_prefix = Found::in_class(maps, port.class, kind, number).is_allowed(scratch)?;
            if allowed {
                scratch.asked.rule = rule;
            }
            allowed |= by_prefix;
        }
    }
    if allowed {
        Ok(())
    } else {
        Err(DropReason::DefaultDeny)
    }
}

const NOTHING: u32 = 0;
const ALLOW: u32 = 1;
const DENY: u32 = 2;

/// A verdict, or none. Numbers, as the verifier refuses what the compiler makes of an `Option` here: it moves members
/// of a value that is not there.
#[derive(Clone, Copy)]
struct Found {
    says: u32,
    rule: u32,
}

impl Found {
    #[inline(always)]
    fn in_class<M: Maps>(maps: &M, class: u32, kind: u32, id: u32) -> Self {
        match maps.verdict(VerdictKey { class, kind, id }) {
            Some(value) => Self {
                says: if value.allow == 1 { ALLOW } else { DENY },
                rule: value.rule,
            },
            None => Self {
                says: NOTHING,
                rule: 0,
            },
        }
    }

    /// Notes the rule. Deny beats every allow.
    #[inline(always)]
    fn is_allowed(self, scratch: &mut Scratch) -> Result<bool, DropReason> {
        match self.says {
            NOTHING => Ok(false),
            ALLOW => {
                scratch.asked.rule = self.rule;
                Ok(true)
            }
            _ => {
                scratch.asked.rule = self.rule;
                Err(DropReason::Policy)
            }
        }
    }
}

/// Who the peer is: its mark beats its address, which may be a masquerade; prefixes are then asked for its own. What
/// this host made is the host's, whatever its address; what was forwarded with this node's address came from outside.
#[inline(always)]
fn find_peer<M: Maps>(maps: &M, scratch: &mut Scratch) {
    let from = scratch.asked.from;
    scratch.asked.address = scratch.key.remote;
    let address = scratch.remote();
    let ingress = scratch.asked.direction != EGRESS;
    scratch.asked.peer = if from != 0 && from != PEER_FORWARDED && from != scratch.now.tunnel_mark {
        match maps.marked(from) {
            Some(value) => {
                if scratch.key.family == 4 {
                    if value.v4 != [0; 4] {
                        scratch.asked.address = Address::V4(value.v4).octets();
                    }
                } else if value.v6 != [0; 16] {
                    scratch.asked.address = value.v6;
                }
                value.identity
            }
            None => UNKNOWN,
        }
    } else if ingress && from == 0 {
        HOST
    } else {
        match maps.owner(&address) {
            Some(owner) if ingress && owner.tag == OwnerTag::LocalNode as u8 => WORLD,
            Some(owner) => owner.identity,
            // A pod that nobody told of yet is not the world.
            None if is_pod(maps, &address) => UNKNOWN,
            None => WORLD,
        }
    };
}
