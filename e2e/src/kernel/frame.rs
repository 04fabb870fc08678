//! Packets as bytes, from their Ethernet header on.

use std::net::IpAddr;

/// Bytes of the Ethernet header.
const ETHERNET: usize = 14;
const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;
const ICMP4: u8 = 1;
const ICMP6: u8 = 58;

/// A packet that opens a connection, or answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// MAC address of the sender.
    pub mac: [u8; 6],
    /// Source address.
    pub source: IpAddr,
    /// Destination address; of the same family.
    pub destination: IpAddr,
    /// IP protocol.
    pub protocol: u8,
    /// Source port; identifier of an ICMP echo.
    pub source_port: u16,
    /// Destination port, or ICMP type.
    pub port: u16,
    /// TCP: flags. SCTP: with ACK it answers.
    pub tcp_flags: u8,
}

impl Frame {
    /// First packet of a TCP connection.
    pub const SYN: u8 = 0x02;
    /// Answer to it.
    pub const SYN_ACK: u8 = 0x12;
    /// Any later packet.
    pub const ACK: u8 = 0x10;

    /// The bytes, with a few of payload.
    pub fn bytes(&self) -> Vec<u8> {
        let payload = self.transport();
        self.packet(self.protocol, &payload)
    }

    /// A packet between the same addresses with any payload.
    pub fn packet(&self, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(ETHERNET + 40 + payload.len());
        bytes.extend([2, 0, 0, 0, 0, 2]);
        bytes.extend(self.mac);
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let length = (20 + payload.len()) as u16;
                bytes.extend([8, 0, 0x45, 0]);
                bytes.extend(length.to_be_bytes());
                bytes.extend([0, 1, 0, 0, 64, protocol, 0, 0]);
                bytes.extend(source.octets());
                bytes.extend(destination.octets());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                bytes.extend((payload.len() as u16).to_be_bytes());
                bytes.extend([protocol, 64]);
                bytes.extend(source.octets());
                bytes.extend(destination.octets());
            }
            (source, destination) => panic!("{source} and {destination} are of two families"),
        }
        bytes.extend(payload);
        bytes
    }

    fn transport(&self) -> Vec<u8> {
        let [from, to] = [self.source_port, self.port].map(u16::to_be_bytes);
        let mut out = Vec::with_capacity(32);
        match self.protocol {
            TCP => {
                out.extend(from);
                out.extend(to);
                out.extend([
                    0,
                    0,
                    0,
                    1,
                    0,
                    0,
                    0,
                    0,
                    0x50,
                    self.tcp_flags,
                    0xff,
                    0xff,
                    0,
                    0,
                    0,
                    0,
                ]);
            }
            UDP => {
                out.extend(from);
                out.extend(to);
                out.extend([0, 12, 0, 0, 1, 2, 3, 4]);
            }
            // A chunk: INIT, or INIT ACK.
            SCTP => {
                out.extend(from);
                out.extend(to);
                let chunk = if self.tcp_flags & Self::ACK == 0 { 1 } else { 2 };
                out.extend([0, 0, 0, 0, 0, 0, 0, 0, chunk, 0, 0, 20]);
                out.extend([0; 16]);
            }
            ICMP4 | ICMP6 => {
                out.extend([to[1], 0, 0, 0]);
                out.extend(from);
                out.extend([0, 1, 1, 2, 3, 4]);
            }
            _ => out.extend([0; 16]),
        }
        out
    }

    /// The packet that answers: addresses and ports exchanged, an echo answered.
    pub fn reply(&self, mac: [u8; 6]) -> Self {
        let (source_port, port) = match (self.protocol, self.port) {
            (ICMP4, 8) => (self.source_port, 0),
            (ICMP6, 128) => (self.source_port, 129),
            (ICMP4 | ICMP6, kind) => (self.source_port, kind),
            (_, port) => (port, self.source_port),
        };
        Self {
            mac,
            source: self.destination,
            destination: self.source,
            source_port,
            port,
            tcp_flags: Self::SYN_ACK,
            ..*self
        }
    }
}
