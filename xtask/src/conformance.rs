//! `cargo xtask conformance`: the policy suite of others, all of it, against a real cluster.

use anyhow::Result;

use crate::{
    image::Profile,
    lab::{Passed, in_cluster},
};

/// See `warren-cluster conformance --help`.
pub(crate) fn run(passed: &Passed) -> Result<()> {
    in_cluster("conformance", Profile::Dev, passed)
}
