//! Rules: lists of typed expressions, which are encoded for the kernel and printed in nft's own syntax.
//!
//! Each method of `phrases.rs` appends one phrase of `nft(8)`. So a rule reads as in nft's syntax:
//! `Rule::new().iif("egret").ct_reply().accept()` prints as `iifname "egret" ct direction reply accept`.

mod encode;
mod phrases;
mod text;

pub(super) use text::protocol_name;

use super::table::SetName;
use super::uapi::*;
use crate::Family;
use crate::hash::fnv1a;
use ipnetwork::IpNetwork;
use std::net::IpAddr;

/// Numbers of IP protocols, <https://www.iana.org/assignments/protocol-numbers>.
pub mod protocol {
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// SCTP.
    pub const SCTP: u8 = 132;
    /// ICMPv6.
    pub const ICMPV6: u8 = 58;
}

/// The kernel's number of an IP version in rules.
fn nfproto(family: Family) -> u8 {
    match family {
        Family::V4 => NFPROTO_IPV4,
        Family::V6 => NFPROTO_IPV6,
    }
}

/// A rule: its expressions in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    expressions: Vec<Expression>,
}

impl Rule {
    /// A rule that matches everything and does nothing.
    pub fn new() -> Self {
        // Most rules have three to eight expressions.
        Rule { expressions: Vec::with_capacity(8) }
    }

    /// Appends the content of `NFTA_RULE_EXPRESSIONS`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        self.expressions.iter().for_each(|expression| expression.encode(out));
    }

    /// FNV-1a, 64 bits, of the encoding, which is written to `buffer`. The rule's comment contains it, and by it a
    /// rule that the kernel lists is recognized.
    pub(super) fn hash(&self, buffer: &mut Vec<u8>) -> u64 {
        buffer.clear();
        self.encode(buffer);
        fnv1a(buffer)
    }

    /// Where packets continue after this rule: in a chain, or in the chains of a verdict map.
    pub(super) fn continuation(&self) -> Option<Continuation<'_>> {
        self.expressions.iter().find_map(|expression| match expression {
            Expression::Verdict(Verdict::Jump(chain) | Verdict::Goto(chain)) => Some(Continuation::Chain(chain)),
            Expression::VerdictMap(_, map) => Some(Continuation::Map(map)),
            _ => None,
        })
    }

    fn with(mut self, expression: Expression) -> Self {
        self.expressions.push(expression);
        self
    }
}

/// See [`Rule::continuation`].
pub(super) enum Continuation<'a> {
    Chain(&'static str),
    Map(&'a str),
}

/// One phrase of a rule: a statement, or a condition that must hold for the phrases after it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Expression {
    /// `FIELD == VALUE`
    Compare { left: Operand, operator: Operator, right: Constant },
    /// `FIELD . FIELD @SET`, or with `!=`
    InSet { key: [Option<Operand>; 3], set: SetName, not: bool },
    /// `TARGET set VALUE`
    Assign(Writable, Value),
    /// `TARGET set VALUE TARGET set VALUE`: both values are looked up first, so that both are assigned or neither.
    AssignBoth([(Writable, Value); 2]),
    /// `counter name "NAME"`
    Counter(&'static str),
    /// `log group GROUP`
    Log(u16),
    /// `limit rate 1/hour burst PACKETS packets`
    LimitBurst(u32),
    /// `limit name FIELD map @MAP`
    LimitMap(Operand, SetName),
    /// `meta nftrace set 1`
    Trace,
    /// `notrack`
    Notrack,
    /// `dup to ADDRESS device "NAME"`
    Dup { to: IpAddr, index: u32, device: &'static str },
    /// `fwd to "NAME"`
    Forward { index: u32, device: &'static str },
    /// `snat ip to ADDRESS`
    Snat(Family, Value),
    /// `tcp option maxseg size set rt mtu`
    ClampMss,
    /// `ip dscp set VALUE`
    SetDscp(Family, u8),
    /// `accept`
    Verdict(Verdict),
    /// `FIELD vmap @MAP`
    VerdictMap(Operand, SetName),
}

/// See [`Expression::Compare`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    Equal,
    Unequal,
    AtLeast,
}

/// A field, and a transformation of its bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Operand {
    field: Field,
    bits: Bits,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bits {
    All,
    And(u32),
    Xor(u32),
    /// The bits of `mask` become `value`.
    Put {
        mask: u32,
        value: u32,
    },
}

/// What a rule can read of a packet and of its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Mark,
    /// The Ethernet type.
    Protocol,
    Iif,
    IifName,
    IifGroup,
    /// The kind of interface that the packet came in by, such as `vrf`.
    IifKind,
    OifGroup,
    SkUid,
    NfProto,
    L4Proto,
    CtState,
    CtStatus,
    CtDirection,
    CtMark,
    /// The source address of the connection's packets in one direction.
    CtSaddr(Family, Direction),
    /// The destination address, as for [`Field::CtSaddr`].
    CtDaddr(Family, Direction),
    /// The connection's protocol.
    CtProtocol,
    /// The source port that the connection began with.
    CtSport,
    /// The destination port that the connection began with.
    CtDport,
    EtherSaddr,
    EtherDaddr,
    Saddr(Family),
    Daddr(Family),
    HopLimit,
    Sport,
    Dport,
    TcpFlags,
    IcmpType,
    /// The type of the destination in the routing tables.
    DaddrType,
    /// The same, as seen from the interface by which the packet came in.
    DaddrTypeAtIif,
    /// Whether packets to the source would leave by the interface that the packet came in by: its index, or 0.
    SaddrOifAtIif,
}

/// `enum ip_conntrack_dir`, include/uapi/linux/netfilter/nf_conntrack_tuple_common.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Original,
    Reply,
}

/// What a field can be compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Constant {
    Number(u32),
    Network(IpNetwork),
    Mac([u8; 6]),
    /// The name of an interface, or of its kind.
    Name(&'static str),
}

/// What a rule can write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writable {
    Mark,
    CtMark,
    EtherDaddr,
}

/// The value that is written.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Number(u32),
    Of(Operand),
    /// `FIELD map @MAP`
    Map(Operand, SetName),
    /// `NUMBER map @MAP`
    MapOfNumber(u32, SetName),
    /// `jhash FIELD . FIELD … mod MODULUS seed SEED map @MAP`
    MapOfHash([Operand; 4], u32, SetName),
}

/// The seed of hashes. Each node and each daemon has the same, so that a connection has the same hash everywhere.
const HASH_SEED: u32 = 0x4547_5254;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    Accept,
    Drop,
    Return,
    Jump(&'static str),
    Goto(&'static str),
}

impl Field {
    fn and(self, mask: u32) -> Operand {
        Operand { field: self, bits: Bits::And(mask) }
    }

    fn xor(self, value: u32) -> Operand {
        Operand { field: self, bits: Bits::Xor(value) }
    }

    /// Whether the field is in the IP header. Then `nft` does not print a condition on the IP version before it.
    fn is_of_ip_header(self) -> bool {
        matches!(self, Field::Saddr(_) | Field::Daddr(_) | Field::HopLimit)
    }

    fn is_of_transport_header(self) -> bool {
        matches!(self, Field::Sport | Field::Dport | Field::TcpFlags | Field::IcmpType)
    }
}

impl From<Field> for Operand {
    fn from(field: Field) -> Self {
        Operand { field, bits: Bits::All }
    }
}
