//! Messages of the exchange, each in one packet.
//!
//! ```text
//!   byte 0   version, 1
//!   byte 1   type
//!   2..9     nonce: says which of its messages the beginning end is answered; zero in Hello
//!   9..16    Init: the first bytes of the name of the offered key that it is instead of, zero for none; else zero
//!   16..     Hello    name of the key that the sender has offered (16), or nothing
//!            Init     X25519 key (32), ML-KEM-768 key (1184)
//!            Reply    X25519 key (32), ML-KEM-768 ciphertext (1088), name of the key (16)
//!            Confirm  name of the key (16)
//!            Ack      name of the key (16)
//!            Other    name of the key that the sender has agreed on instead (16), or nothing
//! ```
//!
//! The largest, Init, fills a packet of IPv6's smallest MTU (1280 bytes, less 48 of headers) to the last byte.

use warren_model::PskId;

/// Bytes of what an end offers: its X25519 and its ML-KEM-768 public key (RFC 7748; FIPS 203, table 3).
pub const OFFER: usize = 32 + 1184;
/// Bytes of the answer: an X25519 public key and an ML-KEM-768 ciphertext.
pub const ANSWER: usize = 32 + 1088;
/// Bytes of the longest message.
pub const LONGEST: usize = HEADER + OFFER;

const VERSION: u8 = 1;
const HEADER: usize = 16;
const ID: usize = 16;
/// IPv6 minimum MTU (RFC 8200 section 5) without the IPv6 and UDP headers.
const SMALLEST_PAYLOAD: usize = 1280 - 40 - 8;

const _: () = assert!(LONGEST == SMALLEST_PAYLOAD);

/// Of one message of the beginning end: random from start to start, counted within.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Nonce(pub [u8; 7]);

impl Nonce {
    /// The `number`-th nonce of those that begin with `salt`.
    pub(super) fn numbered(salt: [u8; 7], number: u64) -> Self {
        let mut bytes = salt;
        for (byte, count) in bytes.iter_mut().zip(number.to_le_bytes()) {
            *byte ^= count;
        }
        Self(bytes)
    }
}

/// The first bytes of the name of an offered key; zero for none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Former(pub [u8; 7]);

impl Former {
    /// Of this key.
    pub fn of(offered: Option<PskId>) -> Self {
        let mut bytes = [0; 7];
        if let Some(id) = offered {
            bytes.copy_from_slice(&id.0[..7]);
        }
        Self(bytes)
    }
}

/// What the ends say to each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// From the end that does not begin: it has agreed on nothing, and its tunnel is open.
    Hello {
        /// The key that it has offered.
        offered: Option<PskId>,
    },
    /// The beginning end offers its public keys.
    Init {
        /// Of this offer; the same when it is repeated.
        nonce: Nonce,
        /// What the other end has offered, which this end does not take any more.
        instead_of: Former,
        /// [`OFFER`] bytes.
        offer: Vec<u8>,
    },
    /// The other end has computed the key and has it on disk.
    Reply {
        /// Of the offer.
        nonce: Nonce,
        /// [`ANSWER`] bytes.
        answer: Vec<u8>,
        /// The key.
        id: PskId,
    },
    /// The beginning end has it on disk too: it is agreed on.
    Confirm {
        /// Of this question; the same when it is repeated.
        nonce: Nonce,
        /// The key.
        id: PskId,
    },
    /// The other end knows, and its device has the key.
    Ack {
        /// Of the question.
        nonce: Nonce,
        /// The key.
        id: PskId,
    },
    /// Instead of Reply or Ack: that is not what the other end has.
    Other {
        /// Of the offer or question.
        nonce: Nonce,
        /// The key that it has agreed on.
        id: Option<PskId>,
    },
}

impl Message {
    /// The bytes of a packet.
    pub fn to_bytes(&self) -> Vec<u8> {
        let (kind, nonce, former) = match *self {
            Self::Hello { .. } => (1, Nonce::default(), Former::default()),
            Self::Init {
                nonce, instead_of, ..
            } => (2, nonce, instead_of),
            Self::Reply { nonce, .. } => (3, nonce, Former::default()),
            Self::Confirm { nonce, .. } => (4, nonce, Former::default()),
            Self::Ack { nonce, .. } => (5, nonce, Former::default()),
            Self::Other { nonce, .. } => (6, nonce, Former::default()),
        };
        let mut bytes = Vec::with_capacity(LONGEST);
        bytes.extend([VERSION, kind]);
        bytes.extend(nonce.0);
        bytes.extend(former.0);
        match self {
            Self::Hello { offered: None } | Self::Other { id: None, .. } => {}
            Self::Hello { offered: Some(id) } => bytes.extend(id.0),
            Self::Init { offer, .. } => bytes.extend(offer),
            Self::Reply { answer, id, .. } => {
                bytes.extend(answer);
                bytes.extend(id.0);
            }
            Self::Confirm { id, .. } | Self::Ack { id, .. } | Self::Other { id: Some(id), .. } => {
                bytes.extend(id.0);
            }
        }
        bytes
    }

    /// Parses a packet; `None` where it is not exactly a message.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let (header, rest) = bytes.split_at_checked(HEADER)?;
        let nonce = Nonce(header[2..9].try_into().ok()?);
        let former = Former(header[9..].try_into().ok()?);
        let id = |bytes: &[u8]| Some(PskId(bytes.try_into().ok()?));
        let some_id = |bytes: &[u8]| match bytes.is_empty() {
            true => Some(None),
            false => id(bytes).map(Some),
        };
        match (header[0], header[1]) {
            (VERSION, 2) if rest.len() == OFFER => Some(Self::Init {
                nonce,
                instead_of: former,
                offer: rest.to_vec(),
            }),
            _ if former != Former::default() => None,
            (VERSION, 1) if nonce == Nonce::default() => Some(Self::Hello {
                offered: some_id(rest)?,
            }),
            (VERSION, 3) if rest.len() == ANSWER + ID => Some(Self::Reply {
                nonce,
                answer: rest[..ANSWER].to_vec(),
                id: id(&rest[ANSWER..])?,
            }),
            (VERSION, 4) => Some(Self::Confirm { nonce, id: id(rest)? }),
            (VERSION, 5) => Some(Self::Ack { nonce, id: id(rest)? }),
            (VERSION, 6) => Some(Self::Other {
                nonce,
                id: some_id(rest)?,
            }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_wire_and_nothing_else_is_one() {
        let nonce = Nonce::numbered([7; 7], 0x0102);
        let id = PskId([9; 16]);
        let messages = [
            Message::Hello { offered: None },
            Message::Hello { offered: Some(id) },
            Message::Init {
                nonce,
                instead_of: Former::of(Some(id)),
                offer: vec![1; OFFER],
            },
            Message::Reply {
                nonce,
                answer: vec![2; ANSWER],
                id,
            },
            Message::Confirm { nonce, id },
            Message::Ack { nonce, id },
            Message::Other { nonce, id: None },
            Message::Other { nonce, id: Some(id) },
        ];
        for message in &messages {
            let bytes = message.to_bytes();
            assert!(bytes.len() <= LONGEST);
            assert_eq!(Message::parse(&bytes).as_ref(), Some(message));
            for length in 0..bytes.len() {
                let shorter = Message::parse(&bytes[..length]);
                let nothing = matches!(
                    shorter,
                    None | Some(Message::Other { id: None, .. } | Message::Hello { offered: None })
                );
                assert!(nothing, "{length}");
            }
            let longer = [bytes.as_slice(), &[0]].concat();
            assert_eq!(Message::parse(&longer), None);
            for (at, value) in [(0, 0), (0, 2), (1, 0), (1, 7)] {
                let mut other = bytes.clone();
                other[at] = value;
                assert_eq!(Message::parse(&other), None);
            }
        }
    }

    #[test]
    fn nonces_of_a_start_differ() {
        let salt = [0xa5; 7];
        let all: std::collections::HashSet<_> = (0..1000).map(|n| Nonce::numbered(salt, n)).collect();
        assert_eq!(all.len(), 1000);
        assert!(!all.contains(&Nonce::default()));
    }
}
