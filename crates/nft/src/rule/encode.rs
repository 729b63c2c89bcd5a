//! Rules as the kernel's expressions: each loads registers, compares them or writes from them.
//!
//! Everything is appended to the message under construction, without a buffer in between.

use super::super::table::Bytes;
use super::*;
use crate::netlink::Attributes;

/// Two registers of 16 bytes. Conditions use the first one only.
const R1: u32 = 1;
const R2: u32 = 2;
/// Register 1 is the same as the 32-bit registers 8 to 11 (`NFT_REG32_00`), and register 2 follows. So a key of
/// several fields is one run of bytes.
const R1_FIRST_WORD: u32 = 8;
/// The register of verdicts, `NFT_REG_VERDICT`.
const VERDICT: u32 = 0;

const TCP_OPTION_MAXSEG: u8 = 2;
const IFNAMSIZ: usize = 16;
/// The offset of the checksum in the IPv4 header, RFC 791.
const IPV4_CHECKSUM: u32 = 10;

/// Where the kernel reads a field.
enum Source {
    Meta(u32),
    Ct(u32, Option<Direction>),
    /// Header and offset.
    Payload(u32, u32),
    /// Result and flags.
    Fib(u32, u32),
}

impl Field {
    /// Where the kernel reads the field, and its length in bytes.
    fn source(self) -> (Source, u32) {
        use Source::*;
        let (link, network, transport) =
            (NFT_PAYLOAD_LL_HEADER, NFT_PAYLOAD_NETWORK_HEADER, NFT_PAYLOAD_TRANSPORT_HEADER);
        match self {
            Field::Mark => (Meta(NFT_META_MARK), 4),
            Field::Protocol => (Meta(NFT_META_PROTOCOL), 2),
            Field::Iif => (Meta(NFT_META_IIF), 4),
            Field::IifName => (Meta(NFT_META_IIFNAME), IFNAMSIZ as u32),
            Field::IifGroup => (Meta(NFT_META_IIFGROUP), 4),
            Field::IifKind => (Meta(NFT_META_IIFKIND), IFNAMSIZ as u32),
            Field::OifGroup => (Meta(NFT_META_OIFGROUP), 4),
            Field::SkUid => (Meta(NFT_META_SKUID), 4),
            Field::NfProto => (Meta(NFT_META_NFPROTO), 1),
            Field::L4Proto => (Meta(NFT_META_L4PROTO), 1),
            Field::CtState => (Ct(NFT_CT_STATE, None), 4),
            Field::CtStatus => (Ct(NFT_CT_STATUS, None), 4),
            Field::CtDirection => (Ct(NFT_CT_DIRECTION, None), 1),
            Field::CtMark => (Ct(NFT_CT_MARK, None), 4),
            Field::CtSaddr(Family::V4, direction) => (Ct(NFT_CT_SRC_IP, Some(direction)), 4),
            Field::CtSaddr(Family::V6, direction) => (Ct(NFT_CT_SRC_IP6, Some(direction)), 16),
            Field::CtDaddr(Family::V4, direction) => (Ct(NFT_CT_DST_IP, Some(direction)), 4),
            Field::CtDaddr(Family::V6, direction) => (Ct(NFT_CT_DST_IP6, Some(direction)), 16),
            Field::CtProtocol => (Ct(NFT_CT_PROTOCOL, Some(Direction::Original)), 1),
            Field::CtDport => (Ct(NFT_CT_PROTO_DST, Some(Direction::Original)), 2),
            Field::CtSport => (Ct(NFT_CT_PROTO_SRC, Some(Direction::Original)), 2),
            Field::EtherDaddr => (Payload(link, 0), 6),
            Field::EtherSaddr => (Payload(link, 6), 6),
            Field::Saddr(Family::V4) => (Payload(network, 12), 4),
            Field::Daddr(Family::V4) => (Payload(network, 16), 4),
            Field::Saddr(Family::V6) => (Payload(network, 8), 16),
            Field::Daddr(Family::V6) => (Payload(network, 24), 16),
            Field::HopLimit => (Payload(network, 7), 1),
            Field::Sport => (Payload(transport, 0), 2),
            Field::Dport => (Payload(transport, 2), 2),
            Field::TcpFlags => (Payload(transport, 13), 1),
            Field::IcmpType => (Payload(transport, 0), 1),
            Field::DaddrType => (Fib(NFT_FIB_RESULT_ADDRTYPE, NFTA_FIB_F_DADDR), 4),
            Field::DaddrTypeAtIif => (Fib(NFT_FIB_RESULT_ADDRTYPE, NFTA_FIB_F_DADDR | NFTA_FIB_F_IIF), 4),
            Field::SaddrOifAtIif => (Fib(NFT_FIB_RESULT_OIF, NFTA_FIB_F_SADDR | NFTA_FIB_F_IIF), 4),
        }
    }

    fn load(self, out: &mut Vec<u8>, register: u32) {
        match self.source() {
            (Source::Meta(key), _) => expression(out, "meta", |d| {
                d.be32(NFTA_META_KEY, key);
                d.be32(NFTA_META_DREG, register);
            }),
            (Source::Ct(key, direction), _) => expression(out, "ct", |d| {
                d.be32(NFTA_CT_KEY, key);
                d.be32(NFTA_CT_DREG, register);
                if let Some(direction) = direction {
                    d.attribute(NFTA_CT_DIRECTION, &[direction as u8]);
                }
            }),
            (Source::Payload(base, offset), len) => expression(out, "payload", |d| {
                d.be32(NFTA_PAYLOAD_DREG, register);
                d.be32(NFTA_PAYLOAD_BASE, base);
                d.be32(NFTA_PAYLOAD_OFFSET, offset);
                d.be32(NFTA_PAYLOAD_LEN, len);
            }),
            (Source::Fib(result, flags), _) => expression(out, "fib", |d| {
                d.be32(NFTA_FIB_DREG, register);
                d.be32(NFTA_FIB_RESULT, result);
                d.be32(NFTA_FIB_FLAGS, flags);
            }),
        }
    }

    /// How many registers of 32 bits the field fills.
    fn words(self) -> u32 {
        self.source().1.div_ceil(4)
    }

    /// A number as the field's register holds it: in the host's byte order for the kernel's own values, in the
    /// network's for those of packets.
    fn bytes(self, number: u32) -> Bytes {
        match self.source() {
            (_, 1) => Bytes::from([number as u8].as_slice()),
            (_, 2) => Bytes::from((number as u16).to_be_bytes().as_slice()),
            _ => Bytes::from(number),
        }
    }
}

impl Operand {
    fn load(self, out: &mut Vec<u8>, register: u32) {
        self.field.load(out, register);
        match self.bits {
            Bits::All => {}
            Bits::And(mask) => bitwise(out, register, self.field.bytes(mask), self.field.bytes(0)),
            Bits::Put { mask, value } => bitwise(out, register, self.field.bytes(!mask), self.field.bytes(value)),
            Bits::Xor(value) => bitwise(out, register, self.field.bytes(u32::MAX), self.field.bytes(value)),
        }
    }
}

impl Value {
    fn load(&self, out: &mut Vec<u8>, register: u32) {
        match self {
            Value::Number(number) => immediate(out, register, &number.to_ne_bytes()),
            Value::Of(operand) => operand.load(out, register),
            Value::Map(operand, map) => {
                operand.load(out, register);
                lookup(out, map, register, Some(register), false);
            }
            Value::MapOfNumber(number, map) => {
                immediate(out, register, &number.to_ne_bytes());
                lookup(out, map, register, Some(register), false);
            }
            Value::MapOfHash(fields, modulus, map) => {
                let words = concatenate(out, fields.iter().copied());
                hash(out, 4 * words, *modulus);
                lookup(out, map, R1, Some(register), false);
            }
        }
    }
}

impl Writable {
    fn store(self, out: &mut Vec<u8>, register: u32) {
        match self {
            Writable::Mark => expression(out, "meta", |d| {
                d.be32(NFTA_META_KEY, NFT_META_MARK);
                d.be32(NFTA_META_SREG, register);
            }),
            Writable::CtMark => expression(out, "ct", |d| {
                d.be32(NFTA_CT_KEY, NFT_CT_MARK);
                d.be32(NFTA_CT_SREG, register);
            }),
            Writable::EtherDaddr => expression(out, "payload", |d| {
                d.be32(NFTA_PAYLOAD_SREG, register);
                d.be32(NFTA_PAYLOAD_BASE, NFT_PAYLOAD_LL_HEADER);
                d.be32(NFTA_PAYLOAD_OFFSET, 0);
                d.be32(NFTA_PAYLOAD_LEN, 6);
                d.be32(NFTA_PAYLOAD_CSUM_TYPE, 0);
            }),
        }
    }
}

impl Expression {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Expression::Compare { left, operator, right } => compare(out, *left, *operator, *right),
            Expression::InSet { key, set, not } => {
                concatenate(out, key.iter().flatten().copied());
                lookup(out, set, R1, None, *not);
            }
            Expression::Assign(target, value) => {
                value.load(out, R1);
                target.store(out, R1);
            }
            Expression::AssignBoth([(first, one), (second, other)]) => {
                one.load(out, R1);
                other.load(out, R2);
                first.store(out, R1);
                second.store(out, R2);
            }
            Expression::Counter(name) => expression(out, "objref", |d| {
                d.be32(NFTA_OBJREF_IMM_TYPE, NFT_OBJECT_COUNTER);
                d.text(NFTA_OBJREF_IMM_NAME, name);
            }),
            Expression::Log(group) => {
                expression(out, "log", |d| d.attribute(NFTA_LOG_GROUP, &group.to_be_bytes()));
            }
            Expression::LimitBurst(packets) => limit(out, *packets),
            Expression::LimitMap(operand, map) => {
                operand.load(out, R1);
                expression(out, "objref", |d| {
                    d.be32(NFTA_OBJREF_SET_SREG, R1);
                    d.text(NFTA_OBJREF_SET_NAME, map);
                });
            }
            Expression::Trace => trace(out),
            Expression::Notrack => expression(out, "notrack", |_| {}),
            Expression::Dup { to, index, .. } => dup(out, *to, *index),
            Expression::Forward { index, .. } => {
                immediate(out, R1, &index.to_ne_bytes());
                expression(out, "fwd", |d| d.be32(NFTA_FWD_SREG_DEV, R1));
            }
            Expression::Snat(ip, to) => {
                to.load(out, R1);
                expression(out, "nat", |d| {
                    d.be32(NFTA_NAT_TYPE, NFT_NAT_SNAT);
                    d.be32(NFTA_NAT_FAMILY, u32::from(nfproto(*ip)));
                    d.be32(NFTA_NAT_REG_ADDR_MIN, R1);
                });
            }
            Expression::ClampMss => clamp_mss(out),
            Expression::SetDscp(ip, value) => set_dscp(out, *ip, *value),
            Expression::Verdict(verdict) => {
                let (code, chain) = verdict.code();
                expression(out, "immediate", |d| {
                    d.be32(NFTA_IMMEDIATE_DREG, VERDICT);
                    d.nested(NFTA_IMMEDIATE_DATA, |v| {
                        v.nested(NFTA_DATA_VERDICT, |v| {
                            v.be32(NFTA_VERDICT_CODE, code as u32);
                            if let Some(chain) = chain {
                                v.text(NFTA_VERDICT_CHAIN, chain);
                            }
                        });
                    });
                });
            }
            Expression::VerdictMap(operand, map) => {
                operand.load(out, R1);
                lookup(out, map, R1, Some(VERDICT), false);
            }
        }
    }
}

impl Verdict {
    fn code(&self) -> (i32, Option<&str>) {
        match self {
            Verdict::Accept => (NF_ACCEPT, None),
            Verdict::Drop => (NF_DROP, None),
            Verdict::Return => (NFT_RETURN, None),
            Verdict::Jump(chain) => (NFT_JUMP, Some(chain)),
            Verdict::Goto(chain) => (NFT_GOTO, Some(chain)),
        }
    }
}

fn expression(out: &mut Vec<u8>, name: &str, fill: impl FnOnce(&mut Vec<u8>)) {
    out.nested(NFTA_LIST_ELEM, |e| {
        e.text(NFTA_EXPR_NAME, name);
        e.nested(NFTA_EXPR_DATA, fill);
    });
}

fn compare(out: &mut Vec<u8>, left: Operand, operator: Operator, right: Constant) {
    left.load(out, R1);
    let value = match right {
        Constant::Number(number) => left.field.bytes(number),
        Constant::Mac(mac) => Bytes::from(mac.as_slice()),
        // The kernel compares all of `IFNAMSIZ` bytes.
        Constant::Name(name) => {
            let mut all = [0; IFNAMSIZ];
            all.iter_mut().zip(name.bytes().take(IFNAMSIZ - 1)).for_each(|(to, from)| *to = from);
            Bytes::from(all.as_slice())
        }
        Constant::Network(network) => {
            let address = Bytes::from(network.network());
            if usize::from(network.prefix()) < address.as_slice().len() * 8 {
                let zero = Bytes::from(&[0; 16][..address.as_slice().len()]);
                bitwise(out, R1, Bytes::from(network.mask()), zero);
            }
            address
        }
    };
    let operator = match operator {
        Operator::Equal => NFT_CMP_EQ,
        Operator::Unequal => NFT_CMP_NEQ,
        Operator::AtLeast => NFT_CMP_GTE,
    };
    expression(out, "cmp", |d| {
        d.be32(NFTA_CMP_SREG, R1);
        d.be32(NFTA_CMP_OP, operator);
        d.nested(NFTA_CMP_DATA, |v| v.attribute(NFTA_DATA_VALUE, value.as_slice()));
    });
}

fn bitwise(out: &mut Vec<u8>, register: u32, mask: Bytes, xor: Bytes) {
    expression(out, "bitwise", |d| {
        d.be32(NFTA_BITWISE_SREG, register);
        d.be32(NFTA_BITWISE_DREG, register);
        d.be32(NFTA_BITWISE_LEN, mask.as_slice().len() as u32);
        d.nested(NFTA_BITWISE_MASK, |v| v.attribute(NFTA_DATA_VALUE, mask.as_slice()));
        d.nested(NFTA_BITWISE_XOR, |v| v.attribute(NFTA_DATA_VALUE, xor.as_slice()));
    });
}

fn immediate(out: &mut Vec<u8>, register: u32, value: &[u8]) {
    expression(out, "immediate", |d| {
        d.be32(NFTA_IMMEDIATE_DREG, register);
        d.nested(NFTA_IMMEDIATE_DATA, |v| v.attribute(NFTA_DATA_VALUE, value));
    });
}

fn lookup(out: &mut Vec<u8>, set: &str, source: u32, destination: Option<u32>, not: bool) {
    expression(out, "lookup", |d| {
        d.text(NFTA_LOOKUP_SET, set);
        d.be32(NFTA_LOOKUP_SREG, source);
        if let Some(register) = destination {
            d.be32(NFTA_LOOKUP_DREG, register);
        }
        if not {
            d.be32(NFTA_LOOKUP_FLAGS, NFT_LOOKUP_F_INV);
        }
    });
}

/// Loads fields one behind the other from register 1 on. Returns how many registers of 32 bits they fill.
fn concatenate(out: &mut Vec<u8>, fields: impl Iterator<Item = Operand>) -> u32 {
    let (mut register, mut next_word) = (R1, R1_FIRST_WORD);
    for operand in fields {
        operand.load(out, register);
        next_word += operand.field.words();
        register = next_word;
    }
    next_word - R1_FIRST_WORD
}

/// Puts the hash of so many bytes from register 1 on, less than `modulus`, into register 1.
fn hash(out: &mut Vec<u8>, length: u32, modulus: u32) {
    expression(out, "hash", |d| {
        d.be32(NFTA_HASH_SREG, R1);
        d.be32(NFTA_HASH_DREG, R1);
        d.be32(NFTA_HASH_LEN, length);
        d.be32(NFTA_HASH_MODULUS, modulus);
        d.be32(NFTA_HASH_SEED, HASH_SEED);
        d.be32(NFTA_HASH_TYPE, NFT_HASH_JENKINS);
    });
}

fn dup(out: &mut Vec<u8>, to: IpAddr, device: u32) {
    // An IPv6 address fills the four words of register 1.
    let device_register = if to.is_ipv4() { R1_FIRST_WORD + 1 } else { R2 };
    immediate(out, R1, Bytes::from(to).as_slice());
    immediate(out, device_register, &device.to_ne_bytes());
    expression(out, "dup", |d| {
        d.be32(NFTA_DUP_SREG_ADDR, R1);
        d.be32(NFTA_DUP_SREG_DEV, device_register);
    });
}

/// A bucket that holds `burst` packets from the start, and gets another one after an hour.
fn limit(out: &mut Vec<u8>, burst: u32) {
    const HOUR: u64 = 3600;
    expression(out, "limit", |d| {
        d.attribute(NFTA_LIMIT_RATE, &1u64.to_be_bytes());
        d.attribute(NFTA_LIMIT_UNIT, &HOUR.to_be_bytes());
        d.be32(NFTA_LIMIT_BURST, burst);
        d.be32(NFTA_LIMIT_TYPE, NFT_LIMIT_PKTS);
    });
}

fn trace(out: &mut Vec<u8>) {
    immediate(out, R1, &[1]);
    expression(out, "meta", |d| {
        d.be32(NFTA_META_KEY, NFT_META_NFTRACE);
        d.be32(NFTA_META_SREG, R1);
    });
}

/// The first 16 bits of the IP header are read, changed and written, as nft does it. In IPv4 the DSCP is the upper six
/// bits of the second byte (RFC 2474), and the header has a checksum. In IPv6 it begins in the middle of the first
/// byte (RFC 8200).
fn set_dscp(out: &mut Vec<u8>, ip: Family, value: u8) {
    let value = u16::from(value & 0x3f);
    let (mask, bits) = match ip {
        Family::V4 => (0x00fc_u16, value << 2),
        Family::V6 => (0x0fc0, value << 6),
    };
    expression(out, "payload", |d| {
        d.be32(NFTA_PAYLOAD_DREG, R1);
        d.be32(NFTA_PAYLOAD_BASE, NFT_PAYLOAD_NETWORK_HEADER);
        d.be32(NFTA_PAYLOAD_OFFSET, 0);
        d.be32(NFTA_PAYLOAD_LEN, 2);
    });
    let bytes = |number: u16| Bytes::from(number.to_be_bytes().as_slice());
    bitwise(out, R1, bytes(!mask), bytes(bits));
    expression(out, "payload", |d| {
        d.be32(NFTA_PAYLOAD_SREG, R1);
        d.be32(NFTA_PAYLOAD_BASE, NFT_PAYLOAD_NETWORK_HEADER);
        d.be32(NFTA_PAYLOAD_OFFSET, 0);
        d.be32(NFTA_PAYLOAD_LEN, 2);
        match ip {
            Family::V4 => {
                d.be32(NFTA_PAYLOAD_CSUM_TYPE, NFT_PAYLOAD_CSUM_INET);
                d.be32(NFTA_PAYLOAD_CSUM_OFFSET, IPV4_CHECKSUM);
            }
            Family::V6 => d.be32(NFTA_PAYLOAD_CSUM_TYPE, 0),
        }
    });
}

fn clamp_mss(out: &mut Vec<u8>) {
    expression(out, "rt", |d| {
        d.be32(NFTA_RT_KEY, NFT_RT_TCPMSS);
        d.be32(NFTA_RT_DREG, R1);
    });
    expression(out, "byteorder", |d| {
        d.be32(NFTA_BYTEORDER_SREG, R1);
        d.be32(NFTA_BYTEORDER_DREG, R1);
        d.be32(NFTA_BYTEORDER_OP, NFT_BYTEORDER_HTON);
        d.be32(NFTA_BYTEORDER_LEN, 2);
        d.be32(NFTA_BYTEORDER_SIZE, 2);
    });
    expression(out, "exthdr", |d| {
        d.be32(NFTA_EXTHDR_SREG, R1);
        d.attribute(NFTA_EXTHDR_TYPE, &[TCP_OPTION_MAXSEG]);
        d.be32(NFTA_EXTHDR_OFFSET, 2);
        d.be32(NFTA_EXTHDR_LEN, 2);
        d.be32(NFTA_EXTHDR_OP, NFT_EXTHDR_OP_TCPOPT);
    });
}
