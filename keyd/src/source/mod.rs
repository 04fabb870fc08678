//! Sources of Nodes, Namespaces, Pods and policies, and the feed that is the same behind all of them.

pub(crate) mod feed;
pub(crate) mod follow;
pub(crate) mod kubernetes;
pub(crate) mod manifests;
pub(crate) mod parse;
