//! The plugin: the CNI specification's types and verbs, and the conversation with the daemon.
//!
//! The way of a call: [`plugin`] reads the [`environment`] and the [`config`], finds the pod's addresses in the
//! [`result`] of the plugin before it and the host's end of its [`interface`], and asks the [`daemon`]. When the
//! daemon is [`away`], the [`offline_policies`] it left decide whether the pod goes free or into [quarantine](crate::datapath::quarantine).

pub mod attachment;
pub mod config;
pub mod daemon;
pub mod environment;
pub mod interface;
pub mod offline;
pub mod offline_policies;
pub mod plugin;
pub mod protocol;
pub mod result;
pub mod run_dir;
pub mod uninstalled;
pub mod version;
