//! The cluster's state as validated types, without what Egret does not use.
//!
//! A [`Cluster`] is a snapshot. The sources in [`crate::cluster`] make a new one for each change; snapshots share their
//! objects. The other modules compute what follows from a snapshot and is the same for the controller and for nodes:
//! which policies select a pod, which node owns an egress IP, which networks are inside the cluster.

mod address_range;
pub mod backends;
pub mod bandwidth;
pub mod blocks;
pub mod capacity;
mod cluster;
pub mod condition;
pub mod covers;
pub mod destination;
pub mod drain;
pub mod egress_node;
pub mod fallback_policy;
pub mod fnv;
mod gateway;
pub mod kube_vip;
mod label_index;
pub mod marks;
mod metadata;
pub mod networks;
mod node;
pub mod notice;
pub mod opt_in;
pub mod ownership;
mod pod;
mod policy;
pub mod precedence;
pub mod quota;
pub mod selector;
mod service;
pub mod shared;
pub mod spread;
pub mod target;
pub mod text;
pub mod trace;
pub mod treatment;
pub mod tunnel_family;
pub mod tunnel_mac;
pub mod uplink_key;
pub mod uplink_probes;

pub use crate::api::PolicyKey;
pub use address_range::{AddressRange, addresses_of};
pub use cluster::{Cluster, Inside, ObjectKey, Unreadable};
pub use gateway::{Gateway, Reserved};
pub use metadata::{
    ASKED_GATEWAY, DEFAULT_GATEWAY, END_COOLDOWN, Invalid, LIKE_LABELS, MADE_FROM, MOVE_TO, Metadata, REBALANCE,
};
pub use node::Node;
pub use pod::{Client, Pod};
pub use policy::{AddressRequest, ForController, Guessed, Namespaces, PodMatch, Policy, Tier, destinations};
pub use service::{
    Announcement, Announcer, AskedEgress, Endpoints, Exposure, LoadBalancer, Service, ServicePort, VIP_HOST,
};
