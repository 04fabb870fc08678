//! Sources of Nodes, Namespaces and Pods, and the feed that is the same behind all of them.

pub(crate) mod feed;
pub(crate) mod kubernetes;
pub(crate) mod manifests;
pub(crate) mod parse;
