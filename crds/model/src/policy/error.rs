//! What is wrong with a policy object.

use std::fmt;

/// One fault of a policy object: which field, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PolicyError {
    /// The field, as in `spec.ingress[0].toPorts[1].ports[0].port`; empty for the whole object.
    pub path: String,
    /// What is wrong with it, without a full stop.
    pub problem: String,
}

impl PolicyError {
    /// A fault at a field.
    pub fn new(path: impl Into<String>, problem: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            problem: problem.into(),
        }
    }
}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() {
            return f.write_str(&self.problem);
        }
        write!(f, "{}: {}", self.path, self.problem)
    }
}

impl std::error::Error for PolicyError {}
