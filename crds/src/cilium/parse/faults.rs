//! Paths and the faults found at them.

use warren_model::policy::PolicyError;

/// Where in an object: `spec.ingress[0].toPorts`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Path(String);

impl Path {
    pub(super) fn root() -> Self {
        Self(String::new())
    }

    pub(super) fn member(&self, name: &str) -> Self {
        if self.0.is_empty() {
            Self(name.to_owned())
        } else {
            Self(format!("{}.{name}", self.0))
        }
    }

    pub(super) fn item(&self, index: usize) -> Self {
        Self(format!("{}[{index}]", self.0))
    }

    pub(super) fn text(&self) -> String {
        self.0.clone()
    }
}

/// What was found wrong so far.
#[derive(Debug, Default)]
pub(super) struct Faults(Vec<PolicyError>);

impl Faults {
    pub(super) fn add(&mut self, path: &Path, problem: impl Into<String>) {
        self.0.push(PolicyError::new(path.text(), problem));
    }

    pub(super) fn push(&mut self, fault: PolicyError) {
        self.0.push(fault);
    }

    /// The value, unless something was wrong.
    pub(super) fn none_or<T>(self, value: T) -> Result<T, Vec<PolicyError>> {
        if self.0.is_empty() { Ok(value) } else { Err(self.0) }
    }
}
