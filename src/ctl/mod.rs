//! The commands of `kubectl egret`, which people and scripts run, with the credentials of who runs them.
//!
//! Each command reads a state of the cluster ([`state`]), computes a value from it, and shows it ([`output`]): as text
//! for people, or as JSON or YAML. The computation is pure and has its own tests. All commands work with the Kubernetes
//! API and with a directory of manifests alike.

pub mod acceptance;
pub mod check;
pub mod cni;
pub mod convert;
mod daemon;
pub mod ip;
mod manifest;
pub mod moves;
pub mod output;
pub mod plan;
pub mod pods;
pub mod problem;
pub mod site;
pub mod state;
pub mod status;
pub mod subject;
pub mod table;
pub mod trace;
pub mod why;
mod write;
