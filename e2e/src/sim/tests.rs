//! The invariants over many seeds, and whether the judge can find anything.

use super::{Sabotage, run, scale};

/// Seeds from `first` on over two threads; returns what was found, by seed.
fn violations(first: u64, seeds: u64, sabotage: Sabotage) -> Vec<(u64, String)> {
    let half = |offset: u64| {
        let found = (first + offset..first + seeds).step_by(2).filter_map(|seed| {
            let outcome = run(seed, sabotage, false);
            outcome
                .violations
                .first()
                .map(|violation| (seed, violation.to_string()))
        });
        found.collect::<Vec<_>>()
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(|| half(1));
        let mut all = half(0);
        all.extend(other.join().expect("the simulation does not panic"));
        all
    })
}

#[test]
fn two_thousand_worlds_keep_the_invariants() {
    let found = violations(0, 2_000, Sabotage::None);
    assert!(
        found.is_empty(),
        "replay with `cargo xtask sim --seed S`: {found:#?}"
    );
}

#[test]
fn a_seed_is_a_world() {
    let (one, two) = (run(7, Sabotage::None, true), run(7, Sabotage::None, true));
    assert_eq!(one.trace, two.trace);
    assert!(one.commits > 0 && one.judged_packets > 100);
}

/// Looks for a violation in batches, so that an easy one costs little.
fn is_found(sabotage: Sabotage, most: u64) -> bool {
    (0..most)
        .step_by(50)
        .any(|first| !violations(first, 50, sabotage).is_empty())
}

#[test]
fn moving_without_a_handshake_is_found() {
    assert!(is_found(Sabotage::Blind, 200));
}

#[test]
fn retiring_a_key_in_use_is_found() {
    assert!(is_found(Sabotage::EarlyMoved, 500));
}

#[test]
fn a_path_that_does_not_wait_for_its_pre_shared_key_is_found() {
    assert!(is_found(Sabotage::WithoutPsk, 50));
}

/// Disks that are set back lose pre-shared keys: the worlds have enough of that.
#[test]
fn pre_shared_keys_are_agreed_on_lost_and_forgotten() {
    let outcomes: Vec<_> = (0..100).map(|seed| run(seed, Sabotage::None, false)).collect();
    let agreed: u64 = outcomes.iter().map(|outcome| outcome.pre_shared_keys).sum();
    let forgotten = outcomes.iter().filter(|outcome| outcome.forgotten > 0).count();
    assert!(
        agreed > 1_000 && forgotten > 1,
        "{agreed} agreed on, forgotten in {forgotten} worlds"
    );
}

#[test]
fn a_stale_disk_that_is_believed_is_found() {
    assert!(is_found(Sabotage::TrustStaleDisk, 1_500));
}

#[test]
fn writes_that_overwrite_are_found() {
    assert!(is_found(Sabotage::ForcedWrites, 6_000));
}

#[test]
fn a_larger_mesh_costs_each_node_as_much_as_it_has_more_peers() {
    let (small, large) = (scale(20), scale(40));
    assert!(
        small.violations.is_empty() && large.violations.is_empty(),
        "{small} {large}"
    );
    let per_peer = |scale: &super::Scale| scale.bytes_per_node() / (scale.nodes - 1) as f64;
    assert!(per_peer(&large) < 1.3 * per_peer(&small), "{small}; {large}");
    // Prepared, active, retired: three writes for each node, whatever the number of its peers.
    assert_eq!(large.traffic.writes, 3 * 40);
}
