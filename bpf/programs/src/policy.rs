//! Policy: the one place that decides whether one identity may talk to another.

use warren_abi::DropReason;

/// Seen from the endpoint that the policy is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// To the endpoint.
    Ingress,
    /// From the endpoint.
    Egress,
}

/// What policy is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question {
    /// Which direction.
    pub direction: Direction,
    /// Identity of the local endpoint.
    pub endpoint: u32,
    /// Identity of the other end.
    pub peer: u32,
    /// IP protocol number.
    pub protocol: u8,
    /// Source and destination port, 0 where there are none.
    pub ports: (u16, u16),
}

/// Answers; it allows everything for now.
#[inline(always)]
pub fn policy(_question: &Question) -> Result<(), DropReason> {
    Ok(())
}

/// Who is at the other end.
pub(crate) mod identities {
    use warren_abi::{OwnerTag, OwnerValue, SettingsValue};

    use crate::{Address, Maps, Meta};

    const HOST: u32 = 1;
    const WORLD: u32 = 2;

    /// Identity of a packet's sender: its mark beats its address, which may be a masquerade. What was forwarded
    /// with this node's address is not the host: it came from outside.
    #[inline(always)]
    pub(crate) fn of_source<M: Maps>(
        maps: &M,
        settings: &SettingsValue,
        meta: &Meta,
        source: &Address,
    ) -> u32 {
        let mark = meta.mark & settings.mark_mask;
        if mark != 0 && mark != settings.tunnel_mark {
            return maps.endpoint_identity(mark);
        }
        match maps.owner(source) {
            Some(owner) if mark == 0 && OwnerTag::parse(owner.tag) == Some(OwnerTag::LocalNode) => {
                if meta.ingress_ifindex == 0 { HOST } else { WORLD }
            }
            Some(owner) => of_owner(owner),
            None => WORLD,
        }
    }

    /// Identity of a packet's destination.
    #[inline(always)]
    pub(crate) fn of_destination<M: Maps>(maps: &M, destination: &Address) -> u32 {
        match maps.owner(destination) {
            Some(owner) => of_owner(owner),
            None => WORLD,
        }
    }

    #[inline(always)]
    fn of_owner(owner: &OwnerValue) -> u32 {
        owner.identity
    }
}

#[cfg(test)]
mod tests {
    use super::identities::{of_destination, of_source};
    use crate::{
        Address, Maps, Meta,
        testing::{POD_IDENTITY, POD_MARK, TUNNEL_MARK, World},
    };

    #[test]
    fn the_mark_beats_the_address() {
        let world = World::new();
        let settings = world.settings().copied().unwrap();
        let of = |source, mark, ingress_ifindex| {
            let meta = Meta {
                mark,
                ingress_ifindex,
                ..Meta::default()
            };
            of_source(&world, &settings, &meta, &Address::V4(source))
        };
        let node = [192, 168, 0, 1];
        assert_eq!(of(node, 0, 0), 1, "the host");
        assert_eq!(of(node, 0, 7), 2, "forwarded with a local source");
        assert_eq!(of(node, POD_MARK, 7), POD_IDENTITY, "a pod behind masquerade");
        assert_eq!(of([10, 244, 2, 9], TUNNEL_MARK, 7), 300);
        assert_eq!(of([192, 168, 0, 2], TUNNEL_MARK, 7), 6);
        assert_eq!(of([8, 8, 8, 8], 0, 7), 2);
        assert_eq!(of_destination(&world, &Address::V4([10, 244, 2, 9])), 300);
        assert_eq!(of_destination(&world, &Address::V4([8, 8, 8, 8])), 2);
    }
}
