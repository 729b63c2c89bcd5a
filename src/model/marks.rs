//! The bits of packet marks and connection marks that are Egret's.
//!
//! A packet's mark: two bits of kind, nine of index below them, and in bits 13-0 an allocation id. A connection's mark:
//! the base above, then 0 and an allocation id (where the pod runs), or 1 and a peer index (on a gateway).

use std::fmt;

/// An allocation's cluster-wide id.
pub type EgressId = u16;

/// The highest allocation id: 14 bits.
pub const MAX_EGRESS_ID: EgressId = 0x3fff;
/// The highest index of a pod's pod mark or of an uplink: 9 bits.
pub const MAX_INDEX: u16 = 0x1ff;
/// The highest peer index: 15 bits, and 0 is not used.
pub const MAX_PEER: u16 = 0x7fff;

const INDEX_BITS: u32 = 9;

/// Where the bits lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// The upper half of a connection's mark.
    pub connection_base: u16,
    /// The lowest bit of the index; the kind lies above it. 16 to 21.
    pub shift: u8,
}

impl Default for Marks {
    /// Clear of kube-proxy (0x4000, 0x8000) and of the bits from 0x10000 to 0x100000 that Calico takes first.
    fn default() -> Self {
        Marks { connection_base: 0x4547, shift: 21 }
    }
}

/// A layout of bits that cannot be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MarksError {
    /// See the message.
    #[error(
        "mark shift {0}: the index needs nine bits and the kind two, above the allocation id and kube-proxy's two; use 16 to 21"
    )]
    Shift(u8),
    /// See the message.
    #[error("connection mark base 0: connections without a mark would be taken for Egret's; use 1 to 0xffff")]
    Base,
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

    /// Mask of the allocation id.
    pub fn allocation_mask(self) -> u32 {
        u32::from(MAX_EGRESS_ID)
    }

    /// Kind 01: a pod's packet, before anything was decided.
    pub fn pod_mark(self, index: u16) -> u32 {
        self.kind(0b01) | u32::from(index) << self.shift
    }

    /// The kind bits alone of a pod mark.
    pub fn pod_mark_kind(self) -> u32 {
        self.kind(0b01)
    }

    /// A packet of a pod's, or out of the tunnel, on which nothing has decided: the guard's mark. Its index is that of the
    /// pod mark which lets nothing out.
    pub fn undecided(self) -> u32 {
        self.pod_mark(MAX_INDEX)
    }

    /// Mask of what must be as in [`pod_mark_kind`](Self::pod_mark_kind) for a mark to be a pod mark: a connection's mark that somebody
    /// restores into its packets can have the bits of the kind, but has an allocation or a peer.
    pub fn pod_mark_mask(self) -> u32 {
        self.kind_mask() | self.allocation_mask()
    }

    /// Kind 10: to the gateway, through the tunnel.
    pub fn request(self) -> u32 {
        self.kind(0b10)
    }

    /// Kind 11: back to the pod's node, through the tunnel.
    pub fn reply(self) -> u32 {
        self.kind(0b11)
    }

    /// Kind 00: out of this node, by the main table (uplink 0) or by the table of an uplink.
    pub fn local(self, allocation: EgressId, uplink: u16) -> u32 {
        self.uplink(uplink) | u32::from(allocation)
    }

    /// What the routing rule of an uplink looks for.
    pub fn uplink(self, uplink: u16) -> u32 {
        u32::from(uplink) << self.shift
    }

    /// The mark of a connection on the node where its pod runs.
    pub fn connection(self, allocation: EgressId) -> u32 {
        u32::from(self.connection_base) << 16 | u32::from(allocation)
    }

    /// The upper half of all connections' marks.
    pub fn connection_base(self) -> u16 {
        self.connection_base
    }

    /// The mark of a connection that is translated to another address than its allocation's: it is to be forgotten, and picked
    /// up anew by its next packet. No allocation has the id 0.
    pub fn stale(self) -> u32 {
        self.connection(0)
    }

    /// The mark of a connection on its gateway.
    pub fn connection_of_peer(self, peer: u16) -> u32 {
        u32::from(self.connection_base) << 16 | 0x8000 | u32::from(peer)
    }

    /// The mark of a server's packet on its way to the node that still knows its connection, and of the entries that
    /// let in what is late there. It is no other connection's: bit 14 is neither an allocation's nor, with bit 15 unset, a
    /// peer's.
    pub fn handed(self, allocation: EgressId) -> u32 {
        self.connection(allocation) | 0x4000
    }

    /// Mask that tells connections with an allocation from those of peers, and from others'.
    pub fn connection_kind_mask(self) -> u32 {
        0xffff_8000
    }

    /// Mask that tells connections with an allocation from what is [`handed`](Self::handed), and from peers' and others'.
    pub fn connection_of_allocation_mask(self) -> u32 {
        0xffff_c000
    }

    /// Mask that tells Egret's connections from others'.
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
