//! Egret: pods leave the cluster from an address that stays.
//!
//! | module | content |
//! |---|---|
//! | `api` | the custom resources |
//! | `model` | the cluster's state as validated types: policies, gateways, nodes, pods |
//! | `allocation` | which policy gets which egress IP, and the statuses that say so |
//! | `node_plan` | what one node has to do, compiled from the model |
//! | `convert` | turns other egress systems' objects into Egret's |
//! | `cluster` | where the state comes from: the Kubernetes API or a directory |
//! | `datapath` | the rules, routes, addresses and devices that Egret has in a node's kernel |
//! | `check` | `egretd check` |
//! | `install` | the plugin's installation on a host |
//! | `controller`, `node` | the two daemons |
//! | `probe` | asks a server outside which source address it sees, and is such a server |
//! | `ctl` | the commands of `kubectl egret` |
//! | `signals` | the signals that end a program |
//! | `telemetry` | logs, metrics, health |
//! | `memory` | settings of the allocator of memory |
//!
//! The modules depend on each other in one direction, downward (`tests/structure.rs` has it exactly). `api`, `model`,
//! `allocation`, `node_plan` and `convert` do no I/O. `datapath` knows nothing of Kubernetes.
//!
//! Below these modules are three crates. `egret-nft` speaks nf_tables and connection tracking, and knows nothing of Egret.
//! `egret-cni` is the plugin and what it shares with the daemon. `egret-bpf` has the eBPF programs of the fast path.

pub mod allocation;
pub mod api;
pub mod check;
pub mod cluster;
pub mod controller;
pub mod convert;
pub mod ctl;
pub mod datapath;
#[cfg(test)]
pub(crate) mod fixture;
pub mod install;
pub mod memory;
pub mod model;
pub mod node;
pub mod node_plan;
pub mod probe;
pub mod signals;
pub mod telemetry;
