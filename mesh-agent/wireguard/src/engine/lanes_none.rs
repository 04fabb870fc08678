//! Stands in for the cipher of many messages at once where the CPU's architecture has none.

use std::convert::Infallible;

pub(super) const LANES: usize = 16;

/// There is none.
pub(super) struct Lanes(Infallible);

/// There is none.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {}

impl Kind {
    pub(super) const ALL: [Self; 0] = [];

    pub(super) fn name(self) -> &'static str {
        match self {}
    }

    pub(super) fn is_there(self) -> bool {
        match self {}
    }

    pub(super) fn width(self) -> usize {
        match self {}
    }
}

impl Lanes {
    pub(super) fn new(_key: &[u8; 32]) -> Option<Self> {
        None
    }

    pub(super) fn with(_key: &[u8; 32], kind: Kind) -> Self {
        match kind {}
    }

    pub(super) fn available() -> Option<Kind> {
        None
    }

    pub(super) fn width(&self) -> usize {
        match self.0 {}
    }

    pub(super) fn worthwhile(&self, _segment: usize) -> usize {
        match self.0 {}
    }

    pub(super) fn seal(&self, _messages: &mut [u8], _segment: usize, _counters: &[u64; LANES]) {
        match self.0 {}
    }

    pub(super) fn open(
        &self,
        _messages: &mut [u8],
        _layout: super::transport::Layout,
        _counters: &[u64; LANES],
    ) -> [bool; LANES] {
        match self.0 {}
    }
}
