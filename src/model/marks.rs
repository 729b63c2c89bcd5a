//! Egret's bits in packet marks and connection marks.
//!
//! A packet mark has two bits of kind, nine bits of index below them, and an egress ID in bits 13-0. A connection
//! mark has the base in its upper half. Bit 15 below it is 0 where the pod runs, and an egress ID follows; it is 1 on a
//! gateway, and a peer index follows. docs/datapath.md has both as figures.

use std::fmt;

/// The cluster-wide number of an egress IP.
pub type EgressId = u16;

/// The highest egress ID: 14 bits.
pub const MAX_EGRESS_ID: EgressId = 0x3fff;
/// The highest index in a pod mark: 9 bits.
pub const MAX_INDEX: u16 = 0x1ff;
/// The highest number of an uplink: see [`Marks::uplink`].
pub const MAX_UPLINK: u16 = MAX_INDEX - 1;
/// The highest peer index: 15 bits. Index 0 is not used.
pub const MAX_PEER: u16 = 0x7fff;

const INDEX_BITS: u32 = 9;

/// The position of the bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// The upper half of a connection's mark.
    pub connection_base: u16,
    /// The lowest bit of the index, 16 to 21. The kind lies above the index.
    pub shift: u8,
}

impl Default for Marks {
    /// These bits collide neither with kube-proxy (0x4000, 0x8000) nor with the bits from 0x10000 to 0x100000 that
    /// Calico takes first.
    fn default() -> Self {
        Marks { connection_base: 0x4547, shift: 21 }
    }
}

/// An invalid layout of bits.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MarksError {
    /// The shift is out of range.
    #[error(
        "mark shift {0}: the index needs nine bits and the kind two, above the egress ID and kube-proxy's two bits; \
         use 16 to 21"
    )]
    Shift(u8),
    /// The base is 0.
    #[error("connection mark base 0: connections without a mark would be taken for Egret's; use 1 to 0xffff")]
    Base,
    /// The base has the bit by which packets are sent into the tunnel.
    #[error(
        "connection mark base {base:#06x} with mark shift {shift}: the tunnel's own packets have the base in their mark, and \
         its bit {bit} would send them into the tunnel again; give a --connection-mark without this bit, {without:#06x} for \
         instance"
    )]
    Tunnel {
        /// The base.
        base: u16,
        /// The shift.
        shift: u8,
        /// The bit, counted in the base.
        bit: u8,
        /// A base without the bit.
        without: u16,
    },
}

impl Marks {
    /// Checks a layout.
    ///
    /// # Errors
    /// See [`MarksError`].
    pub fn new(connection_base: u16, shift: u8) -> Result<Self, MarksError> {
        if !(16..=21).contains(&shift) {
            return Err(MarksError::Shift(shift));
        }
        if connection_base == 0 {
            return Err(MarksError::Base);
        }
        Ok(Marks { connection_base, shift })
    }

    /// Checks a layout for a node, whose kernel looks up a tunnel packet's route with the packet's mark.
    ///
    /// # Errors
    /// See [`MarksError`].
    pub fn of_a_node(connection_base: u16, shift: u8) -> Result<Self, MarksError> {
        let marks = Marks::new(connection_base, shift)?;
        if marks.connection(0) & marks.request() == 0 {
            return Ok(marks);
        }
        // The higher bit of the kind.
        let bit = shift + 10 - 16;
        let without = connection_base & !(1 << bit) | 1;
        Err(MarksError::Tunnel { base: connection_base, shift, bit, without })
    }

    fn kind(self, kind: u32) -> u32 {
        kind << (u32::from(self.shift) + INDEX_BITS)
    }

    /// Mask of the two bits that tell the kind.
    pub fn kind_mask(self) -> u32 {
        self.kind(0b11)
    }

    /// Mask of kind and index.
    pub fn kind_and_index_mask(self) -> u32 {
        self.kind_mask() | self.index_mask()
    }

    /// Mask of the index.
    pub fn index_mask(self) -> u32 {
        u32::from(MAX_INDEX) << self.shift
    }

    /// Mask of the egress ID.
    pub fn egress_id_mask(self) -> u32 {
        u32::from(MAX_EGRESS_ID)
    }

    /// Kind 01: a packet of a selected pod, before a policy has decided.
    pub fn pod_mark(self, index: u16) -> u32 {
        self.kind(0b01) | u32::from(index) << self.shift
    }

    /// The kind bits alone of a pod mark.
    pub fn pod_mark_kind(self) -> u32 {
        self.kind(0b01)
    }

    /// The guard's mark: a packet of a pod, or out of the tunnel, on which nothing has decided. Its index is that of
    /// the pod mark which lets nothing out.
    pub fn undecided(self) -> u32 {
        self.pod_mark(MAX_INDEX)
    }

    /// Mask of the bits that must equal [`pod_mark_kind`](Self::pod_mark_kind) in a pod mark. A connection mark that
    /// somebody restores into packets can have the bits of the kind, but it has an egress ID or a peer index too.
    pub fn pod_mark_mask(self) -> u32 {
        self.kind_mask() | self.egress_id_mask()
    }

    /// Kind 10: a request to the gateway, through the tunnel.
    pub fn request(self) -> u32 {
        self.kind(0b10)
    }

    /// Kind 11: a reply to the pod's node, through the tunnel.
    pub fn reply(self) -> u32 {
        self.kind(0b11)
    }

    /// Kind 11 with an index: a reply to a pod of this node that came in by a VRF.
    pub fn reply_here(self) -> u32 {
        self.reply() | 1 << self.shift
    }

    /// Kind 11 with an index: a packet that came in by a VRF, to a pods' network, and that belongs to no connection of
    /// Egret's. No routing rule of Egret's matches it.
    pub fn stays_in_vrf(self) -> u32 {
        self.reply() | 2 << self.shift
    }

    /// Kind 00: leaves this node, by the main table (uplink 0) or by the table of an uplink.
    pub fn local(self, id: EgressId, uplink: u16) -> u32 {
        self.uplink(uplink) | u32::from(id)
    }

    /// The mark that the routing rule of an uplink matches. No uplink has the index's lowest bit alone: with WireGuard,
    /// Calico marks the encrypted packets between nodes with 0x200000, which is this bit in the default layout. The first
    /// uplink has the highest index instead, which no other one has.
    pub fn uplink(self, uplink: u16) -> u32 {
        self.index(if uplink == 1 { MAX_INDEX } else { uplink })
    }

    /// The bits of an index.
    pub fn index(self, index: u16) -> u32 {
        u32::from(index) << self.shift
    }

    /// The mark of a connection on the node where its pod runs.
    pub fn connection(self, id: EgressId) -> u32 {
        u32::from(self.connection_base) << 16 | u32::from(id)
    }

    /// The upper half of the marks of Egret's connections.
    pub fn connection_base(self) -> u16 {
        self.connection_base
    }

    /// The mark of a connection whose translation has another address than its egress IP. The daemon deletes it, and
    /// the next packet begins it anew. No egress IP has the ID 0.
    pub fn stale(self) -> u32 {
        self.connection(0)
    }

    /// The mark of a connection on its gateway.
    pub fn connection_of_peer(self, peer: u16) -> u32 {
        u32::from(self.connection_base) << 16 | 0x8000 | u32::from(peer)
    }

    /// The mark of a server's packet on its way to the node that still knows the connection, and of the entries there
    /// that admit late packets. No other connection has it: bit 14 belongs neither to an egress ID nor, with bit 15
    /// unset, to a peer index.
    pub fn handed(self, id: EgressId) -> u32 {
        self.connection(id) | 0x4000
    }

    /// Mask that distinguishes connections with an egress ID from those with a peer index, and from foreign ones.
    pub fn connection_kind_mask(self) -> u32 {
        0xffff_8000
    }

    /// Mask that distinguishes connections with an egress ID from those that are [`handed`](Self::handed), from those
    /// with a peer index, and from foreign ones.
    pub fn connection_of_allocation_mask(self) -> u32 {
        0xffff_c000
    }

    /// Mask that distinguishes Egret's connections from foreign ones.
    pub fn connection_mask(self) -> u32 {
        0xffff_0000
    }
}

impl fmt::Display for Marks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "packet marks {:#010x}, connection marks {:#06x}____",
            self.kind_and_index_mask() | 0x3fff,
            self.connection_base
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_does_not_look_like_the_mark_of_a_request_or_reply() {
        let base = Marks::default().connection_base;
        for (base, shift, works) in [
            (base, 16, false),
            (base, 17, true),
            (base, 20, false),
            (base, 21, true),
            (0x0048, 16, true),
            (0x8547, 21, false),
            (0xc547, 21, false),
            (0x8000, 21, false),
        ] {
            match Marks::of_a_node(base, shift) {
                Ok(marks) => {
                    assert!(works, "{base:#x} {shift}");
                    assert!(![marks.request(), marks.reply()].contains(&(marks.connection(7) & marks.kind_mask())));
                }
                Err(MarksError::Tunnel { without, .. }) => {
                    assert!(!works, "{base:#x} {shift}");
                    assert!(Marks::of_a_node(without, shift).is_ok(), "{without:#x} {shift}");
                }
                Err(e) => panic!("{base:#x} {shift}: {e}"),
            }
        }
    }
}
