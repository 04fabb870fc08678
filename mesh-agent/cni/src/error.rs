//! Errors as the CNI specification has them.

use serde::Serialize;

/// Codes of the CNI specification 1.1, section 5 "Error".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    /// 1: incompatible CNI version.
    IncompatibleVersion = 1,
    /// 3: the container is unknown or gone.
    UnknownContainer = 3,
    /// 4: a necessary environment variable is missing or wrong.
    Environment = 4,
    /// 5: input or output failed.
    Io = 5,
    /// 6: content cannot be decoded.
    Decode = 6,
    /// 7: the network configuration is wrong.
    Config = 7,
    /// 11: try again later.
    TryAgainLater = 11,
    /// 50: STATUS: pods cannot be added now.
    NotAvailable = 50,
    /// 100: the first code of a plugin's own: the agent refused.
    Refused = 100,
}

/// A failed command: what is printed on standard output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CniError {
    pub(crate) code: Code,
    pub(crate) message: String,
}

impl CniError {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// The error object for a caller of that version.
    pub(crate) fn to_json(&self, version: &str) -> String {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Object<'a> {
            cni_version: &'a str,
            code: u16,
            msg: &'a str,
        }
        let object = Object {
            cni_version: version,
            code: self.code as u16,
            msg: &self.message,
        };
        serde_json::to_string(&object).unwrap_or_else(|_| String::from("{}"))
    }
}
