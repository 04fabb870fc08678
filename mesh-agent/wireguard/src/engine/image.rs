//! The bytes of what an engine hands to its successor: see [`super::supervisor`]. Numbers are little-endian; times are
//! distances from the moment of writing. Both sides wipe the bytes, which hold keys, when they are done with them.

use std::{
    net::SocketAddr,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use ipnet::IpNet;
use zeroize::Zeroizing;

/// What was read is not what an engine of this version writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the other engine's state cannot be read")]
pub(super) struct Damaged;

/// Writes an image.
pub(super) struct Writer {
    bytes: Zeroizing<Vec<u8>>,
    now: Instant,
}

impl Writer {
    /// Times are written as distances from `now`.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            bytes: Zeroizing::new(Vec::with_capacity(4096)),
            now,
        }
    }

    /// Another image with the same clock.
    pub(super) fn beside(&self) -> Self {
        Self::new(self.now)
    }

    pub(super) fn finish(self) -> Zeroizing<Vec<u8>> {
        self.bytes
    }

    /// Bytes without their number.
    pub(super) fn raw(&mut self, bytes: &[u8]) {
        // Grown by hand, so that no copy of a key is left behind when the bytes move.
        if self.bytes.capacity() - self.bytes.len() < bytes.len() {
            let room = (self.bytes.len() + bytes.len()) * 2;
            let mut larger = Zeroizing::new(Vec::with_capacity(room));
            larger.extend_from_slice(&self.bytes);
            self.bytes = larger;
        }
        self.bytes.extend_from_slice(bytes);
    }

    pub(super) fn flag(&mut self, flag: bool) {
        self.raw(&[u8::from(flag)]);
    }

    pub(super) fn u16(&mut self, number: u16) {
        self.raw(&number.to_le_bytes());
    }

    pub(super) fn u32(&mut self, number: u32) {
        self.raw(&number.to_le_bytes());
    }

    pub(super) fn u64(&mut self, number: u64) {
        self.raw(&number.to_le_bytes());
    }

    /// How many of something follow.
    pub(super) fn count(&mut self, count: usize) {
        self.u64(count as u64);
    }

    /// Bytes and their number.
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.raw(bytes);
    }

    pub(super) fn text(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }

    pub(super) fn option<T>(&mut self, value: Option<T>, write: impl FnOnce(&mut Self, T)) {
        self.flag(value.is_some());
        if let Some(value) = value {
            write(self, value);
        }
    }

    /// Something that a reader may skip.
    pub(super) fn section(&mut self, write: impl FnOnce(&mut Self)) {
        let place = self.bytes.len();
        self.u64(0);
        let start = self.bytes.len();
        write(self);
        let len = (self.bytes.len() - start) as u64;
        self.bytes[place..start].copy_from_slice(&len.to_le_bytes());
    }

    pub(super) fn moment(&mut self, moment: Instant) {
        let nanoseconds = |distance: Duration| i64::try_from(distance.as_nanos()).unwrap_or(i64::MAX);
        let distance = match moment.checked_duration_since(self.now) {
            Some(ahead) => nanoseconds(ahead),
            None => -nanoseconds(self.now.saturating_duration_since(moment)),
        };
        self.raw(&distance.to_le_bytes());
    }

    pub(super) fn time(&mut self, time: SystemTime) {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        self.u64(since.as_secs());
        self.u32(since.subsec_nanos());
    }

    pub(super) fn endpoint(&mut self, endpoint: SocketAddr) {
        self.text(&endpoint.to_string());
    }

    pub(super) fn prefix(&mut self, prefix: IpNet) {
        match prefix {
            IpNet::V4(prefix) => {
                self.raw(&[4, prefix.prefix_len()]);
                self.raw(&prefix.addr().octets());
            }
            IpNet::V6(prefix) => {
                self.raw(&[6, prefix.prefix_len()]);
                self.raw(&prefix.addr().octets());
            }
        }
    }
}

/// Reads an image. Nothing in it is believed beyond its end.
#[derive(Clone)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
    now: Instant,
}

impl<'a> Reader<'a> {
    /// `now` is a moment before that of writing, so that nothing seems younger than it is.
    pub(super) fn new(bytes: &'a [u8], now: Instant) -> Self {
        Self { rest: bytes, now }
    }

    /// How much is left.
    #[cfg(test)]
    pub(super) fn left(&self) -> usize {
        self.rest.len()
    }

    /// That nothing is left.
    pub(super) fn end(&self) -> Result<(), Damaged> {
        self.rest.is_empty().then_some(()).ok_or(Damaged)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], Damaged> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(Damaged)?;
        self.rest = rest;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], Damaged> {
        self.take(N)?.try_into().map_err(|_| Damaged)
    }

    pub(super) fn secret<const N: usize>(&mut self) -> Result<Zeroizing<[u8; N]>, Damaged> {
        let bytes = self.take(N)?;
        let mut secret = Zeroizing::new([0; N]);
        secret.copy_from_slice(bytes);
        Ok(secret)
    }

    pub(super) fn flag(&mut self) -> Result<bool, Damaged> {
        match self.array()? {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => Err(Damaged),
        }
    }

    pub(super) fn u16(&mut self) -> Result<u16, Damaged> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Damaged> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Damaged> {
        self.array().map(u64::from_le_bytes)
    }

    /// How many follow, each of at least one byte.
    pub(super) fn count(&mut self) -> Result<usize, Damaged> {
        let count = usize::try_from(self.u64()?).map_err(|_| Damaged)?;
        (count <= self.rest.len()).then_some(count).ok_or(Damaged)
    }

    pub(super) fn bytes(&mut self) -> Result<&'a [u8], Damaged> {
        let len = self.count()?;
        self.take(len)
    }

    pub(super) fn text(&mut self) -> Result<&'a str, Damaged> {
        std::str::from_utf8(self.bytes()?).map_err(|_| Damaged)
    }

    pub(super) fn option<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, Damaged>,
    ) -> Result<Option<T>, Damaged> {
        match self.flag()? {
            true => read(self).map(Some),
            false => Ok(None),
        }
    }

    /// What [`Writer::section`] wrote.
    pub(super) fn section(&mut self) -> Result<Self, Damaged> {
        Ok(Self::new(self.bytes()?, self.now))
    }

    pub(super) fn moment(&mut self) -> Result<Instant, Damaged> {
        let distance = i64::from_le_bytes(self.array()?);
        let length = Duration::from_nanos(distance.unsigned_abs());
        let moment = match distance < 0 {
            true => self.now.checked_sub(length),
            false => self.now.checked_add(length),
        };
        moment.ok_or(Damaged)
    }

    pub(super) fn time(&mut self) -> Result<SystemTime, Damaged> {
        let (seconds, nanoseconds) = (self.u64()?, self.u32()?);
        let since = Duration::from_secs(seconds).checked_add(Duration::from_nanos(nanoseconds.into()));
        since
            .and_then(|since| UNIX_EPOCH.checked_add(since))
            .ok_or(Damaged)
    }

    pub(super) fn endpoint(&mut self) -> Result<SocketAddr, Damaged> {
        self.text()?.parse().map_err(|_| Damaged)
    }

    pub(super) fn prefix(&mut self) -> Result<IpNet, Damaged> {
        let [family, len] = self.array()?;
        let address = match family {
            4 => self.array::<4>()?.into(),
            6 => self.array::<16>()?.into(),
            _ => return Err(Damaged),
        };
        IpNet::new(address, len).map_err(|_| Damaged)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn everything_comes_back() {
        let now = Instant::now();
        let (before, after) = (now - Duration::from_secs(100), now + Duration::from_millis(5));
        let time = UNIX_EPOCH + Duration::new(1_700_000_000, 7);
        let endpoints: [SocketAddr; 2] = ["192.0.2.1:9".parse().unwrap(), "[fe80::1%3]:9".parse().unwrap()];
        let prefixes: [IpNet; 2] = ["10.0.0.0/8".parse().unwrap(), "::/0".parse().unwrap()];
        let mut out = Writer::new(now);
        out.section(|out| {
            out.option(Some(7), Writer::u32);
            out.option(None, Writer::u32);
            out.moment(before);
            out.moment(after);
        });
        out.time(time);
        endpoints.into_iter().for_each(|endpoint| out.endpoint(endpoint));
        prefixes.into_iter().for_each(|prefix| out.prefix(prefix));
        out.bytes(&[1; 100_000]);
        let bytes = out.finish();
        let mut from = Reader::new(&bytes, now);
        let mut section = from.section().unwrap();
        assert_eq!(section.option(Reader::u32), Ok(Some(7)));
        assert_eq!(section.option(Reader::u32), Ok(None));
        assert_eq!((section.moment(), section.moment()), (Ok(before), Ok(after)));
        assert_eq!(section.end(), Ok(()));
        assert_eq!(from.time(), Ok(time));
        assert_eq!(endpoints.map(|_| from.endpoint().unwrap()), endpoints);
        assert_eq!(prefixes.map(|_| from.prefix().unwrap()), prefixes);
        assert_eq!(from.bytes(), Ok(&[1; 100_000][..]));
        assert_eq!(from.end(), Ok(()));
    }

    proptest! {
        /// Whatever the bytes are, reading ends and takes no more memory than they have.
        #[test]
        fn nonsense_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..64), what in 0u8..10) {
            let mut from = Reader::new(&bytes, Instant::now());
            match what {
                0 => drop(from.section()),
                1 => drop(from.moment()),
                2 => drop(from.time()),
                3 => drop(from.endpoint()),
                4 => drop(from.prefix()),
                5 => drop(from.text()),
                6 => prop_assert!(from.count().is_ok_and(|count| count <= bytes.len()) || from.count().is_err()),
                7 => drop(from.option(Reader::u64)),
                8 => drop(from.secret::<32>()),
                _ => drop(from.bytes()),
            }
        }
    }
}
