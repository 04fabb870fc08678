//! What clients and the server say to each other.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// TCP: `ECHO`, length (4 bytes, big-endian), payload; answered by name and the same payload.
pub const ECHO: &[u8; 4] = b"ECHO";
/// TCP: `XFER`, length (8 bytes, big-endian), that many bytes of [`pattern`]; answered by a [`TransferReport`].
pub const XFER: &[u8; 4] = b"XFER";
/// UDP: a numbered packet, [`FlowPacket`].
pub const FLOW: &[u8; 4] = b"FLOW";

/// The largest UDP payload that still fits with the server's name in front.
pub const MAX_UDP: usize = 65_000;

/// Byte number `offset` of the test data: no period that a fragment or segment boundary could hide.
pub fn pattern(offset: u64) -> u8 {
    let mixed = offset.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 56) as u8 ^ (offset >> 3) as u8
}

/// `length` bytes of test data from `offset` on.
pub fn pattern_block(offset: u64, length: usize) -> Vec<u8> {
    (offset..).take(length).map(pattern).collect()
}

/// Writes a block with its length (4 bytes, big-endian) in front.
pub fn write_block(out: &mut impl Write, block: &[u8]) -> io::Result<()> {
    let length = u32::try_from(block.len()).map_err(|_| io::Error::other("block too long"))?;
    out.write_all(&length.to_be_bytes())?;
    out.write_all(block)
}

/// Reads what [`write_block`] wrote; at most 16 MiB.
pub fn read_block(input: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    input.read_exact(&mut length)?;
    let length = u32::from_be_bytes(length) as usize;
    if length > 16 << 20 {
        return Err(io::Error::other(format!("a block of {length} bytes is too long")));
    }
    let mut block = vec![0; length];
    input.read_exact(&mut block)?;
    Ok(block)
}

/// A numbered packet of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowPacket {
    /// Which flow of the sender.
    pub flow: u64,
    /// 0, 1, 2, ...; in the last packet: how many there were.
    pub number: u64,
    /// Asks for the [`FlowReport`].
    pub last: bool,
}

impl FlowPacket {
    /// Bytes without padding.
    pub const SIZE: usize = 21;

    /// The packet, padded to `size`.
    pub fn encode(self, size: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(size.max(Self::SIZE));
        out.extend_from_slice(FLOW);
        out.extend_from_slice(&self.flow.to_be_bytes());
        out.extend_from_slice(&self.number.to_be_bytes());
        out.push(u8::from(self.last));
        out.resize(size.max(Self::SIZE), 0);
        out
    }

    /// `None` for anything that is no flow packet.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let rest = bytes.strip_prefix(FLOW)?;
        let number = |at: usize| rest.get(at..at + 8)?.try_into().ok().map(u64::from_be_bytes);
        Some(Self {
            flow: number(0)?,
            number: number(8)?,
            last: *rest.get(16)? != 0,
        })
    }
}

/// What became of a flow.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowReport {
    /// Packets that the sender made.
    pub sent: u64,
    /// Of those, refused by the sender's own kernel.
    pub refused: u64,
    /// Different packets that arrived.
    pub received: u64,
    /// Sent, never arrived.
    pub lost: u64,
    /// The first runs of lost packets, each as its first and last number.
    #[serde(default)]
    pub lost_runs: Vec<(u64, u64)>,
    /// Arrived more than once.
    pub duplicated: u64,
    /// Arrived after a later one.
    pub reordered: u64,
    /// The longest time without a packet, milliseconds.
    pub longest_gap_ms: u64,
    /// Name of the pod that received.
    pub receiver: String,
}

/// What became of a transfer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferReport {
    /// Name of the pod that received.
    pub receiver: String,
    /// Bytes that arrived.
    pub bytes: u64,
    /// The first byte that was not what was sent.
    pub corrupt_at: Option<u64>,
}

/// Answer to a question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Name of the pod that answered.
    pub name: String,
    /// Bytes of payload that came back.
    pub bytes: usize,
    /// From question to answer, microseconds.
    pub micros: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flow_packets_survive_the_wire() {
        let packet = FlowPacket {
            flow: 7,
            number: u64::MAX - 1,
            last: true,
        };
        assert_eq!(FlowPacket::decode(&packet.encode(100)), Some(packet));
        assert_eq!(packet.encode(0).len(), FlowPacket::SIZE);
        assert_eq!(FlowPacket::decode(b"FLOWshort"), None);
        assert_eq!(FlowPacket::decode(b"something else that is long enough"), None);
    }

    #[test]
    fn the_pattern_does_not_repeat_at_segment_sizes() {
        for shift in [1, 8, 64, 256, 1360, 1400, 1448, 4096, 65536] {
            assert_ne!(pattern_block(0, 512), pattern_block(shift, 512), "{shift}");
        }
    }

    #[test]
    fn blocks_survive_the_wire() {
        let mut wire = Vec::new();
        write_block(&mut wire, b"abc").unwrap();
        assert_eq!(read_block(&mut wire.as_slice()).unwrap(), b"abc");
        assert!(read_block(&mut [0xff; 8].as_slice()).is_err());
    }
}
