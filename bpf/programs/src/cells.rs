//! Values that are changed in their maps, where other CPUs read them at the same time. A member is written whole
//! or not at all; two writers lose one of two updates of times and counts, which is all that they hold. What
//! decides (a flow's judgement) is never changed in place, as a map may give the place to another entry.

use core::{cell::Cell, mem::size_of};

use warren_abi::{FlowValue, RepeatValue};

/// A [`FlowValue`] in its map.
#[derive(Debug, Default)]
#[repr(C)]
pub struct FlowCells {
    last_seen: Cell<u32>,
    lifetime: Cell<u32>,
    created: Cell<u32>,
    revision: Cell<u32>,
    rule: Cell<u32>,
    peer: Cell<u32>,
    peer_mark: Cell<u32>,
    port: Cell<u16>,
    flags: Cell<u8>,
    padding: Cell<u8>,
}

impl FlowCells {
    /// A copy.
    #[inline(always)]
    pub fn load(&self) -> FlowValue {
        FlowValue {
            last_seen: self.last_seen.get(),
            lifetime: self.lifetime.get(),
            created: self.created.get(),
            revision: self.revision.get(),
            rule: self.rule.get(),
            peer: self.peer.get(),
            peer_mark: self.peer_mark.get(),
            port: self.port.get(),
            flags: self.flags.get(),
            padding: 0,
        }
    }

    /// Notes a packet. Writes what changed only: the line stays with the CPUs that read it.
    #[inline(always)]
    pub(crate) fn touch(&self, now: u32, flags: u8, lifetime: u32) {
        if self.last_seen.get() != now {
            self.last_seen.set(now);
        }
        if self.flags.get() != flags {
            self.flags.set(flags);
        }
        if self.lifetime.get() != lifetime {
            self.lifetime.set(lifetime);
        }
    }

    #[cfg(test)]
    pub(crate) fn store(&self, value: &FlowValue) {
        self.touch(value.last_seen, value.flags, value.lifetime);
        self.created.set(value.created);
        self.revision.set(value.revision);
        self.rule.set(value.rule);
        self.peer.set(value.peer);
        self.peer_mark.set(value.peer_mark);
        self.port.set(value.port);
    }
}

/// A [`RepeatValue`] in its map.
#[derive(Debug, Default)]
#[repr(C)]
pub struct RepeatCells {
    pub(crate) told: Cell<u64>,
    pub(crate) packets: Cell<u32>,
    padding: Cell<u32>,
}

#[cfg(test)]
impl RepeatCells {
    pub(crate) fn new(value: &RepeatValue) -> Self {
        Self {
            told: value.told.into(),
            packets: value.packets.into(),
            padding: 0.into(),
        }
    }
}

const _: () = {
    assert!(size_of::<FlowCells>() == size_of::<FlowValue>());
    assert!(align_of::<FlowCells>() == align_of::<FlowValue>());
    assert!(size_of::<RepeatCells>() == size_of::<RepeatValue>());
    assert!(align_of::<RepeatCells>() == align_of::<RepeatValue>());
};
