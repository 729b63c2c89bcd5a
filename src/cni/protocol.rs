//! The conversation between plugin and daemon: over a Unix socket, one JSON object a line, one request and one
//! answer a connection.

use super::attachment::{Attachment, AttachmentId};
use serde::{Deserialize, Serialize};

/// The version of this conversation. A daemon answers requests of its own version and refuses others by
/// [`codes::INCOMPATIBLE`]; the plugin that finds its request refused so treats the daemon as away.
pub const PROTOCOL: u32 = 1;

/// What the plugin asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// [`PROTOCOL`].
    pub version: u32,
    /// What is asked.
    #[serde(flatten)]
    pub verb: Verb,
}

/// The CNI verbs that concern the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "UPPERCASE")]
pub enum Verb {
    /// A pod's interface is there: program it before answering.
    Add(Attachment),
    /// It goes.
    Del(AttachmentId),
    /// Is the kernel as it should be for it?
    Check(Attachment),
    /// Of this network's attachments, only these are still valid.
    Gc {
        /// The network's name; attachments of other networks are not spoken of.
        network: String,
        /// All that the runtime knows.
        valid: Vec<AttachmentId>,
    },
}

/// What the daemon answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Response {
    /// [`PROTOCOL`].
    pub version: u32,
    /// `None`: done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Failure>,
}

/// A CNI error, <https://www.cni.dev/docs/spec/#error>.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{msg}{}", if details.is_empty() { String::new() } else { format!(": {details}") })]
pub struct Failure {
    /// See [`codes`].
    pub code: u32,
    /// In a few words.
    pub msg: String,
    /// What to do.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}

impl Failure {
    /// A failure of `code` with the two texts.
    pub fn new(code: u32, msg: impl Into<String>, details: impl Into<String>) -> Self {
        Failure { code, msg: msg.into(), details: details.into() }
    }
}

/// CNI error codes, <https://www.cni.dev/docs/spec/#error>; from 100 on they are the plugin's own.
pub mod codes {
    /// Incompatible CNI version.
    pub const INCOMPATIBLE: u32 = 1;
    /// Invalid necessary environment variables.
    pub const INVALID_ENVIRONMENT: u32 = 4;
    /// Input or output failure.
    pub const IO: u32 = 5;
    /// Failed to decode content.
    pub const DECODE: u32 = 6;
    /// Invalid network configuration.
    pub const INVALID_CONFIGURATION: u32 = 7;
    /// Try again later.
    pub const TRY_AGAIN: u32 = 11;
    /// A selected pod's interface has no veth peer on the host, so it cannot be held to its policy.
    pub const NO_HOST_INTERFACE: u32 = 100;
    /// CHECK: the kernel is not as it should be for the pod.
    pub const NOT_PROGRAMMED: u32 = 101;
    /// The kernel refused.
    pub const KERNEL: u32 = 102;
}
