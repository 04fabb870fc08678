//! What configuration leaves behind.

use zeroize::Zeroizing;

use super::{
    super::{Implementation, device::State},
    apply,
};
use crate::{
    memory_search::occurrences,
    uapi::{Request, parse_request},
    wipe_stack,
};

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
