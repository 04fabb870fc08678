//! What the verifier spends on the programs.

use super::{config, isolation::isolated};
use crate::Datapath;

/// The kernel refuses programs on which its verifier spends a million instructions, and each takes about a
/// microsecond of every agent start.
const BUDGET: u32 = 300_000;

#[test]
fn the_verifier_needs_little() {
    isolated(|pins| {
        let mut datapath = Datapath::open(&config(pins)).unwrap();
        let mut spent = Vec::new();
        for (name, program) in datapath.programs.ebpf().programs() {
            let info = program.info().unwrap();
            spent.push((
                info.verified_instruction_count().unwrap_or_default(),
                name.to_owned(),
            ));
        }
        spent.sort();
        println!("{spent:?}");
        assert!(spent.iter().all(|(count, _)| *count < BUDGET), "{spent:?}");
    });
}
