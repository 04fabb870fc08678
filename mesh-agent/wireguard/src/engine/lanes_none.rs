//! Stands in for the cipher of many messages at once where the CPU's architecture has none.

use std::convert::Infallible;

pub(super) const LANES: usize = 16;
pub(super) const WORTHWHILE: usize = LANES;

/// There is none.
pub(super) struct Lanes(Infallible);

impl Lanes {
    pub(super) fn new(_key: &[u8; 32]) -> Option<Self> {
        None
    }

    pub(super) fn available() -> bool {
        false
    }

    pub(super) fn seal(&self, _messages: &mut [u8], _segment: usize, _counters: &[u64; LANES]) {
        match self.0 {}
    }

    pub(super) fn open(
        &self,
        _messages: &mut [u8],
        _segment: usize,
        _counters: &[u64; LANES],
    ) -> [bool; LANES] {
        match self.0 {}
    }
}
