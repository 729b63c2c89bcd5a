//! Rules in nft's own syntax, as `nft list` prints them.

use super::*;
use crate::mac::Shown;
use std::fmt::{Display, Formatter, Result};

/// `include/uapi/linux/netfilter/nf_conntrack_common.h`, under the names that nft gives the bits.
const STATES: [(u32, &str); 5] = [
    (CT_STATE_INVALID, "invalid"),
    (CT_STATE_ESTABLISHED, "established"),
    (CT_STATE_RELATED, "related"),
    (CT_STATE_NEW, "new"),
    (CT_STATE_UNTRACKED, "untracked"),
];
const STATUSES: [(u32, &str); 5] = [
    (IPS_EXPECTED, "expected"),
    (IPS_ASSURED, "assured"),
    (IPS_CONFIRMED, "confirmed"),
    (IPS_SRC_NAT, "snat"),
    (IPS_DST_NAT, "dnat"),
];

/// The values that nft prints by name (its src/proto.c: `dscp_type_tbl`).
const DSCP_NAMES: [(u8, &str); 23] = [
    (0, "cs0"),
    (8, "cs1"),
    (16, "cs2"),
    (24, "cs3"),
    (32, "cs4"),
    (40, "cs5"),
    (48, "cs6"),
    (56, "cs7"),
    (1, "lephb"),
    (10, "af11"),
    (12, "af12"),
    (14, "af13"),
    (18, "af21"),
    (20, "af22"),
    (22, "af23"),
    (26, "af31"),
    (28, "af32"),
    (30, "af33"),
    (34, "af41"),
    (36, "af42"),
    (38, "af43"),
    (44, "va"),
    (46, "ef"),
];

impl Display for Rule {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let mut transport = "th";
        let mut first = true;
        for (at, expression) in self.expressions.iter().enumerate() {
            let rest = &self.expressions[at..];
            if let Expression::Compare { left: Operand { field, .. }, operator, right: Constant::Number(number) } =
                expression
            {
                if *field == Field::L4Proto && *operator == Operator::Equal {
                    transport = protocol_name(*number as u8);
                }
                // nft does not print a condition that follows from a later phrase.
                let is_implied = match field {
                    Field::NfProto => rest.iter().any(|e| e.reads(Field::is_of_ip_header)),
                    Field::Protocol if *operator == Operator::Equal => {
                        rest.iter().any(|e| e.reads(Field::is_of_ip_header))
                    }
                    Field::L4Proto => rest.iter().any(|e| e.reads(Field::is_of_transport_header)),
                    _ => false,
                };
                if is_implied {
                    continue;
                }
            }
            if !std::mem::take(&mut first) {
                f.write_str(" ")?;
            }
            expression.print(f, transport)?;
        }
        Ok(())
    }
}

impl Expression {
    fn reads(&self, is_it: impl Fn(Field) -> bool) -> bool {
        let of_value = |value: &Value| matches!(value, Value::Of(o) | Value::Map(o, _) if is_it(o.field));
        match self {
            Expression::Compare { left, .. } | Expression::VerdictMap(left, _) | Expression::LimitMap(left, _) => {
                is_it(left.field)
            }
            Expression::InSet { key, .. } => key.iter().flatten().any(|operand| is_it(operand.field)),
            Expression::Assign(_, value) | Expression::Snat(_, value) => of_value(value),
            Expression::AssignBoth(both) => both.iter().any(|(_, value)| of_value(value)),
            Expression::SetDscp(ip, _) => is_it(Field::Saddr(*ip)),
            _ => false,
        }
    }

    fn print(&self, f: &mut Formatter<'_>, transport: &str) -> Result {
        match self {
            Expression::Compare { left, operator, right } => compare(f, *left, *operator, *right, transport),
            Expression::InSet { key, set, not } => {
                for (at, operand) in key.iter().flatten().enumerate() {
                    f.write_str(if at > 0 { " . " } else { "" })?;
                    operand.print(f, transport)?;
                }
                // nft prints the operator after a single field with a mask only.
                let operator = match key {
                    _ if *not => "!= ",
                    [Some(Operand { bits: Bits::And(_), .. }), None, None] => "== ",
                    _ => "",
                };
                write!(f, " {operator}@{set}")
            }
            Expression::Assign(target, value) => assignment(f, *target, value, transport),
            Expression::AssignBoth([(first, one), (second, other)]) => {
                assignment(f, *first, one, transport)?;
                f.write_str(" ")?;
                assignment(f, *second, other, transport)
            }
            Expression::Counter(name) => write!(f, "counter name \"{name}\""),
            Expression::Log(group) => write!(f, "log group {group}"),
            Expression::LimitBurst(packets) => write!(f, "limit rate 1/hour burst {packets} packets"),
            Expression::LimitMap(operand, map) => {
                f.write_str("limit name ")?;
                operand.print(f, transport)?;
                write!(f, " map @{map}")
            }
            Expression::Trace => f.write_str("meta nftrace set 1"),
            Expression::Notrack => f.write_str("notrack"),
            Expression::Dup { to, device, .. } => write!(f, "dup to {to} device \"{device}\""),
            Expression::Forward { device, .. } => write!(f, "fwd to \"{device}\""),
            Expression::Snat(ip, to) => {
                write!(f, "snat {} to ", ip_name(*ip))?;
                to.print(f, transport)
            }
            Expression::ClampMss => f.write_str("tcp option maxseg size set rt mtu"),
            Expression::SetDscp(ip, value) => match DSCP_NAMES.iter().find(|(number, _)| number == value) {
                Some((_, name)) => write!(f, "{} dscp set {name}", ip_name(*ip)),
                None => write!(f, "{} dscp set {value:#04x}", ip_name(*ip)),
            },
            Expression::Verdict(verdict) => match verdict {
                Verdict::Accept => f.write_str("accept"),
                Verdict::Drop => f.write_str("drop"),
                Verdict::Return => f.write_str("return"),
                Verdict::Jump(chain) => write!(f, "jump {chain}"),
                Verdict::Goto(chain) => write!(f, "goto {chain}"),
            },
            Expression::VerdictMap(operand, map) => {
                operand.print(f, transport)?;
                write!(f, " vmap @{map}")
            }
        }
    }
}

fn assignment(f: &mut Formatter<'_>, target: Writable, value: &Value, transport: &str) -> Result {
    f.write_str(match target {
        Writable::Mark => "meta mark set ",
        Writable::CtMark => "ct mark set ",
        Writable::EtherDaddr => "ether daddr set ",
    })?;
    value.print(f, transport)
}

impl Value {
    fn print(&self, f: &mut Formatter<'_>, transport: &str) -> Result {
        match self {
            Value::Number(number) => write!(f, "{number:#010x}"),
            Value::Of(operand) => operand.print(f, transport),
            Value::Map(operand, map) => {
                operand.print(f, transport)?;
                write!(f, " map @{map}")
            }
            Value::MapOfNumber(number, map) => write!(f, "{number:#010x} map @{map}"),
            Value::MapOfHash(fields, modulus, map) => {
                for (at, field) in fields.iter().enumerate() {
                    f.write_str(if at == 0 { "jhash " } else { " . " })?;
                    field.print(f, transport)?;
                }
                write!(f, " mod {modulus} seed {HASH_SEED:#x} map @{map}")
            }
        }
    }
}

impl Operand {
    fn print(&self, f: &mut Formatter<'_>, transport: &str) -> Result {
        self.field.print(f, transport)?;
        let (sign, bits) = match self.bits {
            Bits::All => return Ok(()),
            Bits::And(mask) => ('&', mask),
            Bits::Xor(value) => ('^', value),
            // nft omits bits from the first mask that are set afterwards.
            Bits::Put { mask, value } => return write!(f, " & {:#010x} | {value:#010x}", !mask | value),
        };
        match self.field {
            Field::Mark | Field::CtMark => write!(f, " {sign} {bits:#010x}"),
            _ => write!(f, " {sign} {bits}"),
        }
    }
}

impl Field {
    fn print(self, f: &mut Formatter<'_>, transport: &str) -> Result {
        f.write_str(match self {
            Field::Mark => "meta mark",
            Field::Protocol => "meta protocol",
            Field::Iif => "iif",
            Field::IifName => "iifname",
            Field::IifGroup => "iifgroup",
            Field::IifKind => "meta iifkind",
            Field::OifGroup => "oifgroup",
            Field::SkUid => "meta skuid",
            Field::NfProto => "meta nfproto",
            Field::L4Proto => "meta l4proto",
            Field::CtState => "ct state",
            Field::CtStatus => "ct status",
            Field::CtDirection => "ct direction",
            Field::CtMark => "ct mark",
            Field::CtSaddr(ip, direction) => {
                return write!(f, "ct {} {} saddr", direction_name(direction as u32), ip_name(ip));
            }
            Field::CtDaddr(ip, direction) => {
                return write!(f, "ct {} {} daddr", direction_name(direction as u32), ip_name(ip));
            }
            Field::CtProtocol => "ct original protocol",
            Field::CtSport => "ct original proto-src",
            Field::CtDport => "ct original proto-dst",
            Field::EtherSaddr => "ether saddr",
            Field::EtherDaddr => "ether daddr",
            Field::Saddr(ip) => return write!(f, "{} saddr", ip_name(ip)),
            Field::Daddr(ip) => return write!(f, "{} daddr", ip_name(ip)),
            Field::HopLimit => "ip6 hoplimit",
            Field::Sport => return write!(f, "{transport} sport"),
            Field::Dport => return write!(f, "{transport} dport"),
            Field::TcpFlags => "tcp flags",
            Field::IcmpType => return write!(f, "{transport} type"),
            Field::DaddrType => "fib daddr type",
            Field::DaddrTypeAtIif => "fib daddr . iif type",
            Field::SaddrOifAtIif => "fib saddr . iif oif",
        })
    }

    /// The number with which the field is compared.
    fn print_number(self, f: &mut Formatter<'_>, number: u32) -> Result {
        let name = match self {
            Field::Mark | Field::CtMark => return write!(f, "{number:#010x}"),
            Field::CtState => return flags(f, number, &STATES),
            Field::CtStatus => return flags(f, number, &STATUSES),
            Field::TcpFlags => return flags(f, number, &[(TCP_FLAG_SYN, "syn")]),
            Field::CtDirection => direction_name(number),
            Field::NfProto if number == u32::from(NFPROTO_IPV4) => "ipv4",
            Field::NfProto => "ipv6",
            Field::L4Proto | Field::CtProtocol => protocol_name(number as u8),
            Field::Protocol if number == ETH_P_IP => "ip",
            Field::Protocol if number == ETH_P_IPV6 => "ip6",
            Field::IcmpType if matches!(number as u8, ICMP_ECHO_REQUEST | ICMPV6_ECHO_REQUEST) => "echo-request",
            Field::IcmpType if number as u8 == ICMPV6_ECHO_REPLY => "echo-reply",
            Field::DaddrType | Field::DaddrTypeAtIif => route_type(number),
            _ => return write!(f, "{number}"),
        };
        f.write_str(name)
    }
}

fn compare(f: &mut Formatter<'_>, left: Operand, operator: Operator, right: Constant, transport: &str) -> Result {
    let Operand { field, bits } = left;
    let is_flags = matches!(field, Field::CtState | Field::CtStatus | Field::TcpFlags);
    match (bits, operator, right) {
        (Bits::And(mask), Operator::Unequal, Constant::Number(0)) if is_flags => {
            field.print(f, transport)?;
            f.write_str(" ")?;
            return field.print_number(f, mask);
        }
        (Bits::And(mask), Operator::Equal, Constant::Number(0)) if is_flags => {
            field.print(f, transport)?;
            f.write_str(" ! ")?;
            return field.print_number(f, mask);
        }
        (Bits::And(mask), Operator::Equal, Constant::Number(number)) if is_flags => {
            field.print(f, transport)?;
            f.write_str(" ")?;
            field.print_number(f, number)?;
            f.write_str(" / ")?;
            return field.print_number(f, mask);
        }
        // The mask covers the upper bits of a mark.
        (Bits::And(mask), _, Constant::Number(number)) if mask.leading_ones() + mask.trailing_zeros() == 32 => {
            field.print(f, transport)?;
            f.write_str(if operator == Operator::Unequal { " != " } else { " " })?;
            field.print_number(f, number)?;
            return write!(f, "/{}", mask.leading_ones());
        }
        _ => left.print(f, transport)?,
    }
    f.write_str(match operator {
        Operator::Equal if bits == Bits::All => " ",
        Operator::Equal => " == ",
        Operator::Unequal => " != ",
        Operator::AtLeast => " >= ",
    })?;
    match right {
        Constant::Number(number) => field.print_number(f, number),
        Constant::Network(network) if network.prefix() == if network.is_ipv4() { 32 } else { 128 } => {
            write!(f, "{}", network.ip())
        }
        Constant::Network(network) => write!(f, "{}/{}", network.network(), network.prefix()),
        Constant::Mac(mac) => Shown(mac).fmt(f),
        Constant::Name(name) => write!(f, "\"{name}\""),
    }
}

/// The names of bits, as a list. Bits without a name are printed as a number.
fn flags(f: &mut Formatter<'_>, bits: u32, names: &[(u32, &str)]) -> Result {
    let mut unnamed = bits;
    let mut separator = "";
    for (bit, name) in names.iter().filter(|(bit, _)| bits & bit != 0) {
        write!(f, "{separator}{name}")?;
        separator = ",";
        unnamed &= !bit;
    }
    if unnamed != 0 { write!(f, "{separator}{unnamed:#x}") } else { Ok(()) }
}

fn ip_name(ip: Family) -> &'static str {
    match ip {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

fn direction_name(direction: u32) -> &'static str {
    if direction == Direction::Original as u32 { "original" } else { "reply" }
}

/// The name of an IP protocol and of its header.
pub(in super::super) fn protocol_name(number: u8) -> &'static str {
    match number {
        protocol::ICMP => "icmp",
        protocol::TCP => "tcp",
        protocol::UDP => "udp",
        protocol::SCTP => "sctp",
        protocol::ICMPV6 => "icmpv6",
        _ => "th",
    }
}

fn route_type(number: u32) -> &'static str {
    match number {
        RTN_LOCAL => "local",
        RTN_BROADCAST => "broadcast",
        RTN_ANYCAST => "anycast",
        RTN_MULTICAST => "multicast",
        _ => "unicast",
    }
}
