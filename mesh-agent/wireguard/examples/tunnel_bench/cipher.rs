//! What the ciphers alone could do on one CPU of this machine: no tunnel can be faster than its bound.

use std::time::Duration;

use serde_json::{Map, Value};
use warren_wireguard::engine;

/// Bytes of a packet: a small one, one in between, as large as the tunnel takes.
const SIZES: [usize; 3] = [64, 576, 1420];

const TIME: Duration = Duration::from_millis(300);

/// Gb/s of content that one CPU seals, by size and cipher: the usual one, and those of the engine that do many messages
/// at once.
pub(super) fn bound() -> Value {
    let mut bounds = Map::new();
    for size in SIZES {
        let rates = engine::sealing_alone(size, TIME)
            .into_iter()
            .map(|(name, count, time)| {
                let rate = count as f64 * size as f64 * 8.0 / time.as_secs_f64() / 1e9;
                (name.to_owned(), Value::from((rate * 100.0).round() / 100.0))
            });
        bounds.insert(format!("gbps_{size}"), Value::Object(rates.collect()));
    }
    Value::Object(bounds)
}
