//! What the eBPF programs decide: parsing and verdicts as functions of a packet and of maps.
//!
//! This crate may not touch a kernel helper, allocate, panic or loop without a bound: the same code runs in the
//! kernel (`main.rs` binds it to helpers and maps) and in the tests of the host. A packet is only ever read
//! through [`Packet::load`], and a failed read is an error, never an assumption.
//!
//! All functions are inlined into their program: the verifier then follows each one with what it knows there.
#![cfg_attr(target_arch = "bpf", no_std)]

mod arp;
mod barrier;
mod cells;
mod endpoint;
mod events;
mod flows;
mod host;
mod ip;
mod link;
mod maps;
mod neighbour;
mod policy;
mod quote;
mod scratch;
mod state;
mod transport;
mod tunnel;
mod tuple;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use barrier::{barrier_in, barrier_out};
pub use cells::{FlowCells, RepeatCells};
pub use endpoint::{from_pod, to_pod};
pub use host::to_host;
pub use ip::{Address, Ip};
pub use link::{Link, Network};
pub use maps::{Maps, Table};
pub use scratch::Scratch;
pub use transport::{Fragment, Transport};
pub use tunnel::{tun_eg, tun_in};
pub use tuple::{Step, Tuple};
use warren_abi::DropReason;

/// A packet from its link-layer header on.
pub trait Packet {
    /// `N` bytes at an offset, or `None` where the packet is shorter.
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;

    /// Bytes from the start of the link-layer header; a super-packet is as long as its parts together.
    fn length(&self) -> usize;

    /// The same number, less than 2^32, but the verifier forgets what it knew about it. Without that it follows
    /// every way through a loop apart, as each leaves another range of offsets.
    fn forget(&self, number: usize) -> usize {
        number
    }
}

/// What the kernel says about a packet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Meta {
    /// The device that it is on.
    pub ifindex: u32,
    /// The device that it came in by; 0 = made on this host.
    pub ingress_ifindex: u32,
    /// Packet mark.
    pub mark: u32,
    /// Ethertype that the sender claims.
    pub protocol: u16,
    /// It has a VLAN tag beside its bytes.
    pub tagged: bool,
}

/// What happens to a packet that is not dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// On to the stack, or to the device, with this mark.
    Pass {
        /// The whole mark.
        mark: u32,
    },
    /// Out of another device.
    Redirect {
        /// The device.
        ifindex: u32,
        /// The whole mark.
        mark: u32,
    },
}

impl Verdict {
    /// The same, with bits added to the mark.
    #[inline(always)]
    pub(crate) fn marked(self, bits: u32) -> Self {
        match self {
            Self::Pass { mark } => Self::Pass { mark: mark | bits },
            Self::Redirect { ifindex, mark } => Self::Redirect {
                ifindex,
                mark: mark | bits,
            },
        }
    }
}

/// A verdict, or why the packet is dropped.
pub type Judgement = Result<Verdict, DropReason>;
