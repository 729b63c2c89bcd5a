//! Rules, written as nf_tables expressions.
//!
//! Each method appends what one phrase of `nft(8)` means, so that a rule reads as it does there:
//! `Rule::new().iif("egret").ct_reply().accept()`. Values pass through register 1, and 2 where two are
//! needed at once.

mod actions;
mod matches;

use super::uapi::*;
use crate::kernel::netlink::Attributes;
use crate::model::fnv::fnv1a;
use ipnetwork::IpNetwork;
use std::net::IpAddr;

const R1: u32 = 1;
const R2: u32 = 2;
/// Register 1 is 32-bit registers 8 to 11 (`NFT_REG32_00`), and the next ones follow.
const R1_FIRST_WORD: u32 = 8;
const R1_SECOND_WORD: u32 = 9;

const OFFSET_SADDR4: u32 = 12;
const OFFSET_DADDR4: u32 = 16;
const OFFSET_SADDR6: u32 = 8;
const OFFSET_DADDR6: u32 = 24;
const OFFSET_HOP_LIMIT: u32 = 7;
const OFFSET_SPORT: u32 = 0;
const OFFSET_DPORT: u32 = 2;
const OFFSET_TCP_FLAGS: u32 = 13;
const OFFSET_ICMP_TYPE: u32 = 0;
const TCP_FLAG_SYN: u8 = 0x02;
const TCP_OPTION_MAXSEG: u8 = 2;
const IFNAMSIZ: usize = 16;
/// `enum ip_conntrack_dir`, include/uapi/linux/netfilter/nf_conntrack_tuple_common.h.
const IP_CT_DIR_ORIGINAL: u8 = 0;
const IP_CT_DIR_REPLY: u8 = 1;

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

/// An IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ip {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Ip {
    /// Both.
    pub const BOTH: [Ip; 2] = [Ip::V4, Ip::V6];

    /// Whether an address is of this version.
    pub fn has(self, address: &IpAddr) -> bool {
        address.is_ipv4() == (self == Ip::V4)
    }

    fn nfproto(self) -> u8 {
        match self {
            Ip::V4 => NFPROTO_IPV4,
            Ip::V6 => NFPROTO_IPV6,
        }
    }

    fn len(self) -> u32 {
        match self {
            Ip::V4 => 4,
            Ip::V6 => 16,
        }
    }
}

/// A rule: its expressions, and a hash of them by which it is known again in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    expressions: Vec<u8>,
}

impl Rule {
    /// A rule that matches everything and does nothing.
    pub fn new() -> Self {
        Rule::default()
    }

    /// The content of `NFTA_RULE_EXPRESSIONS`.
    pub fn expressions(&self) -> &[u8] {
        &self.expressions
    }

    /// FNV-1a, 64 bits, of the expressions. It stands in the rule's comment.
    pub fn hash(&self) -> u64 {
        fnv1a(self.expressions.iter().copied())
    }

    fn expression(mut self, name: &str, fill: impl FnOnce(&mut Vec<u8>)) -> Self {
        self.expressions.nested(NFTA_LIST_ELEM, |e| {
            e.text(NFTA_EXPR_NAME, name);
            e.nested(NFTA_EXPR_DATA, fill);
        });
        self
    }

    fn load_meta(self, key: u32, register: u32) -> Self {
        self.expression("meta", |d| {
            d.be32(NFTA_META_KEY, key);
            d.be32(NFTA_META_DREG, register);
        })
    }

    fn load_ct(self, key: u32) -> Self {
        self.expression("ct", |d| {
            d.be32(NFTA_CT_KEY, key);
            d.be32(NFTA_CT_DREG, R1);
        })
    }

    fn load_payload(self, base: u32, offset: u32, len: u32, register: u32) -> Self {
        self.expression("payload", |d| {
            d.be32(NFTA_PAYLOAD_DREG, register);
            d.be32(NFTA_PAYLOAD_BASE, base);
            d.be32(NFTA_PAYLOAD_OFFSET, offset);
            d.be32(NFTA_PAYLOAD_LEN, len);
        })
    }

    fn load_saddr(self, ip: Ip, register: u32) -> Self {
        let offset = if ip == Ip::V4 { OFFSET_SADDR4 } else { OFFSET_SADDR6 };
        self.load_payload(NFT_PAYLOAD_NETWORK_HEADER, offset, ip.len(), register)
    }

    fn load_daddr(self, ip: Ip) -> Self {
        let offset = if ip == Ip::V4 { OFFSET_DADDR4 } else { OFFSET_DADDR6 };
        self.load_payload(NFT_PAYLOAD_NETWORK_HEADER, offset, ip.len(), R1)
    }

    fn and(self, mask: &[u8]) -> Self {
        self.bitwise(R1, mask, &vec![0; mask.len()])
    }

    fn bitwise(self, register: u32, mask: &[u8], xor: &[u8]) -> Self {
        self.expression("bitwise", |d| {
            d.be32(NFTA_BITWISE_SREG, register);
            d.be32(NFTA_BITWISE_DREG, register);
            d.be32(NFTA_BITWISE_LEN, mask.len() as u32);
            d.nested(NFTA_BITWISE_MASK, |v| v.attribute(NFTA_DATA_VALUE, mask));
            d.nested(NFTA_BITWISE_XOR, |v| v.attribute(NFTA_DATA_VALUE, xor));
        })
    }

    fn compare(self, op: u32, value: &[u8]) -> Self {
        self.expression("cmp", |d| {
            d.be32(NFTA_CMP_SREG, R1);
            d.be32(NFTA_CMP_OP, op);
            d.nested(NFTA_CMP_DATA, |v| v.attribute(NFTA_DATA_VALUE, value));
        })
    }

    fn equals(self, value: &[u8]) -> Self {
        self.compare(0, value)
    }

    fn differs(self, value: &[u8]) -> Self {
        self.compare(1, value)
    }

    fn immediate(self, register: u32, value: &[u8]) -> Self {
        self.expression("immediate", |d| {
            d.be32(NFTA_IMMEDIATE_DREG, register);
            d.nested(NFTA_IMMEDIATE_DATA, |v| v.attribute(NFTA_DATA_VALUE, value));
        })
    }

    fn lookup(self, set: &str, source: u32, destination: Option<u32>, inverted: bool) -> Self {
        self.expression("lookup", |d| {
            d.text(NFTA_LOOKUP_SET, set);
            d.be32(NFTA_LOOKUP_SREG, source);
            if let Some(register) = destination {
                d.be32(NFTA_LOOKUP_DREG, register);
            }
            if inverted {
                d.be32(NFTA_LOOKUP_FLAGS, NFT_LOOKUP_F_INV);
            }
        })
    }

    fn verdict(self, code: i32, chain: Option<&str>) -> Self {
        self.expression("immediate", |d| {
            d.be32(NFTA_IMMEDIATE_DREG, 0);
            d.nested(NFTA_IMMEDIATE_DATA, |v| {
                v.nested(NFTA_DATA_VERDICT, |v| {
                    v.be32(NFTA_VERDICT_CODE, code as u32);
                    if let Some(chain) = chain {
                        v.text(NFTA_VERDICT_CHAIN, chain);
                    }
                });
            });
        })
    }
}
