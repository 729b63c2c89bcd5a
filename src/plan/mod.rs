//! What should be, computed from what is: selection, precedence, profiles, paths, ownership, allocation.
//!
//! Everything here is pure: no I/O, no clock, no environment. Time comes in as a value.

pub mod backends;
mod condition;
pub mod covers;
pub mod destination;
pub mod egress_node;
#[cfg(test)]
pub(crate) mod fixture;
pub mod fnv;
mod label_index;
pub mod ledger;
pub mod mac;
pub mod marks;
pub mod model;
pub mod networks;
pub mod node;
pub mod ownership;
pub mod paths;
pub mod precedence;
pub mod profile;
pub mod quota;
pub mod report;
pub mod selector;
pub mod shared;
pub mod stand_in;
pub mod target;
pub mod tunnel_family;
pub mod uplink_key;
pub mod why;
