//! Egret's CNI plugin: the specification's types and verbs, and what the plugin shares with the daemon, which are the
//! protocol, the run directory and the quarantine.
//!
//! A call goes through these modules: [`plugin`] reads the [`environment`] and the [`config`], finds the pod's
//! addresses in the previous plugin's [`result`] and the host end of its [`interface`], and sends a request to the
//! [`daemon`]. If the daemon is [`offline`], the [`offline_policies`] that it left decide whether the pod starts
//! unrestricted or in [`quarantine`].
//!
//! A pod's start waits for this program, so it has no async runtime and none of Kubernetes' types.

pub mod attachment;
pub mod careful;
pub mod config;
pub mod daemon;
pub mod environment;
pub mod interface;
pub mod offline;
pub mod offline_policies;
pub mod plugin;
pub mod protocol;
pub mod quarantine;
pub mod result;
pub mod run_dir;
pub mod source_rule;
pub mod uninstalled;
pub mod version;
