//! A session's two halves: one seals, the other opens, each in place and neither knowing the other.

use std::{
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use aws_lc_rs::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use zeroize::Zeroizing;

use super::{
    drops::DropReason,
    image::{Damaged, Reader, Writer},
    lanes::{Kind, LANES, Lanes},
    transport::{DATA_HEADER, Layout, OVERHEAD, TAG},
    window::Window,
};

/// The type of a data message.
pub(super) const TYPE_DATA: u8 = 4;

/// After so many messages and so long a session is renewed, or not used any more (section 6.1 of the WireGuard paper).
pub(super) const REKEY_AFTER_MESSAGES: u64 = 1 << 60;
pub(super) const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
pub(super) const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
pub(super) const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);

/// What seals.
pub(super) struct Sending {
    /// For a successor: the cipher does not tell its key.
    secret: Zeroizing<[u8; 32]>,
    key: LessSafeKey,
    lanes: Option<Lanes>,
    /// The session's index at the other end.
    receiver: u32,
}

/// Counters that nobody else uses, and what seals with them.
pub(super) struct Sealing {
    sending: Arc<Sending>,
    first: u64,
}

/// What opens.
pub(super) struct Receiving {
    secret: Zeroizing<[u8; 32]>,
    key: LessSafeKey,
    lanes: Option<Lanes>,
    pub(super) created: Instant,
    window: Mutex<Window>,
}

/// What became of messages that came together.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    /// Bytes of messages that were authentic and new.
    pub(super) bytes: usize,
    /// Whether one of them had content.
    pub(super) data: bool,
}

/// The cipher refused a key, which it does for no key of 32 bytes.
#[derive(Debug)]
pub(super) struct BadKey;

fn cipher(key: &[u8; 32]) -> Result<LessSafeKey, BadKey> {
    let key = UnboundKey::new(&CHACHA20_POLY1305, key).map_err(|_| BadKey)?;
    Ok(LessSafeKey::new(key))
}

/// Four zeroes and the counter, little-endian (section 5.4.6).
fn nonce(counter: u64) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

impl Sending {
    pub(super) fn new(key: &[u8; 32], receiver: u32) -> Result<Self, BadKey> {
        Ok(Self {
            secret: Zeroizing::new(*key),
            key: cipher(key)?,
            lanes: Lanes::new(key),
            receiver,
        })
    }

    /// Writes the half for a successor.
    pub(super) fn write(&self, out: &mut Writer) {
        out.raw(&*self.secret);
        out.u32(self.receiver);
    }

    /// What [`Self::write`] wrote.
    pub(super) fn read(from: &mut Reader<'_>) -> Result<Self, Damaged> {
        let secret = from.secret()?;
        Self::new(&secret, from.u32()?).map_err(|BadKey| Damaged)
    }

    /// Type, receiver, counter.
    fn header(&self, counter: u64) -> [u8; DATA_HEADER] {
        let mut header = [0; DATA_HEADER];
        header[0] = TYPE_DATA;
        header[4..8].copy_from_slice(&self.receiver.to_le_bytes());
        header[8..].copy_from_slice(&counter.to_le_bytes());
        header
    }

    /// Seals the packet in a message of [`OVERHEAD`] bytes more than it. A counter must be used once only.
    fn seal(&self, message: &mut [u8], counter: u64) -> bool {
        let Some((header, rest)) = message.split_first_chunk_mut::<DATA_HEADER>() else {
            return false;
        };
        let Some((content, tag)) = rest.split_last_chunk_mut::<TAG>() else {
            return false;
        };
        *header = self.header(counter);
        let sealed = self
            .key
            .seal_in_place_separate_tag(nonce(counter), Aad::empty(), content);
        sealed.map(|made| tag.copy_from_slice(made.as_ref())).is_ok()
    }
}

impl Sealing {
    /// Reserves nothing by itself: `first` and as many after it as there will be messages are the caller's.
    pub(super) fn new(sending: Arc<Sending>, first: u64) -> Self {
        Self { sending, first }
    }

    /// Seals messages of `segment` bytes (the last may be shorter), one after the other. Whether all were sealed.
    pub(super) fn seal(&self, messages: &mut [u8], segment: usize) -> bool {
        let mut counter = self.first;
        for group in groups(messages, Layout::packed(segment), self.sending.lanes.as_ref()) {
            let count = group.len() / segment;
            let sealed = match &self.sending.lanes {
                Some(lanes) if count >= lanes.worthwhile(segment) => {
                    let counters = std::array::from_fn(|lane| counter + lane as u64);
                    for (message, counter) in group.chunks_exact_mut(segment).zip(counters) {
                        message[..DATA_HEADER].copy_from_slice(&self.sending.header(counter));
                    }
                    lanes.seal(group, segment, &counters);
                    counter += count as u64;
                    true
                }
                _ => group.chunks_mut(segment).all(|message| {
                    let sealed = self.sending.seal(message, counter);
                    counter += 1;
                    sealed
                }),
            };
            if !sealed {
                return false;
            }
        }
        true
    }
}

/// Seals messages of `bytes` bytes in memory for about that long: by the usual cipher, then by each that does many at once
/// on this CPU. Its name, how many, and how long it took.
pub(super) fn sealing_alone(bytes: usize, time: Duration) -> Vec<(&'static str, u64, Duration)> {
    let kinds = Kind::ALL.into_iter().filter(|kind| kind.is_there());
    let ciphers = std::iter::once(None).chain(kinds.map(Some));
    let measured = ciphers.filter_map(|kind| {
        let (segment, key) = (bytes + OVERHEAD, [7; 32]);
        let mut sending = Sending::new(&key, 0).ok()?;
        sending.lanes = kind.map(|kind| Lanes::with(&key, kind));
        let (sending, mut messages) = (Arc::new(sending), vec![0; segment * 2 * LANES]);
        let (start, mut count) = (Instant::now(), 0);
        while start.elapsed() < time && Sealing::new(Arc::clone(&sending), count).seal(&mut messages, segment)
        {
            count += 2 * LANES as u64;
        }
        Some((kind.map_or("usual", Kind::name), count, start.elapsed()))
    });
    measured.collect()
}

/// Messages in groups that are done at once: as many as there are lanes, all of full size; or one.
fn groups<'a>(
    messages: &'a mut [u8],
    layout: Layout,
    lanes: Option<&Lanes>,
) -> impl Iterator<Item = &'a mut [u8]> {
    let mut rest = messages;
    let Layout { segment, pitch } = layout;
    // Nothing fits into no lanes.
    let (width, worthwhile) = lanes.map_or((0, 1), |lanes| (lanes.width(), lanes.worthwhile(segment)));
    std::iter::from_fn(move || {
        let whole = layout.whole(rest.len()).min(width);
        let together = segment >= OVERHEAD && whole >= worthwhile;
        let len = if together { whole * pitch } else { pitch };
        let len = len.min(rest.len());
        let (group, behind) = std::mem::take(&mut rest).split_at_mut(len);
        rest = behind;
        (!group.is_empty()).then_some(group)
    })
}

/// The counter of the message whose packet begins here.
fn counter_before(messages: &[u8], content: usize) -> u64 {
    let mut counter = [0; 8];
    counter.copy_from_slice(&messages[content - 8..content]);
    u64::from_le_bytes(counter)
}

/// The counters of messages that can be opened at once: enough, with sound headers. Others get their reasons one by one.
fn counters(group: &[u8], layout: Layout, worthwhile: usize) -> Option<[u64; LANES]> {
    let count = layout.whole(group.len());
    if layout.segment < OVERHEAD || count < worthwhile {
        return None;
    }
    let mut counters = [0; LANES];
    for (message, counter) in group.chunks(layout.pitch).zip(&mut counters) {
        *counter = counter_before(message, DATA_HEADER);
        if message[..4] != [TYPE_DATA, 0, 0, 0] || *counter >= REJECT_AFTER_MESSAGES {
            return None;
        }
    }
    Some(counters)
}

impl Receiving {
    pub(super) fn new(key: &[u8; 32], created: Instant) -> Result<Self, BadKey> {
        Ok(Self {
            secret: Zeroizing::new(*key),
            key: cipher(key)?,
            lanes: Lanes::new(key),
            created,
            window: Mutex::new(Window::new()),
        })
    }

    /// Writes the half for a successor.
    pub(super) fn write(&self, out: &mut Writer) {
        out.raw(&*self.secret);
        out.moment(self.created);
        self.window
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(out);
    }

    /// What [`Self::write`] wrote.
    pub(super) fn read(from: &mut Reader<'_>) -> Result<Self, Damaged> {
        let secret = from.secret()?;
        let mut receiving = Self::new(&secret, from.moment()?).map_err(|BadKey| Damaged)?;
        receiving.window = Mutex::new(Window::read(from)?);
        Ok(receiving)
    }

    /// Opens a message in place. Where its packet is. The counter was not compared with others yet.
    fn open(&self, message: &mut [u8]) -> Result<Range<usize>, DropReason> {
        let Some((header, sealed)) = message.split_first_chunk_mut::<DATA_HEADER>() else {
            return Err(DropReason::Malformed);
        };
        if header[..4] != [TYPE_DATA, 0, 0, 0] || sealed.len() < TAG {
            return Err(DropReason::Malformed);
        }
        let counter = counter_before(header, DATA_HEADER);
        if counter >= REJECT_AFTER_MESSAGES {
            return Err(DropReason::NoSession);
        }
        let opened = self.key.open_in_place(nonce(counter), Aad::empty(), sealed);
        let len = opened.map_err(|_| DropReason::NotAuthentic)?.len();
        Ok(DATA_HEADER..DATA_HEADER + len)
    }

    /// Opens messages. Leaves in `opened` where the packets of new ones are; tells `dropped` of the others.
    pub(super) fn open_all(
        &self,
        messages: &mut [u8],
        layout: Layout,
        now: Instant,
        opened: &mut Vec<Range<usize>>,
        mut dropped: impl FnMut(DropReason),
    ) -> Outcome {
        let mut outcome = Outcome::default();
        let begin = opened.len();
        if now.saturating_duration_since(self.created) >= REJECT_AFTER_TIME {
            (0..layout.count(messages.len())).for_each(|_| dropped(DropReason::NoSession));
            return outcome;
        }
        let mut start = 0;
        let Layout { segment, pitch } = layout;
        let worthwhile = self
            .lanes
            .as_ref()
            .map_or(usize::MAX, |lanes| lanes.worthwhile(segment));
        for group in groups(messages, layout, self.lanes.as_ref()) {
            match (&self.lanes, counters(group, layout, worthwhile)) {
                (Some(lanes), Some(counters)) => {
                    let authentic = lanes.open(group, layout, &counters);
                    let count = layout.whole(group.len());
                    for (number, authentic) in authentic.into_iter().enumerate().take(count) {
                        let begin = start + number * pitch;
                        match authentic {
                            true => opened.push(begin + DATA_HEADER..begin + segment - TAG),
                            false => dropped(DropReason::NotAuthentic),
                        }
                    }
                }
                _ => {
                    for (at, message) in layout.each(group) {
                        let begin = start + at;
                        match self.open(message) {
                            Ok(range) => opened.push(begin + range.start..begin + range.end),
                            Err(reason) => dropped(reason),
                        }
                    }
                }
            }
            start += group.len();
        }
        // Only now: a counter counts when its message is authentic. One lock for all.
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        let mut kept = begin;
        for place in begin..opened.len() {
            let range = opened[place].clone();
            // The header is as it came.
            if !window.note(counter_before(messages, range.start)) {
                dropped(DropReason::Replayed);
                continue;
            }
            outcome.bytes += range.len() + OVERHEAD;
            if !range.is_empty() {
                outcome.data = true;
                opened[kept] = range;
                kept += 1;
            }
        }
        opened.truncate(kept);
        outcome
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn halves() -> (Arc<Sending>, Receiving, Instant) {
        let now = Instant::now();
        let sending = Arc::new(Sending::new(&[5; 32], 0x0a0b_0c0d).unwrap());
        (sending, Receiving::new(&[5; 32], now).unwrap(), now)
    }

    fn message(content: &[u8]) -> Vec<u8> {
        [&[0; DATA_HEADER][..], content, &[0; TAG]].concat()
    }

    fn open(
        receiving: &Receiving,
        messages: &[u8],
        segment: usize,
        now: Instant,
    ) -> (Vec<Vec<u8>>, Vec<DropReason>, Outcome) {
        let (mut messages, mut opened, mut drops) = (messages.to_vec(), Vec::new(), Vec::new());
        let outcome = receiving.open_all(
            &mut messages,
            Layout::packed(segment),
            now,
            &mut opened,
            |reason| drops.push(reason),
        );
        let packets = opened
            .iter()
            .map(|range| messages[range.clone()].to_vec())
            .collect();
        (packets, drops, outcome)
    }

    proptest! {
        #[test]
        fn what_is_sealed_together_opens_together(
            size in 0usize..600, last in 0usize..600, count in 1usize..20, first in 0u64..REJECT_AFTER_MESSAGES - 100,
        ) {
            let (sending, receiving, now) = halves();
            let mut contents: Vec<Vec<u8>> = (0..count).map(|n| vec![n as u8; size]).collect();
            contents.push(vec![0xee; last.min(size)]);
            let mut messages: Vec<u8> = contents.iter().flat_map(|content| message(content)).collect();
            prop_assert!(Sealing::new(sending, first).seal(&mut messages, size + OVERHEAD));
            let (packets, drops, outcome) = open(&receiving, &messages, size + OVERHEAD, now);
            contents.retain(|content| !content.is_empty());
            prop_assert_eq!(&packets, &contents);
            prop_assert_eq!(drops, vec![]);
            prop_assert_eq!(outcome, Outcome { bytes: messages.len(), data: !contents.is_empty() });
            // And never again.
            let (packets, drops, outcome) = open(&receiving, &messages, size + OVERHEAD, now);
            prop_assert!(packets.is_empty() && outcome == Outcome::default());
            prop_assert_eq!(drops, vec![DropReason::Replayed; count + 1]);
        }

        #[test]
        fn a_changed_message_is_no_message(content in prop::collection::vec(any::<u8>(), 0..200), bit in any::<usize>()) {
            let (sending, receiving, now) = halves();
            let mut sealed = message(&content);
            prop_assert!(Sealing::new(sending, 7).seal(&mut sealed, content.len() + OVERHEAD));
            let whole = sealed.clone();
            let bit = bit % (sealed.len() * 8);
            sealed[bit / 8] ^= 1 << (bit % 8);
            let segment = sealed.len();
            // The receiver's index was looked up before; it is not part of what is authenticated.
            let (packets, drops, _) = open(&receiving, &sealed, segment, now);
            if !(4..8).contains(&(bit / 8)) {
                prop_assert!(packets.is_empty() && drops.len() == 1, "bit {}", bit);
            }
            for len in 0..segment {
                prop_assert!(open(&receiving, &whole[..len], segment, now).0.is_empty());
            }
        }
    }

    #[test]
    fn limits_of_time_and_count() {
        let (sending, receiving, now) = halves();
        for counter in [REJECT_AFTER_MESSAGES, u64::MAX - 1] {
            let mut sealed = message(b"x");
            assert!(sending.seal(&mut sealed, counter));
            let (_, drops, _) = open(&receiving, &sealed, sealed.len(), now);
            assert_eq!(drops, [DropReason::NoSession]);
        }
        let mut sealed = message(b"x");
        assert!(sending.seal(&mut sealed, 1));
        let (_, drops, _) = open(&receiving, &sealed, sealed.len(), now + REJECT_AFTER_TIME);
        assert_eq!(drops, [DropReason::NoSession]);
        let almost = now + REJECT_AFTER_TIME - Duration::from_millis(1);
        assert_eq!(open(&receiving, &sealed, sealed.len(), almost).0, [b"x"]);
    }
}
