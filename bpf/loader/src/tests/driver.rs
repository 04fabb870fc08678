//! Attaching to real devices in private namespaces.
