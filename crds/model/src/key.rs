//! WireGuard keys.

use std::{fmt, str::FromStr};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use zeroize::Zeroize as _;

/// Why bytes are not an acceptable WireGuard key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not 44 characters of base64 that decode to 32 bytes.
    #[error("not a WireGuard key: expected 44 characters of base64 for 32 bytes")]
    Encoding,
    /// The all-zero key.
    #[error("the all-zero key is refused")]
    Zero,
    /// A point of small order: a handshake with it yields a secret that everybody knows.
    #[error("a low-order point is refused as public key")]
    LowOrder,
}

/// A Curve25519 public key that is neither zero nor of low order.
///
/// Printed as 44 characters of base64, as `wg` does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey([u8; 32]);

/// The u-coordinates of small order on Curve25519 and its twist, reduced, little-endian, with the top bit
/// clear (RFC 7748 masks it). Source: <https://cr.yp.to/ecdh.html#validate>.
const LOW_ORDER: [[u8; 32]; 7] = [
    [0; 32],
    {
        let mut one = [0; 32];
        one[0] = 1;
        one
    },
    [
        0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a, 0xda,
        0x09, 0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00,
    ],
    [
        0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef, 0x5b, 0x04,
        0x44, 0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f, 0x11, 0x57,
    ],
    prime_plus(-1),
    prime_plus(0),
    prime_plus(1),
];

/// 2^255 - 19 + `offset` for offsets of -1, 0 and 1, little-endian.
const fn prime_plus(offset: i16) -> [u8; 32] {
    let mut bytes = [0xff; 32];
    bytes[0] = (0xed + offset) as u8;
    bytes[31] = 0x7f;
    bytes
}

impl PublicKey {
    /// Accepts 32 bytes unless they are zero or a point of low order.
    pub fn from_bytes(bytes: [u8; 32]) -> Result<Self, KeyError> {
        if bytes == [0; 32] {
            return Err(KeyError::Zero);
        }
        let mut masked = bytes;
        masked[31] &= 0x7f;
        if LOW_ORDER.contains(&masked) {
            return Err(KeyError::LowOrder);
        }
        Ok(Self(bytes))
    }

    /// The 32 bytes of the key.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl TryFrom<&[u8]> for PublicKey {
    type Error = KeyError;

    fn try_from(bytes: &[u8]) -> Result<Self, KeyError> {
        Self::from_bytes(bytes.try_into().map_err(|_| KeyError::Encoding)?)
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        let bytes = STANDARD.decode(text).map_err(|_| KeyError::Encoding)?;
        Self::try_from(bytes.as_slice())
    }
}

impl TryFrom<String> for PublicKey {
    type Error = KeyError;

    fn try_from(text: String) -> Result<Self, KeyError> {
        text.parse()
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> Self {
        key.to_string()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

/// A Curve25519 private key. Never printed: `Debug` redacts it, there is no `Display` and no `Serialize`.
/// The bytes are overwritten when it is dropped, and stay where they are while it is moved: a moved array leaves a copy
/// behind, in freed memory as well.
#[derive(Clone, PartialEq, Eq)]
pub struct PrivateKey(Box<[u8; 32]>);

impl Drop for PrivateKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl PrivateKey {
    /// Takes 32 random bytes and clamps them as RFC 7748 section 5 says.
    pub fn from_bytes(mut bytes: [u8; 32]) -> Self {
        bytes[0] &= 248;
        bytes[31] &= 127;
        bytes[31] |= 64;
        let mut key = Self(Box::new([0; 32]));
        key.0.copy_from_slice(&bytes);
        bytes.zeroize();
        key
    }

    /// The key itself, for the device and for the file that keeps it; nowhere else.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(redacted)")
    }
}

/// A WireGuard pre-shared key, of two nodes and one pair of their key generations. Redacts and wipes itself as a
/// [`PrivateKey`] does.
#[derive(Clone, PartialEq, Eq)]
pub struct PreSharedKey(Box<[u8; 32]>);

impl Drop for PreSharedKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl PreSharedKey {
    /// Takes 32 bytes; all zero means "none" to WireGuard and is refused.
    pub fn from_bytes(bytes: &[u8; 32]) -> Option<Self> {
        if *bytes == [0; 32] {
            return None;
        }
        let mut key = Self(Box::new([0; 32]));
        key.0.copy_from_slice(bytes);
        Some(key)
    }

    /// The key itself, for the device and for the file that keeps it; nowhere else.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for PreSharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PreSharedKey(redacted)")
    }
}

/// Names a pre-shared key without telling it: the first half of a hash of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PskId(pub [u8; 16]);

impl fmt::Debug for PskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PskId({self})")
    }
}

impl fmt::Display for PskId {
    /// The first 8 hexadecimal digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn low_order_points_are_refused_with_either_top_bit() {
        for point in LOW_ORDER {
            for top in [0, 0x80] {
                let mut bytes = point;
                bytes[31] |= top;
                assert!(PublicKey::from_bytes(bytes).is_err(), "{bytes:02x?}");
            }
        }
    }

    #[test]
    fn text_round_trips_and_bad_text_is_refused() {
        let text = "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw=";
        assert_eq!(text.parse::<PublicKey>().unwrap().to_string(), text);
        for bad in ["", "AAAA", "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8yk", "!"] {
            assert_eq!(bad.parse::<PublicKey>(), Err(KeyError::Encoding));
        }
        assert_eq!(
            "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=".parse::<PublicKey>(),
            Err(KeyError::Zero)
        );
    }

    #[test]
    fn private_keys_redact_themselves() {
        assert_eq!(
            format!("{:?}", PrivateKey::from_bytes([7; 32])),
            "PrivateKey(redacted)"
        );
        let shared = PreSharedKey::from_bytes(&[7; 32]);
        assert_eq!(format!("{shared:?}"), "Some(PreSharedKey(redacted))");
        assert_eq!(PreSharedKey::from_bytes(&[0; 32]), None);
    }
}
