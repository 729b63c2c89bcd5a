//! Egret: pods leave the cluster from an address that stays.
//!
//! The modules depend on each other in one direction, downward:
//! `node`, `controller` and `install` above; `cluster`, `cni` and `kernel` below them; then `plan`, then `api`
//! (`tests/structure.rs` has it exactly). `plan` and `api` do no I/O, `kernel` knows nothing of Kubernetes, `cni` speaks to
//! the daemon over a socket only, and `telemetry` knows none of them.

pub mod api;
pub mod careful;
pub mod cluster;
pub mod cni;
pub mod controller;
pub mod install;
pub mod kernel;
pub mod memory;
pub mod node;
pub mod plan;
pub mod telemetry;
