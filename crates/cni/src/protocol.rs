//! The protocol between plugin and daemon: a Unix socket, one JSON object a line, one request and one response a
//! connection.

use crate::attachment::{Attachment, AttachmentId};
use serde::{Deserialize, Serialize};

/// The protocol's version. A daemon rejects requests of other versions with [`codes::INCOMPATIBLE`]; the plugin then
/// treats the daemon as offline.
pub const PROTOCOL: u32 = 1;

/// What the plugin sends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// [`PROTOCOL`].
    pub version: u32,
    /// The verb with its parameters.
    #[serde(flatten)]
    pub verb: Verb,
}

/// The CNI verbs that concern the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "UPPERCASE")]
pub enum Verb {
    /// A pod's interface exists: program it before responding.
    Add(Attachment),
    /// A pod's interface is being removed.
    Del(AttachmentId),
    /// Check that the kernel's state for the pod is as it should be.
    Check(Attachment),
    /// Remove this network's attachments that are not listed.
    Gc {
        /// The network's name. Attachments of other networks are not affected.
        network: String,
        /// All attachments that the runtime knows.
        valid: Vec<AttachmentId>,
    },
}

/// What the daemon returns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Response {
    /// [`PROTOCOL`].
    pub version: u32,
    /// `None` means success.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<CniError>,
}

/// A CNI error, <https://www.cni.dev/docs/spec/#error>.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{msg}{}", if details.is_empty() { String::new() } else { format!(": {details}") })]
pub struct CniError {
    /// One of [`codes`].
    pub code: u32,
    /// What was wrong, in a few words.
    pub msg: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}

impl CniError {
    /// A failure with a code, a message, and details.
    pub fn new(code: u32, msg: impl Into<String>, details: impl Into<String>) -> Self {
        CniError { code, msg: msg.into(), details: details.into() }
    }
}

/// CNI error codes, <https://www.cni.dev/docs/spec/#error>. Codes from 100 on are the plugin's own.
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
    /// A selected pod's interface has no veth peer on the host, so no policy can be applied to it.
    pub const NO_HOST_INTERFACE: u32 = 100;
    /// CHECK: the kernel's state is not as it should be for the pod.
    pub const NOT_PROGRAMMED: u32 = 101;
    /// The kernel rejected a request.
    pub const KERNEL: u32 = 102;
}
