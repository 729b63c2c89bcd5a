//! Tables in nft's own syntax, as `nft -s list table` prints them. Chains are in the order in which a packet meets
//! them.

use super::elements::Bytes;
use super::rule::Continuation;
use super::rule::protocol_name;
use super::table::{Chain, Data, DataType, Elements, Hook, Key, Policy, Set, SetKind, Table, TableName, hook};
use super::uapi::*;
use crate::mac::Shown;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{Display, Formatter, Result};
use std::net::IpAddr;

/// How many characters of elements one line holds.
const LINE: usize = 110;
/// nft's names of priorities, with the hook if a name is for one hook only. nft prints a priority that is at most ten
/// away from a named one by that name.
const PRIORITIES: [(&str, i32, Option<u32>); 6] = [
    ("raw", -300, None),
    ("mangle", -150, None),
    ("dstnat", -100, Some(hook::PREROUTING)),
    ("filter", 0, None),
    ("security", 50, None),
    ("srcnat", 100, Some(hook::POSTROUTING)),
];

/// The same for tables of the family bridge.
const BRIDGE_PRIORITIES: [(&str, i32, Option<u32>); 4] = [
    ("dstnat", -300, Some(hook::PREROUTING)),
    ("filter", -200, None),
    ("out", 100, Some(hook::OUTPUT)),
    ("srcnat", 300, Some(hook::POSTROUTING)),
];

/// A table with what is needed to print it.
pub struct Listing<'a> {
    /// Family and name.
    pub name: TableName,
    /// The content.
    pub table: &'a Table,
    /// The names of interfaces, by index.
    pub interfaces: &'a BTreeMap<u32, String>,
}

impl Display for Listing<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        writeln!(f, "table {} {} {{", family(self.name.family), self.name.name)?;
        let mut blank = "";
        for counter in &self.table.counters {
            writeln!(f, "{blank}\tcounter {counter} {{\n\t}}")?;
            blank = "\n";
        }
        for (name, limit) in &self.table.limits {
            writeln!(f, "{blank}\tlimit {name} {{\n\t\t{limit}\n\t}}")?;
            blank = "\n";
        }
        for (name, set) in &self.table.sets {
            write!(f, "{blank}")?;
            self.set(f, name, set)?;
            blank = "\n";
        }
        for name in self.order() {
            write!(f, "{blank}")?;
            self.chain(f, name, &self.table.chains[name])?;
            blank = "\n";
        }
        writeln!(f, "}}")
    }
}

impl<'a> Listing<'a> {
    /// Base chains by hook and priority, each followed by the chains to which it leads. Chains to which no rule leads
    /// come last.
    fn order(&self) -> Vec<&'a str> {
        // A packet meets ingress chains before prerouting, although their hook number is higher.
        let place = |hook: &Hook| ((hook.number + 1) % (hook::INGRESS + 1), hook.priority);
        let chains = &self.table.chains;
        let mut bases: Vec<(_, &str)> =
            chains.iter().filter_map(|(name, chain)| Some((chain.hook().map(place)?, &**name))).collect();
        bases.sort();
        let (mut order, mut seen) = (Vec::new(), BTreeSet::new());
        for name in bases.into_iter().map(|(_, name)| name).chain(chains.keys().map(|name| &**name)) {
            self.visit(name, &mut order, &mut seen);
        }
        order
    }

    fn visit(&self, name: &str, order: &mut Vec<&'a str>, seen: &mut BTreeSet<&'a str>) {
        let Some((name, chain)) = self.table.chains.get_key_value(name) else { return };
        if !seen.insert(name) {
            return;
        }
        order.push(name);
        for (rule, _) in chain.rules() {
            match rule.continuation() {
                Some(Continuation::Chain(next)) => self.visit(next, order, seen),
                Some(Continuation::Map(map)) => {
                    for (_, data) in self.table.sets.get(map).iter().flat_map(|map| map.elements.iter()) {
                        if let Data::Jump(next) = data {
                            self.visit(&next, order, seen);
                        }
                    }
                }
                None => {}
            }
        }
    }

    fn set(&self, f: &mut Formatter<'_>, name: &str, set: &Set) -> Result {
        let SetKind { key, data, .. } = set.kind;
        writeln!(f, "\t{} {name} {{", if data.is_some() { "map" } else { "set" })?;
        let data_name = data.map(|data| format!(" : {}", type_name(data))).unwrap_or_default();
        writeln!(f, "\t\ttype {}{data_name}", type_name(key))?;
        match (set.kind.is_constant(), set.kind.is_of_ranges()) {
            (true, true) => writeln!(f, "\t\tflags constant,interval")?,
            (true, false) => writeln!(f, "\t\tflags constant")?,
            (false, true) => writeln!(f, "\t\tflags interval")?,
            (false, false) => {}
        }
        if set.kind.is_counted() {
            writeln!(f, "\t\tcounter")?;
        }
        let elements = self.elements(set.kind, &set.elements);
        if !elements.is_empty() {
            write!(f, "\t\telements = {{ ")?;
            let mut width = 0;
            for (at, element) in elements.iter().enumerate() {
                if width + element.len() > LINE {
                    write!(f, ",\n\t\t\t     ")?;
                    width = 0;
                } else if at > 0 {
                    write!(f, ", ")?;
                }
                write!(f, "{element}")?;
                width += element.len() + 2;
            }
            writeln!(f, " }}")?;
        }
        writeln!(f, "\t}}")
    }

    fn elements(&self, kind: SetKind, elements: &Elements) -> Vec<String> {
        if kind.is_of_fields() {
            let last = |data: Data| match data {
                Data::Value(last) => last,
                _ => Bytes::default(),
            };
            return elements.iter().map(|(first, data)| self.fields(kind.key, first.bytes, last(data))).collect();
        }
        if kind.is_of_ranges() {
            let mut all: Vec<String> = Vec::new();
            let mut elements = elements.iter().map(|(key, _)| key).peekable();
            while let Some(first) = elements.next() {
                let end = elements.next_if(|next| next.end);
                all.push(range_text(address(first.bytes.as_slice()), last_before(&first, end)));
            }
            return all;
        }
        let counter = if kind.is_counted() { " counter" } else { "" };
        let of = |(key, data): (Key, Data)| {
            let value = match (data, kind.data) {
                (Data::Jump(chain), _) => format!(" : jump {chain}"),
                (Data::Object(name), _) => format!(" : \"{name}\""),
                (Data::Value(value), Some(type_)) => format!(" : {}", self.fields(type_, value, value)),
                _ => String::new(),
            };
            format!("{}{counter}{value}", self.fields(kind.key, key.bytes, key.bytes))
        };
        elements.iter().map(of).collect()
    }

    /// All fields of a value, joined. If `last` differs from `first`, each field is a range.
    fn fields(&self, type_: DataType, first: Bytes, last: Bytes) -> String {
        let (mut first, mut last) = (first.as_slice(), last.as_slice());
        let mut texts = Vec::new();
        for (field, len) in parts(type_) {
            // Each field fills whole registers of four bytes. The last field may end before its register does.
            let take = |from: &mut &[u8]| -> Vec<u8> {
                let (field, rest) = from.split_at(len.next_multiple_of(4).min(from.len()));
                *from = rest;
                field[..(*len).min(field.len())].to_vec()
            };
            let (from, to) = (take(&mut first), take(&mut last));
            texts.push(self.field(*field, &from, &to));
        }
        texts.join(" . ")
    }

    fn field(&self, field: Part, from: &[u8], to: &[u8]) -> String {
        let number = |bytes: &[u8]| bytes.try_into().map_or(0, u32::from_ne_bytes);
        match field {
            Part::Address => range_text(address(from), address(to)),
            Part::Ether => from.try_into().map_or_else(|_| String::new(), |mac| Shown(mac).to_string()),
            Part::Mark => format!("{:#010x}", number(from)),
            Part::Interface => match self.interfaces.get(&number(from)) {
                Some(name) => format!("\"{name}\""),
                None => number(from).to_string(),
            },
            Part::Protocol => protocol_name(from[0]).to_owned(),
            Part::Port => {
                let [from, to] = [from, to].map(|bytes| bytes.try_into().map_or(0, u16::from_be_bytes));
                if from == to { from.to_string() } else { format!("{from}-{to}") }
            }
        }
    }

    fn chain(&self, f: &mut Formatter<'_>, name: &str, chain: &Chain) -> Result {
        writeln!(f, "\tchain {name} {{")?;
        if let Some(Hook { kind, number, priority, policy, device }) = chain.hook() {
            let hook = hook_name(self.name.family, *number);
            let device = device.as_ref().map(|device| format!(" device \"{device}\"")).unwrap_or_default();
            let priority = priority_name(self.name.family, *number, *priority);
            let policy = match policy {
                Policy::Accept => "accept",
                Policy::Drop => "drop",
            };
            writeln!(f, "\t\ttype {kind} hook {hook}{device} priority {priority}; policy {policy};")?;
        }
        chain.rules().try_for_each(|(rule, _)| writeln!(f, "\t\t{rule}"))?;
        writeln!(f, "\t}}")
    }
}

/// The last address of a range, from the first address after it. A range without an end reaches to the last address
/// of all.
fn last_before(first: &Key, end: Option<Key>) -> IpAddr {
    match (address(first.bytes.as_slice()), end.map(|end| address(end.bytes.as_slice()))) {
        (_, Some(IpAddr::V4(end))) => IpAddr::V4((u32::from(end) - 1).into()),
        (_, Some(IpAddr::V6(end))) => IpAddr::V6((u128::from(end) - 1).into()),
        (IpAddr::V4(_), None) => IpAddr::V4(u32::MAX.into()),
        (IpAddr::V6(_), None) => IpAddr::V6(u128::MAX.into()),
    }
}

/// An address, or a network, or a range that is not a network.
fn range_text(first: IpAddr, last: IpAddr) -> String {
    let (from, to, bits) = match (first, last) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (u128::from(u32::from(a)), u128::from(u32::from(b)), 32),
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.into(), b.into(), 128),
        _ => return String::new(),
    };
    let host_bits = (from ^ to).count_ones();
    let is_network = from ^ to == u128::MAX.checked_shr(128 - host_bits).unwrap_or(0) && from & (from ^ to) == 0;
    match (is_network, bits - host_bits) {
        (true, prefix) if prefix == bits => first.to_string(),
        (true, prefix) => format!("{first}/{prefix}"),
        (false, _) => format!("{first}-{last}"),
    }
}

fn address(bytes: &[u8]) -> IpAddr {
    match <[u8; 4]>::try_from(bytes) {
        Ok(v4) => v4.into(),
        Err(_) => <[u8; 16]>::try_from(bytes).unwrap_or_default().into(),
    }
}

/// One field of a key or value.
#[derive(Clone, Copy)]
enum Part {
    Address,
    Ether,
    Mark,
    Interface,
    Protocol,
    Port,
}

/// The fields of a type, with their lengths in bytes.
fn parts(type_: DataType) -> &'static [(Part, usize)] {
    match type_ {
        DataType::Ipv4 => &[(Part::Address, 4)],
        DataType::Ipv6 => &[(Part::Address, 16)],
        DataType::Ether => &[(Part::Ether, 6)],
        DataType::Mark => &[(Part::Mark, 4)],
        DataType::Interface => &[(Part::Interface, 4)],
        DataType::Verdict | DataType::Limit => &[],
        DataType::MarkIpv4 => &[(Part::Mark, 4), (Part::Address, 4)],
        DataType::MarkIpv6 => &[(Part::Mark, 4), (Part::Address, 16)],
        DataType::Ports => &[(Part::Port, 2), (Part::Port, 2)],
        DataType::Ipv4Protocol => &[(Part::Address, 4), (Part::Protocol, 1)],
        DataType::Ipv6Protocol => &[(Part::Address, 16), (Part::Protocol, 1)],
        DataType::Ipv4ProtocolPort => &[(Part::Address, 4), (Part::Protocol, 1), (Part::Port, 2)],
        DataType::Ipv6ProtocolPort => &[(Part::Address, 16), (Part::Protocol, 1), (Part::Port, 2)],
    }
}

/// nft's name of a type.
fn type_name(type_: DataType) -> String {
    match type_ {
        DataType::Verdict => return "verdict".to_owned(),
        DataType::Limit => return "limit".to_owned(),
        _ => {}
    }
    let name = |(part, len): &(Part, usize)| match part {
        Part::Address if *len == 4 => "ipv4_addr",
        Part::Address => "ipv6_addr",
        Part::Ether => "ether_addr",
        Part::Mark => "mark",
        Part::Interface => "iface_index",
        Part::Protocol => "inet_proto",
        Part::Port => "inet_service",
    };
    parts(type_).iter().map(name).collect::<Vec<_>>().join(" . ")
}

fn family(number: u8) -> &'static str {
    match number {
        NFPROTO_INET => "inet",
        NFPROTO_IPV4 => "ip",
        NFPROTO_IPV6 => "ip6",
        NFPROTO_BRIDGE => "bridge",
        _ => "netdev",
    }
}

fn hook_name(family: u8, number: u32) -> &'static str {
    match (family, number) {
        (NFPROTO_NETDEV, hook::NETDEV_EGRESS) => "egress",
        (NFPROTO_NETDEV, _) | (_, hook::INGRESS) => "ingress",
        (_, hook::PREROUTING) => "prerouting",
        (_, hook::OUTPUT) => "output",
        _ => "postrouting",
    }
}

fn priority_name(family: u8, hook: u32, priority: i32) -> String {
    let names: &[(&str, i32, Option<u32>)] = if family == NFPROTO_BRIDGE { &BRIDGE_PRIORITIES } else { &PRIORITIES };
    let names = names.iter().filter(|(_, _, of)| of.is_none_or(|of| of == hook));
    let near = names.map(|(name, number, _)| (name, priority - number)).find(|(_, distance)| distance.abs() <= 10);
    match near {
        None => priority.to_string(),
        Some((name, 0)) => (*name).to_owned(),
        Some((name, distance)) if distance < 0 => format!("{name} - {}", -distance),
        Some((name, distance)) => format!("{name} + {distance}"),
    }
}
