//! What configuration leaves behind.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
};

use zeroize::Zeroizing;

use super::{
    super::{Implementation, control::wipe_stack, device::State},
    apply,
};
use crate::uapi::{Request, parse_request};

/// Bytes of a key's middle: whoever frees memory overwrites the beginning.
const MIDDLE: std::ops::Range<usize> = 1..16;

/// How often the middle of the key whose complement this is occurs in this process's memory.
fn occurrences(complement: &[u8; 32]) -> usize {
    let wanted = &complement[MIDDLE];
    let memory = File::open("/proc/self/mem").unwrap();
    let mut bytes = Vec::new();
    let mut found = 0;
    for line in fs::read_to_string("/proc/self/maps").unwrap().lines() {
        let (range, rest) = line.split_once(' ').unwrap();
        if !rest.starts_with("rw") || rest.ends_with("[vvar]") {
            continue;
        }
        let (start, end) = range.split_once('-').unwrap();
        let address = |text| u64::from_str_radix(text, 16).unwrap();
        bytes.resize((address(end) - address(start)) as usize, 0);
        // A neighbour's stack may be gone by now.
        if memory.read_exact_at(&mut bytes, address(start)).is_err() {
            continue;
        }
        // As complements, so that what was read is not found again.
        bytes.iter_mut().for_each(|byte| *byte = !*byte);
        found += bytes
            .windows(wanted.len())
            .filter(|window| *window == wanted)
            .count();
    }
    found
}

/// One request: pre-shared keys for these peers, all of which begin alike; or their removal.
fn request(peers: std::ops::Range<u8>, complement: Option<&[u8; 32]>) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(16 * 1024));
    text.push_str("set=1\n");
    for peer in peers {
        text.push_str(&format!("public_key={}\n", hex::encode([peer; 32])));
        match complement {
            Some(complement) => {
                text.push_str("preshared_key=");
                complement
                    .iter()
                    .for_each(|byte| text.push_str(&format!("{:02x}", !byte)));
                text.push_str(&format!("\nallowed_ip=10.0.0.{peer}/32\n"));
            }
            None => text.push_str("remove=true\n"),
        }
    }
    text
}

/// A key that is moved is copied: in a request's list of peers, as the list grows and as it is taken apart. A peer that
/// was removed leaves none of these copies.
#[test]
fn no_pre_shared_key_outlives_its_peer() {
    let mut complement = [0; 32];
    getrandom::fill(&mut complement).unwrap();
    let mut state = State::default();
    let mut configure = |text: Zeroizing<String>| {
        let Ok(Request::Set(request)) = parse_request(&text) else {
            panic!("not taken");
        };
        drop(text);
        apply(&mut state, *request, Implementation::Warren);
        wipe_stack();
    };
    for _ in 0..8 {
        configure(request(2..34, Some(&complement)));
        let held = occurrences(&complement);
        assert!(held >= 32, "the search is blind: {held} of 32 were found");
        configure(request(2..34, None));
        assert_eq!(occurrences(&complement), 0);
    }
}
