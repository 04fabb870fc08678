//! TCP through a network that delays and loses: what an implementation adds to what the network does.

use std::time::Duration;

use anyhow::Result;

use super::{
    pair::Pair,
    report::Measured,
    support::{Engine, relay::Impairment},
};

/// 20 ms there and back; one datagram in a thousand is lost.
const FAR: Impairment = Impairment {
    seed: 0,
    delay: Duration::from_millis(10),
    lost: 1_000,
    doubled: 0,
    reordered: 0,
    held: Duration::ZERO,
};

/// The same, and one datagram in a thousand comes twice, two in a thousand 2 ms too late.
const UNSTEADY: Impairment = Impairment {
    doubled: 1_000,
    reordered: 2_000,
    held: Duration::from_millis(2),
    ..FAR
};

/// One stream and eight. All implementations of a round lose the same numbers.
pub(super) fn measure(
    name: &'static str,
    engine: &Engine,
    round: usize,
    seconds: u64,
) -> Result<Vec<Measured>> {
    let mut measured = Vec::new();
    for (test, impairment, streams) in [
        ("impaired_tcp_one", FAR, "1"),
        ("impaired_tcp_eight", FAR, "8"),
        ("impaired_unsteady_tcp_eight", UNSTEADY, "8"),
    ] {
        let seed = round as u64 + 1;
        let pair = Pair::impaired(name, engine, Impairment { seed, ..impairment })?;
        measured.extend(pair.tcp(test, seconds, &["-P", streams], None)?);
    }
    Ok(measured)
}
