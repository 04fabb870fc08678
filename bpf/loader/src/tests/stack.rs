//! Drops by the kernel's stack.
