//! Reads tables from the kernel.

use super::table::{
    Bytes, Data, Elements, Hook, Key, Limit, ObservedChain, ObservedSet, ObservedTable, Policy, TableName,
};
use super::uapi::*;
use crate::netlink::{Attributes, Error, Socket, attributes, string};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The value of a counter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

pub(super) fn kind(message: u16) -> u16 {
    NFNL_SUBSYS_NFTABLES << 8 | message
}

/// `nfgenmsg`: family, version 0, resource id.
pub(super) fn header(family: u8) -> [u8; 4] {
    [family, 0, 0, 0]
}

fn request(table: TableName, fill: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut payload = header(table.family).to_vec();
    fill(&mut payload);
    payload
}

/// Reads a table with everything in it.
pub(super) fn table(socket: &mut Socket, table: TableName) -> Result<ObservedTable, Error> {
    let mut observed = without_content(socket, table)?;
    if !observed.exists {
        return Ok(observed);
    }
    let mut chains = chains(socket, table)?;
    for (name, chain) in &mut chains {
        if let ObservedChain::Read { hashes, .. } = chain {
            *hashes = rules(socket, table, name)?;
        }
    }
    let mut sets = BTreeMap::new();
    for (name, mut set) in sets_of(socket, table)? {
        set.elements = Arc::new(elements(socket, table, &name, |_, _| {})?);
        sets.insert(name.into(), set);
    }
    observed.limits = limits(socket, table)?;
    observed.counters = counters(socket, table)?.into_keys().map(Cow::Owned).collect();
    (observed.chains, observed.sets) = (chains, sets);
    Ok(observed)
}

/// Reads whether the table exists, its flags, and its owner.
pub(super) fn without_content(socket: &mut Socket, table: TableName) -> Result<ObservedTable, Error> {
    let payload = request(table, |p| p.text(NFTA_TABLE_NAME, table.name));
    let message = match socket.get(kind(NFT_MSG_GETTABLE), &payload) {
        Ok(message) => message,
        Err(e) if e.errno() == Some(nix::libc::ENOENT) => return Ok(ObservedTable::default()),
        Err(e) => return Err(e),
    };
    let mut observed = ObservedTable { exists: true, ..ObservedTable::default() };
    for (attribute, value) in attributes(message.get(4..).unwrap_or_default()) {
        match attribute {
            NFTA_TABLE_FLAGS => observed.flags = be32(value),
            NFTA_TABLE_OWNER => observed.owner = Some(be32(value)),
            _ => {}
        }
    }
    Ok(observed)
}

fn chains(socket: &mut Socket, table: TableName) -> Result<BTreeMap<Arc<str>, ObservedChain>, Error> {
    let payload = request(table, |p| p.text(NFTA_CHAIN_TABLE, table.name));
    socket.dump(kind(NFT_MSG_GETCHAIN), &payload, BTreeMap::new, |all, message| {
        let (mut of, mut name, mut hook, mut policy, mut type_) =
            (String::new(), String::new(), None, 1, String::new());
        for (attribute, value) in attributes(message.get(4..).unwrap_or_default()) {
            match attribute {
                NFTA_CHAIN_TABLE => of = string(value),
                NFTA_CHAIN_NAME => name = string(value),
                NFTA_CHAIN_HOOK => hook = Some(value),
                NFTA_CHAIN_POLICY => policy = be32(value),
                NFTA_CHAIN_TYPE => type_ = string(value),
                _ => {}
            }
        }
        if of != table.name {
            return;
        }
        let hook = hook.map(|h| {
            let policy = if policy as i32 == NF_DROP { Policy::Drop } else { Policy::Accept };
            let mut hook = Hook { kind: type_, number: 0, priority: 0, policy, device: None };
            for (attribute, value) in attributes(h) {
                match attribute {
                    NFTA_HOOK_HOOKNUM => hook.number = be32(value),
                    NFTA_HOOK_PRIORITY => hook.priority = be32(value) as i32,
                    NFTA_HOOK_DEV => hook.device = Some(string(value)),
                    _ => {}
                }
            }
            hook
        });
        all.insert(name.into(), ObservedChain::Read { hook, hashes: Vec::new() });
    })
}

/// The hashes of a chain's rules, in order.
fn rules(socket: &mut Socket, table: TableName, chain: &str) -> Result<Vec<u64>, Error> {
    Ok(handles_and_hashes(socket, table, chain)?.into_iter().map(|(_, hash)| hash).collect())
}

/// The hash of each rule of a chain by the rule's handle; 0 for a rule that this crate did not write.
pub(super) fn handles(socket: &mut Socket, table: TableName, chain: &str) -> Result<BTreeMap<u64, u64>, Error> {
    Ok(handles_and_hashes(socket, table, chain)?.into_iter().collect())
}

/// The handle and the hash of each rule of a chain, in order. The dump is for one chain only: each datagram of a dump
/// starts again at the first rule and skips those that were sent before (`__nf_tables_dump_rules`,
/// net/netfilter/nf_tables_api.c), so the time grows with the square of the number of rules.
fn handles_and_hashes(socket: &mut Socket, table: TableName, chain: &str) -> Result<Vec<(u64, u64)>, Error> {
    let payload = request(table, |p| {
        p.text(NFTA_RULE_TABLE, table.name);
        p.text(NFTA_RULE_CHAIN, chain);
    });
    socket.dump(kind(NFT_MSG_GETRULE), &payload, Vec::new, |all, message| {
        let (mut of, mut within, mut handle, mut hash) = (false, false, 0, 0);
        for (attribute, value) in attributes(message.get(4..).unwrap_or_default()) {
            match attribute {
                NFTA_RULE_TABLE => of = string(value) == table.name,
                NFTA_RULE_CHAIN => within = string(value) == chain,
                NFTA_RULE_HANDLE => handle = be64(value),
                NFTA_RULE_USERDATA => hash = super::transaction::hash_in_comment(value),
                _ => {}
            }
        }
        if of && within {
            all.push((handle, hash));
        }
    })
}

fn sets_of(socket: &mut Socket, table: TableName) -> Result<Vec<(String, ObservedSet)>, Error> {
    let payload = request(table, |p| p.text(NFTA_SET_TABLE, table.name));
    socket.dump(kind(NFT_MSG_GETSET), &payload, Vec::new, |all, message| {
        let mut set = ObservedSet { flags: 0, key_len: 0, data_len: 0, elements: Arc::default() };
        let (mut of, mut name) = (String::new(), String::new());
        for (attribute, value) in attributes(message.get(4..).unwrap_or_default()) {
            match attribute {
                NFTA_SET_TABLE => of = string(value),
                NFTA_SET_NAME => name = string(value),
                NFTA_SET_FLAGS => set.flags |= be32(value),
                NFTA_SET_KEY_LEN => set.key_len = be32(value),
                // The data of a verdict map has the length of a kernel structure.
                NFTA_SET_DATA_LEN if set.data_len == 0 => set.data_len = be32(value),
                NFTA_SET_EXPR => set.flags |= NFT_SET_EXPR,
                _ => {}
            }
        }
        let verdicts = attributes(message.get(4..).unwrap_or_default())
            .any(|(a, v)| a == NFTA_SET_DATA_TYPE && be32(v) == NFT_DATA_VERDICT);
        if verdicts {
            set.data_len = 0;
        }
        if of == table.name {
            all.push((name, set));
        }
    })
}

/// The elements of a set. `counted` is called with each key and the value of its counter.
pub(super) fn elements(
    socket: &mut Socket,
    table: TableName,
    set: &str,
    mut counted: impl FnMut(&Key, Count),
) -> Result<Elements, Error> {
    let payload = request(table, |p| {
        p.text(NFTA_SET_ELEM_LIST_TABLE, table.name);
        p.text(NFTA_SET_ELEM_LIST_SET, set);
    });
    let all = socket.dump(kind(NFT_MSG_GETSETELEM), &payload, Vec::new, |all, message| {
        for (attribute, list) in attributes(message.get(4..).unwrap_or_default()) {
            if attribute != NFTA_SET_ELEM_LIST_ELEMENTS {
                continue;
            }
            for (_, element) in attributes(list) {
                let (mut key, mut data, mut end, mut count) = (None, Data::None, false, None);
                for (attribute, value) in attributes(element) {
                    match attribute {
                        NFTA_SET_ELEM_KEY => key = data_value(value),
                        NFTA_SET_ELEM_KEY_END => data = data_value(value).map_or(Data::None, Data::Value),
                        NFTA_SET_ELEM_DATA => data = element_data(value),
                        NFTA_SET_ELEM_OBJREF => data = Data::Object(string(value).into()),
                        NFTA_SET_ELEM_FLAGS => end = be32(value) & NFT_SET_ELEM_INTERVAL_END != 0,
                        NFTA_SET_ELEM_EXPR => {
                            count = attributes(value).find(|(a, _)| *a == NFTA_EXPR_DATA).map(|(_, d)| counter(d));
                        }
                        _ => {}
                    }
                }
                if let Some(bytes) = key {
                    let key = Key { bytes, end };
                    if let Some(count) = count {
                        counted(&key, count);
                    }
                    all.push((key, data));
                }
            }
        }
    })?;
    Ok(all.into_iter().collect())
}

/// The named counters of a table.
pub(super) fn counters(socket: &mut Socket, table: TableName) -> Result<BTreeMap<String, Count>, Error> {
    let all = objects(socket, table, NFT_OBJECT_COUNTER)?;
    Ok(all.into_iter().map(|(name, content)| (name, counter(&content))).collect())
}

/// The named limits of a table.
fn limits(socket: &mut Socket, table: TableName) -> Result<BTreeMap<Arc<str>, Limit>, Error> {
    let all = objects(socket, table, NFT_OBJECT_LIMIT)?;
    Ok(all.into_iter().map(|(name, content)| (name.into(), Limit::decode(&content))).collect())
}

/// The objects of a table that are of this type: name and `NFTA_OBJ_DATA`.
fn objects(socket: &mut Socket, table: TableName, wanted: u32) -> Result<Vec<(String, Vec<u8>)>, Error> {
    let payload = request(table, |p| {
        p.text(NFTA_OBJ_TABLE, table.name);
        p.be32(NFTA_OBJ_TYPE, wanted);
    });
    let all = socket.dump(kind(NFT_MSG_GETOBJ), &payload, Vec::new, |all, message| {
        let (mut of, mut name, mut type_, mut content) = (String::new(), String::new(), 0, &[][..]);
        for (attribute, value) in attributes(message.get(4..).unwrap_or_default()) {
            match attribute {
                NFTA_OBJ_TABLE => of = string(value),
                NFTA_OBJ_NAME => name = string(value),
                NFTA_OBJ_TYPE => type_ = be32(value),
                NFTA_OBJ_DATA => content = value,
                _ => {}
            }
        }
        if of == table.name && type_ == wanted {
            all.push((name, content.to_vec()));
        }
    });
    match all {
        Err(e) if e.errno() == Some(nix::libc::ENOENT) => Ok(Vec::new()),
        other => other,
    }
}

fn counter(data: &[u8]) -> Count {
    let mut count = Count::default();
    for (attribute, value) in attributes(data) {
        match attribute {
            NFTA_COUNTER_BYTES => count.bytes = be64(value),
            NFTA_COUNTER_PACKETS => count.packets = be64(value),
            _ => {}
        }
    }
    count
}

fn data_value(data: &[u8]) -> Option<Bytes> {
    attributes(data).find(|(a, _)| *a == NFTA_DATA_VALUE).map(|(_, v)| Bytes::from(v))
}

fn element_data(data: &[u8]) -> Data {
    for (attribute, value) in attributes(data) {
        match attribute {
            NFTA_DATA_VALUE => return Data::Value(Bytes::from(value)),
            NFTA_DATA_VERDICT => {
                let chain = attributes(value).find(|(a, _)| *a == NFTA_VERDICT_CHAIN).map(|(_, v)| string(v));
                return Data::Jump(chain.unwrap_or_default().into());
            }
            _ => {}
        }
    }
    Data::None
}

fn be32(value: &[u8]) -> u32 {
    value.try_into().map(u32::from_be_bytes).unwrap_or_default()
}

pub(super) fn be64(value: &[u8]) -> u64 {
    value.try_into().map(u64::from_be_bytes).unwrap_or_default()
}
