//! The MAC address of a node's tunnel device.

use crate::model::fnv::fnv1a;
use egret_nft::mac::Mac;

/// A node's tunnel MAC address: locally administered, unicast, then 40 bits of the name's FNV-1a hash. With 5,000
/// nodes two share one with a probability of about 1 in 90,000.
pub fn of_node(node: &str) -> Mac {
    let hash = fnv1a(node.bytes());
    // FNV mixes the last letters badly into the upper bits, and node names differ in their last letters.
    let mixed = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let [_, _, _, a, b, c, d, e] = (mixed ^ (mixed >> 33)).to_be_bytes();
    [0x02, a, b, c, d, e]
}
