//! The difference between an observed table and a desired one, as messages of one nf_tables transaction.
//!
//! The order keeps every reference valid: sets and chains are created first, then elements and rules are removed,
//! then rules and elements are added, and unwanted chains and sets are removed last.

use super::read::{header, kind};
use super::table::{
    ChainDifference, Data, DataType, Elements, Hook, Key, Lifetime, ObservedChain, ObservedSet, ObservedTable, Policy,
    Set, SetKind, Table, TableName,
};
use super::uapi::*;
use crate::netlink::{self, Attributes, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, Socket};

/// Elements per message. `NFTA_SET_ELEM_LIST_ELEMENTS` is one attribute of at most 64 KiB, and an element takes less
/// than 100 bytes.
const ELEMENTS_A_MESSAGE: usize = 500;
/// The type of a comment in a rule's user data, nft's `UDATA_TYPE_COMMENT`.
const UDATA_COMMENT: u8 = 0;
/// The types in a set's user data, libnftnl's `NFTNL_UDATA_SET_KEYBYTEORDER` and `_DATABYTEORDER`.
const UDATA_KEY_BYTE_ORDER: u8 = 0;
const UDATA_DATA_BYTE_ORDER: u8 = 1;
const COMMENT_PREFIX: &str = "egret ";

/// Who owns a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ownership {
    /// No socket.
    None,
    /// This socket; the table stays when the socket closes.
    Lasting,
    /// This socket; the table ends with it.
    WithSocket,
}

impl Ownership {
    /// The ownership of a desired table. `own` says whether this socket should own tables that stay.
    pub(super) fn of(wanted: &Table, own: bool) -> Self {
        match (wanted.lifetime, own) {
            (Lifetime::OfSocket, _) => Ownership::WithSocket,
            (Lifetime::Lasting, true) => Ownership::Lasting,
            (Lifetime::Lasting, false) => Ownership::None,
        }
    }

    /// The table's flags. A table that lost its owner and is not adopted keeps the persist flag.
    pub(super) fn flags(self, observed: &ObservedTable) -> u32 {
        match self {
            Ownership::None => observed.flags & NFT_TABLE_F_PERSIST,
            Ownership::Lasting => NFT_TABLE_F_OWNER | NFT_TABLE_F_PERSIST,
            Ownership::WithSocket => NFT_TABLE_F_OWNER,
        }
    }

    /// The owner's port, if the socket with this port owns the table.
    pub(super) fn owner(self, port: u32) -> Option<u32> {
        (self != Ownership::None).then_some(port)
    }

    /// Whether the kernel can give this ownership to the existing table: it sets `NFT_TABLE_F_PERSIST` on new tables
    /// only, and never clears it (`nf_tables_updtable`).
    pub(super) fn can_be_given(self, observed: &ObservedTable) -> bool {
        match self {
            Ownership::None => true,
            Ownership::Lasting => observed.flags & NFT_TABLE_F_PERSIST != 0,
            Ownership::WithSocket => observed.owner.is_some() && observed.flags & NFT_TABLE_F_PERSIST == 0,
        }
    }
}

/// The messages of a transaction under construction.
pub(super) struct Transaction<'a> {
    bytes: Vec<u8>,
    /// How many changes the transaction makes.
    pub(super) changes: usize,
    socket: &'a mut Socket,
    next_set_id: u32,
    first: u32,
    /// Where the last message starts, and its sequence number.
    last: (usize, u32),
}

/// A complete transaction.
pub(super) struct Batch {
    /// The messages.
    pub(super) bytes: Vec<u8>,
    /// The sequence number of the beginning.
    pub(super) first: u32,
    /// The sequence number of the last change, which the kernel acknowledges.
    pub(super) last: u32,
}

impl<'a> Transaction<'a> {
    pub(super) fn new(socket: &'a mut Socket) -> Self {
        let mut t = Transaction { bytes: Vec::new(), changes: 0, socket, next_set_id: 1, first: 0, last: (0, 0) };
        t.first = t.batch(NFNL_MSG_BATCH_BEGIN);
        t
    }

    /// Ends the batch, and requests an acknowledgement of its last change.
    pub(super) fn finish(mut self) -> Batch {
        self.batch(NFNL_MSG_BATCH_END);
        self.acknowledged()
    }

    fn acknowledged(mut self) -> Batch {
        let (at, last) = self.last;
        netlink::set_flag(&mut self.bytes[at..], NLM_F_ACK);
        Batch { bytes: self.bytes, first: self.first, last }
    }

    fn batch(&mut self, message: u16) -> u32 {
        let sequence = self.socket.next_sequence();
        netlink::append_message(&mut self.bytes, message, NLM_F_REQUEST, sequence, |p| {
            // nfgenmsg: family unspecified, version 0, resource id in network byte order.
            p.extend_from_slice(&[0, 0]);
            p.extend_from_slice(&NFNL_SUBSYS_NFTABLES.to_be_bytes());
        });
        sequence
    }

    fn push(&mut self, table: TableName, message: u16, flags: u16, fill: impl FnOnce(&mut Vec<u8>)) {
        let sequence = self.socket.next_sequence();
        self.last = (self.bytes.len(), sequence);
        netlink::append_message(&mut self.bytes, kind(message), NLM_F_REQUEST | flags, sequence, |p| {
            p.extend_from_slice(&header(table.family));
            fill(p);
        });
        self.changes += 1;
    }

    /// Appends the changes that turn `observed` into `wanted`.
    pub(super) fn table(&mut self, name: TableName, observed: &ObservedTable, wanted: &Table, ownership: Ownership) {
        let empty = ObservedTable::default();
        let mut observed = observed;
        let mut chains: Vec<_> = observed.differences(wanted).collect();
        if observed.exists && (!ownership.can_be_given(observed) || rebuilt(observed, wanted, &chains)) {
            self.push(name, NFT_MSG_DELTABLE, 0, |p| p.text(NFTA_TABLE_NAME, name.name));
            observed = &empty;
            chains = observed.differences(wanted).collect();
        }
        if !observed.exists {
            self.new_table(name, ownership.flags(observed));
        }
        self.new_objects(name, observed, wanted);
        for (set, s) in wanted.sets.iter().filter(|(n, _)| !observed.sets.contains_key(*n)) {
            self.new_set(name, set, s);
            // Before the rules that use it.
            if s.kind.is_constant() {
                self.elements(name, set, NFT_MSG_NEWSETELEM, s.elements.iter().collect(), s.kind);
            }
        }
        for chain in chains.iter().filter(|chain| chain.observed.is_none()) {
            self.new_chain(name, chain.name, chain.wanted.and_then(|wanted| wanted.hook()));
        }
        let none = Elements::default();
        for (set, s) in &wanted.sets {
            let Some(h) = observed.sets.get(set) else { continue };
            if s.kind.is_constant() || std::sync::Arc::ptr_eq(&h.elements, &s.elements) {
                continue;
            }
            self.elements(name, set, NFT_MSG_DELSETELEM, missing(&h.elements, &s.elements, s.kind), s.kind);
        }
        // Constant sets are removed whole, after the rules that use them. Elements of other sets may lead to chains
        // that are removed.
        let unwanted = observed.sets.iter().filter(|(n, _)| !wanted.sets.contains_key(*n));
        for (set, h) in unwanted.filter(|(_, h)| h.flags & NFT_SET_CONSTANT == 0) {
            self.elements(name, set, NFT_MSG_DELSETELEM, h.elements.iter().collect(), KEYS);
        }
        self.rules(name, &chains);
        for (set, s) in &wanted.sets {
            let observed = observed.sets.get(set).map_or(&none, |h| &*h.elements);
            if s.kind.is_constant() || std::ptr::eq(observed, &*s.elements) {
                continue;
            }
            self.elements(name, set, NFT_MSG_NEWSETELEM, missing(&s.elements, observed, s.kind), s.kind);
        }
        for chain in chains.iter().filter(|chain| chain.wanted.is_none()) {
            self.push(name, NFT_MSG_DELCHAIN, 0, |p| {
                p.text(NFTA_CHAIN_TABLE, name.name);
                p.text(NFTA_CHAIN_NAME, chain.name);
            });
        }
        self.delete_sets_and_objects(name, observed, wanted);
    }

    fn new_objects(&mut self, name: TableName, observed: &ObservedTable, wanted: &Table) {
        for counter in wanted.counters.iter().filter(|c| !observed.counters.contains(**c)) {
            self.push(name, NFT_MSG_NEWOBJ, NLM_F_CREATE, |p| {
                p.text(NFTA_OBJ_TABLE, name.name);
                p.text(NFTA_OBJ_NAME, counter);
                p.be32(NFTA_OBJ_TYPE, NFT_OBJECT_COUNTER);
                p.nested(NFTA_OBJ_DATA, |_| {});
            });
        }
        for (limit, content) in wanted.limits.iter().filter(|(n, _)| !observed.limits.contains_key(*n)) {
            self.push(name, NFT_MSG_NEWOBJ, NLM_F_CREATE, |p| {
                p.text(NFTA_OBJ_TABLE, name.name);
                p.text(NFTA_OBJ_NAME, limit);
                p.be32(NFTA_OBJ_TYPE, NFT_OBJECT_LIMIT);
                p.nested(NFTA_OBJ_DATA, |d| content.encode(d));
            });
        }
    }

    /// Empties the chains of `chains` that have rules, and adds the wanted rules.
    fn rules(&mut self, name: TableName, chains: &[ChainDifference<'_>]) {
        for chain in chains.iter().filter(|chain| chain.observed.is_some_and(ObservedChain::has_rules)) {
            self.push(name, NFT_MSG_DELRULE, 0, |p| {
                p.text(NFTA_RULE_TABLE, name.name);
                p.text(NFTA_RULE_CHAIN, chain.name);
            });
        }
        for chain in chains {
            for (rule, hash) in chain.wanted.iter().flat_map(|wanted| wanted.rules()) {
                self.push(name, NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, |p| {
                    p.text(NFTA_RULE_TABLE, name.name);
                    p.text(NFTA_RULE_CHAIN, chain.name);
                    p.nested(NFTA_RULE_EXPRESSIONS, |e| rule.encode(e));
                    p.attribute(NFTA_RULE_USERDATA, &comment(hash));
                });
            }
        }
    }

    fn delete_sets_and_objects(&mut self, name: TableName, observed: &ObservedTable, wanted: &Table) {
        for (set, _) in observed.sets.iter().filter(|(n, _)| !wanted.sets.contains_key(*n)) {
            self.push(name, NFT_MSG_DELSET, 0, |p| {
                p.text(NFTA_SET_TABLE, name.name);
                p.text(NFTA_SET_NAME, set);
            });
        }
        let counters = observed.counters.iter().filter(|c| !wanted.counters.contains(&***c));
        let limits = observed.limits.keys().filter(|l| !wanted.limits.contains_key(*l));
        let counters = counters.map(|counter| (&**counter, NFT_OBJECT_COUNTER));
        for (object, kind) in counters.chain(limits.map(|limit| (&**limit, NFT_OBJECT_LIMIT))) {
            self.push(name, NFT_MSG_DELOBJ, 0, |p| {
                p.text(NFTA_OBJ_TABLE, name.name);
                p.text(NFTA_OBJ_NAME, object);
                p.be32(NFTA_OBJ_TYPE, kind);
            });
        }
    }

    /// Creates a table, or changes the flags of an existing one.
    pub(super) fn new_table(&mut self, name: TableName, flags: u32) {
        self.push(name, NFT_MSG_NEWTABLE, NLM_F_CREATE, |p| {
            p.text(NFTA_TABLE_NAME, name.name);
            p.be32(NFTA_TABLE_FLAGS, flags);
        });
    }

    /// A batch that asks whether the kernel accepts a table. The batch has no end message, so the kernel checks it,
    /// answers and changes nothing (`nfnetlink_rcv_batch`), as for `nft --check`.
    pub(super) fn trial(mut self, name: TableName, table: &Table, ownership: Ownership) -> Batch {
        self.table(name, &ObservedTable::default(), table, ownership);
        self.acknowledged()
    }

    /// Appends the removal of a table.
    pub(super) fn remove(&mut self, name: TableName) {
        self.push(name, NFT_MSG_DELTABLE, 0, |p| p.text(NFTA_TABLE_NAME, name.name));
    }

    fn new_set(&mut self, table: TableName, name: &str, set: &Set) {
        let id = self.next_set_id;
        self.next_set_id += 1;
        self.push(table, NFT_MSG_NEWSET, NLM_F_CREATE, |p| {
            p.text(NFTA_SET_TABLE, table.name);
            p.text(NFTA_SET_NAME, name);
            p.be32(NFTA_SET_FLAGS, set.kind.flags());
            p.be32(NFTA_SET_KEY_TYPE, set.kind.key.number());
            p.be32(NFTA_SET_KEY_LEN, set.kind.key.len());
            match set.kind.data {
                None => {}
                Some(DataType::Limit) => p.be32(NFTA_SET_OBJ_TYPE, DataType::Limit.number()),
                Some(data) => {
                    p.be32(NFTA_SET_DATA_TYPE, data.number());
                    p.be32(NFTA_SET_DATA_LEN, data.len());
                }
            }
            p.be32(NFTA_SET_ID, id);
            if set.kind.is_of_fields() {
                p.nested(NFTA_SET_DESC, |d| {
                    d.nested(NFTA_SET_DESC_CONCAT, |fields| {
                        for len in set.kind.key.fields() {
                            fields.nested(NFTA_LIST_ELEM, |f| f.be32(NFTA_SET_FIELD_LEN, *len));
                        }
                    });
                });
            }
            p.attribute(NFTA_SET_USERDATA, &byte_orders(set));
            if set.kind.is_counted() {
                p.nested(NFTA_SET_EXPR, |e| {
                    e.text(NFTA_EXPR_NAME, "counter");
                    e.nested(NFTA_EXPR_DATA, |_| {});
                });
            }
        });
    }

    fn new_chain(&mut self, table: TableName, name: &str, hook: Option<&Hook>) {
        self.push(table, NFT_MSG_NEWCHAIN, NLM_F_CREATE, |p| {
            p.text(NFTA_CHAIN_TABLE, table.name);
            p.text(NFTA_CHAIN_NAME, name);
            if let Some(hook) = hook {
                p.nested(NFTA_CHAIN_HOOK, |h| {
                    h.be32(NFTA_HOOK_HOOKNUM, hook.number);
                    h.be32(NFTA_HOOK_PRIORITY, hook.priority as u32);
                    if let Some(device) = &hook.device {
                        h.text(NFTA_HOOK_DEV, device);
                    }
                });
                let policy = match hook.policy {
                    Policy::Accept => NF_ACCEPT,
                    Policy::Drop => NF_DROP,
                };
                p.be32(NFTA_CHAIN_POLICY, policy as u32);
                p.text(NFTA_CHAIN_TYPE, &hook.kind);
            }
        });
    }

    fn elements(&mut self, table: TableName, set: &str, message: u16, elements: Vec<(Key, Data)>, kind: SetKind) {
        for chunk in elements.chunks(ELEMENTS_A_MESSAGE) {
            self.push(table, message, if message == NFT_MSG_NEWSETELEM { NLM_F_CREATE } else { 0 }, |p| {
                p.text(NFTA_SET_ELEM_LIST_TABLE, table.name);
                p.text(NFTA_SET_ELEM_LIST_SET, set);
                p.nested(NFTA_SET_ELEM_LIST_ELEMENTS, |list| {
                    for (key, value) in chunk {
                        list.nested(NFTA_LIST_ELEM, |e| {
                            e.nested(NFTA_SET_ELEM_KEY, |k| k.attribute(NFTA_DATA_VALUE, key.bytes.as_slice()));
                            if let (true, Data::Value(last)) = (kind.is_of_fields(), value) {
                                e.nested(NFTA_SET_ELEM_KEY_END, |k| k.attribute(NFTA_DATA_VALUE, last.as_slice()));
                            }
                            if key.end {
                                e.be32(NFTA_SET_ELEM_FLAGS, NFT_SET_ELEM_INTERVAL_END);
                            }
                            // A deletion contains the key only.
                            if message == NFT_MSG_NEWSETELEM && kind.data.is_some() {
                                element_data(e, value);
                            }
                        });
                    }
                });
            });
            self.changes += chunk.len() - 1;
        }
    }
}

/// A kind for messages that contain keys only.
const KEYS: SetKind = SetKind::plain(DataType::Mark, None);

/// The elements of `these` that are missing in `others`.
fn missing(these: &Elements, others: &Elements, kind: SetKind) -> Vec<(Key, Data)> {
    if kind.is_of_ranges() { these.ranges_missing_in(others).collect() } else { these.missing_in(others).collect() }
}

fn element_data(element: &mut Vec<u8>, value: &Data) {
    match value {
        Data::None => {}
        Data::Value(bytes) => element.nested(NFTA_SET_ELEM_DATA, |d| d.attribute(NFTA_DATA_VALUE, bytes.as_slice())),
        Data::Jump(chain) => element.nested(NFTA_SET_ELEM_DATA, |d| {
            d.nested(NFTA_DATA_VERDICT, |v| {
                v.be32(NFTA_VERDICT_CODE, NFT_JUMP as u32);
                v.text(NFTA_VERDICT_CHAIN, chain);
            });
        }),
        Data::Object(name) => element.text(NFTA_SET_ELEM_OBJREF, name),
    }
}

/// A set's user data: the byte order of keys and values. Only `nft list` needs it.
fn byte_orders(set: &Set) -> Vec<u8> {
    let mut out = Vec::new();
    let parts = [(UDATA_KEY_BYTE_ORDER, Some(set.kind.key)), (UDATA_DATA_BYTE_ORDER, set.kind.data)];
    for (part, type_) in parts {
        // nft cannot list a verdict map with a byte order for its values.
        if let Some(type_) = type_.filter(|t| ![DataType::Verdict, DataType::Limit].contains(t)) {
            out.extend_from_slice(&[part, 4]);
            out.extend_from_slice(&type_.byte_order().to_ne_bytes());
        }
    }
    out
}

/// Whether the table must be created anew in the same transaction, because a set's type, a chain's hook, a limit or the
/// content of a constant set differs. The kernel cannot change these.
fn rebuilt(observed: &ObservedTable, wanted: &Table, chains: &[ChainDifference<'_>]) -> bool {
    let other = |s: &Set, h: &ObservedSet| {
        let same = || std::sync::Arc::ptr_eq(&h.elements, &s.elements) || h.elements == s.elements;
        !s.kind.is(h) || s.kind.is_constant() && !same()
    };
    wanted.sets.iter().any(|(n, s)| observed.sets.get(n).is_some_and(|h| other(s, h)))
        || wanted.limits.iter().any(|(n, l)| observed.limits.get(n).is_some_and(|o| o != l))
        || chains
            .iter()
            .any(|c| c.observed.zip(c.wanted).is_some_and(|(observed, wanted)| observed.hook() != wanted.hook()))
}

/// A rule's user data: type, length, text with its NUL byte. `nft list` shows it as the rule's comment.
fn comment(hash: u64) -> Vec<u8> {
    let text = format!("{COMMENT_PREFIX}{hash:016x}\0");
    let mut out = vec![UDATA_COMMENT, text.len() as u8];
    out.extend_from_slice(text.as_bytes());
    out
}

/// The hash in a rule's comment, 0 if there is none.
pub(super) fn hash_in_comment(userdata: &[u8]) -> u64 {
    let Some((&[UDATA_COMMENT, len], text)) = userdata.split_first_chunk::<2>() else { return 0 };
    let text = netlink::string(text.get(..usize::from(len)).unwrap_or_default());
    text.strip_prefix(COMMENT_PREFIX).and_then(|h| u64::from_str_radix(h, 16).ok()).unwrap_or_default()
}
