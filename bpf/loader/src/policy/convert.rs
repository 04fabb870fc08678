//! Between the values of the agent and those of the maps.

use aya::maps::lpm_trie::Key;
use warren_abi::{
    EGRESS, INGRESS, POLICY_AUDIT, POLICY_EGRESS_OPEN, POLICY_INGRESS_OPEN, PolicyValue, PortKey, PortValue,
    VerdictKey, VerdictValue,
};

use super::{
    PolicyDirection, PolicyEndpoint, PolicyPeerKind, PolicyPort, PolicyPortKey, PolicyVerdict,
    PolicyVerdictKey,
};
use crate::{Error, maps::Plain};

/// Bits of [`PortKey`] before protocol and port.
const PORT_KEY_FIXED: u32 = 40;

impl PolicyDirection {
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Ingress => INGRESS,
            Self::Egress => EGRESS,
        }
    }

    pub(crate) fn parse(number: u8) -> Option<Self> {
        match number {
            INGRESS => Some(Self::Ingress),
            EGRESS => Some(Self::Egress),
            _ => None,
        }
    }
}

impl PolicyEndpoint {
    pub(super) fn value(self) -> PolicyValue {
        let flag = |set, flag| if set { flag } else { 0 };
        PolicyValue {
            policy: self.policy,
            cidr_table: self.cidr_table,
            flags: flag(self.audit, POLICY_AUDIT)
                | flag(self.ingress_open, POLICY_INGRESS_OPEN)
                | flag(self.egress_open, POLICY_EGRESS_OPEN),
        }
    }

    pub(super) fn parse(value: PolicyValue) -> Self {
        Self {
            policy: value.policy,
            cidr_table: value.cidr_table,
            audit: value.flags & POLICY_AUDIT != 0,
            ingress_open: value.flags & POLICY_INGRESS_OPEN != 0,
            egress_open: value.flags & POLICY_EGRESS_OPEN != 0,
        }
    }
}

impl PolicyPortKey {
    /// The key of the trie; refused where it would mean something else to the programs.
    pub(super) fn key(self) -> Result<Key<Plain<PortKey>>, Error> {
        let behind = match self.length {
            0 => 0xff_ffff,
            8..=24 => 0xff_ffff >> self.length,
            length => {
                return Err(Error::Invalid(format!(
                    "a port's prefix of {length} bits is neither 0 nor 8 to 24 long"
                )));
            }
        };
        if self.bits > 0xff_ffff || self.bits & behind != 0 {
            return Err(Error::Invalid(format!(
                "ports {:#x} have bits behind their length of {}",
                self.bits, self.length
            )));
        }
        let [_, protocol, port @ ..] = self.bits.to_be_bytes();
        let data = PortKey {
            policy: self.policy.to_be_bytes(),
            direction: self.direction.number(),
            protocol,
            port,
        };
        Ok(Key::new(PORT_KEY_FIXED + u32::from(self.length), Plain(data)))
    }

    /// `None` for what this version never writes.
    pub(super) fn parse(key: Key<Plain<PortKey>>) -> Option<Self> {
        let length = u8::try_from(key.prefix_len().checked_sub(PORT_KEY_FIXED)?).ok()?;
        let Plain(data) = key.data();
        let [high, low] = data.port;
        let key = Self {
            policy: u32::from_be_bytes(data.policy),
            direction: PolicyDirection::parse(data.direction)?,
            bits: u32::from_be_bytes([0, data.protocol, high, low]),
            length,
        };
        key.key().ok().map(|_| key)
    }
}

/// The whole key of a port: what a look-up asks for.
pub(super) fn port_question(
    policy: u32,
    direction: PolicyDirection,
    protocol: u8,
    port: u16,
) -> Key<Plain<PortKey>> {
    let data = PortKey {
        policy: policy.to_be_bytes(),
        direction: direction.number(),
        protocol,
        port: port.to_be_bytes(),
    };
    Key::new(PORT_KEY_FIXED + 24, Plain(data))
}

impl PolicyPort {
    pub(super) fn value(self) -> PortValue {
        PortValue {
            class: self.class,
            has_cidrs: self.has_cidrs.into(),
        }
    }

    pub(super) fn parse(value: PortValue) -> Self {
        Self {
            class: value.class,
            has_cidrs: value.has_cidrs != 0,
        }
    }
}

impl PolicyVerdictKey {
    pub(super) fn key(self) -> Plain<VerdictKey> {
        Plain(VerdictKey {
            class: self.class,
            kind: self.kind as u32,
            id: self.id,
        })
    }

    pub(super) fn parse(Plain(key): Plain<VerdictKey>) -> Option<Self> {
        let kinds = [
            PolicyPeerKind::Identity,
            PolicyPeerKind::Everybody,
            PolicyPeerKind::WorldPrefix,
            PolicyPeerKind::MemberPrefix,
        ];
        let kind = kinds.into_iter().find(|kind| *kind as u32 == key.kind)?;
        Some(Self {
            class: key.class,
            kind,
            id: key.id,
        })
    }
}

impl PolicyVerdict {
    pub(super) fn value(self) -> VerdictValue {
        VerdictValue {
            allow: self.allow.into(),
            rule: self.rule,
        }
    }

    /// Anything but 1 denies.
    pub(super) fn parse(value: VerdictValue) -> Self {
        Self {
            allow: value.allow == 1,
            rule: value.rule,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(bits: u32, length: u8) -> PolicyPortKey {
        PolicyPortKey {
            policy: 0x0102_0304,
            direction: PolicyDirection::Egress,
            bits,
            length,
        }
    }

    #[test]
    fn ports_come_back() {
        for (bits, length) in [(0, 0), (0x06_0000, 8), (0x06_1f90, 24), (0x11_8000, 9)] {
            let key = port(bits, length).key().unwrap();
            assert_eq!(key.prefix_len(), 40 + u32::from(length));
            assert_eq!(PolicyPortKey::parse(key), Some(port(bits, length)));
        }
        let Plain(data) = port(0x06_1f90, 24).key().unwrap().data();
        assert_eq!((data.policy, data.direction), ([1, 2, 3, 4], 1));
        assert_eq!((data.protocol, data.port), (6, [0x1f, 0x90]));
    }

    #[test]
    fn ports_that_mean_something_else() {
        for (bits, length) in [(0, 7), (0, 25), (0x06_1f90, 23 - 8), (1 << 24, 8), (0x06_0000, 0)] {
            assert!(port(bits, length).key().is_err(), "{bits:#x}/{length}");
        }
        assert_eq!(
            PolicyPortKey::parse(Key::new(39, Plain(PortKey::default()))),
            None
        );
    }

    #[test]
    fn endpoints_come_back() {
        for flags in 0..8_u32 {
            let value = PolicyValue {
                policy: 7,
                cidr_table: 8,
                flags,
            };
            assert_eq!(PolicyEndpoint::parse(value).value(), value);
        }
    }

    #[test]
    fn anything_but_one_denies() {
        for allow in [0, 2, u32::MAX] {
            assert!(!PolicyVerdict::parse(VerdictValue { allow, rule: 1 }).allow);
        }
        assert!(PolicyVerdict::parse(VerdictValue { allow: 1, rule: 1 }).allow);
    }
}
