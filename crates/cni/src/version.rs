//! The supported versions of the CNI specification, and the verbs of each.

use crate::environment::Command;
use crate::protocol::{CniError, codes};

/// A version of the specification. Later versions are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// 0.3.0: chained plugins. kube-router's configuration uses it.
    V0_3_0,
    /// 0.3.1: as 0.3.0, with an error in the text corrected.
    V0_3_1,
    /// 0.4.0: CHECK, and `prevResult` on DEL.
    V0_4_0,
    /// 1.0.0: network lists only.
    V1_0_0,
    /// 1.1.0: GC and STATUS.
    V1_1_0,
}

impl Version {
    /// All supported versions.
    pub const SUPPORTED: [Version; 5] =
        [Version::V0_3_0, Version::V0_3_1, Version::V0_4_0, Version::V1_0_0, Version::V1_1_0];
    /// The newest.
    pub const LATEST: Version = Version::V1_1_0;

    /// The text that `cniVersion` has.
    pub fn as_str(self) -> &'static str {
        match self {
            Version::V0_3_0 => "0.3.0",
            Version::V0_3_1 => "0.3.1",
            Version::V0_4_0 => "0.4.0",
            Version::V1_0_0 => "1.0.0",
            Version::V1_1_0 => "1.1.0",
        }
    }

    /// Reads a `cniVersion`.
    ///
    /// # Errors
    /// It is not one of [`Version::SUPPORTED`].
    pub fn parse(text: &str) -> Result<Self, CniError> {
        Self::SUPPORTED.into_iter().find(|v| v.as_str() == text).ok_or_else(|| {
            CniError::new(
                codes::INCOMPATIBLE,
                format!("cniVersion {text:?} is not supported"),
                format!("set cniVersion in the network configuration to one of {}", Self::list()),
            )
        })
    }

    /// Rejects a verb that this version does not have.
    ///
    /// # Errors
    /// A later version introduced the verb.
    pub fn allows(self, command: Command) -> Result<(), CniError> {
        let since = match command {
            Command::Check => Version::V0_4_0,
            Command::Gc | Command::Status => Version::V1_1_0,
            Command::Add | Command::Del | Command::Version => Version::V0_3_0,
        };
        if self >= since {
            return Ok(());
        }
        Err(CniError::new(
            codes::INCOMPATIBLE,
            format!("cniVersion {} has no {}", self.as_str(), command.as_str()),
            format!("{} exists since {}", command.as_str(), since.as_str()),
        ))
    }

    /// The supported versions, for a person to read.
    pub fn list() -> String {
        Self::SUPPORTED.map(Version::as_str).join(", ")
    }
}
