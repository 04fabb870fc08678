//! Room in the policy maps. Some is kept for the host's own policy: however much the pods' policies need, those that hold
//! the node together can still be written.

use std::collections::BTreeSet;

use warren_abi::{limits, names};
use warren_agent_core::policy::{MapWrite, Maps};
use warren_bpf::Error;

/// The endpoint that is the host.
const HOST: u16 = 0;
/// One part in so many of a map is the host's.
const HOST_SHARE: u32 = 64;
/// Verdicts that all pods may have together.
const VERDICTS: u32 = limits::POLICY_VERDICTS - limits::POLICY_VERDICTS / HOST_SHARE;
/// Entries for ports that all pods may have together.
const PORTS: u32 = limits::POLICY_PORTS - limits::POLICY_PORTS / HOST_SHARE;

/// What belongs to the host's policy.
pub(super) struct OfHost {
    policy: Option<u32>,
    classes: BTreeSet<u32>,
}

/// What of `wanted` belongs to the host's policy.
pub(super) fn of_host(wanted: &Maps) -> OfHost {
    let policy = wanted.endpoints.get(&HOST).map(|value| value.policy);
    let ports = wanted.ports.iter().filter(|(key, _)| Some(key.policy) == policy);
    OfHost {
        policy,
        classes: ports.map(|(_, value)| value.class).collect(),
    }
}

/// Whether a step may be made where the maps hold `held`.
pub(super) fn check(held: &Maps, step: &MapWrite, host: &OfHost) -> Result<(), Error> {
    match step {
        MapWrite::SetVerdict(key, _) if !host.classes.contains(&key.class) => {
            let is_new = !held.verdicts.contains_key(key);
            within(is_new, held.verdicts.len(), VERDICTS, names::POLICY_VERDICTS)
        }
        MapWrite::SetPort(key, _) if Some(key.policy) != host.policy => {
            let is_new = !held.ports.contains_key(key);
            within(is_new, held.ports.len(), PORTS, names::POLICY_PORTS)
        }
        _ => Ok(()),
    }
}

fn within(is_new: bool, used: usize, limit: u32, map: &'static str) -> Result<(), Error> {
    match is_new && used >= limit as usize {
        true => Err(Error::Full { map, limit }),
        false => Ok(()),
    }
}

/// How many entries the maps hold, at most: an entry that changes its value is counted as one more until the maps are read
/// again.
pub(super) struct Entries {
    verdicts: usize,
    ports: usize,
}

impl Entries {
    pub(super) fn of(held: &Maps) -> Self {
        Self {
            verdicts: held.verdicts.len(),
            ports: held.ports.len(),
        }
    }

    /// Before a step is made. The share of the host is looked at closely only where this fails: see [`check`].
    pub(super) fn count(&mut self, step: &MapWrite) -> Result<(), Error> {
        match step {
            MapWrite::SetVerdict(..) => {
                within(true, self.verdicts, VERDICTS, names::POLICY_VERDICTS)?;
                self.verdicts += 1;
            }
            MapWrite::DeleteVerdict(_) => self.verdicts = self.verdicts.saturating_sub(1),
            MapWrite::SetPort(..) => {
                within(true, self.ports, PORTS, names::POLICY_PORTS)?;
                self.ports += 1;
            }
            MapWrite::DeletePort(_) => self.ports = self.ports.saturating_sub(1),
            MapWrite::SetCidr(..)
            | MapWrite::DeleteCidr(_)
            | MapWrite::SetEndpoint(..)
            | MapWrite::DeleteEndpoint(_)
            | MapWrite::Grace => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use warren_agent_core::policy::{EndpointValue, PeerKind, PortKey, PortValue, VerdictKey, VerdictValue};
    use warren_model::policy::{Direction, Directions};

    use super::*;

    const OPEN: VerdictValue = VerdictValue { allow: true, rule: 1 };

    fn verdict(class: u32, id: u32) -> VerdictKey {
        VerdictKey {
            class,
            kind: PeerKind::Identity,
            id,
        }
    }

    /// The host has policy 1 and class 10, a pod has policy 2 and class 20.
    fn wanted() -> Maps {
        let mut wanted = Maps::default();
        for (index, policy) in [(HOST, 1), (5, 2)] {
            let value = EndpointValue {
                policy,
                cidr_table: 1,
                audit: false,
                open: Directions::default(),
            };
            wanted.apply(&MapWrite::SetEndpoint(index, value));
            let key = PortKey {
                policy,
                direction: Direction::Ingress,
                bits: 0,
                length: 0,
            };
            let value = PortValue {
                class: 10 * policy,
                has_cidrs: false,
            };
            wanted.apply(&MapWrite::SetPort(key, value));
        }
        wanted
    }

    #[test]
    fn the_last_entries_are_the_hosts() {
        let host = of_host(&wanted());
        let mut held = Maps {
            verdicts: (1..VERDICTS).map(|id| (verdict(20, id), OPEN)).collect(),
            ..Maps::default()
        };
        let mut entries = Entries::of(&held);
        let last = MapWrite::SetVerdict(verdict(20, VERDICTS), OPEN);
        assert!(check(&held, &last, &host).is_ok() && entries.count(&last).is_ok());
        held.apply(&last);
        let more = MapWrite::SetVerdict(verdict(20, VERDICTS + 1), OPEN);
        assert!(check(&held, &more, &host).is_err() && entries.count(&more).is_err());
        // What is there may change.
        assert!(check(&held, &last, &host).is_ok());
        for id in 0..limits::POLICY_VERDICTS / HOST_SHARE {
            let of_host = MapWrite::SetVerdict(verdict(10, id), OPEN);
            assert!(check(&held, &of_host, &host).is_ok());
        }
        // With room again.
        assert!(entries.count(&MapWrite::DeleteVerdict(verdict(20, 1))).is_ok());
        assert!(entries.count(&more).is_ok());
    }
}
