//! Authenticators of handshake messages, and what is done about too many of them (sections 5.3 and 5.4.7 of the
//! WireGuard paper).

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use chacha20poly1305::{AeadInPlace as _, KeyInit as _, XChaCha20Poly1305};
use zeroize::Zeroizing;

use super::{
    image::{Damaged, Reader, Writer},
    noise,
};

/// Bytes of a cookie reply.
pub(super) const COOKIE_REPLY: usize = 64;

/// The type of a cookie reply.
pub(super) const TYPE_COOKIE: u8 = 3;

/// How long a cookie is good for; the secret behind it changes as often.
const LIFE: Duration = Duration::from_secs(120);

/// Handshake messages in a second and on a device from which on a cookie is asked for.
const PER_SECOND: u32 = 200;

/// As [`PER_SECOND`], of answers to initiations of ours. Nobody who has not seen such an initiation knows its index, so a
/// flood does not get here; many peers that answer at once do.
const ANSWERS_PER_SECOND: u32 = 2000;

/// Of one source with a cookie, while there are too many: in a second, and at once.
const SOURCE_PER_SECOND: f64 = 20.0;
const SOURCE_BURST: f64 = 5.0;

/// Sources that are counted.
pub(super) const SOURCES: usize = 8192;

const MAC: usize = 16;
const NONCE: usize = 24;

fn mac1_key(public: &[u8; 32]) -> [u8; 32] {
    noise::hash(&[b"mac1----", public])
}

fn cookie_key(public: &[u8; 32]) -> [u8; 32] {
    noise::hash(&[b"cookie--", public])
}

/// Where the two authenticators of a handshake message begin: its last 32 bytes.
fn authenticators(message: &[u8]) -> (usize, usize) {
    (message.len() - 2 * MAC, message.len() - MAC)
}

fn equal(a: &[u8], b: &[u8]) -> bool {
    aws_lc_rs::constant_time::verify_slices_are_equal(a, b).is_ok()
}

/// What a device does with a handshake message before anything expensive.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Look at it.
    Accepted,
    /// Its sender does not know our public key.
    Forged,
    /// Send it a cookie.
    AskForCookie,
    /// It has a cookie, and sends too much.
    TooMany,
}

/// The receiving side: one per device.
pub(super) struct Gate {
    mac1_key: [u8; 32],
    cookie_key: [u8; 32],
    /// What cookies are made of, and since when.
    secret: Zeroizing<[u8; 32]>,
    secret_since: Option<Instant>,
    initiations: Meter,
    answers: Meter,
    sources: HashMap<IpAddr, Bucket>,
}

/// Messages in the running second.
#[derive(Default)]
struct Meter {
    second: Option<Instant>,
    count: u32,
}

impl Meter {
    /// Counts a message. Whether there were more than `limit`.
    fn exceeds(&mut self, limit: u32, now: Instant) -> bool {
        match self.second {
            Some(second) if now.saturating_duration_since(second) < Duration::from_secs(1) => {}
            _ => {
                self.second = Some(now);
                self.count = 0;
            }
        }
        self.count = self.count.saturating_add(1);
        self.count > limit
    }
}

/// A token bucket.
struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Gate {
    pub(super) fn new(public: &[u8; 32]) -> Self {
        Self {
            mac1_key: mac1_key(public),
            cookie_key: cookie_key(public),
            secret: Zeroizing::default(),
            secret_since: None,
            initiations: Meter::default(),
            answers: Meter::default(),
            sources: HashMap::new(),
        }
    }

    /// Sources that are counted: what a flood can fill.
    #[cfg(test)]
    pub(super) fn sources(&self) -> usize {
        self.sources.len()
    }

    /// Judges an initiation, or an answer to one of ours, of the right length.
    pub(super) fn judge(
        &mut self,
        from: SocketAddr,
        message: &[u8],
        now: Instant,
        random: &dyn Fn(&mut [u8]),
    ) -> Verdict {
        let (mac1, mac2) = authenticators(message);
        if !equal(
            &message[mac1..mac2],
            &noise::mac(&self.mac1_key, &[&message[..mac1]]),
        ) {
            return Verdict::Forged;
        }
        let under_load = match message[0] {
            noise::TYPE_RESPONSE => self.answers.exceeds(ANSWERS_PER_SECOND, now),
            _ => self.initiations.exceeds(PER_SECOND, now),
        };
        if !under_load {
            return Verdict::Accepted;
        }
        let cookie = self.cookie(from, now, random);
        if !equal(&message[mac2..], &noise::mac(&cookie, &[&message[..mac2]])) {
            return Verdict::AskForCookie;
        }
        match self.take_token(from.ip(), now) {
            true => Verdict::Accepted,
            false => Verdict::TooMany,
        }
    }

    /// The cookie of an address and port: who has it receives what is sent there.
    fn cookie(&mut self, from: SocketAddr, now: Instant, random: &dyn Fn(&mut [u8])) -> [u8; MAC] {
        if self
            .secret_since
            .is_none_or(|since| now.saturating_duration_since(since) >= LIFE)
        {
            random(&mut *self.secret);
            self.secret_since = Some(now);
        }
        let port = from.port().to_be_bytes();
        match from.ip() {
            IpAddr::V4(ip) => noise::mac(&*self.secret, &[&ip.octets(), &port]),
            IpAddr::V6(ip) => noise::mac(&*self.secret, &[&ip.octets(), &port]),
        }
    }

    /// Sources of IPv6 are counted by their /64: who has one address of it has them all.
    fn take_token(&mut self, from: IpAddr, now: Instant) -> bool {
        let source = match from {
            IpAddr::V4(_) => from,
            IpAddr::V6(ip) => IpAddr::V6((u128::from(ip) >> 64 << 64).into()),
        };
        if self.sources.len() >= SOURCES && !self.sources.contains_key(&source) {
            self.sources
                .retain(|_, bucket| now.saturating_duration_since(bucket.at) < Duration::from_secs(1));
            if self.sources.len() >= SOURCES {
                return false;
            }
        }
        let bucket = self.sources.entry(source).or_insert(Bucket {
            tokens: SOURCE_BURST,
            at: now,
        });
        let earned = now.saturating_duration_since(bucket.at).as_secs_f64() * SOURCE_PER_SECOND;
        bucket.tokens = (bucket.tokens + earned).min(SOURCE_BURST);
        bucket.at = now;
        let enough = bucket.tokens >= 1.0;
        if enough {
            bucket.tokens -= 1.0;
        }
        enough
    }

    /// Writes the answer to a message that needs a cookie.
    pub(super) fn reply(
        &mut self,
        from: SocketAddr,
        message: &[u8],
        now: Instant,
        random: &dyn Fn(&mut [u8]),
        out: &mut [u8; COOKIE_REPLY],
    ) -> bool {
        let (mac1, mac2) = authenticators(message);
        let mut cookie = self.cookie(from, now, random);
        out.fill(0);
        out[0] = TYPE_COOKIE;
        // The sender's index is at the same place in both handshake messages.
        out[4..8].copy_from_slice(&message[4..8]);
        random(&mut out[8..8 + NONCE]);
        let mut nonce = [0; NONCE];
        nonce.copy_from_slice(&out[8..8 + NONCE]);
        let sealed = XChaCha20Poly1305::new(&self.cookie_key.into()).encrypt_in_place_detached(
            &nonce.into(),
            &message[mac1..mac2],
            &mut cookie,
        );
        let Ok(tag) = sealed else { return false };
        out[32..48].copy_from_slice(&cookie);
        out[48..].copy_from_slice(&tag);
        true
    }
}

/// The sending side: one per peer.
pub(super) struct Authenticator {
    mac1_key: [u8; 32],
    cookie_key: [u8; 32],
    /// The first authenticator of the last message: a cookie answers exactly that.
    last: Option<[u8; MAC]>,
    cookie: Option<([u8; MAC], Instant)>,
}

impl Authenticator {
    pub(super) fn new(peer: &[u8; 32]) -> Self {
        Self {
            mac1_key: mac1_key(peer),
            cookie_key: cookie_key(peer),
            last: None,
            cookie: None,
        }
    }

    /// Writes the cookie, and what one is expected for, for a successor.
    pub(super) fn write(&self, out: &mut Writer) {
        out.option(self.last.as_ref(), |out, last| out.raw(last));
        out.option(self.cookie.as_ref(), |out, (cookie, at)| {
            out.raw(cookie);
            out.moment(*at);
        });
    }

    /// What [`Self::write`] wrote.
    pub(super) fn read(peer: &[u8; 32], from: &mut Reader<'_>) -> Result<Self, Damaged> {
        let mut authenticator = Self::new(peer);
        authenticator.last = from.option(Reader::array)?;
        authenticator.cookie = from.option(|from| Ok((from.array()?, from.moment()?)))?;
        Ok(authenticator)
    }

    /// Completes a handshake message.
    pub(super) fn sign(&mut self, message: &mut [u8], now: Instant) {
        let (mac1, mac2) = authenticators(message);
        let first = noise::mac(&self.mac1_key, &[&message[..mac1]]);
        message[mac1..mac2].copy_from_slice(&first);
        self.last = Some(first);
        let second = match &self.cookie {
            Some((cookie, at)) if now.saturating_duration_since(*at) < LIFE => {
                noise::mac(cookie, &[&message[..mac2]])
            }
            _ => [0; MAC],
        };
        message[mac2..].copy_from_slice(&second);
    }

    /// Takes a cookie reply. Whether it was the answer to our last message.
    pub(super) fn take(&mut self, message: &[u8; COOKIE_REPLY], now: Instant) -> bool {
        let Some(last) = self.last else { return false };
        let (mut nonce, mut cookie, mut tag) = ([0; NONCE], [0; MAC], [0; MAC]);
        nonce.copy_from_slice(&message[8..32]);
        cookie.copy_from_slice(&message[32..48]);
        tag.copy_from_slice(&message[48..]);
        let opened = XChaCha20Poly1305::new(&self.cookie_key.into()).decrypt_in_place_detached(
            &nonce.into(),
            &last,
            &mut cookie,
            &tag.into(),
        );
        if opened.is_err() {
            return false;
        }
        self.last = None;
        self.cookie = Some((cookie, now));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(out: &mut [u8]) {
        out.fill(0x42);
    }

    fn address(n: u16) -> SocketAddr {
        ([192, 0, 2, 1], n).into()
    }

    /// A gate that has had its messages for this second.
    fn loaded(now: Instant) -> (Gate, Authenticator) {
        let (mut gate, mut sender) = (Gate::new(&[1; 32]), Authenticator::new(&[1; 32]));
        for _ in 0..PER_SECOND {
            let mut message = [0; 148];
            sender.sign(&mut message, now);
            assert_eq!(gate.judge(address(1), &message, now, &random), Verdict::Accepted);
        }
        (gate, sender)
    }

    #[test]
    fn a_message_without_its_authenticator_costs_nothing() {
        let (now, mut gate) = (Instant::now(), Gate::new(&[1; 32]));
        let mut message = [0; 148];
        for _ in 0..2 * PER_SECOND {
            assert_eq!(gate.judge(address(1), &message, now, &random), Verdict::Forged);
        }
        Authenticator::new(&[2; 32]).sign(&mut message, now);
        assert_eq!(gate.judge(address(1), &message, now, &random), Verdict::Forged);
        Authenticator::new(&[1; 32]).sign(&mut message, now);
        assert_eq!(gate.judge(address(1), &message, now, &random), Verdict::Accepted);
    }

    #[test]
    fn a_cookie_is_good_for_its_address_port_and_time() {
        let now = Instant::now();
        let (mut gate, mut sender) = loaded(now);
        let mut message = [0; 148];
        sender.sign(&mut message, now);
        assert_eq!(
            gate.judge(address(1), &message, now, &random),
            Verdict::AskForCookie
        );
        let mut reply = [0; COOKIE_REPLY];
        assert!(gate.reply(address(1), &message, now, &random, &mut reply));
        let mut forged = reply;
        forged[40] ^= 1;
        assert!(!sender.take(&forged, now));
        assert!(sender.take(&reply, now));
        assert!(!sender.take(&reply, now), "one cookie for one message");
        sender.sign(&mut message, now);
        assert_eq!(gate.judge(address(1), &message, now, &random), Verdict::Accepted);
        assert_eq!(
            gate.judge(address(2), &message, now, &random),
            Verdict::AskForCookie
        );
        let other: SocketAddr = ([192, 0, 2, 2], 1).into();
        assert_eq!(gate.judge(other, &message, now, &random), Verdict::AskForCookie);
        // It is not used when it is too old.
        sender.sign(&mut message, now + LIFE);
        assert_eq!(message[132..], [0; MAC]);
    }

    #[test]
    fn a_source_with_a_cookie_is_limited_too() {
        let now = Instant::now();
        let (mut gate, mut sender) = loaded(now);
        let (mut message, mut reply) = ([0; 148], [0; COOKIE_REPLY]);
        sender.sign(&mut message, now);
        assert!(gate.reply(address(1), &message, now, &random, &mut reply));
        assert!(sender.take(&reply, now));
        sender.sign(&mut message, now);
        let verdicts = (0..10).map(|_| gate.judge(address(1), &message, now, &random));
        assert_eq!(verdicts.filter(|verdict| *verdict == Verdict::TooMany).count(), 5);
        // The next second begins anew.
        let later = now + Duration::from_secs(1);
        assert_eq!(
            gate.judge(address(1), &message, later, &random),
            Verdict::Accepted
        );
    }

    #[test]
    fn sources_are_counted_up_to_a_limit() {
        let (now, mut gate) = (Instant::now(), Gate::new(&[1; 32]));
        for n in 0..2 * SOURCES as u32 {
            gate.take_token(IpAddr::V4(n.into()), now);
        }
        assert_eq!(gate.sources.len(), SOURCES);
        assert!(gate.take_token([255, 0, 0, 1].into(), now + Duration::from_secs(2)));
        let (a, b): (IpAddr, IpAddr) = ("2001:db8::1".parse().unwrap(), "2001:db8::2".parse().unwrap());
        for _ in 0..5 {
            assert!(gate.take_token(a, now + Duration::from_secs(2)));
        }
        assert!(!gate.take_token(b, now + Duration::from_secs(2)), "the same /64");
    }
}
