//! Port ranges to classes: ports that the same statements cover share one.

use std::collections::{BTreeMap, BTreeSet};

/// The ports that a statement covers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum PortCover {
    /// Every packet of every protocol.
    All,
    /// Ranges: protocol, first, last.
    Ranges(Vec<(u8, u16, u16)>),
}

/// A prefix of `protocol << 16 | port`: bits and length.
pub(super) type Prefix = (u32, u8);

/// Which statements cover which ports: the longest prefix of a port names exactly the statements (by their place
/// in `covers`) that cover it.
pub(super) fn classify<'a>(covers: impl Iterator<Item = &'a PortCover>) -> BTreeMap<Prefix, Vec<usize>> {
    let mut all = Vec::new();
    let mut ranges: BTreeMap<u8, Vec<(u16, u16, usize)>> = BTreeMap::new();
    for (index, cover) in covers.enumerate() {
        match cover {
            PortCover::All => all.push(index),
            PortCover::Ranges(list) => {
                for &(protocol, first, last) in list {
                    ranges.entry(protocol).or_default().push((first, last, index));
                }
            }
        }
    }
    let mut out = BTreeMap::from([((0, 0), all.clone())]);
    for (protocol, list) in ranges {
        let pieces = pieces(&all, &list);
        let base = widest(&pieces);
        let bits = u32::from(protocol) << 16;
        if base != all {
            out.insert((bits, 8), base.clone());
        }
        for (first, last, set) in pieces {
            if set != base {
                for (port, length) in prefixes(first, last) {
                    out.insert((bits | u32::from(port), 8 + length), set.clone());
                }
            }
        }
    }
    out
}

/// Cuts all ports of a protocol where the set of statements changes.
fn pieces(all: &[usize], ranges: &[(u16, u16, usize)]) -> Vec<(u16, u16, Vec<usize>)> {
    let mut starts = BTreeSet::from([0u32]);
    for &(first, last, _) in ranges {
        starts.insert(first.into());
        starts.insert(u32::from(last) + 1);
    }
    starts.remove(&0x1_0000);
    let starts: Vec<u32> = starts.into_iter().collect();
    let mut out: Vec<(u16, u16, Vec<usize>)> = Vec::new();
    for (i, &start) in starts.iter().enumerate() {
        let end = starts.get(i + 1).copied().unwrap_or(0x1_0000) - 1;
        let (first, last) = (start as u16, end as u16);
        let mut set: BTreeSet<usize> = all.iter().copied().collect();
        set.extend(
            ranges
                .iter()
                .filter(|(from, to, _)| *from <= first && last <= *to)
                .map(|(_, _, index)| *index),
        );
        let set: Vec<_> = set.into_iter().collect();
        match out.last_mut() {
            Some((_, end, before)) if *before == set => *end = last,
            _ => out.push((first, last, set)),
        }
    }
    out
}

/// The set that covers most ports: it gets the protocol's own entry.
fn widest(pieces: &[(u16, u16, Vec<usize>)]) -> Vec<usize> {
    let mut spans: BTreeMap<&[usize], u32> = BTreeMap::new();
    for (first, last, set) in pieces {
        *spans.entry(set).or_default() += u32::from(last - first) + 1;
    }
    spans
        .into_iter()
        .max_by_key(|(_, span)| *span)
        .map(|(set, _)| set.to_vec())
        .unwrap_or_default()
}

/// The fewest prefixes (port, length of 16) that make up a range.
fn prefixes(first: u16, last: u16) -> Vec<(u16, u8)> {
    let (mut next, end) = (u32::from(first), u32::from(last) + 1);
    let mut out = Vec::new();
    while next < end {
        let aligned = if next == 0 {
            16
        } else {
            next.trailing_zeros().min(16)
        };
        let fits = 31 - (end - next).leading_zeros();
        let bits = aligned.min(fits);
        out.push((next as u16, (16 - bits) as u8));
        next += 1 << bits;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(map: &BTreeMap<Prefix, Vec<usize>>, protocol: u8, port: u16) -> Vec<usize> {
        let bits = u32::from(protocol) << 16 | u32::from(port);
        let covers = |(prefix, length): &Prefix| {
            let mask = if *length == 0 {
                0
            } else {
                0xff_ffffu32 << (24 - length) & 0xff_ffff
            };
            bits & mask == *prefix
        };
        map.iter()
            .filter(|(prefix, _)| covers(prefix))
            .max_by_key(|((_, length), _)| *length)
            .unwrap()
            .1
            .clone()
    }

    #[test]
    fn every_port_gets_exactly_the_statements_that_cover_it() {
        let covers = [
            PortCover::Ranges(vec![(6, 80, 80)]),
            PortCover::Ranges(vec![(6, 1, 1023), (17, 53, 53)]),
            PortCover::All,
            PortCover::Ranges(vec![(6, 0, 65535)]),
            PortCover::Ranges(vec![(6, 1000, 65535), (1, 8, 8)]),
            PortCover::Ranges(vec![]),
        ];
        let map = classify(covers.iter());
        let expected = |protocol: u8, port: u16| -> Vec<usize> {
            let hit = |cover: &PortCover| match cover {
                PortCover::All => true,
                PortCover::Ranges(list) => list
                    .iter()
                    .any(|(p, first, last)| *p == protocol && (*first..=*last).contains(&port)),
            };
            (0..covers.len()).filter(|i| hit(&covers[*i])).collect()
        };
        for protocol in [1, 6, 17, 58, 132, 47] {
            for port in (0..=2048).chain([32767, 32768, 65534, 65535]) {
                assert_eq!(
                    class(&map, protocol, port),
                    expected(protocol, port),
                    "{protocol} {port}"
                );
            }
        }
    }

    #[test]
    fn ranges_become_few_prefixes() {
        assert_eq!(prefixes(0, 65535), [(0, 0)]);
        assert_eq!(prefixes(80, 80), [(80, 16)]);
        assert_eq!(prefixes(1, 65535).len(), 16);
        assert_eq!(prefixes(1024, 65535).len(), 6);
        assert_eq!(classify([PortCover::All].iter()).len(), 1);
        // All ports but one: the one gets the entry.
        let but_one = [PortCover::Ranges(vec![(6, 0, 79), (6, 81, 65535)])];
        assert_eq!(classify(but_one.iter()).len(), 3);
    }
}
