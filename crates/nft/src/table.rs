//! A table as desired ([`Table`]) and as observed in the kernel ([`ObservedTable`]).

pub use super::elements::{Bytes, Data, Elements, Key};
pub use super::limit::Limit;

use super::rule::Rule;
use super::uapi::*;
use std::borrow::Cow;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

/// The family and name of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TableName {
    /// `NFPROTO_INET`, `NFPROTO_NETDEV`, `NFPROTO_BRIDGE`, `NFPROTO_IPV4` or `NFPROTO_IPV6`.
    pub family: u8,
    /// The name.
    pub name: &'static str,
}

/// A desired table.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// Chains by name. They are shared, so that an unchanged chain is not written again.
    pub chains: BTreeMap<Arc<str>, Arc<Chain>>,
    /// Sets and maps by name. Their elements are shared, so that unchanged lists are not compared.
    pub sets: BTreeMap<SetName, Set>,
    /// Named counters.
    pub counters: BTreeSet<&'static str>,
    /// Named limits.
    pub limits: BTreeMap<Arc<str>, Limit>,
    /// How long it stays.
    pub lifetime: Lifetime,
}

/// How long a table stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lifetime {
    /// Until it is removed.
    #[default]
    Lasting,
    /// Until the socket that made it closes. That socket owns the table even where tables cannot persist without an
    /// owner (Linux 5.12).
    OfSocket,
}

/// A set's name. Most sets always exist and have a constant name.
pub type SetName = Cow<'static, str>;

/// A chain: its hook, if it has one, and its rules.
pub struct Chain {
    hook: Option<Hook>,
    /// Makes the rules. A node has one chain for each pod, and most are written once. What the rules are made from
    /// takes a tenth of the rules' memory.
    make: Box<dyn Fn() -> Vec<Rule> + Send + Sync>,
    hashes: Box<[u64]>,
}

impl Chain {
    /// A chain that packets enter by `hook`, or only from other chains if there is none.
    pub fn new(hook: Option<Hook>, rules: Vec<Rule>) -> Self {
        Chain::of(hook, move || rules.clone())
    }

    /// The same, with rules that `make` computes whenever they are written. It must return the same rules each time.
    pub fn of(hook: Option<Hook>, make: impl Fn() -> Vec<Rule> + Send + Sync + 'static) -> Self {
        let mut buffer = Vec::with_capacity(1024);
        let hashes = make().iter().map(|rule| rule.hash(&mut buffer)).collect();
        Chain { hook, make: Box::new(make), hashes }
    }

    /// Its hook.
    pub fn hook(&self) -> Option<&Hook> {
        self.hook.as_ref()
    }

    /// Its rules in order, each with its hash.
    pub fn rules(&self) -> impl Iterator<Item = (Rule, u64)> {
        (self.make)().into_iter().zip(self.hashes.iter().copied())
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chain").field("hook", &self.hook).field("rules", &(self.make)()).finish()
    }
}

/// Where a base chain is attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    /// `filter` or `nat`.
    pub kind: String,
    /// A number of [`hook`].
    pub number: u32,
    /// Chains with lower priorities come first.
    pub priority: i32,
    /// What happens to a packet that no rule decides on.
    pub policy: Policy,
    /// The interface, for ingress and egress hooks.
    pub device: Option<String>,
}

/// What a base chain does with packets that no rule decides on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// `NF_ACCEPT`
    Accept,
    /// `NF_DROP`
    Drop,
}

/// Hook numbers, include/uapi/linux/netfilter.h.
pub mod hook {
    /// `NF_INET_PRE_ROUTING`
    pub const PREROUTING: u32 = 0;
    /// `NF_INET_LOCAL_OUT`
    pub const OUTPUT: u32 = 3;
    /// `NF_INET_POST_ROUTING`
    pub const POSTROUTING: u32 = 4;
    /// `NF_INET_INGRESS`, Linux 5.10
    pub const INGRESS: u32 = 5;
    /// `NF_NETDEV_INGRESS`
    pub const NETDEV_INGRESS: u32 = 0;
    /// `NF_NETDEV_EGRESS`, Linux 5.16
    pub const NETDEV_EGRESS: u32 = 1;
}

/// A set, or a map if it has data.
#[derive(Clone, Debug)]
pub struct Set {
    /// Its type.
    pub kind: SetKind,
    /// Its elements.
    pub elements: Arc<Elements>,
}

/// The type of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetKind {
    /// Type of the keys.
    pub key: DataType,
    /// Type of the values, for a map.
    pub data: Option<DataType>,
    /// What a key stands for.
    pub keys: Keys,
    /// What is counted.
    pub counters: Counters,
    /// Whether elements come and go.
    pub contents: Contents,
}

/// What a set's key stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keys {
    /// For one value.
    Single,
    /// For a range of values.
    Ranges,
}

/// What a set counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counters {
    /// The set has no counters.
    None,
    /// Packets and bytes, for each element.
    OfElements,
}

/// Whether a set's elements come and go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contents {
    /// Elements are added and removed.
    Changing,
    /// The set is written once, and its elements never change. The kernel lets nobody add or remove an element of a
    /// constant set that a rule uses (`nf_tables_delsetelem`, `nf_tables_newsetelem`).
    Constant,
}

/// The types of keys and values. The numbers are those of `nft(8)` (its include/datatype.h: `enum datatypes`), which
/// needs them for printing. The kernel only looks at the lengths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataType {
    /// An IPv4 address.
    Ipv4,
    /// An IPv6 address.
    Ipv6,
    /// A MAC address.
    Ether,
    /// A mark.
    Mark,
    /// An interface's index.
    Interface,
    /// A verdict.
    Verdict,
    /// A named limit, as a value only.
    Limit,
    /// A mark and an IPv4 address.
    MarkIpv4,
    /// A mark and an IPv6 address.
    MarkIpv6,
    /// Two ports.
    Ports,
    /// An IPv4 address and a protocol.
    Ipv4Protocol,
    /// An IPv6 address and a protocol.
    Ipv6Protocol,
    /// An IPv4 address, a protocol and a port.
    Ipv4ProtocolPort,
    /// An IPv6 address, a protocol and a port.
    Ipv6ProtocolPort,
}

impl DataType {
    /// `NFTA_SET_KEY_TYPE`. In a concatenation each type takes six bits (nft's `TYPE_BITS`).
    pub fn number(self) -> u32 {
        match self {
            DataType::Ipv4 => 7,
            DataType::Ipv6 => 8,
            DataType::Ether => 9,
            DataType::Mark => 19,
            DataType::Interface => 20,
            DataType::Verdict => NFT_DATA_VERDICT,
            DataType::Limit => NFT_OBJECT_LIMIT,
            DataType::MarkIpv4 => 19 << 6 | 7,
            DataType::MarkIpv6 => 19 << 6 | 8,
            DataType::Ports => 13 << 6 | 13,
            DataType::Ipv4Protocol => 7 << 6 | 12,
            DataType::Ipv6Protocol => 8 << 6 | 12,
            DataType::Ipv4ProtocolPort => (7 << 6 | 12) << 6 | 13,
            DataType::Ipv6ProtocolPort => (8 << 6 | 12) << 6 | 13,
        }
    }

    /// nft's `enum byteorder`: 1 for the host's, 2 for the network's.
    pub fn byte_order(self) -> u32 {
        match self {
            DataType::Mark | DataType::Interface => 1,
            _ => 2,
        }
    }

    /// The length in bytes.
    #[allow(clippy::len_without_is_empty, reason = "a type is not a container")]
    pub fn len(self) -> u32 {
        match self {
            DataType::Ipv4 | DataType::Mark | DataType::Interface => 4,
            DataType::Ether => 6,
            DataType::MarkIpv4 | DataType::Ports | DataType::Ipv4Protocol => 8,
            DataType::Ipv4ProtocolPort => 12,
            DataType::Ipv6 => 16,
            DataType::MarkIpv6 | DataType::Ipv6Protocol => 20,
            DataType::Ipv6ProtocolPort => 24,
            DataType::Verdict | DataType::Limit => 0,
        }
    }

    /// The lengths in bytes of the fields, for a type whose ranges are ranges of each field.
    pub fn fields(self) -> &'static [u32] {
        match self {
            DataType::Ipv4Protocol => &[4, 1],
            DataType::Ipv6Protocol => &[16, 1],
            DataType::Ipv4ProtocolPort => &[4, 1, 2],
            DataType::Ipv6ProtocolPort => &[16, 1, 2],
            _ => &[],
        }
    }
}

/// An observed table. Of its rules it holds only the hashes.
#[derive(Clone, Debug, Default)]
pub struct ObservedTable {
    /// Whether the table exists.
    pub exists: bool,
    /// `NFTA_TABLE_FLAGS`
    pub flags: u32,
    /// The netlink port of the socket that owns it.
    pub owner: Option<u32>,
    /// Chains by name.
    pub chains: BTreeMap<Arc<str>, ObservedChain>,
    /// Sets by name.
    pub sets: BTreeMap<SetName, ObservedSet>,
    /// Named counters.
    pub counters: BTreeSet<Cow<'static, str>>,
    /// Named limits.
    pub limits: BTreeMap<Arc<str>, Limit>,
}

/// A chain that is not in the kernel as desired.
#[derive(Clone, Copy, Debug)]
pub struct ChainDifference<'a> {
    /// Its name.
    pub name: &'a str,
    /// The observed chain, or `None` if it does not exist.
    pub observed: Option<&'a ObservedChain>,
    /// The desired chain, or `None` if it should not exist.
    pub wanted: Option<&'a Arc<Chain>>,
}

impl ObservedTable {
    /// Whether both tables have the same chains and sets.
    pub fn is_same_as(&self, other: &ObservedTable) -> bool {
        let same_chain = |(a, b): (&ObservedChain, &ObservedChain)| a.hook() == b.hook() && a.hashes() == b.hashes();
        let same_set =
            |(a, b): (&ObservedSet, &ObservedSet)| Arc::ptr_eq(&a.elements, &b.elements) || a.elements == b.elements;
        self.chains.keys().eq(other.chains.keys())
            && self.chains.values().zip(other.chains.values()).all(same_chain)
            && self.sets.keys().eq(other.sets.keys())
            && self.sets.values().zip(other.sets.values()).all(same_set)
    }

    /// The chains that are not as in `wanted`, by name.
    pub fn differences<'a>(&'a self, wanted: &'a Table) -> impl Iterator<Item = ChainDifference<'a>> {
        // Both maps are sorted. A node has some hundred chains, and usually all but one or two are unchanged.
        let (mut observed, mut wanted) = (self.chains.iter().peekable(), wanted.chains.iter().peekable());
        let all = std::iter::from_fn(move || {
            let order = match (observed.peek(), wanted.peek()) {
                (Some((observed, _)), Some((wanted, _))) => observed.cmp(wanted),
                (Some(_), None) => Ordering::Less,
                (None, _) => Ordering::Greater,
            };
            let observed = if order.is_le() { observed.next() } else { None };
            let wanted = if order.is_ge() { wanted.next() } else { None };
            let name = observed.map(|(name, _)| name).or(wanted.map(|(name, _)| name))?;
            Some(ChainDifference {
                name,
                observed: observed.map(|(_, chain)| chain),
                wanted: wanted.map(|(_, chain)| chain),
            })
        });
        all.filter(|chain| chain.observed.zip(chain.wanted).is_none_or(|(observed, wanted)| !observed.is(wanted)))
    }
}

/// An observed chain.
#[derive(Clone, Debug)]
pub enum ObservedChain {
    /// A chain that was read from the kernel.
    Read {
        /// Its hook.
        hook: Option<Hook>,
        /// The hashes of its rules, in order; 0 for a rule that this crate did not write.
        hashes: Vec<u64>,
    },
    /// A chain that this crate wrote.
    Written(Arc<Chain>),
}

impl ObservedChain {
    /// Its hook.
    pub fn hook(&self) -> Option<&Hook> {
        match self {
            ObservedChain::Read { hook, .. } => hook.as_ref(),
            ObservedChain::Written(chain) => chain.hook(),
        }
    }

    /// Whether it has any rules.
    pub fn has_rules(&self) -> bool {
        !self.hashes().is_empty()
    }

    /// Whether the observed chain is the same as `chain`.
    pub fn is(&self, chain: &Arc<Chain>) -> bool {
        match self {
            ObservedChain::Written(observed) if Arc::ptr_eq(observed, chain) => true,
            _ => self.hook() == chain.hook() && self.has_rules_of(chain),
        }
    }

    /// Whether its rules are those of `chain`.
    pub fn has_rules_of(&self, chain: &Chain) -> bool {
        *self.hashes() == *chain.hashes
    }

    fn hashes(&self) -> &[u64] {
        match self {
            ObservedChain::Read { hashes, .. } => hashes,
            ObservedChain::Written(chain) => &chain.hashes,
        }
    }
}

/// An observed set.
#[derive(Clone, Debug)]
pub struct ObservedSet {
    /// `NFTA_SET_FLAGS`
    pub flags: u32,
    /// `NFTA_SET_KEY_LEN`
    pub key_len: u32,
    /// `NFTA_SET_DATA_LEN`
    pub data_len: u32,
    /// Its elements.
    pub elements: Arc<Elements>,
}

impl SetKind {
    /// A kind with single keys, without counters, whose elements may change.
    pub const fn plain(key: DataType, data: Option<DataType>) -> Self {
        SetKind { key, data, keys: Keys::Single, counters: Counters::None, contents: Contents::Changing }
    }

    /// The same, of ranges.
    #[must_use]
    pub const fn of_ranges(self) -> Self {
        SetKind { keys: Keys::Ranges, ..self }
    }

    /// The same, with counters.
    #[must_use]
    pub const fn counted(self) -> Self {
        SetKind { counters: Counters::OfElements, ..self }
    }

    /// The same, written once.
    #[must_use]
    pub const fn constant(self) -> Self {
        SetKind { contents: Contents::Constant, ..self }
    }

    /// Whether its keys are ranges.
    pub fn is_of_ranges(self) -> bool {
        self.keys == Keys::Ranges
    }

    /// Whether each element has a counter.
    pub fn is_counted(self) -> bool {
        self.counters == Counters::OfElements
    }

    /// Whether its elements never change.
    pub fn is_constant(self) -> bool {
        self.contents == Contents::Constant
    }

    /// `NFTA_SET_FLAGS`
    pub fn flags(self) -> u32 {
        let mut flags = 0;
        if self.is_of_ranges() {
            flags |= NFT_SET_INTERVAL;
        }
        if self.is_of_fields() {
            flags |= NFT_SET_CONCAT;
        }
        if self.is_constant() {
            flags |= NFT_SET_CONSTANT;
        }
        flags |= match self.data {
            None => 0,
            Some(DataType::Limit) => NFT_SET_OBJECT,
            Some(_) => NFT_SET_MAP,
        };
        flags
    }

    /// Whether keys are ranges of each of several fields. Then the data of a key is the last value of its range.
    pub fn is_of_fields(self) -> bool {
        self.is_of_ranges() && !self.key.fields().is_empty()
    }

    /// Whether an observed set is of this kind.
    pub fn is(self, observed: &ObservedSet) -> bool {
        // The kernel adds NFT_SET_EXPR by itself where elements have counters.
        observed.flags & !NFT_SET_EXPR == self.flags()
            && (observed.flags & NFT_SET_EXPR != 0) == self.is_counted()
            && observed.key_len == self.key.len()
            && observed.data_len == self.data.map_or(0, DataType::len)
    }
}

impl From<&Table> for ObservedTable {
    fn from(table: &Table) -> Self {
        ObservedTable {
            exists: true,
            flags: 0,
            owner: None,
            chains: table.chains.iter().map(|(n, c)| (n.clone(), ObservedChain::Written(c.clone()))).collect(),
            sets: table
                .sets
                .iter()
                .map(|(n, s)| {
                    let observed = ObservedSet {
                        flags: s.kind.flags() | if s.kind.is_counted() { NFT_SET_EXPR } else { 0 },
                        key_len: s.kind.key.len(),
                        data_len: s.kind.data.map_or(0, DataType::len),
                        elements: s.elements.clone(),
                    };
                    (n.clone(), observed)
                })
                .collect(),
            counters: table.counters.iter().map(|n| Cow::Borrowed(*n)).collect(),
            limits: table.limits.clone(),
        }
    }
}
