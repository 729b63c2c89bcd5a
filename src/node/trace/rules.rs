//! The texts of rules, by the kernel's handles.

use crate::node::host::Chains;
use crate::node::trace::TraceContext;
use egret_nft::Nftables;
use egret_nft::netlink::Error;
use egret_nft::uapi::*;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Finds the text of a rule that a packet has met.
pub struct Rules {
    nftables: Nftables,
    chains: Vec<Chains>,
    /// The hash of each rule by its handle, of the chains that packets have met.
    hashes: HashMap<(TableIndex, Arc<str>), BTreeMap<u64, u64>>,
}

/// The index of a table in [`Rules::chains`].
type TableIndex = usize;

impl Rules {
    /// Opens a socket for reading.
    ///
    /// # Errors
    /// The socket cannot be opened.
    pub fn new(known: TraceContext) -> Result<Self, Error> {
        Ok(Rules { nftables: Nftables::open()?, chains: known.chains, hashes: HashMap::new() })
    }

    /// The rule in the syntax of nft. Another program's rule, and one of a chain that was changed meanwhile, is named by
    /// its handle.
    pub fn text(&mut self, family: u8, table: &str, chain: &str, handle: u64) -> String {
        self.own(family, table, chain, handle).unwrap_or_else(|| format!("handle {handle}"))
    }

    fn own(&mut self, family: u8, table: &str, chain: &str, handle: u64) -> Option<String> {
        let at = self.chains.iter().position(|(name, _)| name.family == family && name.name == table)?;
        let (table, chains) = &self.chains[at];
        let (name, rules) = chains.get_key_value(chain)?;
        let key = (at, name.clone());
        let mut hash = self.hashes.get(&key).and_then(|hashes| hashes.get(&handle)).copied();
        if hash.is_none() {
            let hashes = self.nftables.rule_hashes(*table, chain).unwrap_or_default();
            hash = hashes.get(&handle).copied();
            self.hashes.insert(key, hashes);
        }
        rules.rules().find(|(_, of)| Some(*of) == hash).map(|(rule, _)| rule.to_string())
    }
}

/// The family as nft names it.
pub fn family(number: u8) -> &'static str {
    match number {
        NFPROTO_INET => "inet",
        NFPROTO_IPV4 => "ip",
        NFPROTO_IPV6 => "ip6",
        NFPROTO_NETDEV => "netdev",
        NFPROTO_BRIDGE => "bridge",
        NFPROTO_ARP => "arp",
        _ => "unknown",
    }
}
