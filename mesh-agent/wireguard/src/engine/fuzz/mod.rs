//! Random input against independent judges, from seeds: `cargo xtask fuzz engine`, and in every test run the inputs of
//! `corpus/` with a moment of new ones.
//!
//! An input is bytes, which a target takes for a script. New inputs are made of old ones by changing bytes and by joining
//! two. A target says what it has seen ("features": reasons of drops, states, sizes); an input that shows something new is
//! kept, and others are made of it. Nothing is measured of the code itself, so the usual compiler will do.

mod configuration;
mod lanes;
mod offloads;
mod reference;
mod sessions;

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::PathBuf,
    time::{Duration, Instant},
};

/// What an input has shown.
#[derive(Default)]
struct Features(HashSet<u64>);

impl Features {
    /// Notes that `what` was seen with this value.
    fn note(&mut self, what: u8, value: impl Into<u64>) {
        self.0.insert(u64::from(what) << 56 | value.into());
    }

    /// Notes a size: how many bits it has.
    fn size(&mut self, what: u8, size: usize) {
        self.note(what, usize::BITS - size.leading_zeros());
    }
}

/// Reads an input; zeroes come after its end.
struct Source<'a>(&'a [u8]);

impl<'a> Source<'a> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let taken = self.bytes(N);
        bytes[..taken.len()].copy_from_slice(taken);
        bytes
    }

    /// At most so many.
    fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn byte(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// Below `limit`, which is not 0.
    fn below(&mut self, limit: usize) -> usize {
        usize::from(self.u16()) % limit
    }
}

/// xorshift64* (Vigna, 2016).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        ((self.next() >> 32) as usize) % limit
    }

    fn fill(&mut self, out: &mut [u8]) {
        out.iter_mut().for_each(|byte| *byte = (self.next() >> 40) as u8);
    }
}

/// Bytes of the longest input.
const LONGEST: usize = 2048;

/// How long new inputs are tried in a usual test run.
const MOMENT: Duration = Duration::from_millis(400);

/// A new input made of one or two others.
fn mutate(pool: &[Vec<u8>], numbers: &mut Numbers) -> Vec<u8> {
    let mut input = match pool {
        [] => Vec::new(),
        pool => pool[numbers.below(pool.len())].clone(),
    };
    if input.is_empty() || numbers.below(8) == 0 {
        input = vec![0; 1 + numbers.below(300)];
        numbers.fill(&mut input);
        return input;
    }
    for _ in 0..=numbers.below(4) {
        let at = numbers.below(input.len());
        match numbers.below(8) {
            0 => input[at] ^= 1 << numbers.below(8),
            1 => input[at] = numbers.next() as u8,
            2 => input[at] = [0, 1, 0x7f, 0x80, 0xff][numbers.below(5)],
            3 => input[at] = input[at].wrapping_add(numbers.below(9) as u8).wrapping_sub(4),
            4 => {
                let mut more = vec![0; 1 + numbers.below(16)];
                numbers.fill(&mut more);
                input.splice(at..at, more);
            }
            5 => {
                let end = (at + 1 + numbers.below(16)).min(input.len());
                if end - at < input.len() {
                    input.drain(at..end);
                }
            }
            6 => {
                let other = &pool[numbers.below(pool.len())];
                if !other.is_empty() {
                    input.truncate(at);
                    input.extend_from_slice(&other[numbers.below(other.len())..]);
                }
            }
            _ => {
                let end = (at + 1 + numbers.below(40)).min(input.len());
                let copy = input[at..end].to_vec();
                input.extend(copy);
            }
        }
        if input.is_empty() {
            input.push(0);
        }
    }
    input.truncate(LONGEST);
    input
}

/// Runs one input; says which when it fails.
fn try_one(name: &str, target: fn(&[u8], &mut Features), input: &[u8], features: &mut Features) {
    let run = catch_unwind(AssertUnwindSafe(|| target(input, features)));
    if let Err(panic) = run {
        eprintln!("fuzz {name} failed for input {}", hex::encode(input));
        resume_unwind(panic);
    }
}

fn corpus_path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("corpus/{name}.hex"))
}

/// One input in a line.
fn corpus(name: &str) -> Vec<Vec<u8>> {
    let path = corpus_path(name);
    let text = fs::read_to_string(&path).unwrap_or_default();
    text.lines()
        .map(|line| hex::decode(line).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
        .collect()
}

/// Replays the corpus and tries new inputs: for a moment, or for `WARREN_FUZZ_SECONDS`, from `WARREN_FUZZ_SEED`.
/// `WARREN_FUZZ_SAVE=1` writes the inputs that showed something new to the corpus.
fn fuzz(name: &str, target: fn(&[u8], &mut Features)) {
    let number = |variable: &str| std::env::var(variable).ok()?.parse::<u64>().ok();
    let seed = number("WARREN_FUZZ_SEED").unwrap_or_else(|| {
        let mut bytes = [0; 8];
        aws_lc_rs::rand::fill(&mut bytes).expect("random numbers");
        u64::from_le_bytes(bytes)
    });
    let time = number("WARREN_FUZZ_SECONDS").map_or(MOMENT, Duration::from_secs);
    println!("fuzz {name}: seed {seed}");
    let (mut numbers, mut pool) = (Numbers(seed | 1), corpus(name));
    let mut known: HashSet<u64> = HashSet::new();
    // Which input was the shortest to show a feature.
    let mut first: BTreeMap<u64, usize> = BTreeMap::new();
    let mut learn = |input: &[u8], place: usize, features: &Features| -> bool {
        let mut new = false;
        for feature in &features.0 {
            if known.insert(*feature) {
                first.insert(*feature, place);
                new = true;
            }
        }
        new && !input.is_empty()
    };
    for (place, input) in pool.iter().enumerate() {
        let mut features = Features::default();
        try_one(name, target, input, &mut features);
        learn(input, place, &features);
    }
    let (replayed, mut tried, start) = (pool.len(), 0u64, Instant::now());
    while start.elapsed() < time {
        let input = mutate(&pool, &mut numbers);
        let mut features = Features::default();
        try_one(name, target, &input, &mut features);
        tried += 1;
        if learn(&input, pool.len(), &features) {
            pool.push(input);
        }
    }
    let found = serde_json::json!({
        "target": name, "seed": seed, "replayed": replayed, "tried": tried, "features": known.len(),
        "kept": pool.len() - replayed,
    });
    println!("fuzz-result {found}");
    if std::env::var_os("WARREN_FUZZ_SAVE").is_some() {
        let needed: std::collections::BTreeSet<usize> = first.into_values().collect();
        let mut text = String::new();
        for place in needed {
            text.push_str(&hex::encode(&pool[place]));
            text.push('\n');
        }
        fs::write(corpus_path(name), text).expect("the corpus can be written");
    }
}

#[test]
fn sessions() {
    fuzz("sessions", sessions::run);
}

#[test]
fn datagrams() {
    fuzz("datagrams", sessions::datagram);
}

#[test]
fn images() {
    fuzz("images", sessions::image);
}

#[test]
fn splitting() {
    fuzz("splitting", offloads::split);
}

#[test]
fn coalescing() {
    fuzz("coalescing", offloads::merge);
}

#[test]
fn inner_packets() {
    fuzz("inner_packets", offloads::inner);
}

#[test]
fn configuration_socket() {
    fuzz("configuration_socket", configuration::run);
}

#[test]
fn lanes_of_the_cipher() {
    fuzz("lanes_of_the_cipher", lanes::run);
}
