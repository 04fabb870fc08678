//! Which counters of a session were seen: the last 8,192 (RFC 6479's ring of words).

use super::image::{Damaged, Reader, Writer};

/// Bits of a word, words of the ring. One word is always being refilled.
const BITS: u64 = 64;
const WORDS: u64 = 128;

/// How far behind the newest counter another may be.
pub(super) const WINDOW: u64 = (WORDS - 1) * BITS;

/// Counters that were seen. Begins empty.
#[derive(Debug)]
pub(super) struct Window {
    /// The newest counter and one; 0 before any.
    next: u64,
    words: [u64; WORDS as usize],
}

impl Window {
    pub(super) fn new() -> Self {
        Self {
            next: 0,
            words: [0; WORDS as usize],
        }
    }

    /// Writes the window for a successor.
    pub(super) fn write(&self, out: &mut Writer) {
        out.u64(self.next);
        for word in self.words {
            out.u64(word);
        }
    }

    /// What [`Self::write`] wrote.
    pub(super) fn read(from: &mut Reader<'_>) -> Result<Self, Damaged> {
        let mut window = Self::new();
        window.next = from.u64()?;
        for word in &mut window.words {
            *word = from.u64()?;
        }
        Ok(window)
    }

    /// Notes a counter of an authentic message, which is below 2^64 - 2^13. Whether it is new.
    pub(super) fn note(&mut self, counter: u64) -> bool {
        if self.next > counter && self.next - counter > WINDOW {
            return false;
        }
        let word = counter / BITS;
        if counter >= self.next {
            let newest = self.next.saturating_sub(1) / BITS;
            // Words that come into the window are empty.
            for fresh in 1..=(word - newest).min(WORDS) {
                self.words[((newest + fresh) % WORDS) as usize] = 0;
            }
            self.next = counter + 1;
        }
        let (place, bit) = ((word % WORDS) as usize, 1 << (counter % BITS));
        let new = self.words[place] & bit == 0;
        self.words[place] |= bit;
        new
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn at_the_edges() {
        let mut window = Window::new();
        for (counter, new) in [
            (0, true),
            (0, false),
            (1, true),
            (9, true),
            (8, true),
            (8, false),
            (WINDOW + 9, true),
            // 9 is now exactly as far behind as is allowed, less one.
            (10, true),
            (9, false),
            (8, false),
            (WINDOW * 3, true),
            (WINDOW * 2, false),
            (WINDOW * 2 + 1, true),
            (WINDOW * 2 + 1, false),
            (u64::MAX - 8192 - 1, true),
            (u64::MAX - 8192 - 1, false),
            (u64::MAX - 8192 - 2, true),
            (5, false),
        ] {
            assert_eq!(window.note(counter), new, "{counter}");
        }
    }

    proptest! {
        /// Against a set of everything seen.
        #[test]
        fn agrees_with_a_set(steps in prop::collection::vec((any::<bool>(), 0u64..20_000), 1..2000)) {
            let (mut window, mut seen, mut next) = (Window::new(), BTreeSet::new(), 0u64);
            for (ahead, distance) in steps {
                let counter = match ahead {
                    true => next + distance % 9000,
                    false => next.saturating_sub(distance % 9000),
                };
                let old = next > counter && next - counter > WINDOW;
                let expected = !old && seen.insert(counter);
                prop_assert_eq!(window.note(counter), expected, "{} after {}", counter, next);
                next = next.max(counter + 1);
            }
        }
    }
}
