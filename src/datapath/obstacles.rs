//! Rules and settings that must see every packet of a connection. Where there is one, no packet may go the fast way.

use crate::datapath::names::{TABLE, TRACES};
use anyhow::{Context, Result};
use egret_nft::netlink::Socket;
use egret_nft::{ANY_OBJECT, Expression, fold_expressions};
use std::fs;

/// Expressions that count or limit packets, send copies or pass packets on to a program.
const EXPRESSIONS: [&str; 6] = ["limit", "quota", "connlimit", "queue", "dup", "synproxy"];
/// Extensions of iptables that do. `statistic` is used by kube-proxy for the first packet of a connection, in its table
/// `nat`.
const EXTENSIONS: [&str; 14] = [
    "limit",
    "hashlimit",
    "quota",
    "quota2",
    "connlimit",
    "connbytes",
    "statistic",
    "recent",
    "rateest",
    "string",
    "NFQUEUE",
    "TEE",
    "RATEEST",
    "IDLETIMER",
];
/// `NFT_OBJECT_QUOTA`, `_LIMIT`, `_CONNLIMIT`, include/uapi/linux/netfilter/nf_tables.h; and what a map names.
const OBJECTS: [u32; 4] = [2, 4, 5, ANY_OBJECT];

/// The first of the host's settings for which all packets must be seen, in words. The kernel notifies nobody of a change.
pub fn setting() -> Option<String> {
    let legacy =
        || legacy().map(|table| format!("iptables-legacy has a table {table}, whose rules cannot be looked at"));
    accounting().or_else(legacy)
}

/// The first of the host's rules that must see every packet, in words.
///
/// # Errors
/// The rules cannot be read.
pub fn rule(socket: &mut Socket) -> Result<Option<String>> {
    let found = fold_expressions(
        socket,
        || None,
        |found, expression| {
            if found.is_none() && sees_every_packet(expression) {
                *found = Some(words(expression));
            }
        },
    );
    found.context("nf_tables")
}

fn sees_every_packet(expression: Expression) -> bool {
    if TRACES.contains(&expression.table) {
        return true;
    }
    // Egret's own tables: the packets of an egress IP with a bandwidth take no fast path, and a move closes it.
    if expression.table == TABLE {
        return false;
    }
    // Chains of the type nat see only the first packet of a connection, and so does iptables' table of that name.
    let of_nat = expression.table == "nat" && matches!(expression.name, "match" | "target");
    EXPRESSIONS.contains(&expression.name)
        || OBJECTS.contains(&expression.object)
        || !of_nat && EXTENSIONS.contains(&expression.extension)
}

fn words(expression: Expression) -> String {
    let Expression { table, chain, name, extension, .. } = expression;
    if TRACES.contains(&table) {
        return "a trace runs".to_owned();
    }
    let what = if extension.is_empty() { name } else { extension };
    format!("a rule in chain {chain} of table {table} must see every packet ({what})")
}

/// Connection tracking counts each connection's packets: for Egret's own record of connections, or for others.
fn accounting() -> Option<String> {
    let name = "nf_conntrack_acct";
    let value = fs::read_to_string(format!("/proc/sys/net/netfilter/{name}")).ok()?;
    (value.trim() != "0").then(|| format!("connection tracking counts packets (net.netfilter.{name})"))
}

/// A table of iptables-legacy with rules for packets of established connections. It tells nobody of changes.
fn legacy() -> Option<String> {
    let families = ["ip_tables_names", "ip6_tables_names"];
    let names = families.iter().filter_map(|file| fs::read_to_string(format!("/proc/thread-self/net/{file}")).ok());
    let all: String = names.collect();
    all.lines().find(|table| *table != "nat").map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_that_limit_or_queue_are_found_and_those_for_first_packets_are_not() {
        let of = |table, name, extension, object| {
            sees_every_packet(Expression { table, chain: "c", name, extension, object })
        };
        assert!(
            of("filter", "limit", "", 0)
                && of("filter", "objref", "", 2)
                && of("filter", "objref", "", ANY_OBJECT)
                && of("filter", "queue", "", 0)
        );
        assert!(of("filter", "match", "hashlimit", 0) && of("mangle", "target", "NFQUEUE", 0));
        assert!(of("egret-trace", "meta", "", 0) && !of("egret", "objref", "", ANY_OBJECT));
        assert!(!of("nat", "match", "statistic", 0) && !of("filter", "match", "conntrack", 0));
        assert!(!of("filter", "objref", "", 1) && !of("filter", "counter", "", 0));
        let limit = Expression { table: "filter", chain: "FORWARD", name: "match", extension: "limit", object: 0 };
        assert_eq!(words(limit), "a rule in chain FORWARD of table filter must see every packet (limit)");
    }
}
